"""What the values or colours of label maps mean: class names, their colours, and raw values -> class indices.

Shapes: raw H,W (values) or H,W,3 (colours); labels H,W uint8 class indices, 255 = ignore.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from segkd.pipeline.data.config import IGNORED, DataConfig
from segkd.pipeline.data.sample import IGNORE, Classes
from segkd.pipeline.settings import to_toml_value
from segkd.storage.errors import ConfigError, DataError

Colour = tuple[int, int, int]

LARGEST_VALUE = 65535
_MOST_TOLD = 32
"""Values without a meaning that a message lists."""


class UnmappedError(DataError):
    """A label map has values or colours that mean nothing: ``codes``, as the keys of :attr:`LabelMap.indices`."""

    codes: frozenset[int] = frozenset()


_SHIFTS = np.array([1 << 16, 1 << 8, 1], np.int32)
"""Of red, green and blue in a colour's code."""

# The vocabulary and colours of SegNet's edition of CamVid, whose void is 11.
_CAMVID: Mapping[str, Colour] = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
_CAMVID_VOID = 11


@dataclass(frozen=True)
class LabelMap:
    """Raw values, or colours as ``red << 16 | green << 8 | blue``, -> class indices."""

    kind: Literal["values", "colours"]
    indices: Mapping[int, int]
    """Raw value or colour -> class index or 255."""
    given: bool = True
    """Whether a run file states the map; false for a reader's own."""

    def __call__(self, raw: npt.NDArray[np.integer[Any]], file: Path) -> npt.NDArray[np.uint8]:
        """Class indices ``(H, W)`` of a raw label map. Raises UnmappedError with the first pixel that is not."""
        found_HW = self._by_value(raw) if self.kind == "values" else self._by_colour(raw)
        first = int(found_HW.argmin())
        if found_HW.flat[first] < 0:
            row, column = divmod(first, found_HW.shape[1])
            error = UnmappedError(self._unmapped(raw[row, column], f"{file}: row {row}, column {column}"))
            of_codes = raw if self.kind == "values" else raw.astype(np.int32) @ _SHIFTS
            error.codes = frozenset(map(int, np.unique(of_codes[found_HW < 0])))
            raise error
        return found_HW.astype(np.uint8)

    def told(self, codes: Iterable[int], names: Sequence[str]) -> str:
        """All ``codes`` that mean nothing, and what to paste into the run file for them to be ignored."""
        ordered = sorted(codes)
        keys = [_colour_key_of(code) if self.kind == "colours" else str(code) for code in ordered[:_MOST_TOLD]]
        if len(ordered) > _MOST_TOLD:
            return f"{', '.join(keys)} and {len(ordered) - _MOST_TOLD:,} more: are these label maps?"
        if self.kind == "colours" or self.given:
            quote, place = ('"', "label_colours") if self.kind == "colours" else ("", "label_values")
            entries = ", ".join(f'{quote}{key}{quote} = "{IGNORED}"' for key in keys)
            return f"{', '.join(keys)}; to add to [data.{place}], each on a line of its own, and correct: {entries}"
        meaning = dict(sorted({**self.indices, **dict.fromkeys(ordered, IGNORE)}.items()))
        table = ", ".join(
            f"{value} = {to_toml_value(IGNORED if index == IGNORE else names[index])}"
            for value, index in meaning.items()
        )
        return f"{', '.join(keys)}; to paste below [data] and correct: label_values = {{ {table} }}"

    def _by_value(self, raw_HW: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int16]:
        # The table's last entry stands for all that is beyond it, and index -1 leads there as well.
        return self._table[np.clip(raw_HW.astype(np.int32), -1, len(self._table) - 1)]

    def _by_colour(self, raw_HW3: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int16]:
        codes_HW = raw_HW3.astype(np.int32) @ _SHIFTS
        colours, indices = self._sorted
        place_HW = np.searchsorted(colours, codes_HW).clip(max=len(colours) - 1)
        return np.where(colours[place_HW] == codes_HW, indices[place_HW], np.int16(-1))

    @cached_property
    def _table(self) -> npt.NDArray[np.int16]:
        table = np.full(max(self.indices) + 2, -1, np.int16)
        table[list(self.indices)] = list(self.indices.values())
        return table

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]:
        ordered = sorted(self.indices.items())
        return np.array([key for key, _ in ordered], np.int32), np.array([index for _, index in ordered], np.int16)

    def _unmapped(self, raw: npt.NDArray[np.integer[Any]], place: str) -> str:
        if self.kind == "colours":
            return (
                f'{place}: colour {colour_key(raw)} is mapped to no class; add `"{colour_key(raw)}" = "CLASS"` '
                f'(or "{IGNORED}") to [data.label_colours]'
            )
        if self.given:
            return (
                f'{place}: value {raw} is mapped to no class; add `{raw} = "CLASS"` (or "{IGNORED}") '
                "to [data.label_values]"
            )
        return (
            f"{place}: value {raw} is no class, expected {_ranges(self.indices)}; "
            "map all values of these files in [data.label_values]"
        )


