"""Values on one grid brought to another, by the weights that :mod:`segkd.storage.geometry` states.

Shapes: values N,C,h,w; pixels N,C,H,W.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segkd.storage.geometry import Axis, Mapping, resampling

Weights = npt.NDArray[np.float64]


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
