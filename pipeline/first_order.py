"""First-order knowledge: how much a cell's output differs from its neighbours' (Xie et al., BMVC 2018).

One definition serves the teacher's targets and the student's loss. The paper's body could not be had; the norm, the
features and their smoothing are this project's own choice.

Shapes: N maps (images or windows), C classes, h, w cells of the teacher's grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Features = Literal["softmax", "logits"]
Slices: TypeAlias = tuple[EllipsisType, slice, slice]

EPSILON = 1e-3
"""Where the distance between two cells goes over from a cone into a parabola, in units of the features.

It takes at most 1e-3 off a distance (a teacher's map averages about 0.1) and is a thousand times what rounding does to
a softmax in float32, so cells that are equal but for rounding give no value and a gradient that vanishes with their
difference. The cone itself (epsilon 0) has an infinite derivative there, and a far smaller epsilon a random direction.
"""

_PAIRS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""A cell's four later neighbours (rows, columns): every pair of neighbours once."""


def features_of(scores_NChw: Tensor, form: Features) -> Tensor:
    """What is compared between neighbours, in float32 (a float64 input stays float64).

    ``softmax``  class probabilities
    ``logits``   logits less their mean over the classes, the same for logits and log-probabilities. A class of
                 probability zero (-inf) has no finite value here.
    """
    scores = _single_precision(scores_NChw)
    return scores.softmax(1) if form == "softmax" else scores - scores.mean(1, keepdim=True)


def first_order_map(features_NChw: Tensor, exists_Nhw: Tensor | None = None) -> Tensor:
    """N,h,w: ``C(x) = mean over the neighbours i that exist of sqrt(|F(x) - F(i)|^2 + EPSILON^2) - EPSILON``.

    A cell has 8 neighbours inside the grid, 5 on an edge and 3 in a corner, less those that ``exists_Nhw`` (bool)
    rules out. Without any, and where a cell does not itself exist, the value is 0. Features of cells that do not exist
    must be finite. In float32 even under autocast (a float64 input stays float64). Differentiable once, and not
    by torch.func.
    """
    with torch.autocast(features_NChw.device.type, enabled=False):
        features = _single_precision(features_NChw)
        if exists_Nhw is None:
            exists_Nhw = torch.ones_like(features[:, 0], dtype=torch.bool)
        found: Tensor = _FirstOrderMap.apply(features, exists_Nhw)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return found


class _FirstOrderMap(torch.autograd.Function):
    """With a gradient of its own, which takes the differences anew, pair by pair, and adds them up in place: autograd
    would keep four of them, and add up eight tensors of zeros with a slice filled in."""

    @staticmethod
    def forward(ctx: Any, features_NChw: Tensor, exists_Nhw: Tensor) -> Tensor:
        total_Nhw = features_NChw.new_zeros(exists_Nhw.shape)
        neighbours_Nhw, steepness = torch.zeros_like(total_Nhw), []
        for here, there in _pairs(*exists_Nhw.shape[1:]):
            both = (exists_Nhw[here] & exists_Nhw[there]).to(features_NChw.dtype)
            squared = (features_NChw[here] - features_NChw[there]).square_().sum(1)
            root = (squared + EPSILON**2).sqrt_()
            # sqrt(s + e^2) - e without its cancellation: exactly 0 for equal cells.
            distance = squared / (root + EPSILON) * both
            for side in (here, there):
                total_Nhw[side] += distance
                neighbours_Nhw[side] += both
            steepness.append(both / root)
        neighbours_Nhw.clamp_min_(1.0)
        ctx.save_for_backward(features_NChw, neighbours_Nhw, *steepness)
        return total_Nhw.div_(neighbours_Nhw)

    @staticmethod
    def backward(ctx: Any, given_Nhw: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("the first-order map is differentiable once: leave out create_graph=True")
        features_NChw, neighbours_Nhw, *steepness = ctx.saved_tensors
        given_Nhw = given_Nhw / neighbours_Nhw
        gradient_NChw = torch.zeros_like(features_NChw)
        for (here, there), steep in zip(_pairs(*given_Nhw.shape[1:]), steepness, strict=True):
            # Of sqrt(|d|^2 + e^2) the gradient with respect to d is d over that root.
            pull = features_NChw[here] - features_NChw[there]
            pull *= ((given_Nhw[here] + given_Nhw[there]) * steep)[:, None]
            gradient_NChw[here] += pull
            gradient_NChw[there] -= pull
        return gradient_NChw, None


def class_edges(classes_Nhw: Tensor, exists_Nhw: Tensor) -> Tensor:
    """N,h,w, bool: whether a cell has a neighbour of another class, of those that exist (bool) as it does itself."""
    edges_Nhw = torch.zeros_like(exists_Nhw)
    for here, there in _pairs(*classes_Nhw.shape[1:]):
        differ = (classes_Nhw[here] != classes_Nhw[there]) & exists_Nhw[here] & exists_Nhw[there]
        for side in (here, there):
            edges_Nhw[side] |= differ
    return edges_Nhw


def _pairs(height: int, width: int) -> Iterator[tuple[Slices, Slices]]:
    """Of every two neighbours of a grid the one and, at the same place, the other."""
    for down, right in _PAIRS:
        here = (..., slice(0, height - down), slice(max(-right, 0), width - max(right, 0)))
        yield here, (..., slice(down, height), slice(max(right, 0), width - max(-right, 0)))


def _single_precision(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
