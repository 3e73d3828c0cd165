"""The loss terms against a slow per-cell reference, and their gradients.

Shapes: N crops of H,W pixels; S sources; C classes; h, w cells.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from segkd.pipeline.data.batch import Batch, Sources
from segkd.pipeline.first_order import EPSILON
from segkd.pipeline.models.network import Grid
from segkd.pipeline.student.losses import (
    LossConfig,
    first_order,
    needed_targets,
    total_loss,
    zero_order,
)
from segkd.storage.errors import ConfigError
from segkd.storage.geometry import Axis, resampling

CROP = (13, 18)
CLASSES = 4
STUDENT = Grid(stride=5).mapping(*CROP)
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.5])
OFF = {"cross_entropy": 0.0, "zero_order": 0.0, "first_order": 0.0}
FORMS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"cross_entropy": 1.0},
    "kl": {"zero_order": 1.0},
    "kl at T=4": {"zero_order": 1.0, "temperature": 4.0},
    "squared": {"zero_order": 1.0, "zero_order_form": "squared"},
    "squared at T=2": {"zero_order": 1.0, "zero_order_form": "squared", "temperature": 2.0},
    "first-order of softmax": {"first_order": 1.0},
    "first-order of logits": {"first_order": 1.0, "first_order_form": "logits"},
}
# Crop, cell -> crop pixel (y, x), window rows and columns, columns of the crop that are this source's.
SOURCES = [
    (0, (4.3, -1.0), (-3.1, 17.9), (5, 6), (0, 18)),
    (2, (2.6, 0.4), (3.3, 2.0), (4, 3), (0, 9)),
    (2, (-5.2, 12.0), (1.9, -3.0), (6, 7), (9, 18)),
    (1, (4.0, 40.0), (4.0, 40.0), (3, 4), (0, 18)),
]


def parametrise_forms(test: Any) -> Any:
    return pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)(test)


def sources() -> Sources:
    """Ragged windows: flipped, scaled, two in one crop (half each), one without a cell that counts."""
    counts, firsts = (torch.zeros((len(SOURCES), 6, 7), dtype=torch.bool) for _ in range(2))
    for s, (_, y, x, (rows, columns), (left, right)) in enumerate(SOURCES):
        for j, i in np.ndindex(rows, columns):
            v, u = y[0] * j + y[1], x[0] * i + x[1]
            counts[s, j, i] = -0.5 <= v <= CROP[0] - 0.5 and left - 0.5 <= u < right - 0.5
        for j, i in np.ndindex(rows, columns):
            near = counts[s, max(j - 1, 0) : min(j + 2, rows), max(i - 1, 0) : min(i + 2, columns)]
            firsts[s, j, i] = near.all()
    return Sources(
        crop_S=torch.tensor([source[0] for source in SOURCES]),
        cell_to_crop_S22=torch.tensor([source[1:3] for source in SOURCES], dtype=torch.float64),
        counts_Shw=counts,
        counts_first_Shw=firsts,
        codes={},
        rungs={},
    )


def example() -> tuple[Tensor, Batch, dict[str, Tensor]]:
    """Logits, a batch whose last crop is auxiliary, and what its sources decode to (NaN where none counts)."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, CLASSES, (3, *CROP), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    given = sources()
    scores = torch.randn((4, CLASSES, 6, 7), generator=generator) * 2
    scores[:, 1, :, ::3] = -torch.inf
    maps = torch.rand((2, 4, 1, 6, 7), generator=generator).masked_fill(~given.counts_first_Shw[:, None], torch.nan)
    decoded = {
        "soft": scores.log_softmax(1).masked_fill(~given.counts_Shw[:, None], torch.nan),
        "first_order": maps[0],
        "first_order_logits": maps[1],
    }
    labelled = torch.tensor([True, True, False])
    batch = Batch(images_N3HW=torch.zeros(3, 3, *CROP), labels_NHW=labels, labelled_N=labelled, sources=given)
    return torch.randn((3, CLASSES, *STUDENT.shape), generator=generator), batch, decoded


def softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    exponential = np.exp(scores - scores.max())
    return exponential / exponential.sum()


def cell_logits(crop_Chw: npt.NDArray[np.float64], y: Axis, x: Axis) -> npt.NDArray[np.float64]:
    return np.einsum("tv,uw,cvw->tuc", resampling(y, STUDENT.y), resampling(x, STUDENT.x), crop_Chw)


