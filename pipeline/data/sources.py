"""The teacher's side of crops: what the cache knows of their images, checked against the data and read by windows; or,
without a cache, what the teacher is to look at.

Shapes: S sources, each with a window of h,w teacher cells; codes channels,h,w.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from segkd.pipeline.data.batch import Look, Sources
from segkd.pipeline.data.mixing import Piece
from segkd.pipeline.data.sample import DataSource, Role, Sample
from segkd.pipeline.data.transforms import BoolArray, Crop, Window, window_of
from segkd.pipeline.models.network import Grid, Preprocessing
from segkd.pipeline.models.predictor import kept_cells
from segkd.storage.errors import CacheDamagedError, CacheMismatchError, ContaminationError, DataError
from segkd.storage.geometry import Affine
from segkd.storage.reader import CacheReader
from segkd.storage.table import Entry

OnDamage = Literal["fail", "skip"]
View = Literal["image", "crop"]


class TeacherSide(Protocol):
    """Where a stream has the teacher's side of its crops from."""

    def of(self, piece: Piece) -> tuple[Any, str | None]:
        """What it has of a piece of a crop, and what is wrong with that where it is damaged and left out."""
        ...

    def collate(self, crops: Sequence[Sequence[Any]]) -> Sources:
        """The sources of a batch, from those of each crop."""
        ...


@dataclass(frozen=True)
class CachedPiece:
    """What the cache holds of one piece of a crop."""

    window: Window
    codes: Mapping[str, npt.NDArray[np.generic]]
    rungs: Mapping[str, int]


class KnowledgeReader:
    """The ``targets`` of a cache for crops of ``source``'s images.

    Raises CacheMismatchError where the cache is of other classes or lacks a target.
    """

    def __init__(self, cache: CacheReader, source: DataSource, targets: tuple[str, ...], on_damage: OnDamage) -> None:
        self._cache, self._source, self._targets, self._on_damage = cache, source, targets, on_damage
        self._verified: set[str] = set()
        if cache.spec.classes != source.classes.names:
            raise CacheMismatchError(
                f"the cache is of the classes {', '.join(cache.spec.classes)}, "
                f"the data of {', '.join(source.classes.names)}; use a cache written for these data"
            )
        for name in targets:
            if name not in cache.spec.targets:
                raise CacheMismatchError(
                    f"the cache keeps no target {name!r}, only {', '.join(cache.spec.targets)}; "
                    "write it again with that target, or give its loss the weight 0"
                )

    def check(self, samples: Iterable[Sample]) -> None:
        """Raises where the cache cannot serve these samples, or must not: CacheMismatchError for one that it does not
        hold or holds in another role, ContaminationError for one of role select or report, CacheDamagedError for one
        whose row is lost unless that is skipped.
        """
        for sample in samples:
            try:
                role = self._cache.entry(sample.id).role
            except CacheDamagedError as error:
                if self._on_damage == "fail":
                    raise CacheDamagedError(
                        f"sample {sample.id}: {error}; or train without what the teacher knows of such samples: "
                        "--on-damage skip"
                    ) from error
                continue
            if role in (Role.SELECT, Role.REPORT):
                raise ContaminationError(
                    f"sample {sample.id} has role {sample.role} in the data but {role} in the cache, "
                    "and such samples must not be learned from; correct the lists of the data"
                )
            if role != sample.role:
                raise CacheMismatchError(
                    f"sample {sample.id} has role {sample.role} in the data but {role} in the cache; "
                    "correct the lists of the data, or run segkd teacher-cache again"
                )

    def of(self, piece: Piece) -> tuple[CachedPiece, str | None]:
        """What the cache holds of a piece, and what is wrong with it where that is damaged and left out.

        Raises CacheDamagedError for damage that is not skipped, CacheMismatchError where the image is not the one that
        the teacher saw.
        """
        try:
            return self._read(piece), None
        except CacheDamagedError as error:
            if self._on_damage == "fail":
                raise CacheDamagedError(
                    f"sample {piece.sample.id}: {error}; or go on without what the teacher knows of such samples: "
                    "--on-damage skip --resume"
                ) from error
            return self._nothing(), str(error)

    def _read(self, piece: Piece) -> CachedPiece:
        entry = self._cache.entry(piece.sample.id)
        self._check_image(piece.sample, entry, piece.crop)
        window = window_of(piece.crop, entry.mapping, owned(piece, self._source))
        return CachedPiece(
            window=window,
            codes={name: self._cache.window(entry, name, window.rows, window.columns) for name in self._targets},
            rungs={name: entry.rungs[name] for name in self._targets},
        )

    def _check_image(self, sample: Sample, entry: Entry, crop: Crop) -> None:
        """The image must be the one that the teacher saw; its digest is computed once a process."""
        remedy = "run segkd teacher-cache again"
        if crop.image_size != entry.image_size:
            raise CacheMismatchError(
                f"the image of {sample.id} is {by(crop.image_size)} pixels, "
                f"the teacher saw one of {by(entry.image_size)}; {remedy}"
            )
        if sample.id not in self._verified:
            if self._source.image_digest(sample) != entry.image_digest:
                raise CacheMismatchError(
                    f"the image of {sample.id} is not the one that the teacher saw: its digest differs; {remedy}"
                )
            self._verified.add(sample.id)

    def _nothing(self) -> CachedPiece:
        """One cell that does not count: a piece whose part of the cache is damaged is still a source."""
        uncounted = np.zeros((1, 1), np.bool_)
        specs = {name: self._cache.spec.targets[name] for name in self._targets}
        return CachedPiece(
            window=Window(range(1), range(1), np.array([[1.0, 0.0], [1.0, 0.0]]), uncounted, uncounted),
            codes={name: np.zeros((spec.channels, 1, 1), spec.coder.dtype) for name, spec in specs.items()},
            rungs=dict.fromkeys(self._targets, 0),
        )

    def collate(self, crops: Sequence[Sequence[CachedPiece]]) -> Sources:
        """The sources of a batch, from those of each crop."""
        items = [item for crop in crops for item in crop]
        placed = _placed([[item.window for item in crop] for crop in crops])
        height, width = placed["counts_Shw"].shape[1:]
        return Sources(
            **placed,
            codes={name: _pad(self._of_one_kind(name, items), height, width) for name in self._targets},
            rungs={name: torch.tensor([item.rungs[name] for item in items]) for name in self._targets},
        )

    def _of_one_kind(self, target: str, items: Sequence[CachedPiece]) -> list[npt.NDArray[np.generic]]:
        """The items' codes; float32 values of all of them where only some are kept exactly.

        Such values stand for themselves as codes: decoding leaves them as they are.
        """
        codes = [item.codes[target] for item in items]
        if len({array.dtype for array in codes}) == 1:
            return codes
        rungs = [np.array([item.rungs[target]]) for item in items]
        return [self._cache.decode(target, array[None], rung)[0] for array, rung in zip(codes, rungs, strict=True)]


