"""A network as it is deployed: images of one size go in as they are, labels come out, and all between is one program.

Shapes: images N,3,H,W uint8 RGB; log-probabilities N,C,h,w on the network's own grid; labels N,H,W uint8.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkd.pipeline.models.predictor import Predictor, kept_cells
from segkd.pipeline.models.preprocessing import normalise, padded
from segkd.pipeline.resample import IMPOSSIBLE, pixel_weights, to_pixels
from segkd.storage.geometry import Axis, Mapping

_HALF = 0.5 + 2**-12
"""Rounds halves up. Half-sized images are full of them, and float32 misses some by a little."""


class Deployed(nn.Module):
    """What a :class:`Predictor` does to images of one size, in operations that ``torch.export`` and ONNX know.

    Returns log-probabilities, and before them, with ``labels``, the label of each pixel.
    """

    def __init__(self, predictor: Predictor, size: tuple[int, int], *, labels: bool) -> None:
        """``size``: the images' height and width."""
        super().__init__()
        self.network = predictor.network
        self._size = size
        self._preprocessing = predictor.config.preprocessing
        self._mapping, self._kept = kept_cells(predictor.grid, self._preprocessing, *size)
        self._upsampling = upsampling(self._mapping, size)
        self._over_classes = predictor.over_classes
        self._labels = labels

    def forward(self, images_N3HW: Tensor) -> tuple[Tensor, ...]:
        """Labels N,H,W of the images where they are wanted, and log-probabilities N,C,h,w."""
        inputs_N3HW = padded(normalise(self._resized(images_N3HW), self._preprocessing), self._preprocessing)
        logits_NChw: Tensor = self.network(inputs_N3HW)
        rows, columns = self._kept
        logits_NChw = logits_NChw[..., rows.start : rows.stop, columns.start : columns.stop]
        log_probs_NChw = self._over_classes(logits_NChw.float().log_softmax(1))
        if not self._labels:
            return (log_probs_NChw,)
        return self._at_pixels(log_probs_NChw).argmax(1).to(torch.uint8), log_probs_NChw

    def _resized(self, images_N3HW: Tensor) -> Tensor:
        """The images as :func:`segkd.pipeline.models.preprocessing.resized` has them: Pillow works along rows, then
        along columns, and has whole numbers in between."""
        height, width = self._preprocessing.resize or self._preprocessing.scaled(*self._size)
        resized_N3HW = images_N3HW.float()
        for size in ((self._size[0], width), (height, width)):
            if resized_N3HW.shape[-2:] != size:
                resized_N3HW = F.interpolate(resized_N3HW, size, mode="bilinear", antialias=True)
                resized_N3HW = (resized_N3HW + _HALF).floor().clamp(0, 255)
        return resized_N3HW

    def _at_pixels(self, log_probs_NChw: Tensor) -> Tensor:
        log_probs_NChw = log_probs_NChw.clamp(min=IMPOSSIBLE)
        if self._upsampling == "weights":
            return to_pixels(log_probs_NChw, self._mapping, *self._size)
        corners = self._upsampling == "corners"
        return F.interpolate(log_probs_NChw, self._size, mode="bilinear", align_corners=corners)


def upsampling(mapping: Mapping, size: tuple[int, int]) -> Literal["span", "corners", "weights"]:
    """Which of the two bilinear interpolations that every runtime has brings cells to pixels, or neither: where cells
    of padding were left out, for instance. Then it takes two products with matrices of weights."""
    axes = tuple(zip((mapping.y, mapping.x), size, strict=True))
    if all(_interpolates(axis, pixels, corners=False) for axis, pixels in axes):
        return "span"
    if all(_interpolates(axis, pixels, corners=True) for axis, pixels in axes):
        return "corners"
    return "weights"


def _interpolates(axis: Axis, pixels: int, *, corners: bool) -> bool:
    """Whether an axis' weights are those of torch's interpolation."""
    ones_11cc = torch.eye(axis.cells, dtype=torch.float64)[None, None]
    weights_11tc = F.interpolate(ones_11cc, (pixels, axis.cells), mode="bilinear", align_corners=corners)
    return bool(np.allclose(weights_11tc[0, 0].numpy(), pixel_weights(axis, pixels), atol=1e-9))
