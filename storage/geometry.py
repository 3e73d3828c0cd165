"""Where cells lie in pixels: the one place that knows.

A *pixel coordinate* counts pixel centres: pixel ``i`` has its centre at ``i`` and an axis of ``n`` pixels extends from
``-0.5`` to ``n - 0.5``. A *cell coordinate* counts cell centres of a logit grid in the same way. Everything between
them (a network's grid, a preprocessing resize or pad, a crop, a scale, a flip) is an affine map per axis, so mappings
compose and invert exactly, in float64.

Shapes: h, w cells of a grid; H, W pixels of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from segkd.storage.errors import GeometryError

Convention = Literal["span", "corners", "stride"]


@dataclass(frozen=True)
class Affine:
    """One axis: ``x -> scale * x + offset``; a flip has a negative scale."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, x: float) -> float:
        return self.scale * x + self.offset

    def then(self, after: Affine) -> Affine:
        """The map that applies this one first and ``after`` to its result."""
        return Affine(after.scale * self.scale, after.scale * self.offset + after.offset)

    def inverse(self) -> Affine:
        """The map back. Raises GeometryError for a scale of zero."""
        if self.scale == 0:
            raise GeometryError("an axis of scale 0 has no inverse; check the sizes that it was made from")
        return Affine(1.0 / self.scale, -self.offset / self.scale)


def resize(source: int, target: int, *, align_corners: bool = False) -> Affine:
    """Pixel of an axis resized from ``source`` to ``target`` pixels -> pixel of the source.

    The *realised* ratio of the two sizes counts, not the factor that was asked for. ``align_corners`` as in
    ``torch.nn.functional.interpolate``.
    """
    if source < 1 or target < 1:
        raise GeometryError(f"cannot resize an axis of {source} pixels to {target}; both must be at least 1")
    if align_corners:
        return Affine((source - 1) / (target - 1)) if target > 1 else Affine(1.0, (source - 1) / 2)
    ratio = source / target
    return Affine(ratio, 0.5 * ratio - 0.5)


def shift(offset: float) -> Affine:
    """Pixel of a window that begins at ``offset`` -> pixel of the whole."""
    return Affine(1.0, offset)


def flip(length: int) -> Affine:
    """Pixel of a mirrored axis of ``length`` pixels -> pixel before mirroring (and back)."""
    return Affine(-1.0, length - 1.0)


@dataclass(frozen=True)
class Axis:
    """One axis of a logit grid: cell ``j`` of ``cells`` has its centre at pixel ``scale * j + offset``."""

    scale: float
    offset: float
    cells: int

    @property
    def affine(self) -> Affine:
        """Cell -> pixel."""
        return Affine(self.scale, self.offset)

    def through(self, pixels: Affine) -> Axis:
        """The same cells, placed in the pixels that ``pixels`` leads to."""
        mapped = self.affine.then(pixels)
        return Axis(mapped.scale, mapped.offset, self.cells)

    def part(self, cells: range) -> Axis:
        """The axis of a run of its cells."""
        return Axis(self.scale, self.affine(cells.start), len(cells))

    def inside(self, low: float, high: float) -> range:
        """The run of cells whose centres lie in ``[low, high]`` (pixel coordinates)."""
        first, last = sorted(((low - self.offset) / self.scale, (high - self.offset) / self.scale))
        # A centre that lies on the border up to rounding belongs to it.
        start = max(math.ceil(first - 1e-9), 0)
        stop = min(math.floor(last + 1e-9) + 1, self.cells)
        return range(start, max(stop, start))

    def inside_image(self, pixels: int) -> range:
        """The run of cells whose centres lie in an image axis of ``pixels`` pixels."""
        return self.inside(-0.5, pixels - 0.5)


