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
    EXACT,
    SOFTMAX_REACH,
    TOP,
    CompandedDistribution,
    ExactDistribution,
    Raw,
    UniformSteps,
    coder_from_dict,
    coder_to_dict,
    from_float16,
    to_float16,
)
from segkd.storage.errors import CacheMismatchError, ConfigError, NonFiniteError

LADDERS = (
    CompandedDistribution(levels=(4.5, 27.33, 63.0, 255.0)),
    CompandedDistribution(exponent=1 / 12, levels=(9.0, 28.05, 60.0, 255.0)),
)
RUNGS = LADDERS[0].rungs

shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 12) | st.sampled_from([150, 1000]), st.integers(1, 4), st.integers(1, 4)
)


@st.composite
def log_distributions(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    """Log-probabilities: ordinary, extreme, one-hot with -inf, uniform, with ties."""
    shape = draw(shapes)
    kind = draw(st.sampled_from(["any", "uniform", "extreme"]))
    elements = {
        "any": st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0, 80.0]),
        "uniform": st.just(0.0),
        "extreme": st.floats(-(2.0**126), 2.0**126, width=32),
    }[kind]
    logits = draw(hnp.arrays(np.float32, shape, elements=elements)).astype(np.float64)
    if draw(st.booleans()):
        winner = draw(hnp.arrays(np.int64, (shape[0], 1, *shape[2:]), elements=st.integers(0, shape[1] - 1)))
        classes = np.arange(shape[1])[None, :, None, None]
        logits = np.where(classes == winner, logits, -np.inf)
    return log_softmax(logits, axis=1).astype(np.float32)


