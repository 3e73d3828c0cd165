"""Values on one grid brought to another, by the weights that :mod:`segkd.storage.geometry` states.

Shapes: values N,C,h,w; pixels N,C,H,W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segkd.storage.geometry import Axis, Mapping, resampling

Weights = npt.NDArray[np.float64]

TILE_BYTES = 4 * 2**20
"""Most that a tile of upsampled float32 values takes, unless a single pixel takes more."""

LOWEST = -100.0
"""What a log-probability of -inf counts as: e^-100 is nothing, and unlike -inf it can be multiplied by 0."""

IMPOSSIBLE = -1e30
"""Stands in for -inf, which times a weight of 0 would be NaN; any share of it still loses against a log-probability."""

_NO_WEIGHT = 1e-9


def apply_weights(values_NChw: Tensor, y: Weights, x: Weights) -> Tensor:
    """N,C,h,w -> N,C,t,u by ``y (t, h)`` and ``x (u, w)``, or by one of each a sample, ``(N, t, h)`` and ``(N, u, w)``.

    Always in float32: half precision would move the values by more than a cache's coding does.
    """
    with torch.autocast(values_NChw.device.type, enabled=False):
        values = values_NChw.float()
        rows, columns = float32_on(values.device, y), float32_on(values.device, x)
        if rows.ndim == 3:
            rows, columns = rows[:, None], columns[:, None]
        return rows @ (values @ columns.transpose(-1, -2))


def float32_on(device: torch.device, weights: Weights) -> Tensor:
    return torch.from_numpy(np.asarray(weights, np.float32)).to(device, non_blocking=True)


def to_cells(log_probs_NChw: Tensor, source: Mapping, target: Mapping) -> Tensor:
    """Log-probabilities on one grid as those on another grid in the same pixels: the log-softmax of what they are
    interpolated to, or of their mean over the footprint of a coarser cell."""
    weights = resampling(target.y, source.y), resampling(target.x, source.x)
    return apply_weights(log_probs_NChw.clamp_min(LOWEST), *weights).log_softmax(1)


def to_pixels(values_NChw: Tensor, mapping: Mapping, height: int, width: int) -> Tensor:
    """Values on a grid, bilinearly brought to the ``height`` x ``width`` pixels that ``mapping`` refers to.

    Equal to ``interpolate(mode="bilinear", align_corners=False)`` for a grid that spans the image. Values are logits or
    log-probabilities: probabilities are never upsampled.
    """
    return apply_weights(values_NChw, pixel_weights(mapping.y, height), pixel_weights(mapping.x, width))


def pixel_weights(axis: Axis, pixels: int, first: int = 0) -> Weights:
    """What each of an axis' cells gives to each of so many pixels from the ``first`` on: (pixels, cells)."""
    return resampling(Axis(1.0, float(first), pixels), axis)


def pixel_tiles(
    values_NChw: Tensor, mapping: Mapping, height: int, width: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """:func:`to_pixels`, one tile of pixels after the other: its rows, its columns and its values ``(N, C, t, u)``.

    Only a tile is in memory at once, and each is computed from no more than the cells that it lies between, so memory
    and work do not grow with the image's width. A value of -inf takes part as -1e30. Without gradient.
    """
    values = values_NChw.detach().float().clamp(min=IMPOSSIBLE)
    side = max(math.isqrt(TILE_BYTES // (4 * max(values.shape[0], 1) * values.shape[1])), 1)
    columns = tiles(mapping.x, width, side)
    for pixels_y, cells_y, weights_th in tiles(mapping.y, height, side):
        for pixels_x, cells_x, weights_uw in columns:
            yield pixels_y, pixels_x, apply_weights(values[..., cells_y, cells_x], weights_th, weights_uw)


def tiles(axis: Axis, pixels: int, side: int) -> list[tuple[slice, slice, Weights]]:
    """For each run of ``side`` pixels: the run, the cells that it depends on, and their weights."""
    runs = []
    for start in range(0, pixels, side):
        stop = min(start + side, pixels)
        weights = pixel_weights(axis, stop - start, start)
        # What rounding leaves at a cell's centre of its neighbours is no share of them: theirs may be -1e30.
        weights[weights < _NO_WEIGHT] = 0
        used = np.flatnonzero(weights.any(axis=0))
        cells = slice(int(used[0]), int(used[-1]) + 1)
        runs.append((slice(start, stop), cells, weights[:, cells].copy()))
    return runs
