"""A network's output at every pixel of an image, however large the image is.

Shapes: log-probabilities (or logits) 1,C,h,w on a native grid; pixels H,W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from segkd.pipeline.resample import pixel_tiles
from segkd.storage.errors import NetworkError, NonFiniteError
from segkd.storage.geometry import Mapping


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
    """``reduce`` (C,t,u -> t,u) of the values at the pixels, H,W."""
    if (log_probs_1Chw.isnan() | (log_probs_1Chw == torch.inf)).any():
        raise NonFiniteError("a network's output holds NaN or +inf; look at its weights and at how its input is made")
    reduced = None
    for rows, columns, values_1Ctu in pixel_tiles(log_probs_1Chw, mapping, height, width):
        tile = reduce(values_1Ctu[0])
        if reduced is None:
            reduced = tile.new_empty((height, width))
        reduced[rows, columns] = tile
    assert reduced is not None, "an image has pixels"
    return reduced