def reference_cross_entropy(logits: npt.NDArray[np.float64], batch: Batch, weights: Tensor | None) -> float:
    total = count = 0.0
    for n in range(2):
        pixels = cell_logits(logits[n], Axis(1, 0, CROP[0]), Axis(1, 0, CROP[1]))
        for v, u in np.ndindex(*CROP):
            label = int(batch.labels_NHW[n, v, u])
            if label != 255:
                weight = 1.0 if weights is None else weights[label].item()
                total -= weight * np.log(softmax(pixels[v, u])[label])
                count += weight
    return total / count


def zero_order_of_cell(teacher: npt.NDArray[np.float64], logits: npt.NDArray[np.float64], config: LossConfig) -> float:
    heat = config.temperature
    p, q = softmax(teacher / heat), softmax(logits / heat)
    if config.zero_order_form == "squared":
        return sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
    return heat**2 * sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def first_order_of_cell(cells: npt.NDArray[np.float64], j: int, i: int, size: tuple[int, int], form: str) -> float:
    def feature(v: int, u: int) -> npt.NDArray[np.float64]:
        return softmax(cells[v, u]) if form == "softmax" else cells[v, u] - cells[v, u].mean()

    steps = [(v, u) for v in (-1, 0, 1) for u in (-1, 0, 1) if (v, u) != (0, 0)]
    near = [(j + v, i + u) for v, u in steps if 0 <= j + v < size[0] and 0 <= i + u < size[1]]
    squared = [np.square(feature(j, i) - feature(v, u)).sum() for v, u in near]
    return sum(np.sqrt(s + EPSILON**2) - EPSILON for s in squared) / len(near)


def reference(logits: npt.NDArray[np.float64], config: LossConfig, weights: Tensor | None = None) -> float:
    """The one term that is switched on, cell by cell: the mean in each crop, then over the crops that have any."""
    _, batch, decoded = example()
    assert batch.sources is not None
    if config.cross_entropy:
        return reference_cross_entropy(logits, batch, weights)
    values: dict[int, list[float]] = {}
    for s, (crop, y, x, size, _) in enumerate(SOURCES):
        cells = cell_logits(logits[crop], Axis(*y, size[0]), Axis(*x, size[1]))
        for j, i in np.ndindex(*size):
            if config.zero_order and batch.sources.counts_Shw[s, j, i]:
                teacher = decoded["soft"][s, :, j, i].double().numpy()
                values.setdefault(crop, []).append(zero_order_of_cell(teacher, cells[j, i], config))
            if config.first_order and batch.sources.counts_first_Shw[s, j, i]:
                written = decoded[needed_targets(config)[0]][s, 0, j, i].item()
                own = first_order_of_cell(cells, j, i, size, config.first_order_form)
                values.setdefault(crop, []).append((written - own) ** 2)
    assert set(values) == {0, 2}
    return float(np.mean([np.mean(crop) for crop in values.values()]))


@parametrise_forms
@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS], ids=["plain", "class weights"])
def test_equals_the_reference(form: dict[str, Any], weights: Tensor | None) -> None:
    config = LossConfig(**OFF | form)
    logits, batch, decoded = example()
    loss, terms = total_loss(logits, STUDENT, batch, decoded, config, weights)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(logits.double().numpy(), config, weights), rel=1e-5)
    assert terms == {next(name for name in OFF if getattr(config, name)): loss}


@parametrise_forms
def test_gradient_equals_the_references(form: dict[str, Any]) -> None:
    config = LossConfig(**OFF | form)
    logits, batch, decoded = example()
    loss, _ = total_loss(logits.requires_grad_(), STUDENT, batch, decoded, config, CLASS_WEIGHTS)
    (gradient,) = torch.autograd.grad(loss, logits)
    at = logits.detach().double().numpy()
    for seed in range(2):
        direction = np.random.default_rng(seed).standard_normal(at.shape)
        high, low = (reference(at + step * direction, config, CLASS_WEIGHTS) for step in (1e-4, -1e-4))
        assert (gradient.numpy() * direction).sum() == pytest.approx((high - low) / 2e-4, rel=1e-3)


