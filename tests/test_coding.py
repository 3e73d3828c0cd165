"""Coders: the same codes everywhere, the argmax kept, the cost as small as claimed, tables both ways."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax

from segkd.storage.coding import (
    SOFTMAX_REACH,
    CompandedDistribution,
    Raw,
    UniformSteps,
    coder_from_dict,
    coder_to_dict,
)
from segkd.storage.errors import CacheMismatchError, ConfigError

LADDER = CompandedDistribution(levels=(15, 63, 255))

shapes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))


@st.composite
def log_distributions(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    """Log-probabilities: ordinary, extreme, one-hot with -inf, uniform, with ties."""
    shape = draw(shapes)
    logits = draw(
        hnp.arrays(np.float32, shape, elements=st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0, 80.0]))
    )
    if draw(st.booleans()):
        winner = draw(hnp.arrays(np.int64, (shape[0], 1, *shape[2:]), elements=st.integers(0, shape[1] - 1)))
        classes = np.arange(shape[1])[None, :, None, None]
        logits = np.where(classes == winner, logits, -np.inf)
    return log_softmax(logits, axis=1).astype(np.float32)


def slow_codes(log_probs: npt.NDArray[np.float32], levels: int) -> npt.NDArray[np.int64]:
    """The definition, cell by cell: round sqrt(p) to a level, then raise the argmax's code as little as is needed."""
    codes = np.zeros(log_probs.shape, np.int64)
    for n, y, x in np.ndindex(log_probs.shape[0], *log_probs.shape[2:]):
        cell = [int(np.floor(levels * np.exp(float(v) / 2) + 0.5)) for v in log_probs[n, :, y, x]]
        top = int(np.argmax(log_probs[n, :, y, x]))
        while int(np.argmax(cell)) != top:
            cell[top] += 1
        codes[n, :, y, x] = cell
    return codes


@given(log_distributions(), st.integers(0, 2))
def test_codes_are_the_rounded_square_roots_with_the_argmax_kept(values: npt.NDArray[np.float32], rung: int) -> None:
    codes = LADDER.encode(values, rung)
    expected = slow_codes(values, LADDER.levels[rung])
    assert codes.dtype == np.uint8
    # A value that lies on a threshold up to rounding may fall on either side of it.
    root = LADDER.levels[rung] * np.exp(values.astype(np.float64) / 2) + 0.5
    on_threshold = np.abs(root - np.round(root)) < 1e-4
    touched = on_threshold.any(axis=1, keepdims=True) & np.ones_like(on_threshold)
    np.testing.assert_array_equal(codes[~touched], expected[~touched])


@given(log_distributions(), st.integers(0, 2))
def test_numpy_and_torch_give_equal_codes(values: npt.NDArray[np.float32], rung: int) -> None:
    np.testing.assert_array_equal(LADDER.encode(torch.from_numpy(values), rung).numpy(), LADDER.encode(values, rung))


@given(log_distributions(), st.integers(0, 2))
def test_decoding_gives_a_finite_distribution_with_the_same_argmax(values: npt.NDArray[np.float32], rung: int) -> None:
    rungs = np.full(len(values), rung)
    decoded = LADDER.decode(LADDER.encode(values, rung), rungs)
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(np.exp(decoded.astype(np.float64)).sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(decoded.argmax(1), values.argmax(1))


def test_each_sample_is_decoded_on_its_own_rung() -> None:
    values = log_softmax(np.random.default_rng(0).normal(size=(3, 5, 4, 4)), axis=1).astype(np.float32)
    codes = np.concatenate([LADDER.encode(values[k : k + 1], k) for k in range(3)])
    together = LADDER.decode(codes, np.arange(3))
    for k in range(3):
        np.testing.assert_array_equal(together[k], LADDER.decode(codes[k : k + 1], np.array([k]))[0])
    np.testing.assert_allclose(LADDER.decode(torch.from_numpy(codes), torch.arange(3)).numpy(), together, atol=2e-6)


def test_the_cost_in_kl_falls_with_the_levels_as_the_fisher_rao_metric_says() -> None:
    logits = np.random.default_rng(1).normal(size=(1, 10, 64, 64)) * 2
    values = log_softmax(logits, axis=1).astype(np.float32)
    costs = []
    for rung in range(3):
        decoded = LADDER.decode(LADDER.encode(values, rung), np.array([rung]))
        costs.append(float((np.exp(values) * (values - decoded)).sum(1).mean()))
    # A rounded root is off by a uniform error of variance step^2 / 12; KL = 2 sum (delta sqrt p)^2.
    predicted = [2 * 10 / 12 / levels**2 for levels in LADDER.levels]
    assert costs[0] > costs[1] > costs[2]
    assert costs[2] == pytest.approx(predicted[2], rel=0.4)


@settings(max_examples=50)
@given(hnp.arrays(np.float32, (2, 1, 3, 3), elements=st.floats(0, 1.4140625, width=32)))
def test_uniform_steps_are_off_by_half_a_step_at_most(values: npt.NDArray[np.float32]) -> None:
    coder = UniformSteps(reach=(SOFTMAX_REACH, 8.0))
    for rung in range(2):
        decoded = coder.decode(coder.encode(values, rung), np.full(2, rung))
        assert np.abs(decoded - values).max() <= coder.step(rung) / 2 * (1 + 1e-5)
        torch_codes = coder.encode(torch.from_numpy(values), rung)
        np.testing.assert_array_equal(torch_codes.numpy(), coder.encode(values, rung))


def test_values_beyond_the_reach_are_clipped_to_it() -> None:
    coder = UniformSteps(reach=(1.0, 4.0))
    decoded = coder.decode(coder.encode(np.full((1, 1, 1, 1), 3.0, np.float32), 0), np.array([0]))
    assert decoded.item() == pytest.approx(1.0)


@pytest.mark.parametrize("coder", [LADDER, UniformSteps(reach=(1.0, 2.0)), Raw()])
def test_a_coder_survives_json(coder: CompandedDistribution | UniformSteps | Raw) -> None:
    assert coder_from_dict(json.loads(json.dumps(coder_to_dict(coder)))) == coder


def test_an_unknown_coder_is_refused() -> None:
    with pytest.raises(CacheMismatchError, match="the cache is coded with 'wavelet'; this version of segkd reads"):
        coder_from_dict({"kind": "wavelet"})


@pytest.mark.parametrize("levels", [(), (2,), (256,)])
def test_levels_out_of_range_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"levels must be between 3 and 255, got \["):
        CompandedDistribution(levels=levels)
