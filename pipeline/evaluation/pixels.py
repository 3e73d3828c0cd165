"""A network's output at every pixel of an image, however large the image is.

Shapes: log-probabilities (or logits) 1,C,h,w on a native grid; pixels H,W.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from segkd.pipeline.resample import Weights, apply_weights
from segkd.storage.errors import NetworkError, NonFiniteError
from segkd.storage.geometry import Axis, Mapping, resampling

TILE_BYTES = 4 * 2**20
"""Most that a tile of upsampled float32 values takes, unless a single pixel takes more."""

_LOWEST = -1e30
"""Stands in for -inf, which times a weight of 0 would be NaN; any share of it still loses against a log-probability."""


def label_map(log_probs_1Chw: Tensor, mapping: Mapping, height: int, width: int) -> Tensor:
    """The most probable class at each pixel (ties: the lowest index), uint8 ``(H, W)`` on the values' device.

    Log-probabilities or logits are brought to the pixels that ``mapping`` refers to, and only then compared.
    Raises NonFiniteError for NaN and +inf.
    """
    return _by_tiles(lambda values_Ctu: values_Ctu.argmax(0).to(torch.uint8), log_probs_1Chw, mapping, height, width)


def confidence_map(log_probs_1Chw: Tensor, mapping: Mapping, height: int, width: int) -> Tensor:
    """The largest probability at each pixel, float32 ``(H, W)``, of the softmax of the upsampled values.

    Raises NonFiniteError for NaN and +inf.
    """
    return _by_tiles(lambda values_Ctu: values_Ctu.softmax(0).amax(0), log_probs_1Chw, mapping, height, width)


def check_output(log_probs_1Chw: Tensor, num_classes: int, of: str) -> None:
    """Raises NetworkError, which names the image ``of``, unless the output is that of one image over the classes."""
    if log_probs_1Chw.ndim != 4 or log_probs_1Chw.shape[:2] != (1, num_classes):
        raise NetworkError(
            f"{of}: the output has shape {tuple(log_probs_1Chw.shape)}, expected (1, {num_classes}, h, w); "
            "give the network's `classes` and `class_map` if they are not those of the data"
        )


def _by_tiles(
    reduce: Callable[[Tensor], Tensor], log_probs_1Chw: Tensor, mapping: Mapping, height: int, width: int
) -> Tensor:
    """``reduce`` (C,t,u -> t,u) of the values at the pixels, H,W.

    As :func:`segkd.pipeline.resample.to_pixels`, but only a tile of pixels is in memory at once, and each is computed
    from no more than the cells that it lies between.
    """
    values = log_probs_1Chw.float().clamp(min=_LOWEST)
    if not values.isfinite().all():
        raise NonFiniteError("a network's output holds NaN or +inf; look at its weights and at how its input is made")
    side = max(math.isqrt(TILE_BYTES // (4 * values.shape[1])), 1)
    columns = _tiles(mapping.x, width, side)
    return torch.cat(
        [
            torch.cat(
                [reduce(apply_weights(values[..., y, x], rows_th, columns_uw)[0]) for x, columns_uw in columns], 1
            )
            for y, rows_th in _tiles(mapping.y, height, side)
        ]
    )


def _tiles(axis: Axis, pixels: int, side: int) -> list[tuple[slice, Weights]]:
    """For each run of ``side`` pixels: the cells that it depends on, and their weights."""
    tiles = []
    for start in range(0, pixels, side):
        weights = resampling(Axis(1.0, float(start), min(side, pixels - start)), axis)
        used = np.flatnonzero(weights.any(axis=0))
        cells = slice(int(used[0]), int(used[-1]) + 1)
        tiles.append((cells, weights[:, cells].copy()))
    return tiles
