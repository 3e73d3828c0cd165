"""Cross-entropy with the labels of pixels, of logits on a coarser grid, without the logits of all pixels at once.

Shapes: N crops of H,W pixels in C classes; logits N,C,h,w on the student's grid; a band of t rows of pixels of k crops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segkd.pipeline.data.sample import IGNORE
from segkd.pipeline.resample import float32_on, pixel_weights, tiles
from segkd.storage.geometry import Mapping

BAND_BYTES = {"cpu": 2**20, "cuda": 64 * 2**20}
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
    other label must be less than C. Nor do pixels whose label weighs 0; of these torch counts the smoothing. Pixels are
    gone through band by band, and what a band's loss does to the logits is found along with it: of the softmax that is
    the gradient with respect to a band's logits (softmax minus labels, each pixel weighted), and bringing logits to
    pixels is linear. So besides the logits' own gradient only a band is in memory, and the columns of its crops, where
    autograd keeps several tensors of N,C,H,W.

    Not differentiable twice, nor with respect to the weights: RuntimeError in backward with ``create_graph``.
    """
    classes = logits_NChw.shape[1]
    weights_C = logits_NChw.new_ones(classes, dtype=torch.float32) if class_weights_C is None else class_weights_C
    learned = torch.is_grad_enabled() and logits_NChw.requires_grad
    given = logits_NChw, mapping, labels_NHW, weights_C.detach(), label_smoothing, learned
    with torch.autocast(logits_NChw.device.type, enabled=False):
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
        smoothing: float,
        learned: bool,
    ) -> Tensor:
        (height, width), place = labels_NHW.shape[1:], logits_NChw.device
        rows = BAND_BYTES.get(place.type, BAND_BYTES["cuda"]) // (4 * len(weights_C) * width)
        crops = max(rows // height, 1)
        columns_Ww = float32_on(place, pixel_weights(mapping.x, width))
        runs = tiles(mapping.y, height, max(rows // crops, 1))
        bands = [(pixels, cells, float32_on(place, weights)) for pixels, cells, weights in runs]
        losses, gradients = [], []
        for first in range(0, max(len(logits_NChw), 1), crops):
            labels_tkW = labels_NHW[first : first + crops].transpose(0, 1).contiguous()
            # Columns first and rows by bands, since few cells lie between the rows of one. Rows come first in memory,
            # so that one matrix product makes a band.
            values_hkCW = logits_NChw[first : first + crops].float().permute(2, 0, 1, 3) @ columns_Ww.T
            values_hm = values_hkCW.flatten(1)
            gradient_hm = torch.zeros_like(values_hm)
            for pixels, cells, rows_th in bands:
                band_tm = rows_th @ values_hm[cells]
                band_tkCW = band_tm.view(len(rows_th), *values_hkCW.shape[1:])
                losses.append(_of_band(band_tkCW, labels_tkW[pixels], weights_C, smoothing, learned))
                if learned:
                    gradient_hm[cells].addmm_(rows_th.T, band_tm)
            if learned:
                gradients.append((gradient_hm.view_as(values_hkCW) @ columns_Ww).permute(1, 2, 0, 3))
        if learned:
            ctx.save_for_backward(torch.cat(gradients))
            ctx.dtype = logits_NChw.dtype
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the cross-entropy with labels is differentiable once: leave out create_graph=True")
        (gradient_NChw,) = ctx.saved_tensors
        # In float32, because of half precision ``given`` may be the factor that keeps gradients from underflow.
        return (given * gradient_NChw).to(ctx.dtype), None, None, None, None, None


def _of_band(logits_tkCW: Tensor, labels_tkW: Tensor, weights_C: Tensor, smoothing: float, learned: bool) -> Tensor:
    """The loss summed over a band; if ``learned``, leaves its gradient where the logits were.

    With q the weights of what the label and smoothing give to the classes, ``sum(q) * log(sum(exp(x))) - sum(q * x)``,
    of which the gradient is ``sum(q) * softmax(x) - q``.
    """
    valid_tkW = labels_tkW != IGNORE
    labels_tkW = labels_tkW.masked_fill(~valid_tkW, 0)
    valid_tkW &= weights_C[labels_tkW] > 0
    shared_C1 = (smoothing / len(weights_C) * weights_C)[:, None]
    label_tkW = torch.where(valid_tkW, (1 - smoothing) * weights_C[labels_tkW], 0)
    mass_tkW = label_tkW + shared_C1.sum() * valid_tkW
    logits_tkCW -= logits_tkCW.amax(2, keepdim=True)  # so that no exponential overflows
    labels_tk1W = labels_tkW[:, :, None]
    met_tkW = label_tkW * logits_tkCW.gather(2, labels_tk1W)[:, :, 0]
    if smoothing:
        met_tkW = met_tkW + (shared_C1 * logits_tkCW).sum(2)
    sums_tkW = logits_tkCW.exp_().sum(2)
    loss = torch.where(valid_tkW, mass_tkW * sums_tkW.log() - met_tkW, 0).sum()
    if learned:
        logits_tkCW *= (mass_tkW / sums_tkW)[:, :, None]
        logits_tkCW.scatter_(2, labels_tk1W, logits_tkCW.gather(2, labels_tk1W) - label_tkW[:, :, None])
        if smoothing:
            logits_tkCW -= shared_C1 * valid_tkW[:, :, None]
    return loss
