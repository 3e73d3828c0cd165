"""Crops: a scaled, mirrored, padded rectangle of an image, and the teacher's cells that lie in it.

Everything follows from one affine map per axis (crop pixel -> pixel of the EXIF-upright image): the image is resampled
by it, labels are looked up by it and cells are placed by its inverse, so the three cannot drift apart.

Shapes: images H,W,3; labels and masks H,W of the crop; h,w cells of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from segkd.pipeline.data.sample import IGNORE
from segkd.pipeline.evidence import Evidence, Row
from segkd.pipeline.models.network import IMAGENET_MEAN
from segkd.storage.errors import ConfigError
from segkd.storage.geometry import Affine, Axis, Mapping, flip, resize, shift

BoolArray = npt.NDArray[np.bool_]

PADDING = tuple(round(255 * channel) for channel in IMAGENET_MEAN)
"""The colour of crop pixels that lie outside the image: nearly zero after the usual normalisation."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training crops are drawn."""

    evidence: ClassVar[Evidence] = {
        "crop": Row("camvid-s.md", "large-crops"),
        "scale": Row("camvid-s.md", "scale-wide"),
        "flip": None,
        "photometric": Row("camvid-s.md", "photometric-0"),
        "auxiliary_photometric": None,
        "cutmix": None,
    }

    crop: tuple[int, int] = (256, 256)
    """Height and width of a crop in pixels; an image that is smaller after scaling is padded."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor by which an image is scaled; drawn log-uniformly."""
    flip: bool = True
    """Whether every second crop, at random, is mirrored left to right."""
    photometric: float = 0.5
    """Strength of the colour and blur perturbation of labelled samples; 0 = none, 1 = strong."""
    auxiliary_photometric: float = 1.0
    """The same for auxiliary samples, which stand more of it: the teacher's word does not depend on it. Labelled ones
    get as much with ``photometric = 1.0``."""
    cutmix: float = 0.0
    """Probability that an auxiliary crop is a mix of two auxiliary images: a rectangle of one, of random size, put into
    the other (CutMix). Each part is learned from its own image's targets."""

    def __post_init__(self) -> None:
        if min(self.crop) < 1:
            raise ConfigError(f"augment.crop is {list(self.crop)}; both sides must be at least 1 pixel")
        low, high = self.scale
        if not 0 < low <= high < math.inf:
            raise ConfigError(f"augment.scale is {list(self.scale)}; give [low, high] with 0 < low <= high")
        for name in ("photometric", "auxiliary_photometric"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"augment.{name} is {getattr(self, name)}; it must be 0 (none) or more")
        if not 0 <= self.cutmix <= 1:
            raise ConfigError(f"augment.cutmix is {self.cutmix}; a probability is between 0 (never) and 1 (always)")


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image. The image's borders fall between crop pixels, as they do for every drawn crop."""

    y: Affine
    """Crop pixel -> pixel of the image."""
    x: Affine
    """Crop pixel -> pixel of the image; a mirrored crop has a negative scale."""
    size: tuple[int, int]
    """H, W of the crop."""
    image_size: tuple[int, int]
    """H, W of the image."""

    @classmethod
    def draw(cls, rng: np.random.Generator, image_size: tuple[int, int], config: AugmentConfig) -> Crop:
        """A random crop of an image of ``image_size`` (H, W). A pure function of the generator's state."""
        low, high = config.scale
        factor = math.exp(rng.uniform(math.log(low), math.log(high)))
        y = _draw_axis(rng, image_size[0], config.crop[0], factor)
        x = _draw_axis(rng, image_size[1], config.crop[1], factor)
        if config.flip and rng.random() < 0.5:
            x = flip(config.crop[1]).then(x)
        return cls(y, x, config.crop, image_size)

    @property
    def visible(self) -> tuple[range, range]:
        """Rows and columns of the crop that show the image; the rest is padding."""
        return _visible(self.y, self.size[0], self.image_size[0]), _visible(self.x, self.size[1], self.image_size[1])

    def inside(self) -> BoolArray:
        """H,W: whether the crop pixel lies in the image."""
        rows, columns = self.visible
        mask = np.zeros(self.size, bool)
        mask[rows.start : rows.stop, columns.start : columns.stop] = True
        return mask

    def resample(self, image: Image.Image) -> Image.Image:
        """The visible part of the crop from a picture of any Pillow mode: bilinear, antialiased where it shrinks.

        Only the pixels that the crop shows (and their neighbours, for the filter) are read. Enlarging follows the map
        exactly; shrinking by anything but a whole number dithers about it by up to 0.072 crop pixels, as every
        antialiasing triangle that is sampled at whole pixels does.
        """
        rows, columns = self.visible
        top, bottom = _edges(self.y, rows, self.image_size[0])
        left, right = _edges(self.x, columns, self.image_size[1])
        part = image.resize((len(columns), len(rows)), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.x.scale < 0 else part

    def image(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The crop of an H,W,3 image of ``image_size``; :data:`PADDING` outside it."""
        assert image.shape[:2] == self.image_size
        rows, columns = self.visible
        crop = Image.new("RGB", (self.size[1], self.size[0]), PADDING)
        crop.paste(self.resample(Image.fromarray(image)), (columns.start, rows.start))
        return np.array(crop)

    def labels(self, labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The crop of an H,W label map of ``image_size``: the nearest pixel's label; 255 outside the image."""
        assert labels.shape == self.image_size
        rows, columns = self.visible
        crop = np.full(self.size, IGNORE, np.uint8)
        # One axis after the other, which numpy does several times as fast as both at once.
        seen = labels[_nearest(self.y, rows)][:, _nearest(self.x, columns)]
        crop[rows.start : rows.stop, columns.start : columns.stop] = seen
        return crop


@dataclass(frozen=True)
class Window:
    """The rectangle of a teacher's cells that a crop covers, in the order in which the cache holds them.

    A mirrored crop does not reorder cells: it places them with a negative scale.
    """

    rows: range
    columns: range
    cell_to_crop: npt.NDArray[np.float64]
    """``[[scale_y, offset_y], [scale_x, offset_x]]``: window cell index -> crop pixel."""
    counts: BoolArray
    """h,w: the cell's centre lies in the crop, nearest to a pixel that the source owns."""
    counts_first: BoolArray
    """h,w: the cell counts, and so do all of its neighbours that exist in the image."""


def window_of(crop: Crop, mapping: Mapping, owned: BoolArray) -> Window:
    """The smallest window that holds every cell whose centre lies in the crop, among the pixels of this image.

    ``mapping`` places the teacher's cells, all of which lie in the image, in the image's pixels. ``owned`` (H,W of the
    crop) marks the pixels that come from this image: ``crop.inside()`` unless crops are mixed. Where no cell's centre
    lies among them the window is the nearest cell, which does not count, so that one is never empty.
    """
    placed = mapping.through(crop.y.inverse(), crop.x.inverse())
    rows = _cells(placed.y, np.flatnonzero(owned.any(1)))
    columns = _cells(placed.x, np.flatnonzero(owned.any(0)))
    part = placed.part(rows, columns)
    (pixel_y, in_y), (pixel_x, in_x) = _pixels(part.y, crop.size[0]), _pixels(part.x, crop.size[1])
    counts = owned[np.ix_(pixel_y, pixel_x)] & in_y[:, None] & in_x
    return Window(
        rows=rows,
        columns=columns,
        cell_to_crop=np.array([[part.y.scale, part.y.offset], [part.x.scale, part.x.offset]], np.float64),
        counts=counts,
        counts_first=_with_neighbours(counts, _exists(rows, mapping.y.cells), _exists(columns, mapping.x.cells)),
    )


def _draw_axis(rng: np.random.Generator, pixels: int, crop: int, factor: float) -> Affine:
    """Crop pixel -> image pixel. What counts is the realised ratio of sizes, not the factor that was drawn."""
    scaled = max(1, round(pixels * factor))
    spare = scaled - crop
    start = int(rng.integers(min(0, spare), max(0, spare), endpoint=True))
    return shift(start).then(resize(pixels, scaled))


def _visible(axis: Affine, size: int, pixels: int) -> range:
    return Axis(axis.scale, axis.offset, size).inside_image(pixels)


def _edges(axis: Affine, visible: range, pixels: int) -> tuple[float, float]:
    """Where a run of crop pixels begins and ends in the image, counted from the image's edge; rounding is cut off."""
    low, high = sorted((axis(visible.start - 0.5) + 0.5, axis(visible.stop - 0.5) + 0.5))
    return max(low, 0.0), min(high, float(pixels))


def _nearest(axis: Affine, visible: range) -> npt.NDArray[np.intp]:
    """Index of the image pixel in which each crop pixel's centre lies."""
    return np.floor(axis.scale * np.asarray(visible) + axis.offset + 0.5).astype(np.intp)


def _cells(axis: Axis, pixels: npt.NDArray[np.intp]) -> range:
    """The cells whose centres lie between the first and the last of these pixels, or the one nearest to the first."""
    first, last = (int(pixels[0]), int(pixels[-1])) if len(pixels) else (0, 0)
    cells = axis.inside(first - 0.5, last + 0.5)
    if cells:
        return cells
    nearest = min(cells.start, axis.cells - 1)
    return range(nearest, nearest + 1)


def _pixels(axis: Axis, size: int) -> tuple[npt.NDArray[np.intp], BoolArray]:
    """Per cell the nearest crop pixel, and whether the centre lies in the crop (the border included)."""
    centres = axis.scale * np.arange(axis.cells) + axis.offset
    pixels = np.clip(np.floor(centres + 0.5).astype(np.intp), 0, size - 1)
    return pixels, np.abs(centres - (size - 1) / 2) <= size / 2 + 1e-6


def _exists(cells: range, total: int) -> BoolArray:
    """Whether the grid has a cell before the run, at each of its cells and after it."""
    indices = np.arange(cells.start - 1, cells.stop + 1)
    exists: BoolArray = (indices >= 0) & (indices < total)
    return exists


def _with_neighbours(counts: BoolArray, row_exists: BoolArray, column_exists: BoolArray) -> BoolArray:
    """Whether a cell and its up to eight neighbours count; those that the grid does not have are not asked for."""
    ring = ~(row_exists[:, None] & column_exists)
    ring[1:-1, 1:-1] = counts
    rows = ring[:-2] & ring[1:-1] & ring[2:]
    neighbours: BoolArray = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return neighbours