@pytest.mark.parametrize("form", ["kl", "squared"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_zero_order_gradcheck(form: Any, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, logits = torch.randn((2, 2, 3, 2, 2), dtype=torch.float64, generator=generator)
    log_probs[:, 0, 0] = -torch.inf
    assert torch.autograd.gradcheck(lambda z: zero_order(z, log_probs, form, temperature), logits.requires_grad_())


@pytest.mark.parametrize("form", ["softmax", "logits"])
def test_first_order_gradcheck(form: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 3, 3, 3), dtype=torch.float64, generator=generator)
    written = torch.rand((2, 3, 3), dtype=torch.float64, generator=generator)
    counts = torch.rand((2, 3, 3), generator=generator) < 0.8
    assert torch.autograd.gradcheck(lambda z: first_order(z, written, counts, form), logits.requires_grad_())


@parametrise_forms
def test_identical_cells_have_finite_gradients(form: dict[str, Any]) -> None:
    _, batch, decoded = example()
    logits = torch.zeros(3, CLASSES, *STUDENT.shape, requires_grad=True)
    loss, _ = total_loss(logits, STUDENT, batch, decoded, LossConfig(**OFF | form))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss > 0
    assert torch.isfinite(gradient).all()


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    logits, batch, decoded = example()
    config = LossConfig(cross_entropy=2.0, zero_order=0.5, first_order=30.0)
    loss, terms = total_loss(logits.requires_grad_(), STUDENT, batch, decoded, config)
    expected = 2 * terms["cross_entropy"] + 0.5 * terms["zero_order"] + 30 * terms["first_order"]
    assert loss.item() == pytest.approx(expected.item())
    assert not any(term.requires_grad for term in terms.values())


@parametrise_forms
def test_terms_at_weight_0_read_nothing(form: dict[str, Any]) -> None:
    config = LossConfig(**OFF | form)
    logits, batch, decoded = example()
    needed = {name: decoded[name] for name in needed_targets(config)}
    if not needed:
        batch = replace(batch, sources=None)
    _, terms = total_loss(logits, STUDENT, batch, needed, config)
    assert len(terms) == 1


def test_needed_targets() -> None:
    assert needed_targets(LossConfig()) == ("soft", "first_order")
    assert needed_targets(LossConfig(zero_order=0, first_order_form="logits")) == ("first_order_logits",)
    assert needed_targets(LossConfig(first_order=0)) == ("soft",)
    assert needed_targets(LossConfig(zero_order=0, first_order=0)) == ()


@parametrise_forms
def test_nothing_valid_is_exactly_zero(form: dict[str, Any]) -> None:
    logits, batch, decoded = example()
    assert batch.sources is not None
    nowhere = torch.zeros_like(batch.sources.counts_Shw)
    batch = replace(
        batch,
        labels_NHW=torch.full_like(batch.labels_NHW, 255),
        sources=replace(batch.sources, counts_Shw=nowhere, counts_first_Shw=nowhere),
    )
    decoded = {name: torch.full_like(target, torch.nan) for name, target in decoded.items()}
    for labelled in (batch.labelled_N, torch.zeros(3, dtype=torch.bool)):
        given = replace(batch, labelled_N=labelled)
        loss, _ = total_loss(logits.requires_grad_(), STUDENT, given, decoded, LossConfig(**OFF | form), CLASS_WEIGHTS)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert torch.count_nonzero(gradient) == 0


def test_auxiliary_crops_have_no_cross_entropy_whatever_their_labels() -> None:
    logits, batch, decoded = example()
    assert (batch.labels_NHW[2] != 255).any()
    loss, _ = total_loss(logits.requires_grad_(), STUDENT, batch, decoded, LossConfig(zero_order=0, first_order=0))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.count_nonzero(gradient[2]) == 0
    assert torch.count_nonzero(gradient[0]) > 0


@parametrise_forms
def test_the_loss_is_in_float32_under_autocast(form: dict[str, Any]) -> None:
    logits, batch, decoded = example()
    config = LossConfig(**OFF | form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = total_loss(logits.bfloat16(), STUDENT, batch, decoded, config)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, total_loss(logits.bfloat16().float(), STUDENT, batch, decoded, config)[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_order": -1.0}, "loss.zero_order is -1.0; a weight is a finite number of at least 0 (0 = off)"),
        ({"first_order": float("nan")}, "loss.first_order is nan; a weight is a finite number of at least 0 (0 = off)"),
        ({"temperature": 0.0}, "loss.temperature is 0.0; expected a finite number above 0 (1 = as is)"),
        (
            OFF,
            "every weight of the loss is 0; give at least one of cross_entropy, zero_order, first_order a weight",
        ),
    ],
)
def test_bad_settings(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LossConfig(**values)  # type: ignore[arg-type]
    assert str(error.value) == message