def slow_codes(log_probs: npt.NDArray[np.float32], coder: CompandedDistribution, rung: int) -> npt.NDArray[np.int64]:
    """The definition, code by code."""
    levels = coder.levels[rung // len(coder.floors)]
    u = np.exp(log_probs.astype(np.float64) * coder.exponent) * levels
    codes = np.zeros(log_probs.shape, np.int64)
    for n, c, y, x in np.ndindex(*log_probs.shape):
        rounded = int(np.floor(u[n, c, y, x] + 0.5))
        codes[n, c, y, x] = 0 if u[n, c, y, x] < coder.first else min(max(rounded, 1), 254)
        if int(np.argmax(log_probs[n, :, y, x])) == c:
            codes[n, c, y, x] = TOP
    rounded = codes.copy()
    for n, c, y, x in np.ndindex(*log_probs.shape):
        beside = [rounded[n, c, y, v] for v in (x - 1, x + 1) if 0 <= v < log_probs.shape[3]]
        if not any(beside) and u[n, c, y, x] < coder.alone and codes[n, c, y, x] != TOP:
            codes[n, c, y, x] = 0
    return codes


def slow_values(codes: npt.NDArray[np.uint8], coder: CompandedDistribution, rung: int) -> npt.NDArray[np.float64]:
    """Probabilities of codes as docs/format.md defines them, cell by cell."""
    levels, floor = coder.levels[rung // len(coder.floors)], coder.floors[rung % len(coder.floors)]
    p = np.zeros(codes.shape)
    for n, y, x in np.ndindex(codes.shape[0], *codes.shape[2:]):
        cell = codes[n, :, y, x].astype(int)
        present = min(int((cell > 0).sum()), 8)
        values = [
            present * (floor / levels) ** (1 / coder.exponent) if k == 0 else min(k / levels, 1) ** (1 / coder.exponent)
            for k in cell
        ]
        others = [value for value, k in zip(values, cell, strict=True) if k != TOP]
        top = max(1 - sum(others), 1.001 * max(others, default=0))
        p[n, :, y, x] = [top if k == TOP else value for value, k in zip(values, cell, strict=True)]
        p[n, :, y, x] /= p[n, :, y, x].sum()
    return p


on_any_ladder = pytest.mark.parametrize("coder", LADDERS, ids=["T=1", "T=1,4"])


@on_any_ladder
@settings(max_examples=40)
@given(log_distributions(), st.integers(0, RUNGS - 1))
def test_codes_are_rounded_powers_with_the_argmax_marked(
    coder: CompandedDistribution, values: npt.NDArray[np.float32], rung: int
) -> None:
    codes = coder.encode(values, np.full(len(values), rung))
    expected = slow_codes(values, coder, rung)
    assert codes.dtype == np.uint8
    # A value that lies on a threshold up to rounding may fall on either side of it, and change what is alone beside it.
    u = coder.levels[rung // len(coder.floors)] * np.exp(values.astype(np.float64) * coder.exponent)
    near = np.abs(u - 0.5 - np.round(u - 0.5)) < 1e-4 * np.maximum(u, 1)
    near |= (np.abs(u - coder.first) < 1e-4) | (np.abs(u - coder.alone) < 1e-4)
    near[..., 1:] |= near[..., :-1].copy()
    near[..., :-1] |= near[..., 1:].copy()
    np.testing.assert_array_equal(codes[~near], expected[~near])


@on_any_ladder
@settings(max_examples=60)
@given(log_distributions(), st.integers(0, RUNGS - 1))
def test_numpy_and_torch_give_equal_codes(
    coder: CompandedDistribution, values: npt.NDArray[np.float32], rung: int
) -> None:
    codes = coder.encode(torch.from_numpy(values), torch.full((len(values),), rung))
    np.testing.assert_array_equal(codes.numpy(), coder.encode(values, np.full(len(values), rung)))
    exact = to_float16(torch.from_numpy(values))
    np.testing.assert_array_equal(exact.numpy(), to_float16(values))


@on_any_ladder
@settings(max_examples=60)
@given(log_distributions(), st.integers(0, RUNGS - 1))
def test_decoding_gives_a_finite_distribution_with_the_same_argmax(
    coder: CompandedDistribution, values: npt.NDArray[np.float32], rung: int
) -> None:
    rungs = np.full(len(values), rung)
    codes = coder.encode(values, rungs)
    for decoded in (coder.decode(codes, rungs), from_float16(to_float16(values))):
        assert decoded.dtype == np.float32
        assert np.isfinite(decoded).all()
        np.testing.assert_allclose(np.exp(decoded.astype(np.float64)).sum(1), 1, atol=1e-4)
        np.testing.assert_array_equal(decoded.argmax(1), values.argmax(1))


@on_any_ladder
@settings(max_examples=25)
@given(log_distributions(), st.integers(0, RUNGS - 1))
def test_codes_decode_to_what_the_format_page_says(
    coder: CompandedDistribution, values: npt.NDArray[np.float32], rung: int
) -> None:
    rungs = np.full(len(values), rung)
    codes = coder.encode(values, rungs)
    expected = slow_values(codes, coder, rung)
    np.testing.assert_allclose(np.exp(coder.decode(codes, rungs)), expected, rtol=2e-4, atol=2e-5)


@on_any_ladder
def test_cells_of_padding_decode_to_something_finite(coder: CompandedDistribution) -> None:
    codes = np.zeros((2, 5, 2, 2), np.uint8)
    assert np.isfinite(coder.decode(codes, np.array([0, RUNGS - 1]))).all()
    assert np.isfinite(coder.decode(codes.astype(np.float16), np.array([EXACT, EXACT]))).all()


@on_any_ladder
def test_every_table_is_monotone(coder: CompandedDistribution) -> None:
    thresholds, logs = coder._thresholds, coder._logs
    assert (np.diff(thresholds) > 0).all()
    # A power is flat where a code would stand for more than certainty.
    assert (np.diff(logs, axis=1) >= 0).all()
    for rung in range(coder.rungs):
        levels = int(coder.levels[rung // len(coder.floors)])
        assert (np.diff(logs[rung, : min(levels, 254)]) > 0).all()


@pytest.mark.parametrize("classes", [2, 11, 150, 1000, 65535])
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 4.0), (20.0,)])
@pytest.mark.parametrize("max_kl", [1e-6, 1e-3, 0.1])
def test_a_ladder_ascends_and_fits_a_byte(classes: int, temperatures: tuple[float, ...], max_kl: float) -> None:
    coder = CompandedDistribution.for_bound(max_kl, classes, temperatures)
    assert (np.diff(coder.levels) > 0).all()
    assert coder.rungs <= EXACT  # which is the number of none of them


def test_a_ladder_ends_with_all_the_levels_that_a_byte_holds() -> None:
    for classes in (2, 11, 1000):
        for max_kl in (1e-6, 1e-3, 0.1):
            assert CompandedDistribution.for_bound(max_kl, classes).levels[-1] == pytest.approx(254 * 2**0.5, rel=1e-3)


def test_each_sample_is_coded_and_decoded_on_its_own_rung() -> None:
    values = log_softmax(np.random.default_rng(0).normal(size=(3, 5, 4, 4)) * 3, axis=1).astype(np.float32)
    coder, rungs = LADDERS[0], np.array([0, 9, 17])
    codes = coder.encode(values, rungs)
    together = coder.decode(codes, rungs)
    for k in range(3):
        np.testing.assert_array_equal(codes[k : k + 1], coder.encode(values[k : k + 1], rungs[k : k + 1]))
        np.testing.assert_array_equal(together[k], coder.decode(codes[k : k + 1], rungs[k : k + 1])[0])
    np.testing.assert_allclose(
        coder.decode(torch.from_numpy(codes), torch.from_numpy(rungs)).numpy(), together, atol=2e-6
    )


def test_the_floor_is_the_one_that_costs_least() -> None:
    values = log_softmax(np.random.default_rng(2).normal(size=(1, 12, 40, 40)) * 4, axis=1).astype(np.float32)
    coder, level = LADDERS[0], np.array([1])
    codes = coder.encode(values, level * len(coder.floors))
    costs = []
    for floor in range(len(coder.floors)):
        decoded = coder.decode(codes, level * len(coder.floors) + floor)
        costs.append(float((np.exp(values) * (values - decoded)).sum(1).mean()))
    assert int(coder.rungs_of(level, values, codes)[0]) == len(coder.floors) + int(np.argmin(costs))


def test_the_cost_in_kl_falls_with_the_levels_as_the_fisher_rao_metric_says() -> None:
    logits = np.random.default_rng(1).normal(size=(1, 10, 64, 64)) * 2
    values = log_softmax(logits, axis=1).astype(np.float32)
    coder, costs = LADDERS[0], []
    for level in range(4):
        codes = coder.encode(values, np.array([level * len(coder.floors)]))
        decoded = coder.decode(codes, np.asarray(coder.rungs_of(np.array([level]), values, codes)))
        costs.append(float((np.exp(values) * (values - decoded)).sum(1).mean()))
    # A rounded root is off by a uniform error of variance step^2 / 12; KL = 2 sum (delta sqrt p)^2.
    assert sorted(costs, reverse=True) == costs
    assert costs[3] == pytest.approx(2 * 10 / 12 / coder.levels[3] ** 2, rel=0.4)


@settings(max_examples=40)
@given(log_distributions())
def test_float16_is_exact_to_eleven_bits(values: npt.NDArray[np.float32]) -> None:
    below = values.astype(np.float64) - values.max(axis=1, keepdims=True)
    kept = to_float16(values)
    assert kept.dtype == np.float16
    expected = np.maximum(below, -65504)
    np.testing.assert_array_less(np.abs(kept - expected), np.abs(expected) * 2.0**-11 + 2.0**-18)


def test_classes_that_float16_cannot_tell_apart_keep_their_argmax() -> None:
    values = np.array([-0.69314724, -0.69314718, -20.0], np.float32).reshape(1, 3, 1, 1)
    assert values.argmax() == 1
    assert from_float16(to_float16(values)).argmax() == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("coder", [*LADDERS, ExactDistribution()])
@pytest.mark.parametrize("library", [np.asarray, torch.asarray])
def test_nan_and_infinity_are_refused(bad: float, coder: CompandedDistribution, library: type) -> None:
    values = np.full((1, 3, 2, 2), -1.0986, np.float32)
    values[0, 1, 1, 0] = bad
    message = (
        "^log-probabilities with NaN or \\+inf cannot be coded; look at the teacher's weights and its preprocessing$"
    )
    with pytest.raises(NonFiniteError, match=message):
        coder.encode(library(values), library(np.zeros(1, np.int64)))


def test_as_many_classes_as_16_bits_number() -> None:
    values = log_softmax(np.random.default_rng(3).normal(size=(1, 65535, 1, 2)) * 0.3, axis=1).astype(np.float32)
    coder = CompandedDistribution.for_bound(1e-3, 65535)
    rungs = np.array([coder.rungs - 1])
    codes = coder.encode(values, rungs)
    decoded = coder.decode(codes, np.asarray(coder.rungs_of(np.array([len(coder.levels) - 1]), values, codes)))
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded.argmax(1), values.argmax(1))


@settings(max_examples=50)
@given(hnp.arrays(np.float32, (2, 1, 3, 3), elements=st.floats(0, 1.4140625, width=32)))
def test_uniform_steps_are_off_by_half_a_step_at_most(values: npt.NDArray[np.float32]) -> None:
    coder = UniformSteps(reach=(SOFTMAX_REACH, 8.0))
    for rung in range(2):
        codes = coder.encode(values, np.full(2, rung))
        decoded = coder.decode(codes, np.full(2, rung))
        assert np.abs(decoded - values).max() <= coder.step(rung) / 2 * (1 + 1e-5)
        torch_codes = coder.encode(torch.from_numpy(values), torch.full((2,), rung))
        np.testing.assert_array_equal(torch_codes.numpy(), codes)


def test_values_beyond_the_reach_are_clipped_to_it() -> None:
    coder = UniformSteps(reach=(1.0, 4.0))
    decoded = coder.decode(coder.encode(np.full((1, 1, 1, 1), 3.0, np.float32), np.array([0])), np.array([0]))
    assert decoded.item() == pytest.approx(1.0)


@pytest.mark.parametrize("coder", [*LADDERS, ExactDistribution(), UniformSteps(reach=(1.0, 2.0)), Raw()])
def test_a_coder_survives_json(coder: CompandedDistribution | UniformSteps | Raw) -> None:
    assert coder_from_dict(json.loads(json.dumps(coder_to_dict(coder)))) == coder


def test_an_unknown_coder_is_refused() -> None:
    with pytest.raises(CacheMismatchError, match="the cache is coded with 'wavelet'; this version of segkd reads"):
        coder_from_dict({"kind": "wavelet"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": ()}, r"levels must be between 1 and 1e6, got \[\]"),
        ({"levels": (0.5,)}, r"levels must be between 1 and 1e6, got \[0.5\]"),
        ({"floors": (1.0,)}, r"floors must lie between 0 and 1 levels, got \[1.0\]"),
        ({"levels": tuple(range(2, 60))}, "levels and floors make 290 rungs; a ladder has at most 255"),
    ],
)
def test_a_ladder_out_of_range_is_refused(fields: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        CompandedDistribution(**fields)
