"""Targets: what is kept, on which rung, and what keeping it costs, against slow definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.models.network import Grid
from segkd.pipeline.teacher.coded import Coded, code, code_targets
from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.targets import TARGETS, Output, kl_divergence
from segkd.storage.coding import EXACT, CompandedDistribution
from segkd.storage.errors import CacheError, ConfigError, NonFiniteError
from segkd.storage.spec import TargetSpec

SIZE = (40, 56)
MAPPING = Grid(stride=8).mapping(*SIZE)


def log_probs(count: int = 2, sharpness: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 6, *MAPPING.shape, generator=generator) * sharpness).log_softmax(1)


def output(values: Tensor) -> Output:
    return Output(log_probs_NChw=values, mapping=MAPPING, image_size=SIZE)


def coded_soft(values: Tensor, **fields: Any) -> tuple[TargetSpec, Coded, Tensor]:
    """The distributions as a cache with these settings keeps them, and what a reader sees."""
    spec = TARGETS["soft"]().spec(CacheConfig(**fields), values.shape[1], 8)
    coded, decoded = code(TARGETS["soft"](), spec, output(values), [f"s{k}" for k in range(len(values))])
    return spec, coded, decoded


def slow_kl(values: Tensor, decoded: Tensor, temperature: float, *, pixels: bool) -> npt.NDArray[np.float64]:
    """Independently: torch's own interpolation, scipy's softmax, numpy's sums."""
    scores = [v.double() for v in (values, decoded)]
    if pixels:
        scores = [F.interpolate(v, size=SIZE, mode="bilinear", align_corners=False) for v in scores]
    p, q = (log_softmax(v.numpy() / temperature, axis=1) for v in scores)
    return np.asarray((np.exp(p) * (p - q)).sum(1).mean((1, 2)))


def test_the_cost_is_the_kl_of_the_upsampled_distributions() -> None:
    values = log_probs()
    _, coded, decoded = coded_soft(values, max_kl=1e-2, temperatures=(1.0, 4.0))
    for temperature, suffix in ((1.0, ""), (4.0, "_t4")):
        for place in ("cells", "pixels"):
            expected = slow_kl(values, decoded, temperature, pixels=place == "pixels")
            np.testing.assert_allclose(coded.measures[f"kl_{place}{suffix}"].numpy(), expected, rtol=1e-3)
    up = [F.interpolate(v.double(), size=SIZE, mode="bilinear", align_corners=False) for v in (values, decoded)]
    changed = (up[0].argmax(1) != up[1].argmax(1)).double().mean((1, 2))
    torch.testing.assert_close(coded.measures["changed_pixels"], changed)
    p = values.double().exp()
    torch.testing.assert_close(coded.measures["entropy"], -(p * p.log()).sum(1).mean((1, 2)), rtol=1e-5, atol=0)
    torch.testing.assert_close(coded.measures["confidence"], p.amax(1).mean((1, 2)), rtol=1e-5, atol=0)
    bounded = [value for name, value in coded.measures.items() if name.startswith("kl")]
    assert torch.equal(coded.errors, torch.stack(bounded).amax(0))


