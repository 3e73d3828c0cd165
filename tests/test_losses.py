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
from torch.nn import functional as F

from segkd.pipeline.data.batch import Batch, Sources
from segkd.pipeline.first_order import EPSILON
from segkd.pipeline.models.network import Grid
from segkd.pipeline.student.knowledge.base import Knowledge
from segkd.pipeline.student.knowledge.channel_wise import ChannelWise
from segkd.pipeline.student.knowledge.dist import Dist
from segkd.pipeline.student.knowledge.first_order import FirstOrder
from segkd.pipeline.student.knowledge.pseudo_labels import PseudoLabels
from segkd.pipeline.student.knowledge.zero_order import ZeroOrder
from segkd.pipeline.student.losses import LossConfig, Objective, loss_terms, total_loss
from segkd.storage.errors import ConfigError
from segkd.storage.geometry import Axis, resampling

CROP = (13, 18)
CLASSES = 4
STUDENT = Grid(stride=5).mapping(*CROP)
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.5])
NO_LABELS = LossConfig(cross_entropy=0.0)


def alone(kind: Knowledge) -> Objective:
    return Objective(loss=NO_LABELS, knowledge=(replace(kind, weight=1.0),))


KNOWN = {
    "cross-entropy": Objective(),
    "smoothed cross-entropy": Objective(loss=LossConfig(label_smoothing=0.3)),
    "kl": alone(ZeroOrder()),
    "kl at T=4": alone(ZeroOrder(temperature=4.0)),
    "kl on auxiliary crops": alone(ZeroOrder(on="auxiliary")),
    "squared": alone(ZeroOrder(form="squared")),
    "squared at T=2": alone(ZeroOrder(form="squared", temperature=2.0)),
    "first-order of softmax": alone(FirstOrder()),
    "first-order of logits": alone(FirstOrder(form="logits")),
    "first-order, recomputed": alone(FirstOrder(teacher_map="recomputed")),
}
"""With a reference here, from the logits of the crops on; the references of the others start at the cells, see
test_knowledge.py."""
FORMS = KNOWN | {
    "DIST": alone(Dist()),
    "channel-wise": alone(ChannelWise()),
    "pseudo-labels": alone(PseudoLabels()),
    "pseudo-labels by confidence": alone(PseudoLabels(form="confidence")),
}
# Crop, cell -> crop pixel (y, x), window rows and columns, columns of the crop that are this source's.
SOURCES = [
    (0, (4.3, -1.0), (-3.1, 17.9), (5, 6), (0, 18)),
    (2, (2.6, 0.4), (3.3, 2.0), (4, 3), (0, 9)),
    (2, (-5.2, 12.0), (1.9, -3.0), (6, 7), (9, 18)),
    (1, (4.0, 40.0), (4.0, 40.0), (3, 4), (0, 18)),
]


def parametrise_forms(test: Any) -> Any:
    return pytest.mark.parametrize("objective", FORMS.values(), ids=FORMS)(test)


def parametrise_known(test: Any) -> Any:
    return pytest.mark.parametrize("objective", KNOWN.values(), ids=KNOWN)(test)


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
    maps = torch.rand((2, 4, 1, 6, 7), generator=generator).masked_fill(~given.counts_Shw[:, None], torch.nan)
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


def reference_cross_entropy(
    logits: npt.NDArray[np.float64], batch: Batch, smoothing: float, weights: Tensor | None
) -> float:
    per_class = np.ones(CLASSES) if weights is None else weights.double().numpy()
    total = count = 0.0
    for n in range(2):
        pixels = cell_logits(logits[n], Axis(1, 0, CROP[0]), Axis(1, 0, CROP[1]))
        for v, u in np.ndindex(*CROP):
            label = int(batch.labels_NHW[n, v, u])
            if label != 255:
                smoothed = np.full(CLASSES, smoothing / CLASSES)
                smoothed[label] += 1 - smoothing
                total -= sum(per_class * smoothed * np.log(softmax(pixels[v, u])))
                count += per_class[label]
    return total / count


def zero_order_of_cell(teacher: npt.NDArray[np.float64], logits: npt.NDArray[np.float64], kind: ZeroOrder) -> float:
    heat = kind.temperature
    p, q = softmax(teacher / heat), softmax(logits / heat)
    if kind.form == "squared":
        return sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
    return heat**2 * sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def first_order_of_cell(cells: npt.NDArray[np.float64], j: int, i: int, size: tuple[int, int], form: str) -> float:
    def feature(v: int, u: int) -> npt.NDArray[np.float64]:
        return softmax(cells[v, u]) if form == "softmax" else cells[v, u] - cells[v, u].mean()

    steps = [(v, u) for v in (-1, 0, 1) for u in (-1, 0, 1) if (v, u) != (0, 0)]
    near = [(j + v, i + u) for v, u in steps if 0 <= j + v < size[0] and 0 <= i + u < size[1]]
    squared = [np.square(feature(j, i) - feature(v, u)).sum() for v, u in near]
    return sum(np.sqrt(s + EPSILON**2) - EPSILON for s in squared) / len(near)


