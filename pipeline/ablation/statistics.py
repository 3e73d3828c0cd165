"""How sure a difference is: over seeds by a paired t interval, over images by a block bootstrap.

Shapes: R resamples; B blocks of images; tallies are (..., 3, C): per class how many pixels are right, labelled and
predicted, which is all that an mIoU needs of a confusion matrix and adds up over images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
"""Of all intervals."""

Verdict = Literal["gain", "loss", "equal", "undecided"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Where a difference lies, in mIoU."""

    low: float
    high: float

    def verdict(self, margin: float) -> Verdict:
        """``equal``: within ``margin`` of 0 (an equivalence test); else ``gain`` or ``loss`` if 0 lies outside.

        An interval that shows a difference too small to matter is equal.
        """
        if -margin < self.low and self.high < margin:
            return "equal"
        if self.low > 0:
            return "gain"
        return "loss" if self.high < 0 else "undecided"


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for one value."""
    count: int


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and spread of at least one value."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Mean(mean=float(np.mean(values)), sd=sd, count=len(values))


def paired_t(differences: Sequence[float]) -> Interval | None:
    """Student's interval for the mean of paired differences; None for fewer than two, which have no spread."""
    if len(differences) < 2:
        return None
    found = mean_of(differences)
    assert found.sd is not None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, found.count - 1)) * found.sd / math.sqrt(found.count)
    return Interval(low=found.mean - half, high=found.mean + half)


def blocks_of(groups: Sequence[str], length: int) -> list[list[int]]:
    """Positions in blocks of at most ``length`` consecutive ones of a group, of nearly equal sizes within it.

    Images stand in the order of their ids, so consecutive frames stand beside each other.
    """
    by_group: dict[str, list[int]] = {}
    for position, group in enumerate(groups):
        by_group.setdefault(group, []).append(position)
    blocks = []
    for positions in by_group.values():
        count = math.ceil(len(positions) / length)
        bounds = [len(positions) * k // count for k in range(count + 1)]
        blocks += [positions[low:high] for low, high in itertools.pairwise(bounds)]
    return blocks


def tallies(confusions_NCC: npt.NDArray[np.integer]) -> Floats:
    """Per image what an mIoU needs of its confusion matrix (rows labels, columns predictions): N,3,C."""
    right = np.einsum("ncc->nc", confusions_NCC)
    return np.stack([right, confusions_NCC.sum(2), confusions_NCC.sum(1)], 1).astype(np.float64)


def miou(tallies_3C: Floats) -> Floats:
    """In percent, over the classes that occur in labels or predictions; NaN where none does. Any leading axes."""
    right, labelled, predicted = np.moveaxis(tallies_3C, -2, 0)
    union = labelled + predicted - right
    iou = np.divide(right, union, out=np.zeros_like(right), where=union > 0)
    classes = (union > 0).sum(-1)
    mean: Floats = np.divide(100 * iou.sum(-1), classes, out=np.full(classes.shape, np.nan), where=classes > 0)
    return mean


def draw_blocks(blocks: int, resamples: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """R,B: how often each resample takes each block; as many as there are, with replacement."""
    return np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples)


def resampled_miou(tallies_N3C: Floats, blocks: Sequence[Sequence[int]], draws_RB: npt.NDArray[np.int64]) -> Floats:
    """R: the mIoU of each resample of the blocks, from its own confusion matrix.

    A class whose labels are in other blocks than those drawn is left out of it, whoever predicts it there: labels are
    the same for all arms, a few stray pixels are not, and would be an IoU of 0 for some arms and of nothing for others.
    One that no image shows counts where it is predicted, as in the score itself.
    """
    tallies_B3C = np.stack([tallies_N3C[list(block)].sum(0) for block in blocks])
    tallies_R3C = np.einsum("rb,bkc->rkc", draws_RB.astype(np.float64), tallies_B3C, optimize=True)
    missed_RC = (tallies_R3C[:, 1] == 0) & (tallies_N3C[:, 1].sum(0) > 0)
    tallies_R3C[:, 2][missed_RC] = 0
    return miou(tallies_R3C)


def bootstrap(
    later: Sequence[Floats], earlier: Sequence[Floats], groups: Sequence[str], *, block: int, resamples: int
) -> Interval | None:
    """The percentile interval over images of the difference in mIoU of two arms, a mean over paired seeds.

    ``later`` and ``earlier`` have tallies N,3,C of each seed over the same images, of which both take the same
    resamples. Blocks, not images, are drawn, because consecutive frames are nearly the same image (fixed blocks, as
    Carlstein 1986 has them). None for fewer than two blocks.
    """
    blocks = blocks_of(groups, block)
    if len(blocks) < 2:
        return None
    draws_RB = draw_blocks(len(blocks), resamples)
    differences_SR = [
        resampled_miou(after, blocks, draws_RB) - resampled_miou(before, blocks, draws_RB)
        for after, before in zip(later, earlier, strict=True)
    ]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.mean(differences_SR, 0), (tail, 100 - tail))
    return Interval(low=float(low), high=float(high))