@dataclass(frozen=True)
class Mapping:
    """Both axes of a logit grid in one image: ``pixel = scale * cell + offset``."""

    y: Axis
    x: Axis

    @property
    def shape(self) -> tuple[int, int]:
        """Cells: h, w."""
        return self.y.cells, self.x.cells

    def through(self, y: Affine, x: Affine) -> Mapping:
        """The same cells, placed in the pixels that the two axes' maps lead to."""
        return Mapping(self.y.through(y), self.x.through(x))

    def part(self, rows: range, columns: range) -> Mapping:
        """The mapping of a rectangle of cells."""
        return Mapping(self.y.part(rows), self.x.part(columns))


def network_axis(pixels: int, cells: int, *, convention: Convention = "span", stride: int | None = None) -> Axis:
    """Where a network's cells lie in its own input.

    ``span``     the cells divide the axis evenly (``W / w`` pixels each): how ``interpolate(align_corners=False)``
                 brings logits to pixels, so what a network trained that way means by its grid
    ``corners``  the outer cells' centres are the outer pixels' (``align_corners=True``)
    ``stride``   cell ``j`` lies at pixel ``stride * j``: what odd kernels with symmetric padding compute
    """
    if pixels < 1 or cells < 1:
        raise GeometryError(f"an axis of {pixels} pixels and {cells} cells is empty; both must be at least 1")
    if convention == "stride":
        if stride is None:
            raise GeometryError("convention 'stride' needs the stride; state it in the network's description")
        return Axis(float(stride), 0.0, cells)
    affine = resize(pixels, cells, align_corners=convention == "corners")
    return Axis(affine.scale, affine.offset, cells)


def resampling(target: Axis, source: Axis) -> npt.NDArray[np.float64]:
    """Weights ``(target.cells, source.cells)`` that bring values on ``source`` to the cells of ``target``.

    Both axes lie in the same pixels. Between its cells' centres the source is interpolated linearly, and it is constant
    beyond the outermost ones, as in ``interpolate(mode="bilinear")``. Where its cells are no finer than the target's
    that value at the target's centre is taken; where they are at least twice as fine, its mean over the target's
    footprint; in between the width of the mean grows from nothing to the whole footprint, so that nothing jumps when a
    scale passes 1. A mean that would reach beyond the outermost centres is narrowed on both sides alike: what is
    linear in the source stays exactly linear. Rows add to 1.
    """
    to_source = target.affine.then(source.affine.inverse())
    centres = to_source.scale * np.arange(target.cells, dtype=np.float64) + to_source.offset
    return box_weights(centres, np.float64(abs(to_source.scale)), source.cells)


def box_weights(
    centres: npt.NDArray[np.float64], spacing: npt.NDArray[np.float64] | np.float64, cells: int
) -> npt.NDArray[np.float64]:
    """:func:`resampling` for ``centres (..., t)``, ``spacing (...)`` in units of source cells: ``(..., t, cells)``."""
    inside = np.clip(centres, 0.0, cells - 1.0)
    width = np.expand_dims(np.minimum(spacing, 2 * (np.asarray(spacing) - 1)), -1)
    half = np.minimum(np.minimum(inside, cells - 1.0 - inside), width / 2)
    half = np.maximum(half, _NO_WIDTH)[..., None]
    distance = inside[..., None] - np.arange(cells, dtype=np.float64)
    mean = (_hat_integral(distance + half) - _hat_integral(distance - half)) / (2 * half)
    # The mean over a vanishing width is the value at the centre.
    weights: npt.NDArray[np.float64] = np.where(half > _NO_WIDTH, mean, np.clip(1 - np.abs(distance), 0, None))
    return weights


_NO_WIDTH = 1e-6


def _hat_integral(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The integral from -infinity to x of ``max(1 - |t|, 0)``, the share of a cell in a linear interpolation."""
    rising = np.clip(x + 1, 0, 1)
    falling = np.clip(1 - x, 0, 1)
    integral: npt.NDArray[np.float64] = np.where(x < 0, rising**2 / 2, 1 - falling**2 / 2)
    return integral