def reference(logits: npt.NDArray[np.float64], objective: Objective, weights: Tensor | None = None) -> float:
    """The only term, cell by cell: the mean in each crop, then over the crops that have any."""
    _, batch, decoded = example()
    assert batch.sources is not None
    if objective.loss.cross_entropy:
        return reference_cross_entropy(logits, batch, objective.loss.label_smoothing, weights)
    (kind,) = objective.knowledge
    values: dict[int, list[float]] = {}
    for s, (crop, y, x, size, _) in enumerate(SOURCES):
        if kind.on == "auxiliary" and batch.labelled_N[crop]:
            continue
        cells = cell_logits(logits[crop], Axis(*y, size[0]), Axis(*x, size[1]))
        for j, i in np.ndindex(*size):
            if isinstance(kind, ZeroOrder) and batch.sources.counts_Shw[s, j, i]:
                teacher = decoded["soft"][s, :, j, i].double().numpy()
                values.setdefault(crop, []).append(zero_order_of_cell(teacher, cells[j, i], kind))
            if isinstance(kind, FirstOrder) and batch.sources.counts_first_Shw[s, j, i]:
                if kind.teacher_map == "recomputed":
                    known = decoded["soft"][s].double().permute(1, 2, 0).numpy()
                    written = first_order_of_cell(known, j, i, size, kind.form)
                else:
                    written = decoded[objective.targets[0]][s, 0, j, i].item()
                own = first_order_of_cell(cells, j, i, size, kind.form)
                values.setdefault(crop, []).append((written - own) ** 2)
    assert set(values) == ({0, 2} if kind.on == "all" else {2})
    return float(np.mean([np.mean(crop) for crop in values.values()]))


@parametrise_known
@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS], ids=["plain", "class weights"])
def test_equals_the_reference(objective: Objective, weights: Tensor | None) -> None:
    logits, batch, decoded = example()
    loss, terms = total_loss(logits, STUDENT, batch, decoded, objective, weights)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(logits.double().numpy(), objective, weights), rel=1e-5)
    assert terms == {next(iter(objective.weights)): loss}


@parametrise_known
def test_gradient_equals_the_references(objective: Objective) -> None:
    logits, batch, decoded = example()
    loss, _ = total_loss(logits.requires_grad_(), STUDENT, batch, decoded, objective, CLASS_WEIGHTS)
    (gradient,) = torch.autograd.grad(loss, logits)
    at = logits.detach().double().numpy()
    for seed in range(2):
        direction = np.random.default_rng(seed).standard_normal(at.shape)
        high, low = (reference(at + step * direction, objective, CLASS_WEIGHTS) for step in (1e-4, -1e-4))
        assert (gradient.numpy() * direction).sum() == pytest.approx((high - low) / 2e-4, rel=1e-3)


@parametrise_forms
def test_identical_cells_have_finite_gradients(objective: Objective) -> None:
    _, batch, decoded = example()
    logits = torch.zeros(3, CLASSES, *STUDENT.shape, requires_grad=True)
    loss, _ = total_loss(logits, STUDENT, batch, decoded, objective)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss > 0
    assert torch.isfinite(gradient).all()


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    logits, batch, decoded = example()
    objective = Objective(
        loss=LossConfig(cross_entropy=2.0), knowledge=(ZeroOrder(weight=0.5), FirstOrder(weight=30.0))
    )
    loss, terms = total_loss(logits.requires_grad_(), STUDENT, batch, decoded, objective)
    expected = 2 * terms["cross_entropy"] + 0.5 * terms["zero_order"] + 30 * terms["first_order"]
    assert loss.item() == pytest.approx(expected.item())
    assert not any(term.requires_grad for term in terms.values())


@parametrise_forms
def test_terms_at_weight_0_read_nothing(objective: Objective) -> None:
    logits, batch, decoded = example()
    off = tuple(kind() for kind in (Dist, ChannelWise, PseudoLabels))
    objective = replace(objective, knowledge=(*objective.knowledge, *off))
    needed = {name: decoded[name] for name in objective.targets}
    if not needed:
        batch = replace(batch, sources=None)
    _, terms = total_loss(logits, STUDENT, batch, needed, objective)
    assert len(terms) == 1


