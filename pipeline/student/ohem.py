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


def mine_hard_pixels(
    logits_NChw: Tensor,
    mapping: Mapping,
    labels_NHW: Tensor,
    threshold: float,
    min_kept: float,
    class_weights_C: Tensor | None = None,
) -> tuple[Tensor, int, int]:
    """``labels_NHW`` with :data:`IGNORE` where the label is known already; how many pixels stay, of how many.

    ``mapping`` places the logits' grid in the pixels. A pixel is hard, and keeps its label, if its class has a
    probability below ``threshold``. A crop of which less than the share ``min_kept`` of the labelled pixels (rounded
    up) is hard keeps so many, those of the smallest probability. Pixels whose class weighs 0 are ignored and do not
    count as labelled. Each crop is mined by itself, so the result does not depend on what else is in the batch, or on
    how many processes share it. A probability that is not a number is hard.
    """
    labelled_NHW = labels_NHW != IGNORE
    if class_weights_C is not None:
        labelled_NHW &= class_weights_C[labels_NHW.masked_fill(~labelled_NHW, 0)] > 0
    indices_N1HW = labels_NHW.masked_fill(~labelled_NHW, 0)[:, None]
    log_probs_NHW = torch.empty(labels_NHW.shape, device=logits_NChw.device)
    for rows, columns, logits_NCtu in pixel_tiles(logits_NChw, mapping, *labels_NHW.shape[1:]):
        met_N1tu = logits_NCtu.log_softmax(1).gather(1, indices_N1HW[..., rows, columns])
        log_probs_NHW[:, rows, columns] = met_N1tu[:, 0]
    kept_NHW = labelled_NHW & ~(log_probs_NHW >= math.log(threshold))
    counts_N2 = torch.stack([labelled_NHW.sum((1, 2)), kept_NHW.sum((1, 2))], 1).tolist()
    kept_pixels = 0
    for crop, (labelled, hard) in enumerate(counts_N2):
        wanted = max(math.ceil(min_kept * labelled), hard)
        kept_pixels += wanted
        if hard < wanted:
            # Counted rather than compared with the last one that is kept: many may have a probability of exactly 1.
            places = labelled_NHW[crop].nonzero()
            order = log_probs_NHW[crop][labelled_NHW[crop]].sort(stable=True).indices
            kept_NHW[crop][tuple(places[order[:wanted]].T)] = True
    return labels_NHW.masked_fill(~kept_NHW, IGNORE), kept_pixels, sum(labelled for labelled, _ in counts_N2)
