"""The first-order map against a slow per-cell reference. Shapes: N maps, C classes, h, w cells."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from segkd.pipeline.first_order import EPSILON, Features, features_of, first_order_map

FORMS: tuple[Features, ...] = ("softmax", "logits")


def scores(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


def reference(features_NChw: Tensor, exists_Nhw: Tensor) -> npt.NDArray[np.float64]:
    features, exists = features_NChw.double().numpy(), exists_Nhw.numpy()
    count, _, height, width = features.shape
    result = np.zeros((count, height, width))
    for n, y, x in np.ndindex(count, height, width):
        near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
        near = [(v, u) for v, u in near if 0 <= v < height and 0 <= u < width and exists[n, v, u]]
        if near and exists[n, y, x]:
            squared = [np.square(features[n, :, y, x] - features[n, :, v, u]).sum() for v, u in near]
            result[n, y, x] = np.mean([np.sqrt(s + EPSILON**2) - EPSILON for s in squared])
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 2), (5, 6), (0, 3), (3, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_reference(form: Features, size: tuple[int, int], masked: bool) -> None:
    features = features_of(scores(2, 3, *size), form)
    everything = torch.ones((2, *size), dtype=torch.bool)
    exists = torch.rand((2, *size), generator=torch.Generator().manual_seed(1)) < 0.7 if masked else everything
    result = first_order_map(features, exists if masked else None)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), reference(features, exists), rtol=1e-5, atol=1e-7)


def test_means_over_the_neighbours_that_exist() -> None:
    features = torch.zeros(1, 1, 3, 4)
    features[0, 0, 0, 0] = 1.0
    distance = (1 + EPSILON**2) ** 0.5 - EPSILON
    expected = torch.tensor([[1.0, 1 / 5, 0.0, 0.0], [1 / 5, 1 / 8, 0.0, 0.0], [0.0] * 4]) * distance
    torch.testing.assert_close(first_order_map(features)[0], expected)


def test_a_lone_cell_is_exactly_zero() -> None:
    assert first_order_map(scores(2, 5, 1, 1)).tolist() == [[[0.0]], [[0.0]]]
    exists = torch.tensor([[[True, False], [False, False]]])
    assert torch.count_nonzero(first_order_map(scores(1, 5, 2, 2), exists)) == 0


@pytest.mark.parametrize("form", FORMS)
def test_identical_neighbours_have_no_value_and_a_finite_gradient(form: Features) -> None:
    flat = torch.full((1, 3, 4, 4), 0.3, requires_grad=True)
    result = first_order_map(features_of(flat, form))
    assert torch.count_nonzero(result) == 0
    (gradient,) = torch.autograd.grad(result.sum(), flat)
    assert torch.count_nonzero(gradient) == 0

    spot = torch.zeros(1, 3, 4, 4)
    spot[0, 0, 1, 1] = 3.0
    (gradient,) = torch.autograd.grad(first_order_map(features_of(spot.requires_grad_(), form)).sum(), spot)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 0, 1, 1] > 0


def test_rounding_alone_gives_next_to_no_gradient() -> None:
    features = torch.full((1, 4, 6, 6), 0.25) + 6e-8 * scores(1, 4, 6, 6)
    (gradient,) = torch.autograd.grad(first_order_map(features.requires_grad_()).sum(), features)
    assert gradient.abs().max() < 1e-2


def test_smoothing_takes_at_most_epsilon_off_a_distance() -> None:
    features = features_of(scores(1, 4, 5, 5, dtype=torch.float64), "softmax")
    pair = torch.stack([features[0, :, 0, 0], features[0, :, 4, 4]], 1)[None, :, None]
    distance = (pair[..., 0] - pair[..., 1]).norm().item()
    assert distance - EPSILON <= first_order_map(pair)[0, 0, 0].item() <= distance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient(form: Features, masked: bool) -> None:
    exists = torch.rand((1, 3, 3), generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    inputs = scores(1, 3, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: first_order_map(features_of(s, form), exists), inputs)


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (1, 1)])
def test_gradient_without_a_pair(size: tuple[int, int]) -> None:
    features = scores(2, 3, *size).requires_grad_()
    (gradient,) = torch.autograd.grad(first_order_map(features).sum(), features)
    assert gradient.shape == features.shape
    assert torch.count_nonzero(gradient) == 0


def test_differentiable_once() -> None:
    features = scores(1, 3, 3, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="is differentiable once: leave out create_graph=True"):
        torch.autograd.grad(first_order_map(features).sum(), features, create_graph=True)


@pytest.mark.parametrize("turn", [lambda t: t.flip(-1), lambda t: t.flip(-2), lambda t: t.transpose(-1, -2)])
def test_moves_with_the_cells(turn) -> None:  # type: ignore[no-untyped-def]
    features = features_of(scores(1, 4, 5, 7), "softmax")
    torch.testing.assert_close(first_order_map(turn(features)), turn(first_order_map(features)))


def test_features_do_not_depend_on_a_cells_constant() -> None:
    logits = scores(1, 4, 3, 3)
    for form in FORMS:
        torch.testing.assert_close(features_of(logits.log_softmax(1), form), features_of(logits, form))


def test_a_class_of_probability_zero_is_legal_under_softmax() -> None:
    logits = scores(1, 3, 2, 2)
    logits[0, 1] = -torch.inf
    assert torch.isfinite(first_order_map(features_of(logits, "softmax"))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_never_in_half_precision(dtype: torch.dtype) -> None:
    logits = scores(1, 3, 4, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = first_order_map(features_of(logits, "softmax"))
    assert result.dtype == torch.float32
    assert torch.equal(result, first_order_map(features_of(logits.float(), "softmax")))
