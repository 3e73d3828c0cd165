"""Windows that slide over an input that is too large to be seen at once, and what a network says in them, blended.

Shapes: inputs N,3,H,W; logits and log-probabilities N,C,h,w, on the grid of a window or of the whole input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segkd.pipeline.models.network import Grid, Views
from segkd.pipeline.resample import to_cells
from segkd.storage.geometry import Axis, shift


@dataclass(frozen=True)
class Window:
    """A rectangle of an input's pixels."""

    top: int
    left: int
    height: int
    width: int


def windows_of(size: tuple[int, int], views: Views, stride: int) -> list[Window]:
    """The windows in which an input of ``size`` (H, W) is seen, row by row: a single one if it is no larger."""
    window = views.window or size
    height, width = (min(side, pixels) for side, pixels in zip(window, size, strict=True))
    rows, columns = (
        starts(pixels, side, views.overlap, stride) for pixels, side in zip(size, (height, width), strict=True)
    )
    return [Window(top, left, height, width) for top in rows for left in columns]


def starts(pixels: int, window: int, overlap: float, stride: int) -> list[int]:
    """Where the windows of an axis begin: as few as have ``overlap`` of their side in common with the next, evenly
    spread, at multiples of the stride, but for the last one, which ends where the axis does. A window is at least as
    large as the stride.
    """
    last = pixels - window
    # A share like 0.8 is a little more than it says: what is a whole step up to rounding is one.
    step = max(math.floor(window * (1 - overlap) / stride + 1e-9), 1)
    cells = math.ceil(last / stride)
    steps = math.ceil(cells / step)
    return [cells * k // steps * stride for k in range(steps)] + [last]


def blended(answer: Callable[[Tensor], Tensor], inputs_N3HW: Tensor, grid: Grid, windows: Sequence[Window]) -> Tensor:
    """Log-probabilities on the grid of the whole input, of the logits that ``answer`` gives for each of its windows.

    The mean of the probabilities that they give a cell, weighted by a raised cosine over the window: what lies at its
    edge, where a network sees least around a cell, counts least. Where a window's cells are not cells of the whole,
    they are brought to them first. Added up as logarithms, so that classes keep their proportion however little they
    have.
    """
    whole = grid.mapping(inputs_N3HW.shape[-2], inputs_N3HW.shape[-1])
    total_NChw = weight_hw = torch.empty(0)
    for window in windows:
        rows = slice(window.top, window.top + window.height)
        columns = slice(window.left, window.left + window.width)
        log_probs_NChw = answer(inputs_N3HW[..., rows, columns]).float().log_softmax(1)
        seen = grid.mapping(window.height, window.width).through(shift(window.top), shift(window.left))
        cells_y = whole.y.inside(rows.start - 0.5, rows.stop - 0.5)
        cells_x = whole.x.inside(columns.start - 0.5, columns.stop - 0.5)
        here = whole.part(cells_y, cells_x)
        if seen != here:
            log_probs_NChw = to_cells(log_probs_NChw, seen, here)
        if not weight_hw.numel():
            total_NChw = log_probs_NChw.new_full((*log_probs_NChw.shape[:2], *whole.shape), -torch.inf)
            weight_hw = log_probs_NChw.new_zeros(whole.shape)
        weights = torch.outer(
            raised_cosine(here.y, window.top, window.height), raised_cosine(here.x, window.left, window.width)
        ).to(total_NChw)
        part = (..., slice(cells_y.start, cells_y.stop), slice(cells_x.start, cells_x.stop))
        total_NChw[part] = total_NChw[part].logaddexp(log_probs_NChw + weights.log())
        weight_hw[part] += weights
    return total_NChw - weight_hw.log()


def raised_cosine(axis: Axis, start: int, pixels: int) -> Tensor:
    """The weights of an axis' cells in a window of so many pixels from ``start`` on: 1 in its middle, nearly 0 at its
    ends."""
    centres = axis.offset + axis.scale * torch.arange(axis.cells, dtype=torch.float64)
    return torch.sin(math.pi * (centres - start + 0.5) / pixels).square().clamp_min(1e-6)
