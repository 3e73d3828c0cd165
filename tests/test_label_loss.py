"""The labels' loss, band by band, against torch's on the logits of all pixels; and which pixels are hard.

Shapes: N crops of H,W pixels in C classes; logits N,C,h,w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from segkd.pipeline import resample
from segkd.pipeline.data.sample import IGNORE
from segkd.pipeline.resample import to_pixels
from segkd.pipeline.student import label_loss
from segkd.pipeline.student.label_loss import summed_cross_entropy
from segkd.pipeline.student.ohem import mine_hard_pixels
from segkd.storage.geometry import Axis, Mapping

Drawn = tuple[Tensor, Mapping, Tensor, Tensor | None, float]


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of the example below."""
    monkeypatch.setitem(label_loss.BAND_BYTES, "cpu", 4 * 4 * 3 * 10)


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    crops, classes, height, width, h, w = (draw(st.integers(1, most)) for most in (3, 5, 14, 12, 5, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits_NChw = torch.randn((crops, classes, h, w), generator=generator) * draw(st.sampled_from([1.0, 30.0]))
    labels_NHW = torch.randint(0, classes, (crops, height, width), generator=generator)
    labels_NHW[torch.rand(labels_NHW.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = IGNORE
    weights_C = torch.rand(classes, generator=generator) + 0.1 if draw(st.booleans()) else None
    mapping = Mapping(Axis(height / h, height / h / 2 - 0.5, h), Axis(width / w, 0.25, w))
    return logits_NChw, mapping, labels_NHW, weights_C, draw(st.sampled_from([0.0, 0.1, 1.0]))


def torchs(
    logits_NChw: Tensor, mapping: Mapping, labels_NHW: Tensor, weights_C: Tensor | None, smoothed: float
) -> Tensor:
    pixels_NCHW = to_pixels(logits_NChw, mapping, *labels_NHW.shape[1:])
    return F.cross_entropy(
        pixels_NCHW, labels_NHW, weights_C, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothed
    )


@given(drawn(), st.sampled_from([0, 200, 2000, 20000]))
def test_loss_and_gradient_equal_torchs(inputs: Drawn, band_bytes: int) -> None:
    """In bands of single rows of a crop to bands of all crops."""
    label_loss.BAND_BYTES["cpu"] = band_bytes
    results = []
    for function in (summed_cross_entropy, torchs):
        logits_NChw = inputs[0].clone().requires_grad_()
        loss = function(logits_NChw, *inputs[1:])
        (2 * loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        results.append((loss.detach(), logits_NChw.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


EXAMPLE: Drawn = (
    torch.randn((2, 3, 4, 5), generator=torch.Generator().manual_seed(0)),
    Mapping(Axis(4, 1.5, 4), Axis(2, 0.5, 5)),
    torch.randint(0, 3, (2, 16, 10), generator=torch.Generator().manual_seed(1)),
    None,
    0.0,
)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """How many floating-point numbers the largest tensor has that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor) and result.is_floating_point():
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.itemsize)
        return result


@pytest.mark.parametrize(
    ("function", "largest"), [(summed_cross_entropy, EXAMPLE[0].numel()), (torchs, 3 * EXAMPLE[2].numel())]
)
def test_no_tensor_has_the_logits_of_all_pixels(function: Callable[..., Tensor], largest: int) -> None:
    """Forward and backward; with torch's own there is one, so that the largest is looked for where it is."""
    logits_NChw = EXAMPLE[0].clone().requires_grad_()
    with Largest() as made:  # type: ignore[no-untyped-call]
        function(logits_NChw, *EXAMPLE[1:]).backward()  # type: ignore[no-untyped-call]
    assert made.numel == largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    """Also the gradient, until it has the factor of a loss that is scaled so that gradients do not underflow."""
    logits_NChw = EXAMPLE[0].to(dtype).requires_grad_()
    logits_NChw.data[:, 0] += 30  # nearly certain: gradients down to 1e-13
    exact_NChw = logits_NChw.detach().float().requires_grad_()
    labels_NHW = torch.zeros_like(EXAMPLE[2])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = [summed_cross_entropy(given, EXAMPLE[1], labels_NHW) for given in (logits_NChw, exact_NChw)]
    (gradient,), (exact,) = (
        torch.autograd.grad(2.0**24 * loss, given)
        for loss, given in zip(losses, (logits_NChw, exact_NChw), strict=True)
    )
    assert losses[0].dtype == torch.float32
    assert torch.equal(*losses)
    assert gradient.dtype == dtype
    assert gradient[:, 1:].count_nonzero() == gradient[:, 1:].numel()
    assert torch.equal(gradient, exact.to(dtype))


def test_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is computed where none is asked for."""
    expected = summed_cross_entropy(EXAMPLE[0].clone().requires_grad_(), *EXAMPLE[1:])
    monkeypatch.setattr(Tensor, "scatter_", None)
    loss = summed_cross_entropy(*EXAMPLE)
    assert not loss.requires_grad
    with torch.no_grad():
        again = summed_cross_entropy(EXAMPLE[0].clone().requires_grad_(), *EXAMPLE[1:])
    assert loss == again == expected


def test_it_is_differentiable_once() -> None:
    logits_NChw = EXAMPLE[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="is differentiable once: leave out create_graph=True"):
        torch.autograd.grad(summed_cross_entropy(logits_NChw, *EXAMPLE[1:]), logits_NChw, create_graph=True)


def test_no_crops_are_exactly_zero() -> None:
    logits_NChw = EXAMPLE[0][:0].clone().requires_grad_()
    loss = summed_cross_entropy(logits_NChw, EXAMPLE[1], EXAMPLE[2][:0], *EXAMPLE[3:])
    (gradient,) = torch.autograd.grad(loss, logits_NChw)
    assert (loss.item(), gradient.shape) == (0, logits_NChw.shape)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pixels_whose_label_weighs_nothing_count_for_nothing(smoothing: float) -> None:
    """As if they were ignored; a batch of nothing else is exactly 0, whatever it is divided by."""
    logits_NChw, mapping, labels_NHW, *_ = EXAMPLE
    weights_C = torch.tensor([0.0, 1.0, 2.0])
    given = summed_cross_entropy(logits_NChw, mapping, labels_NHW, weights_C, smoothing)
    ignored = labels_NHW.masked_fill(labels_NHW == 0, IGNORE)
    assert given == summed_cross_entropy(logits_NChw, mapping, ignored, weights_C, smoothing)
    logits_NChw = logits_NChw.clone().requires_grad_()
    loss = summed_cross_entropy(logits_NChw, mapping, torch.zeros_like(labels_NHW), weights_C, smoothing)
    (gradient,) = torch.autograd.grad(loss, logits_NChw)
    assert (loss.item(), gradient.count_nonzero().item()) == (0, 0)


def test_a_class_that_is_impossible() -> None:
    """Its logit is -inf: nothing where another class is right or nothing counts, infinite where it is right."""
    logits_NChw = torch.zeros(1, 3, 1, 1)
    logits_NChw[:, 0] = -math.inf
    mapping = Mapping(Axis(1, 0, 1), Axis(1, 0, 1))
    for label, expected in ((1, math.log(2)), (IGNORE, 0.0), (0, math.inf)):
        loss = summed_cross_entropy(logits_NChw, mapping, torch.full((1, 1, 1), label))
        assert loss.item() == pytest.approx(expected)


def test_labels_of_classes_that_are_not_there_are_refused() -> None:
    with pytest.raises(IndexError, match="index 3 is out of bounds for dimension 0 with size 3"):
        summed_cross_entropy(EXAMPLE[0], EXAMPLE[1], EXAMPLE[2] + 1)


@given(drawn(), st.sampled_from([0.01, 0.3, 0.7, 0.99]), st.sampled_from([0.001, 1 / 16, 0.5, 1.0]))
def test_hard_pixels_are_those_of_the_definition(inputs: Drawn, threshold: float, min_kept: float) -> None:
    """Looking at one pixel after the other, up to what rounding does to a probability."""
    logits_NChw, mapping, labels_NHW, weights_C, _ = inputs
    weights_C = None if weights_C is None else (weights_C - 0.5).clamp(min=0)
    mined_NHW, *counted = mine_hard_pixels(logits_NChw, mapping, labels_NHW, threshold, min_kept, weights_C)
    probabilities_NCHW = to_pixels(logits_NChw, mapping, *labels_NHW.shape[1:]).double().softmax(1)
    pixels, all_kept = 0, 0
    for labels_HW, mined_HW, probabilities_CHW in zip(labels_NHW, mined_NHW, probabilities_NCHW, strict=True):
        met: dict[tuple[int, int], float] = {}
        for y, x in torch.cartesian_prod(*(torch.arange(side) for side in labels_HW.shape)).tolist():
            label = int(labels_HW[y, x])
            if label != IGNORE and (weights_C is None or weights_C[label] > 0):
                met[y, x] = float(probabilities_CHW[label, y, x])
            else:
                assert mined_HW[y, x] == IGNORE
        wanted = math.ceil(min_kept * len(met))
        limit = max(threshold, sorted(met.values())[wanted - 1]) if met else threshold
        kept = {place for place in met if mined_HW[place] != IGNORE}
        assert all(mined_HW[place] == labels_HW[place] for place in kept)
        assert all(abs(met[place] - limit) < 1e-5 or (place in kept) == (met[place] < limit) for place in met)
        assert len(kept) == wanted or (len(kept) > wanted and all(met[place] < threshold + 1e-5 for place in kept))
        pixels, all_kept = pixels + len(met), all_kept + len(kept)
    assert counted == [all_kept, pixels]


def test_a_crop_is_mined_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where tiles, whose size depends on the number of crops, are of a pixel."""
    generator = torch.Generator().manual_seed(0)
    logits_NChw = 3 * torch.randn((4, 3, 3, 4), generator=generator)
    labels_NHW = torch.randint(0, 3, (4, 12, 16), generator=generator)
    mapping = Mapping(Axis(4, 1.5, 3), Axis(4, 1.5, 4))
    together_NHW, kept, labelled = mine_hard_pixels(logits_NChw, mapping, labels_NHW, 0.3, 0.25)
    monkeypatch.setattr(resample, "TILE_BYTES", 1)
    alone = [
        mine_hard_pixels(logits_NChw[n : n + 1], mapping, labels_NHW[n : n + 1], 0.3, 0.25)[0]
        for n in range(len(labels_NHW))
    ]
    assert torch.equal(together_NHW, torch.cat(alone))
    assert 0 < kept < labelled == labels_NHW.numel()


@pytest.mark.parametrize("margin", [9.0, 90.0])
def test_a_crop_that_is_known_keeps_no_more_than_the_least(margin: float) -> None:
    """Also where all of its probabilities are the same, or exactly 1; a crop without a label keeps nothing."""
    logits_NChw = torch.tensor([margin, 0.0])[None, :, None, None].expand(2, 2, 1, 4).clone()
    labels_NHW = torch.tensor([[[0, 0, 0, 0]], [[IGNORE] * 4]])
    mapping = Mapping(Axis(1, 0, 1), Axis(1, 0, 4))
    mined_NHW, *counted = mine_hard_pixels(logits_NChw, mapping, labels_NHW, 0.7, 0.3)
    assert mined_NHW.tolist() == [[[0, 0, IGNORE, IGNORE]], [[IGNORE] * 4]]
    assert counted == [2, 4]
    logits_NChw[0] = torch.tensor([[[9.0] * 4], [[0.0, 1.0, 2.0, 3.0]]])
    assert mine_hard_pixels(logits_NChw, mapping, labels_NHW, 0.7, 0.3)[0][0].tolist() == [[IGNORE, IGNORE, 0, 0]]


def test_what_is_not_a_number_is_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the loss is not finite either, and the step is refused; also where another pixel is hard enough."""
    monkeypatch.setattr(resample, "TILE_BYTES", 1)  # in one tile, 0 times what is not a number is none either
    logits_NChw = torch.tensor([[0.0, 9.0, math.nan], [9.0, 0.0, 0.0]])[None, :, None, :]
    mapping = Mapping(Axis(1, 0, 1), Axis(1, 0, 3))
    mined_NHW, *_ = mine_hard_pixels(logits_NChw, mapping, torch.zeros((1, 1, 3), dtype=torch.long), 0.7, 1 / 16)
    assert mined_NHW.tolist() == [[[0, IGNORE, 0]]]


def test_without_crops_there_is_nothing_to_mine() -> None:
    mined_NHW, *counted = mine_hard_pixels(EXAMPLE[0][:0], EXAMPLE[1], EXAMPLE[2][:0], 0.7, 1 / 16)
    assert (mined_NHW.shape, counted) == (EXAMPLE[2][:0].shape, [0, 0])
