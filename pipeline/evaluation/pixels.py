"""A network's output at every pixel of an image, however large the image is.

Shapes: log-probabilities (or logits) 1,C,h,w on a native grid; pixels H,W.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from segkd.pipeline.resample import apply_weights
from segkd.storage.errors import NetworkError, NonFiniteError
from segkd.storage.geometry import Axis, Mapping, resampling

STRIP_BYTES = 16 * 2**20
"""Most that a strip of upsampled float32 values takes, unless a single row is larger."""

_LOWEST = -1e30
"""Stands in for -inf, which times a weight of 0 would be NaN; any share of it still loses against a log-probability."""


def label_map(log_probs_1Chw: Tensor, mapping: Mapping, height: int, width: int) -> Tensor:
    """The most probable class at each pixel (ties: the lowest index), uint8 ``(H, W)`` on the values' device.

    Log-probabilities or logits are brought to the pixels that ``mapping`` refers to, and only then compared.
    Raises NonFiniteError for NaN and +inf.
    """
    strips = _strips(log_probs_1Chw, mapping, height, width)
    return torch.cat([values_CtW.argmax(0).to(torch.uint8) for values_CtW in strips])


def confidence_map(log_probs_1Chw: Tensor, mapping: Mapping, height: int, width: int) -> Tensor:
    """The largest probability at each pixel, float32 ``(H, W)``, of the softmax of the upsampled values.

    Raises NonFiniteError for NaN and +inf.
    """
    strips = _strips(log_probs_1Chw, mapping, height, width)
    return torch.cat([values_CtW.softmax(0).amax(0) for values_CtW in strips])


def check_output(log_probs_1Chw: Tensor, num_classes: int, of: str) -> None:
    """Raises NetworkError, which names the image ``of``, unless the output is that of one image over the classes."""
    if log_probs_1Chw.ndim != 4 or log_probs_1Chw.shape[:2] != (1, num_classes):
        raise NetworkError(
            f"{of}: the output has shape {tuple(log_probs_1Chw.shape)}, expected (1, {num_classes}, h, w); "
            "give the network's `classes` and `class_map` if they are not those of the data"
        )


def _strips(log_probs_1Chw: Tensor, mapping: Mapping, height: int, width: int) -> Iterator[Tensor]:
    """The values at the pixels, ``(C, t, W)`` for one run of rows after the other.

    As in :func:`segkd.pipeline.resample.to_pixels`, but only a strip of pixels, and of the cells behind it, is in
    memory at once.
    """
    values = log_probs_1Chw.float().clamp(min=_LOWEST)
    if not values.isfinite().all():
        raise NonFiniteError("a network's output holds NaN or +inf; look at its weights and at how its input is made")
    rows = max(STRIP_BYTES // (4 * values.shape[1] * width), 1)
    columns_Ww = resampling(Axis(1.0, 0.0, width), mapping.x)
    for start in range(0, height, rows):
        weights_th = resampling(Axis(1.0, float(start), min(rows, height - start)), mapping.y)
        used = np.flatnonzero(weights_th.any(axis=0))
        cells = slice(int(used[0]), int(used[-1]) + 1)
        yield apply_weights(values[:, :, cells], weights_th[:, cells], columns_Ww)[0]
