"""Cross-entropy with the labels of pixels, of logits on a coarser grid, without the logits of all pixels at once.

Shapes: N crops of H,W pixels in C classes; logits N,C,h,w on the student's grid; a band of t,W pixels of one crop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segkd.pipeline.data.sample import IGNORE
from segkd.pipeline.resample import float32_on, pixel_weights, tiles
from segkd.storage.geometry import Mapping

BAND_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
"""Most that the float32 logits of a band take, unless a single row of pixels takes more: a CPU's cache should hold
them, and a GPU should have enough to do with them."""


def summed_cross_entropy(
    logits_NChw: Tensor,
    mapping: Mapping,
    labels_NHW: Tensor,
    class_weights_C: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy(to_pixels(logits), labels, class_weights, reduction="sum", label_smoothing=…)``, float32.

    ``mapping`` places the logits' grid in the H,W pixels; pixels labelled :data:`IGNORE` count for nothing, and any
    other label must be less than C. Pixels are gone through band by band, and what a band's loss does to the logits is
    found along with it: of the softmax that is the gradient with respect to a band's logits (softmax minus labels,
    each pixel weighted), and bringing logits to pixels is linear. So no tensor of N,C,H,W is ever made, where autograd
    keeps several. Not differentiable twice.
    """
    classes = logits_NChw.shape[1]
    weights_C = logits_NChw.new_ones(classes, dtype=torch.float32) if class_weights_C is None else class_weights_C
    given = logits_NChw, mapping, labels_NHW, weights_C, label_smoothing
    loss: Tensor = _SummedCrossEntropy.apply(*given)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NChw: Tensor,
        mapping: Mapping,
        labels_NHW: Tensor,
        weights_C: Tensor,
        label_smoothing: float,
    ) -> Tensor:
        crops, classes = logits_NChw.shape[:2]
        height, width = labels_NHW.shape[1:]
        place, learned = logits_NChw.device, ctx.needs_input_grad[0]
        columns_Ww = float32_on(place, pixel_weights(mapping.x, width))
        # Columns at once, rows by bands: few cells lie between the rows of one.
        values_NChW = logits_NChw.float() @ columns_Ww.T
        gradient_NChW = torch.zeros_like(values_NChW) if learned else None
        rows = max(BAND_BYTES.get(place.type, BAND_BYTES["cuda"]) // (4 * classes * width), 1)
        losses = [values_NChW.new_zeros(())]
        for pixels, cells, weights in tiles(mapping.y, height, rows):
            weights_th = float32_on(place, weights)
            for n in range(crops):
                band_CtW = weights_th @ values_NChW[n, :, cells]
                losses.append(_of_band(band_CtW, labels_NHW[n, pixels], weights_C, label_smoothing, learned))
                if gradient_NChW is not None:
                    gradient_NChW[n, :, cells] += weights_th.T @ band_CtW
        if gradient_NChW is not None:
            ctx.save_for_backward(gradient_NChW @ columns_Ww)
            ctx.dtype = logits_NChw.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_NChw,) = ctx.saved_tensors
        return (given * gradient_NChw).to(ctx.dtype), None, None, None, None


def _of_band(logits_CtW: Tensor, labels_tW: Tensor, weights_C: Tensor, smoothing: float, learned: bool) -> Tensor:
    """The loss summed over a band; if ``learned``, leaves its gradient where the logits were.

    With q the weights of what the label and smoothing give to the classes, ``sum(q) * log(sum(exp(x))) - sum(q * x)``,
    of which the gradient is ``sum(q) * softmax(x) - q``.
    """
    valid_tW = labels_tW != IGNORE
    labels_1tW = labels_tW.masked_fill(~valid_tW, 0)[None]
    shared_C = smoothing / len(weights_C) * weights_C
    label_1tW = torch.where(valid_tW, (1 - smoothing) * weights_C[labels_1tW], 0)
    mass_1tW = label_1tW + shared_C.sum() * valid_tW
    logits_CtW -= logits_CtW.amax(0, keepdim=True)  # so that no exponential overflows
    met_1tW = label_1tW * logits_CtW.gather(0, labels_1tW)
    if smoothing:
        met_1tW = met_1tW + torch.tensordot(shared_C, logits_CtW, 1)
    sums_1tW = logits_CtW.exp_().sum(0, keepdim=True)
    loss = torch.where(valid_tW, mass_1tW * sums_1tW.log() - met_1tW, 0).sum()
    if learned:
        logits_CtW *= mass_1tW / sums_1tW
        logits_CtW.scatter_(0, labels_1tW, logits_CtW.gather(0, labels_1tW) - label_1tW)
        if smoothing:
            logits_CtW -= shared_C[:, None, None] * valid_tW
    return loss
