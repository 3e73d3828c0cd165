"""Intervals and verdicts of a sweep: against slow references, and their coverage on simulated data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from segkd.pipeline.ablation.statistics import (
    Interval,
    blocks_of,
    bootstrap,
    draw_blocks,
    mean_of,
    miou,
    paired_t,
    resampled_miou,
    tallies,
)
from segkd.pipeline.evaluation.metrics import ConfusionMatrix

CONFUSIONS = hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.just(3), st.just(3)), elements=st.integers(0, 4))


def reference_miou(counts_CC: npt.NDArray[np.int64], of: Sequence[int] | None = None) -> float:
    """Over all classes, or some of them."""
    matrix = ConfusionMatrix(len(counts_CC))
    matrix.counts = counts_CC
    iou = matrix.compute().iou
    known = [iou[c] for c in (range(len(counts_CC)) if of is None else of) if iou[c] is not None]
    return float(np.mean(known)) if known else np.nan


@given(CONFUSIONS)
def test_tallies_give_the_miou_of_confusion_matrices_one_by_one_and_added_up(counts_NCC: npt.NDArray[np.int64]) -> None:
    found = tallies(counts_NCC)
    np.testing.assert_allclose(miou(found), [reference_miou(counts) for counts in counts_NCC])
    np.testing.assert_allclose(miou(found.sum(0)), reference_miou(counts_NCC.sum(0)))


@given(CONFUSIONS, st.integers(1, 4))
def test_a_resample_is_scored_by_its_own_confusion_matrix(counts_NCC: npt.NDArray[np.int64], length: int) -> None:
    blocks = blocks_of(["clip"] * len(counts_NCC), length)
    draws_RB = draw_blocks(len(blocks), 5)
    slow = []
    for draws in draws_RB:
        total = np.zeros((3, 3), np.int64)
        for block, times in zip(blocks, draws, strict=True):
            for image in block:
                total += times * counts_NCC[image]
        # Of a class without labels there, which has some elsewhere, predictions are taken for ones of nothing.
        missed = (total.sum(1) == 0) & (counts_NCC.sum((0, 2)) > 0)
        slow.append(reference_miou(total, [c for c in range(3) if not missed[c]]))
    assert (draws_RB.sum(1) == len(blocks)).all()
    np.testing.assert_allclose(resampled_miou(tallies(counts_NCC), blocks, draws_RB), slow)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40).map(sorted), st.integers(1, 12))
def test_blocks_are_runs_of_one_group_and_hold_every_image_once(groups: list[str], length: int) -> None:
    blocks = blocks_of(groups, length)
    assert sorted(position for block in blocks for position in block) == list(range(len(groups)))
    for block in blocks:
        assert len({groups[position] for position in block}) == 1
        assert block == list(range(block[0], block[0] + len(block)))
        assert len(block) <= length
    for group in set(groups):
        sizes = [len(block) for block in blocks if groups[block[0]] == group]
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-groups.count(group) // length)


def test_frames_of_interleaved_groups_stay_with_their_group() -> None:
    assert blocks_of(["a", "b", "a", "b", "a"], 2) == [[0], [2, 4], [1, 3]]


def test_the_paired_interval_is_that_of_a_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 9):
        earlier, later = rng.normal(40, 2, count), rng.normal(41, 2, count)
        expected = stats.ttest_rel(later, earlier).confidence_interval(0.95)
        found = paired_t(list(later - earlier))
        assert found is not None
        np.testing.assert_allclose((found.low, found.high), (expected.low, expected.high))


def test_one_seed_has_a_mean_but_neither_spread_nor_interval() -> None:
    assert mean_of([40.5]).sd is None
    assert paired_t([1.5]) is None
    assert bootstrap([np.ones((3, 3, 2))], [np.ones((3, 3, 2))], ["a"] * 3, block=3, resamples=100) is None


def test_the_t_interval_holds_the_true_difference_in_95_of_100_sweeps() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(4000):
        shared = rng.normal(0, 3, 5)  # What a seed does to both arms is no matter.
        later, earlier = 41 + shared + rng.normal(0, 0.5, 5), 40 + shared + rng.normal(0, 0.5, 5)
        found = paired_t(list(later - earlier))
        assert found is not None
        held += found.low <= 1 <= found.high
    assert held / 4000 == pytest.approx(0.95, abs=0.012)


def clip(rng: np.random.Generator, scenes: int, frames: int, skill: float) -> tuple[npt.NDArray[np.float64], float]:
    """Tallies of a clip of two classes whose frames repeat their scene, and the skill's mIoU over endless clips."""
    difficulty = rng.uniform(-0.3, 0.3, scenes).repeat(frames)
    right = 1000 * (skill + difficulty)
    tallies_N3C = np.stack(
        [np.stack([right, right], 1), np.full((len(right), 2), 1000.0), np.full((len(right), 2), 1e3)], 1
    )
    return tallies_N3C, 100 * skill / (2 - skill)


