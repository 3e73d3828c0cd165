"""Targets: what is kept, on which rung, and what keeping it costs, against slow definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.models.network import Grid
from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.targets import TARGETS, code, kl_divergence
from segkd.storage.errors import ConfigError, NonFiniteError

SIZE = (40, 56)
MAPPING = Grid(stride=8).mapping(*SIZE)


def log_probs(count: int = 2, sharpness: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 6, *MAPPING.shape, generator=generator) * sharpness).log_softmax(1)


def test_the_cost_is_the_kl_of_the_upsampled_distributions() -> None:
    config = CacheConfig(levels=(31,), max_kl=10.0)
    target, spec = TARGETS["soft"](), TARGETS["soft"]().spec(config, 6)
    values = log_probs()
    coded = code(target, spec, values, MAPPING, SIZE)
    decoded = spec.coder.decode(coded.codes, coded.rungs)
    # Independently: torch's own interpolation, scipy's softmax, numpy's sums.
    up = [F.interpolate(v.double(), size=SIZE, mode="bilinear", align_corners=False).numpy() for v in (values, decoded)]
    p, q = (log_softmax(v, axis=1) for v in up)
    kl = (np.exp(p) * (p - q)).sum(1).mean((1, 2))
    np.testing.assert_allclose(coded.measures["kl_pixels"].numpy(), kl, rtol=1e-3)
    changed = (p.argmax(1) != q.argmax(1)).mean((1, 2))
    np.testing.assert_allclose(coded.measures["changed_pixels"].numpy(), changed, atol=1e-9)
    cells = (values.exp() * (values - decoded)).sum(1).mean((1, 2))
    np.testing.assert_allclose(coded.measures["kl_cells"].numpy(), cells.numpy(), rtol=1e-3)
    assert torch.equal(coded.errors, torch.maximum(coded.measures["kl_cells"], coded.measures["kl_pixels"]))


def test_each_sample_takes_the_first_rung_that_keeps_the_bound() -> None:
    config = CacheConfig(levels=(15, 31, 63, 255), max_kl=1.5e-3)
    target, spec = TARGETS["soft"](), TARGETS["soft"]().spec(config, 6)
    values = torch.cat([log_probs(1, 2.0), log_probs(1, 1.0), log_probs(1, 0.3)])
    coded = code(target, spec, values, MAPPING, SIZE)
    for k in range(3):
        costs = []
        for rung in range(spec.coder.rungs):
            decoded = spec.coder.decode(spec.coder.encode(values[k : k + 1], rung), torch.tensor([rung]))
            costs.append(float(target.measure(values[k : k + 1], decoded, MAPPING, SIZE)[0]))
        expected = next(rung for rung, cost in enumerate(costs) if cost <= 1.5e-3)
        assert int(coded.rungs[k]) == expected
        assert float(coded.errors[k]) == pytest.approx(costs[expected], rel=1e-6)
        alone = spec.coder.encode(values[k : k + 1], expected)
        assert torch.equal(coded.codes[k : k + 1], alone)
    assert len(set(coded.rungs.tolist())) > 1


def test_a_bound_that_no_rung_keeps_takes_the_closest() -> None:
    spec = TARGETS["soft"]().spec(CacheConfig(levels=(3, 7), max_kl=1e-9), 6)
    coded = code(TARGETS["soft"](), spec, log_probs(), MAPPING, SIZE)
    assert coded.rungs.tolist() == [1, 1]
    assert (coded.errors > 1e-9).all()


def test_minus_infinity_is_measured_as_a_probability_of_nothing() -> None:
    values = log_probs(1)
    values[:, 2] = -torch.inf
    values = values.log_softmax(1)
    coded = code(TARGETS["soft"](), TARGETS["soft"]().spec(CacheConfig(), 6), values, MAPPING, SIZE)
    assert coded.errors.isfinite().all()
    assert (coded.codes[:, 2] == 0).all()


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
    spec = TARGETS[name]().spec(CacheConfig(), 6)
    coded = code(TARGETS[name](), spec, values, MAPPING, SIZE)
    decoded = spec.coder.decode(coded.codes, coded.rungs)
    features = (
        values.double().exp() if name == "first_order" else values.double() - values.double().mean(1, keepdim=True)
    )
    expected = torch.stack([slow_first_order(sample) for sample in features])
    error = (decoded[:, 0] - expected).abs().amax((1, 2))
    assert (error <= spec.bound).all()
    torch.testing.assert_close(coded.errors.double(), error, rtol=1e-2, atol=1e-5)


def test_a_class_of_probability_zero_has_no_first_order_map_of_logits() -> None:
    values = log_probs(1)
    values[:, 2] = -torch.inf
    message = (
        "^first_order_logits is not finite where the teacher gives a class the probability 0; "
        'keep the target "first_order" instead$'
    )
    with pytest.raises(NonFiniteError, match=message):
        TARGETS["first_order_logits"]().values(values, MAPPING)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_kl": 0.0}, "max_kl must be positive, got 0.0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"roles": ()}, "roles and targets must each name at least one"),
    ],
)
def test_a_configuration_out_of_range_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        CacheConfig(**fields)  # type: ignore[arg-type]
