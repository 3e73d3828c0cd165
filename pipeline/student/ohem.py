"""Online hard example mining (Shrivastava, Gupta, Girshick, CVPR 2016), of pixels: labels of those that are hard alone.

Shapes: N crops of H,W pixels in C classes; logits N,C,h,w on the student's grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from segkd.pipeline.data.sample import IGNORE
from segkd.pipeline.resample import pixel_tiles
from segkd.storage.geometry import Mapping


def hard_labels(
    logits_NChw: Tensor,
    mapping: Mapping,
    labels_NHW: Tensor,
    below: float,
    least: float,
    class_weights_C: Tensor | None = None,
) -> Tensor:
    """``labels_NHW`` with :data:`IGNORE` where the logits, whose grid ``mapping`` places in the pixels, know the label.

    That is where its class has a probability of ``below`` or more, but for the share ``least`` of a crop's labelled
    pixels (rounded up) in which it has the smallest, which stay at any rate. Pixels whose class weighs 0 are not among
    the labelled ones, and are ignored. Each crop is judged by itself, so what one teaches does not depend on which
    others are in the batch, or on how many processes share it. A probability that is not a number is hard.
    """
    labelled_NHW = labels_NHW != IGNORE
    if class_weights_C is not None:
        labelled_NHW &= class_weights_C[labels_NHW.masked_fill(~labelled_NHW, 0)] > 0
    indices_N1HW = labels_NHW.masked_fill(~labelled_NHW, 0)[:, None]
    log_probs_NHW = torch.empty(labels_NHW.shape, device=logits_NChw.device)
    for rows, columns, logits_NCtu in pixel_tiles(logits_NChw, mapping, *labels_NHW.shape[1:]):
        met_N1tu = logits_NCtu.log_softmax(1).gather(1, indices_N1HW[..., rows, columns])
        log_probs_NHW[:, rows, columns] = met_N1tu[:, 0]
    easy_NHW = labelled_NHW & (log_probs_NHW >= math.log(below))
    counts_N = torch.stack([labelled_NHW.sum((1, 2)), (labelled_NHW & ~easy_NHW).sum((1, 2))], 1).tolist()
    for crop, (labelled, hard) in enumerate(counts_N):
        wanted = math.ceil(least * labelled)
        if hard < wanted:
            smallest = log_probs_NHW[crop][labelled_NHW[crop]].kthvalue(wanted).values
            easy_NHW[crop] &= log_probs_NHW[crop] > smallest
    return labels_NHW.masked_fill(easy_NHW | ~labelled_NHW, IGNORE)