def coverage(block: int) -> float:
    """How often the interval over images holds the true difference, for scenes of 8 nearly equal frames."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(120):
        (later, high), (earlier, low) = clip(rng, 40, 8, 0.6), clip(rng, 40, 8, 0.5)
        found = bootstrap([later], [earlier], ["clip"] * len(later), block=block, resamples=400)
        assert found is not None
        held += found.low <= high - low <= found.high
    return held / 120


def test_the_interval_over_images_holds_the_true_difference_where_blocks_are_scenes() -> None:
    assert 0.9 <= coverage(block=8) <= 0.99


def test_single_frames_would_feign_a_certainty_that_is_not_there() -> None:
    assert coverage(block=1) < 0.7


def test_paired_images_are_resampled_together() -> None:
    rng = np.random.default_rng(3)
    hard, _ = clip(rng, 30, 1, 0.5)
    easier = hard.copy()
    easier[:, 0] += 50  # The same images, each of them a little better.
    found = bootstrap([easier], [hard], ["clip"] * 30, block=1, resamples=500)
    assert found is not None
    alone = bootstrap([easier], [np.full_like(hard, 500.0)], ["clip"] * 30, block=1, resamples=500)
    assert alone is not None
    assert found.high - found.low < 0.3 * (alone.high - alone.low)
    assert found.low > 0


def test_a_class_without_labels_in_a_resample_is_out_of_it_for_both_arms() -> None:
    """Two arms that differ in one stray pixel of a class which only one of ten blocks shows."""
    counts_NCC = np.zeros((10, 11, 11), np.int64)
    for label in range(10):
        counts_NCC[:, label, label] = 100
    counts_NCC[0, 10, 10] = 100
    stray_NCC = counts_NCC.copy()
    stray_NCC[5, 0, [0, 10]] += -1, 1
    found = bootstrap([tallies(stray_NCC)], [tallies(counts_NCC)], ["clip"] * 10, block=1, resamples=500)
    assert found is not None
    assert -0.3 < found.low <= found.high <= 0
    # One that no image shows is an error wherever it is predicted.
    counts_NCC[0, 10, 10] = stray_NCC[0, 10, 10] = 0
    found = bootstrap([tallies(stray_NCC)], [tallies(counts_NCC)], ["clip"] * 10, block=1, resamples=500)
    assert found is not None
    assert found.low < -8


def test_seeds_are_averaged_under_the_same_resample() -> None:
    rng = np.random.default_rng(4)
    later, earlier = ([clip(rng, 20, 1, skill)[0] for _ in range(3)] for skill in (0.6, 0.5))
    found = bootstrap(later, earlier, ["clip"] * 20, block=2, resamples=300)
    blocks = blocks_of(["clip"] * 20, 2)
    draws_RB = draw_blocks(len(blocks), 300)
    slow = []
    for draws in draws_RB:
        images = [image for block, times in zip(blocks, draws, strict=True) for image in block * times]
        slow.append(
            np.mean([miou(a[images].sum(0)) - miou(b[images].sum(0)) for a, b in zip(later, earlier, strict=True)])
        )
    assert found is not None
    np.testing.assert_allclose((found.low, found.high), np.percentile(slow, (2.5, 97.5)))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.4, 0.4, "equal"),
        (0.1, 0.4, "equal"),
        (0.1, 0.6, "gain"),
        (0.7, 2.0, "gain"),
        (-2.0, -0.1, "loss"),
        (-0.1, 0.6, "undecided"),
        (-0.5, 0.2, "undecided"),
        (0.0, 3.0, "undecided"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert Interval(low=low, high=high).verdict(0.5) == verdict


@pytest.mark.parametrize(
    ("difference", "spread", "verdict", "least", "most"),
    [
        (0.0, 0.1, "equal", 0.99, 1.0),
        (0.5, 0.1, "equal", 0.0, 0.04),  # On the margin: 2.5 % are called equal, and no more.
        (2.0, 0.5, "gain", 0.99, 1.0),
        (-2.0, 0.5, "loss", 0.99, 1.0),
        (0.0, 1.0, "gain", 0.0, 0.04),
        (0.0, 2.0, "undecided", 0.9, 1.0),
    ],
)
def test_how_often_a_verdict_is_given(
    difference: float, spread: float, verdict: str, least: float, most: float
) -> None:
    rng = np.random.default_rng(5)
    given = 0
    for _ in range(1500):
        found = paired_t(list(rng.normal(difference, spread, 5)))
        assert found is not None
        given += found.verdict(0.5) == verdict
    assert least <= given / 1500 <= most
