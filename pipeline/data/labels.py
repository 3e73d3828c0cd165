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

from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.layouts.layout import EXCLUDED, IGNORED, Colour, Layout, voc_colour
from segkd.pipeline.data.sample import IGNORE, Classes
from segkd.pipeline.run_file import to_toml_value
from segkd.storage.errors import ConfigError, DataError

Kind = Literal["values", "colours"]

LARGEST_VALUE = 65535
_MOST_TOLD = 32
"""Values without a meaning that a message lists."""


class UnmappedError(DataError):
    """A label map has values or colours that mean nothing: ``codes``, as the keys of :attr:`LabelMap.indices`."""

    codes: frozenset[int] = frozenset()


_SHIFTS = np.array([1 << 16, 1 << 8, 1], np.int32)
"""Of red, green and blue in a colour's code."""


@dataclass(frozen=True)
class LabelMap:
    """Raw values, or colours as ``red << 16 | green << 8 | blue``, -> class indices."""

    kind: Kind
    indices: Mapping[int, int]
    """Raw value or colour -> class index or 255."""
    excluded_codes: frozenset[int] = frozenset()
    """Those of pixels that show nothing of the scene; their index is 255."""
    given: bool = True
    """Whether single entries may be added to it; false where there are no entries, and value i is class i."""
    title: str = ""
    """The published data set whose values these are."""

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

    def excluded(self, raw: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """``(H, W)``: which pixels are of :attr:`excluded_codes`."""
        codes = raw if self.kind == "values" else raw.astype(np.int32) @ _SHIFTS
        return np.isin(codes, list(self.excluded_codes))

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
        code = colour_key(raw) if self.kind == "colours" else str(raw)
        what, key = ("colour", f'"{code}"') if self.kind == "colours" else ("value", code)
        table = f"[data.label_{what}s]"
        add = f'add `{key} = "CLASS"` (or "{IGNORED}") to {table}'
        expected = f", expected {_ranges(self.indices)}" if self.kind == "values" else ""
        if self.title:
            return (
                f"{place}: {what} {code} means nothing in {self.title}{expected}; "
                f"see that these are its official label maps, or {add}"
            )
        if self.given:
            return f"{place}: {what} {code} is mapped to no class; {add}"
        return (
            f"{place}: {what} {code} is no class{expected}; name all classes in data.classes, or map all values of "
            f"these files in {table}"
        )


def describe(config: DataConfig, layout: Layout | None = None) -> tuple[Classes, LabelMap]:
    """The classes of a data set of files and the meaning of its label maps. Raises ConfigError.

    ``layout``: that of a published data set. Its values keep their meaning but for those that ``config`` maps, unless
    ``config`` names classes of its own.
    """
    own = layout is not None and not config.classes
    customary, meaning = _own(layout, config.background) if layout is not None and own else ({}, {})
    names = tuple(customary) if own else config.classes
    indices = {name: index for index, name in enumerate(names)} | {IGNORED: IGNORE, EXCLUDED: IGNORE}
    kind: Kind = layout.kind if layout is not None and own else "values"
    if config.label_colours:
        given = _mapped("label_colours", ((key, [_colour(key)]) for key in config.label_colours), config, indices)
        meaning, kind = (meaning if kind == "colours" else {}) | given, "colours"
    elif layout is not None and not own and not config.label_values:
        _require_plain(layout)
    elif config.label_values:
        given = _mapped("label_values", _value_ranges(config), config, indices)
        meaning, kind = (meaning if kind == "values" else {}) | given, "values"
    label_map = LabelMap(
        kind,
        {code: indices[name] for code, name in meaning.items()}
        or {**{index: index for index in range(len(names))}, IGNORE: IGNORE},
        excluded_codes=frozenset(code for code, name in meaning.items() if name == EXCLUDED),
        given=bool(meaning),
        title=layout.title if layout is not None and own else "",
    )
    colours = label_map.indices if label_map.kind == "colours" else {}
    palette = config.palette or tuple(customary.values()) or _palette(len(names), colours)
    if len(palette) != len(names):
        raise ConfigError(f"data.palette has {len(palette)} colours for {len(names)} classes; give one a class")
    return Classes(names=names, palette=palette), label_map


def _require_plain(layout: Layout) -> None:
    """Raises ConfigError for a published data set whose values are not its classes' indices: nothing says what they are
    in terms of other classes.
    """
    indices = {name: index for index, name in enumerate(layout.classes)}
    for code, name in layout.meaning.items():
        if name != IGNORED and (layout.kind == "colours" or indices[name] != code):
            what, written = ("colour", _colour_key_of(code)) if layout.kind == "colours" else ("value", str(code))
            raise ConfigError(
                f"data.classes names classes of your own, and nothing says what the label maps of {layout.title} are "
                f"in terms of them: {what} {written} is {name!r} there; map every {what} in [data.label_{what}s], or "
                "leave data.classes out"
            )


def _own(layout: Layout, background: bool) -> tuple[dict[str, Colour], dict[int, str]]:
    """A published data set's classes with their colours, and the meaning of its values."""
    if not background:
        return dict(layout.classes), dict(layout.meaning)
    name = "background"
    return (
        {name: layout.background_colour, **layout.classes},
        {**layout.meaning, **dict.fromkeys(layout.background, name)},
    )


def _palette(classes: int, colours: Mapping[int, int]) -> tuple[Colour, ...]:
    """A distinct colour a class: the first of ``colours`` (colour -> class index), else Pascal VOC's, never black."""
    own: dict[int, Colour] = {}
    for code, index in colours.items():
        own.setdefault(index, (code >> 16, code >> 8 & 255, code & 255))
    return tuple(own.get(index) or voc_colour(index + 1) for index in range(classes))


def colour_key(colour: Iterable[int]) -> str:
    """An RGB colour as the keys of ``label_colours`` write it: ``#rrggbb``."""
    return "#" + bytes(int(channel) for channel in colour).hex()


def _colour_key_of(code: int) -> str:
    return colour_key((code >> 16, code >> 8 & 255, code & 255))


def _mapped(
    setting: Literal["label_values", "label_colours"],
    codes: Iterable[tuple[str, Iterable[int]]],
    config: DataConfig,
    indices: Mapping[str, int],
) -> dict[int, str]:
    """Code -> class name, for the codes that each key of the setting stands for."""
    mapped: dict[int, str] = {}
    for key, of_key in codes:
        name = getattr(config, setting)[key]
        if name not in indices:
            raise ConfigError(
                f"data.{setting}: {key} is mapped to {name!r}, which is no class; expected one of {', '.join(indices)}"
            )
        for code in of_key:
            if code in mapped:
                raise ConfigError(f"data.{setting}: {key} is mapped twice; give every value and colour once")
            mapped[code] = name
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