def test_needed_targets() -> None:
    assert Objective(knowledge=(ZeroOrder(), FirstOrder(), Dist(weight=1.0))).targets == ("soft", "first_order")
    assert Objective(knowledge=(ZeroOrder(weight=0.0), FirstOrder(form="logits"))).targets == ("first_order_logits",)
    recomputed = FirstOrder(teacher_map="recomputed")
    assert Objective(knowledge=(ZeroOrder(), recomputed)).targets == ("soft",)
    assert Objective(knowledge=(FirstOrder(near="edges"),)).targets == ("first_order", "soft")
    assert Objective().targets == ()


def test_a_schedule_acts_on_the_weight_and_on_nothing_else() -> None:
    """Falling by a quarter of the weight a step, over all of four steps; terms are logged without their weight."""
    logits, batch, decoded = example()
    falling = Objective(loss=NO_LABELS, knowledge=(ZeroOrder(weight=8.0, schedule="fall"),))
    whole, terms = total_loss(logits, STUDENT, batch, decoded, falling)
    for step in range(4):
        loss, same = total_loss(logits, STUDENT, batch, decoded, falling.at(step, 4))
        assert loss.item() == pytest.approx(whole.item() * (4 - step) / 4)
        assert same == terms
    assert falling.at(3, 4).at(0, 4).weights == {"zero_order": 2.0}


@parametrise_forms
def test_nothing_valid_is_exactly_zero(objective: Objective) -> None:
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
        loss, _ = total_loss(logits.requires_grad_(), STUDENT, given, decoded, objective, CLASS_WEIGHTS)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert torch.count_nonzero(gradient) == 0


def test_auxiliary_crops_have_no_cross_entropy_whatever_their_labels() -> None:
    logits, batch, decoded = example()
    assert (batch.labels_NHW[2] != 255).any()
    loss, _ = total_loss(logits.requires_grad_(), STUDENT, batch, decoded, Objective())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.count_nonzero(gradient[2]) == 0
    assert torch.count_nonzero(gradient[0]) > 0


@parametrise_forms
def test_the_loss_is_in_float32_under_autocast(objective: Objective) -> None:
    logits, batch, decoded = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = total_loss(logits.bfloat16(), STUDENT, batch, decoded, objective)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, total_loss(logits.bfloat16().float(), STUDENT, batch, decoded, objective)[0])


def test_knowledge_of_auxiliary_images_leaves_labelled_crops_alone() -> None:
    """And counts as if there were no others."""
    logits, batch, decoded = example()
    objective = alone(PseudoLabels(on="auxiliary"))
    loss, _ = total_loss(logits.requires_grad_(), STUDENT, batch, decoded, objective)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.count_nonzero(gradient[:2]) == 0
    assert torch.count_nonzero(gradient[2]) > 0
    whole, _ = total_loss(logits, STUDENT, batch, decoded, alone(PseudoLabels()))
    labelled = replace(batch, labelled_N=~batch.labelled_N)
    rest, _ = total_loss(logits, STUDENT, labelled, decoded, objective)
    assert whole.item() == pytest.approx((loss.item() + rest.item()) / 2)


@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS], ids=["plain", "class weights"])
def test_label_smoothing_is_torchs(weights: Tensor | None) -> None:
    """On a student grid of one cell a pixel, and labelled crops alone."""
    _, batch, _ = example()
    batch = replace(batch, labelled_N=torch.ones(3, dtype=torch.bool), sources=None)
    logits = torch.randn((3, CLASSES, *CROP), generator=torch.Generator().manual_seed(1))
    objective = Objective(loss=LossConfig(label_smoothing=0.2))
    terms = loss_terms(logits, Grid(stride=1).mapping(*CROP), batch, {}, objective, weights)
    expected = F.cross_entropy(logits, batch.labels_NHW, weights, ignore_index=255, label_smoothing=0.2)
    torch.testing.assert_close(terms["cross_entropy"], expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cross_entropy": -1.0}, "loss.cross_entropy is -1.0; expected a finite number of at least 0 (0 = off)"),
        ({"label_smoothing": 1.5}, "loss.label_smoothing is 1.5; expected a share, 0 to 1 (0 = none)"),
        ({"ohem_threshold": 1.0}, "loss.ohem_threshold is 1.0; expected a probability, 0 to below 1 (0 = off)"),
        ({"ohem_min_kept": 0.0}, "loss.ohem_min_kept is 0.0; expected a share above 0, at most 1"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LossConfig(**values)
    assert str(error.value) == message


def test_nothing_to_learn() -> None:
    with pytest.raises(ConfigError) as error:
        Objective(loss=NO_LABELS, knowledge=(ZeroOrder(weight=0.0), Dist()))
    assert str(error.value) == (
        "every weight of the loss is 0; give loss.cross_entropy or a kind of knowledge, such as "
        "knowledge.zero_order.weight, one above 0"
    )
