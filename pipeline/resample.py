"""Values on one grid brought to another, by the weights that :mod:`segkd.storage.geometry` states.

Shapes: values N,C,h,w; pixels N,C,H,W.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segkd.storage.geometry import Axis, Mapping, resampling

Weights = npt.NDArray[np.float64]

STRIP_BYTES = 16 * 2**20
"""Most that a strip of upsampled float32 values takes, unless a single row is larger."""

_LOWEST = -1e30
"""Stands in for -inf, which times a weight of 0 would be NaN; any share of it still loses against a log-probability."""


def apply_weights(values_NChw: Tensor, y: Weights, x: Weights) -> Tensor:
    """N,C,h,w -> N,C,t,u by ``y (t, h)`` and ``x (u, w)``, or by one of each a sample, ``(N, t, h)`` and ``(N, u, w)``.

    Always in float32: half precision would move the values by more than a cache's coding does.
    """
    with torch.autocast(values_NChw.device.type, enabled=False):
        values = values_NChw.float()
        rows = torch.from_numpy(np.asarray(y, np.float32)).to(values.device, non_blocking=True)
        columns = torch.from_numpy(np.asarray(x, np.float32)).to(values.device, non_blocking=True)
        if rows.ndim == 3:
            rows, columns = rows[:, None], columns[:, None]
        return rows @ (values @ columns.transpose(-1, -2))


def to_pixels(values_NChw: Tensor, mapping: Mapping, height: int, width: int) -> Tensor:
    """Values on a grid, bilinearly brought to the ``height`` x ``width`` pixels that ``mapping`` refers to.

    Equal to ``interpolate(mode="bilinear", align_corners=False)`` for a grid that spans the image. Values are logits or
    log-probabilities: probabilities are never upsampled.
    """
    pixels_y, pixels_x = Axis(1.0, 0.0, height), Axis(1.0, 0.0, width)
    return apply_weights(values_NChw, resampling(pixels_y, mapping.y), resampling(pixels_x, mapping.x))


def pixel_strips(values_NChw: Tensor, mapping: Mapping, height: int, width: int) -> Iterator[Tensor]:
    """:func:`to_pixels`, without gradient, for one run of rows after the other: ``(N, C, t, W)``.

    Only a strip of pixels, and of the cells behind it, is in memory at once. A value of -inf takes part as -1e30.
    """
    values = values_NChw.float().clamp(min=_LOWEST)
    rows = max(STRIP_BYTES // (4 * values.shape[0] * values.shape[1] * width), 1)
    columns_Ww = resampling(Axis(1.0, 0.0, width), mapping.x)
    for start in range(0, height, rows):
        weights_th = resampling(Axis(1.0, float(start), min(rows, height - start)), mapping.y)
        used = np.flatnonzero(weights_th.any(axis=0))
        cells = slice(int(used[0]), int(used[-1]) + 1)
        yield apply_weights(values[:, :, cells], weights_th[:, cells], columns_Ww)