@st.composite
def teachers(draw: st.DrawFn) -> Tensor:
    """A teacher's output for two images: any number of classes, sure or not, with classes that are impossible."""
    classes = draw(st.sampled_from([2, 3, 11, 40, 300]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharpness = draw(st.sampled_from([0.0, 0.01, 1.0, 4.0, 20.0, 1e4]))
    logits = torch.randn(2, classes, *MAPPING.shape, generator=generator) * sharpness
    if draw(st.booleans()):
        logits[:, 0] = -torch.inf
    if draw(st.booleans()):
        logits = torch.where(logits == logits.amax(1, keepdim=True), logits, -torch.inf)
    return logits.log_softmax(1)


@settings(max_examples=60)
@given(
    teachers(),
    st.sampled_from([1e-7, 1e-4, 1e-3, 3e-2]),
    st.sampled_from([(1.0,), (1.0, 4.0), (3.0,)]),
    st.sampled_from(["plain", "exact"]),
)
def test_every_sample_keeps_the_bound_or_is_exact(
    values: Tensor, max_kl: float, temperatures: tuple[float, ...], profile: str
) -> None:
    spec, coded, decoded = coded_soft(values, max_kl=max_kl, temperatures=temperatures, profile=profile)
    assert torch.equal(decoded.argmax(1), values.argmax(1))
    for k in range(2):
        exact = profile == "exact" or int(coded.rungs[k]) == EXACT
        kept = torch.int16 if max(temperatures) > 1 and max_kl >= 3e-4 else torch.uint8
        assert coded.codes[k].dtype == (torch.float16 if exact else kept)
        shown = spec.coder.decode(coded.codes[k][None], coded.rungs[k : k + 1].clamp_max(spec.coder.rungs - 1))
        torch.testing.assert_close(shown[0], decoded[k])
        for temperature in temperatures:
            for pixels in (False, True):
                finite = values[k : k + 1].clamp_min(-1e30)
                cost = float(slow_kl(finite, decoded[k : k + 1], temperature, pixels=pixels)[0])
                assert exact or cost <= max_kl * (1 + 1e-3) + 1e-7


@pytest.mark.parametrize(
    ("classes", "gap", "spread", "max_kl", "temperature"),
    [
        (150, 18, 1.0, 1e-5, 1.0),
        (1000, 24, 0.1, 1e-5, 1.0),
        (1000, 8, 0.1, 1e-4, 0.5),
        (5000, 24, 0.1, 1e-4, 1.0),
        (5000, 18, 0.1, 1e-3, 1.0),
    ],
)
def test_many_improbable_classes_count(
    classes: int, gap: float, spread: float, max_kl: float, temperature: float
) -> None:
    """float32 loses what many small probabilities add to one that is nearly 1."""
    logits = torch.randn(1, classes, *MAPPING.shape, generator=torch.Generator().manual_seed(0)) * spread
    logits[:, 0] += gap
    values = logits.log_softmax(1)
    _, coded, decoded = coded_soft(values, max_kl=max_kl, temperatures=(temperature,), targets=("soft",))
    suffix = "" if temperature == 1 else f"_t{temperature:g}"
    for place in ("cells", "pixels"):
        cost = slow_kl(values, decoded, temperature, pixels=place == "pixels")
        np.testing.assert_allclose(coded.measures[f"kl_{place}{suffix}"].numpy(), cost, rtol=1e-3)
        assert cost <= max_kl


@pytest.mark.parametrize("temperature", [8.0, 20.0])
def test_an_impossible_class_is_impossible_at_every_temperature(temperature: float) -> None:
    logits = torch.randn(1, 150, *MAPPING.shape, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 5:] = -torch.inf
    values = logits.log_softmax(1)
    _, coded, decoded = coded_soft(values, temperatures=(temperature,))
    cost = slow_kl(values.clamp_min(-1e30), decoded, temperature, pixels=False)
    np.testing.assert_allclose(coded.measures[f"kl_cells_t{temperature:g}"].numpy(), cost, rtol=1e-3, atol=1e-9)


def test_each_sample_takes_the_coarsest_level_that_keeps_the_bound_over_its_cells() -> None:
    # Smooth, so that its pixels cost less than its cells.
    coarse = torch.randn(1, 6, 2, 2, generator=torch.Generator().manual_seed(0)) * 3
    smooth = F.interpolate(coarse, size=MAPPING.shape, mode="bilinear", align_corners=True)
    values = torch.cat([smooth, smooth / 2, smooth / 10]).log_softmax(1)
    spec, coded, _ = coded_soft(values, max_kl=1.5e-3)
    coder = spec.coder
    assert isinstance(coder, CompandedDistribution)
    for k in range(3):
        costs = []
        for level in range(len(coder.levels)):
            codes = coder.encode(values[k : k + 1], torch.tensor([level * len(coder.floors)]))
            rung = coder.rungs_of(torch.tensor([level]), values[k : k + 1], codes)
            costs.append(float(slow_kl(values[k : k + 1], coder.decode(codes, rung), 1.0, pixels=False)[0]))
        coarsest = next(level for level, cost in enumerate(costs) if cost <= 1.5e-3)
        assert int(coded.rungs[k]) // len(coder.floors) == coarsest
    assert len(set(coded.rungs.tolist())) > 1


def test_a_map_as_rough_as_noise_is_coded_rather_than_kept_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(3, 3, *MAPPING.shape, generator=generator) * 3).log_softmax(1)
    for max_kl in (1e-3, 3e-4):
        _, coded, _ = coded_soft(values, max_kl=max_kl)
        assert (coded.rungs != EXACT).all()
        assert (coded.errors <= max_kl).all()


def test_a_sample_is_coded_alone_as_in_a_batch() -> None:
    values = torch.cat([log_probs(1, 2.0), log_probs(1, 20.0), log_probs(1, 0.3)])
    _, together, _ = coded_soft(values, max_kl=1e-5)
    for k in range(3):
        _, alone, _ = coded_soft(values[k : k + 1], max_kl=1e-5)
        assert torch.equal(alone.codes[0], together.codes[k])
        assert int(alone.rungs[0]) == int(together.rungs[k])


def test_a_sample_that_cannot_be_kept_within_the_bound_is_named_when_asked() -> None:
    message = (
        r"^s0: soft is off by \S+ at best, the bound is 1e-12; allow more with cache.max_kl, "
        r'or keep such samples exactly with cache.beyond = "exact"$'
    )
    with pytest.raises(CacheError, match=message):
        coded_soft(log_probs(), max_kl=1e-12, beyond="stop")
    _, coded, _ = coded_soft(log_probs(), max_kl=1e-12)
    assert coded.rungs.tolist() == [EXACT, EXACT]


def test_minus_infinity_is_measured_as_a_probability_of_nothing() -> None:
    values = log_probs(1)
    values[:, 2] = -torch.inf
    _, coded, _ = coded_soft(values.log_softmax(1), max_kl=3e-2)
    assert coded.errors.isfinite().all()
    assert (coded.codes[0][2] == 0).all()


@given(st.integers(0, 1000))
def test_kl_is_never_negative_and_zero_for_equals(seed: int) -> None:
    p = log_probs(1, 5.0, seed)
    assert (kl_divergence(p, log_probs(1, 5.0, seed + 1)) >= 0).all()
    assert kl_divergence(p, p).abs().max() == 0


def slow_first_order(features: Tensor) -> Tensor:
    """Cell by cell over the neighbours that exist."""
    height, width = features.shape[1:]
    result = torch.zeros(height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            distances = [
                torch.sqrt(((features[:, y, x] - features[:, v, u]) ** 2).sum() + 1e-6) - 1e-3
                for v in range(max(y - 1, 0), min(y + 2, height))
                for u in range(max(x - 1, 0), min(x + 2, width))
                if (v, u) != (y, x)
            ]
            result[y, x] = torch.stack(distances).mean()
    return result


@pytest.mark.parametrize("name", ["first_order", "first_order_logits"])
def test_first_order_maps_are_kept_within_their_bound(name: str) -> None:
    values = log_probs(2)
    config = CacheConfig(targets=("soft", name), max_kl=3e-2)
    specs = {target: TARGETS[target]().spec(config, 6, 8) for target in ("soft", name)}
    coded_targets = code_targets(specs, values, MAPPING, SIZE, ["a", "b"])
    spec, coded = specs[name], coded_targets[name]
    decoded = spec.coder.decode(torch.stack(list(coded.codes)), coded.rungs)
    features = (
        values.double().exp() if name == "first_order" else values.double() - values.double().mean(1, keepdim=True)
    )
    expected = torch.stack([slow_first_order(sample) for sample in features])
    error = (decoded[:, 0] - expected).abs().amax((1, 2))
    assert (error <= spec.bound).all()
    torch.testing.assert_close(coded.errors.double(), error, rtol=1e-2, atol=1e-5)
    soft = (
        specs["soft"].coder.decode(torch.stack(list(coded_targets["soft"].codes)), coded_targets["soft"].rungs).double()
    )
    kept = soft.exp() if name == "first_order" else soft - soft.mean(1, keepdim=True)
    recomputed = (torch.stack([slow_first_order(sample) for sample in kept]) - expected).abs()
    torch.testing.assert_close(
        coded.measures["recomputed_largest_error"].double(), recomputed.amax((1, 2)), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(coded.measures["recomputed_mean_error"], recomputed.mean((1, 2)), rtol=1e-3, atol=1e-5)


def test_a_first_order_map_that_its_steps_do_not_reach_is_refused() -> None:
    values = torch.stack([torch.full(MAPPING.shape, -1e5), torch.zeros(MAPPING.shape)])[None]
    values[..., ::2, :] = values[..., ::2, :].flip(1)
    spec = TARGETS["first_order_logits"]().spec(CacheConfig(), 2, 8)
    message = '^a: first_order_logits is off by .* at best, the bound is 0.25; keep "first_order" instead$'
    with pytest.raises(CacheError, match=message):
        code(TARGETS["first_order_logits"](), spec, output(values), ["a"])


def test_a_class_of_probability_zero_has_no_first_order_map_of_logits() -> None:
    values = log_probs(1)
    values[:, 2] = -torch.inf
    message = (
        "^first_order_logits is not finite where the teacher gives a class the probability 0; "
        'keep the target "first_order" instead$'
    )
    with pytest.raises(NonFiniteError, match=message):
        TARGETS["first_order_logits"]().values(output(values))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_kl": 0.0}, "max_kl must be positive, got 0.0"),
        ({"max_kl": float("inf")}, "max_kl must be positive, got inf"),
        ({"max_kl": float("nan")}, "max_kl must be positive, got nan"),
        ({"temperatures": ()}, r"temperatures must lie between 0.1 and 100, got \[\]"),
        ({"temperatures": (1.0, 0.0)}, r"temperatures must lie between 0.1 and 100, got \[1.0, 0.0\]"),
        ({"temperatures": (float("nan"),)}, r"temperatures must lie between 0.1 and 100, got \[nan\]"),
        ({"temperatures": (1.0, 1.0000001)}, r"temperatures must differ, got \[1.0, 1.0000001\]"),
        (
            {"max_first_order_error": float("nan")},
            "max_first_order_error must be at least 0.003, which takes all 255 steps, got nan",
        ),
        ({"tile": 100_000}, "tile must be 1 to 1024 cells, or 0 for a side that suits the samples, got 100000"),
        (
            {"max_first_order_error": 1e-3},
            "max_first_order_error must be at least 0.003, which takes all 255 steps, got 0.001",
        ),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"roles": ()}, "roles and targets must each name at least one"),
    ],
)
def test_a_configuration_out_of_range_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        CacheConfig(**fields)  # type: ignore[arg-type]