def describe(config: DataConfig) -> tuple[Classes, LabelMap]:
    """The classes of a data set of files and the meaning of its label maps. Raises ConfigError."""
    camvid = config.reader == "camvid" and not config.classes
    names = tuple(_CAMVID) if camvid else config.classes
    indices = {name: index for index, name in enumerate(names)} | {IGNORED: IGNORE}
    colours: dict[int, int] = {}
    if config.label_colours:
        colours = _mapped("label_colours", ((key, [_colour(key)]) for key in config.label_colours), config, indices)
        label_map = LabelMap("colours", colours)
    elif config.label_values:
        label_map = LabelMap("values", _mapped("label_values", _value_ranges(config), config, indices))
    else:
        default = {index: index for index in range(len(names))}
        label_map = LabelMap("values", default | {_CAMVID_VOID if camvid else IGNORE: IGNORE}, given=False)
    palette = config.palette or (tuple(_CAMVID.values()) if camvid else _palette(len(names), colours))
    if len(palette) != len(names):
        raise ConfigError(f"data.palette has {len(palette)} colours for {len(names)} classes; give one a class")
    return Classes(names=names, palette=palette), label_map


def _palette(classes: int, colours: Mapping[int, int]) -> tuple[Colour, ...]:
    """A distinct colour a class: the first of ``colours`` (colour -> class index), else Pascal VOC's, never black."""
    own: dict[int, Colour] = {}
    for code, index in colours.items():
        own.setdefault(index, (code >> 16, code >> 8 & 255, code & 255))
    return tuple(own.get(index) or _voc_colour(index + 1) for index in range(classes))


def colour_key(colour: Iterable[int]) -> str:
    """An RGB colour as the keys of ``label_colours`` write it: ``#rrggbb``."""
    return "#" + bytes(int(channel) for channel in colour).hex()


def _colour_key_of(code: int) -> str:
    return colour_key((code >> 16, code >> 8 & 255, code & 255))


def _voc_colour(index: int) -> Colour:
    """Pascal VOC's colour map: the bits of an index are dealt to red, green and blue in turn, high bits first."""
    red = green = blue = 0
    for bit in range(8):
        red |= (index >> 3 * bit & 1) << 7 - bit
        green |= (index >> 3 * bit + 1 & 1) << 7 - bit
        blue |= (index >> 3 * bit + 2 & 1) << 7 - bit
    return red, green, blue


def _mapped(
    setting: Literal["label_values", "label_colours"],
    codes: Iterable[tuple[str, Iterable[int]]],
    config: DataConfig,
    indices: Mapping[str, int],
) -> dict[int, int]:
    """Code -> class index, for the codes that each key of the setting stands for."""
    mapped: dict[int, int] = {}
    for key, of_key in codes:
        name = getattr(config, setting)[key]
        if name not in indices:
            raise ConfigError(
                f"data.{setting}: {key} is mapped to {name!r}, which is no class; expected one of {', '.join(indices)}"
            )
        for code in of_key:
            if code in mapped:
                raise ConfigError(f"data.{setting}: {key} is mapped twice; give every value and colour once")
            mapped[code] = indices[name]
    return mapped


def _value_ranges(config: DataConfig) -> Iterable[tuple[str, range]]:
    for key in config.label_values:
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", key)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= LARGEST_VALUE:
            raise ConfigError(
                f"data.label_values: {key!r} is no value; expected one of 0 to {LARGEST_VALUE} or a range such as 0-6"
            )
        yield key, range(first, last + 1)


def _colour(key: str) -> int:
    if re.fullmatch(r"#[0-9a-fA-F]{6}", key):
        return int(key[1:], 16)
    channels = [int(part) if part.strip().isdecimal() else -1 for part in key.split(",")]
    if len(channels) != 3 or not all(channel in range(256) for channel in channels):
        raise ConfigError(f'data.label_colours: {key!r} is no colour; expected "#rrggbb" or "red,green,blue"')
    red, green, blue = channels
    return red << 16 | green << 8 | blue


def _ranges(values: Iterable[int]) -> str:
    """``0-10, 255``"""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{low}-{high}" if low < high else str(low) for low, high in runs)