@dataclass(frozen=True)
class SeenPiece:
    """What the teacher is to look at for one piece of a crop."""

    window: Window
    look: Look


class Looks:
    """What a teacher that stands beside the student is to look at for crops of ``source``'s images.

    ``view="image"``: the whole image, as stage 1 saw it; a crop's window is cut out of its answer. ``view="crop"``:
    what the student sees, cut, scaled and mirrored, padding included, but neither recoloured nor mixed with another
    image. ``grid`` and ``preprocessing`` are the teacher's.
    """

    def __init__(self, source: DataSource, grid: Grid, preprocessing: Preprocessing, view: View) -> None:
        self._source, self._grid, self._preprocessing, self._view = source, grid, preprocessing, view

    def of(self, piece: Piece) -> tuple[SeenPiece, None]:
        """What is to be looked at. Raises DataError where no cell of the teacher lies in it."""
        image, crop, whole = piece.image, piece.crop, self._view == "image"
        if not whole:
            image, crop = crop.image(image), Crop(Affine(1.0, 0.0), Affine(1.0, 0.0), crop.size, crop.size)
        mapping, _ = kept_cells(self._grid, self._preprocessing, *image.shape[:2])
        if min(mapping.shape) == 0:
            raise DataError(
                f"{piece.sample.id}: no cell of the teacher lies in {by(image.shape[:2])} pixels; "
                "leave the image out, or use larger crops"
            )
        window = window_of(crop, mapping, owned(piece, self._source))
        look = Look(image=image, rows=window.rows, columns=window.columns, sample=piece.sample.id, whole=whole)
        return SeenPiece(window, look), None

    def collate(self, crops: Sequence[Sequence[SeenPiece]]) -> Sources:
        """The sources of a batch, from those of each crop."""
        placed = _placed([[item.window for item in crop] for crop in crops])
        return Sources(**placed, looks=tuple(item.look for crop in crops for item in crop))


def owned(piece: Piece, source: DataSource) -> BoolArray:
    """H,W of the crop: pixels that show the image, and of a labelled one something of the scene."""
    excluded = source.excluded(piece.sample) if piece.sample.role is Role.TRAIN else None
    if excluded is None:
        return piece.owned
    seen: BoolArray = piece.crop.labels(excluded.astype(np.uint8)) == 0
    return piece.owned & seen


class _Placed(TypedDict):
    crop_S: torch.Tensor
    cell_to_crop_S22: torch.Tensor
    counts_Shw: torch.Tensor
    counts_first_Shw: torch.Tensor


def _placed(crops: Sequence[Sequence[Window]]) -> _Placed:
    """Where the windows of each crop's sources lie, all padded to the largest."""
    windows = [window for crop in crops for window in crop]
    height, width = (max(window.counts.shape[axis] for window in windows) for axis in (0, 1))
    return {
        "crop_S": torch.tensor([number for number, crop in enumerate(crops) for _ in crop]),
        "cell_to_crop_S22": torch.from_numpy(np.stack([window.cell_to_crop for window in windows])),
        "counts_Shw": _pad([window.counts for window in windows], height, width),
        "counts_first_Shw": _pad([window.counts_first for window in windows], height, width),
    }


def _pad(arrays: Sequence[npt.NDArray[np.generic]], height: int, width: int) -> torch.Tensor:
    """Arrays (..., h, w), filled up with zeros at the end of both axes and stacked."""
    stacked = np.zeros((len(arrays), *arrays[0].shape[:-2], height, width), arrays[0].dtype)
    for target, array in zip(stacked, arrays, strict=True):
        target[..., : array.shape[-2], : array.shape[-1]] = array
    return torch.from_numpy(stacked)


def by(size: tuple[int, ...]) -> str:
    """A size as messages write it: 480x360."""
    return "x".join(map(str, size))
