"""Every kind of knowledge against a slow reference at the teacher's cells, its gradient, its settings, its schedule.

Shapes: N crops; C classes; S sources with windows of h,w teacher cells; P valid cells of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segkd.pipeline.first_order import EPSILON
from segkd.pipeline.resample import LOWEST
from segkd.pipeline.student.knowledge.base import Cells, Knowledge
from segkd.pipeline.student.knowledge.channel_wise import ChannelWise
from segkd.pipeline.student.knowledge.config import KnowledgeConfig
from segkd.pipeline.student.knowledge.dist import Dist
from segkd.pipeline.student.knowledge.first_order import FirstOrder
from segkd.pipeline.student.knowledge.pseudo_labels import PseudoLabels
from segkd.pipeline.student.knowledge.schedule import Schedule, factor
from segkd.pipeline.student.knowledge.zero_order import ZeroOrder
from segkd.storage.coding_exact import ExactDistribution
from segkd.storage.errors import ConfigError

Array = npt.NDArray[np.float64]
CLASSES = 4
CROP_OF_SOURCE = (0, 2, 2, 1)
"""Crop 1 has no valid cell, crop 2 is of two images."""
KINDS: tuple[Knowledge, ...] = (
    ZeroOrder(),
    ZeroOrder(temperature=3.0),
    ZeroOrder(form="squared", temperature=2.0),
    ZeroOrder(temperature=3.0, class_weighted=True),
    ZeroOrder(form="squared", class_weighted=True),
    FirstOrder(),
    FirstOrder(form="logits"),
    FirstOrder(teacher_map="recomputed"),
    FirstOrder(near="edges"),
    FirstOrder(teacher_map="recomputed", near="edges"),
    Dist(),
    Dist(temperature=2.0, inter=0.0, intra=3.0),
    Dist(temperature=0.5, inter=2.0, intra=0.5),
    ChannelWise(),
    ChannelWise(temperature=4.0),
    PseudoLabels(),
    PseudoLabels(form="confidence"),
    PseudoLabels(class_weighted=True),
    PseudoLabels(form="confidence", class_weighted=True),
)
CLASS_WEIGHTS = torch.tensor([0.25, 2.0, 0.0, 3.5], dtype=torch.float64)


def describe(kind: Knowledge) -> str:
    changed = {
        field.name: getattr(kind, field.name)
        for field in fields(kind)
        if getattr(kind, field.name) != getattr(type(kind)(), field.name)
    }
    return " ".join([kind.name, *(f"{name}={value}" for name, value in changed.items())])


def parametrise_kinds(test: Any) -> Any:
    return pytest.mark.parametrize("kind", KINDS, ids=describe)(test)


def example() -> tuple[Tensor, dict[str, Tensor], Cells]:
    """Float64 student logits, the teacher's targets (0 where a cell does not exist) and the cells of four windows."""
    generator = torch.Generator().manual_seed(5)
    logits, scores = 2 * torch.randn((2, 4, CLASSES, 3, 4), generator=generator, dtype=torch.float64)
    valid = torch.rand((4, 3, 4), generator=generator) < 0.7
    valid[3] = False
    scores[:, 1, :, ::2] = -torch.inf
    scores[0, 2] = -torch.inf
    maps = torch.rand((2, 4, 1, 3, 4), generator=generator, dtype=torch.float64)
    targets = {"soft": scores.log_softmax(1), "first_order": maps[0], "first_order_logits": maps[1]}
    exist = valid | (torch.rand(valid.shape, generator=generator) < 0.5)
    teacher = {name: target.masked_fill(~exist[:, None], 0.0) for name, target in targets.items()}
    cells = Cells(
        valid_Shw=valid, exist_Shw=exist, crop_S=torch.tensor(CROP_OF_SOURCE), crops=3, class_weights_C=CLASS_WEIGHTS
    )
    return logits, teacher, cells


def softmax(scores: Array) -> Array:
    exponential = np.exp(scores - scores.max())
    return exponential / exponential.sum()


def divergence(p: Array, q: Array) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def zero_order(kind: ZeroOrder, student_PC: Array, teacher_PC: Array) -> float:
    heat = kind.temperature
    pairs = [(softmax(t / heat), softmax(s / heat)) for s, t in zip(student_PC, teacher_PC, strict=True)]
    weights = [(softmax(t) * CLASS_WEIGHTS.numpy()).sum() if kind.class_weighted else 1.0 for t in teacher_PC]
    if kind.form == "squared":
        values = [np.square(p - q).sum() for p, q in pairs]
    else:
        values = [heat**2 * divergence(p, q) for p, q in pairs]
    return float(np.mean(np.multiply(weights, values)))


def pearson(a: Array, b: Array) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def dist(kind: Dist, student_PC: Array, teacher_PC: Array) -> float:
    p, q = (np.stack([softmax(cell / kind.temperature) for cell in cells]) for cells in (teacher_PC, student_PC))
    inter = np.mean([1 - pearson(a, b) for a, b in zip(p, q, strict=True)])
    # A class that the teacher excludes everywhere is constant, and no student that gives it anything is like it.
    intra = np.mean([1 - pearson(a, b) if a.std() else 1.0 for a, b in zip(p.T, q.T, strict=True)])
    return float(kind.temperature**2 * (kind.inter * inter + kind.intra * intra))


def channel_wise(kind: ChannelWise, student_PC: Array, teacher_PC: Array) -> float:
    own_PC = np.stack([np.log(softmax(cell)) for cell in student_PC])
    total = 0.0
    for given_P, own_P in zip(teacher_PC.T, own_PC.T, strict=True):
        if np.isfinite(given_P).any():
            total += divergence(softmax(given_P / kind.temperature), softmax(own_P / kind.temperature))
    return kind.temperature**2 * total / len(teacher_PC[0])


def pseudo_labels(kind: PseudoLabels, student_PC: Array, teacher_PC: Array) -> float:
    total = 0.0
    for own, known in zip(student_PC, teacher_PC, strict=True):
        weight = np.exp(known.max()) if kind.form == "confidence" else 1.0
        weight *= float(CLASS_WEIGHTS[known.argmax()]) if kind.class_weighted else 1.0
        total -= weight * np.log(softmax(own)[known.argmax()])
    return total / len(student_PC)


def first_order(kind: FirstOrder, crop: int) -> float:
    """Needs neighbours, so it looks at the windows themselves."""
    logits, teacher, cells = example()
    written = teacher["first_order" if kind.form == "softmax" else "first_order_logits"]
    values = []
    for s in np.flatnonzero(np.array(CROP_OF_SOURCE) == crop):
        own, known = (np.moveaxis(scores[s].numpy(), 0, -1) for scores in (logits, teacher["soft"]))
        features = np.apply_along_axis(softmax if kind.form == "softmax" else lambda x: x - x.mean(), -1, own)
        for j, i in np.ndindex(3, 4):
            if not cells.valid_Shw[s, j, i]:
                continue
            near = [
                (v, u) for v, u in np.ndindex(3, 4) if max(abs(v - j), abs(u - i)) == 1 and cells.exist_Shw[s, v, u]
            ]
            theirs = written[s, 0, j, i].item()
            if kind.teacher_map == "recomputed":
                theirs = mean_distance(np.apply_along_axis(softmax, -1, known), (j, i), near)
            edge = any(known[j, i].argmax() != known[place].argmax() for place in near)
            counts = edge or kind.near == "everywhere"
            values.append((mean_distance(features, (j, i), near) - theirs) ** 2 if counts else 0.0)
    return float(np.mean(values))


def mean_distance(features: Array, cell: tuple[int, int], near: list[tuple[int, int]]) -> float:
    squared = [np.square(features[cell] - features[place]).sum() for place in near]
    return float(np.mean([math.sqrt(value + EPSILON**2) - EPSILON for value in squared])) if near else 0.0


REFERENCES: dict[str, Callable[[Any, Array, Array], float]] = {
    "zero_order": zero_order,
    "dist": dist,
    "channel_wise": channel_wise,
    "pseudo_labels": pseudo_labels,
}


def reference(kind: Knowledge, crop: int) -> float:
    if isinstance(kind, FirstOrder):
        return first_order(kind, crop)
    logits, teacher, cells = example()
    mine = cells.valid_Shw & (cells.crop_S == crop)[:, None, None]
    student_PC, teacher_PC = (values.movedim(1, -1)[mine].numpy() for values in (logits, teacher["soft"]))
    return REFERENCES[kind.name](kind, student_PC, teacher_PC)


def test_every_kind_is_tested() -> None:
    registered = [field.name for field in fields(KnowledgeConfig)]
    assert [kind.name for kind in KnowledgeConfig().kinds()] == registered
    assert {kind.name for kind in KINDS} == set(registered)


@parametrise_kinds
def test_equals_the_reference(kind: Knowledge) -> None:
    logits, teacher, cells = example()
    values_N = kind.crop_values(logits, teacher, cells)
    assert values_N.shape == (3,)
    # DIST takes less than 1e-3 of a standard deviation for none.
    exactness = 5e-3 if isinstance(kind, Dist) else 1e-6
    for crop in (0, 2):
        assert values_N[crop].item() == pytest.approx(reference(kind, crop), rel=exactness), crop
    assert values_N.isfinite().all()


@parametrise_kinds
def test_gradient(kind: Knowledge) -> None:
    logits, teacher, cells = example()
    assert torch.autograd.gradcheck(lambda z: kind.crop_values(z, teacher, cells), logits.requires_grad_())


@parametrise_kinds
def test_a_crop_of_two_images_is_one_crop(kind: Knowledge) -> None:
    """Two windows of a crop, or one in which their cells stand beside each other, far enough not to be neighbours."""
    logits, teacher, cells = example()
    gap = torch.zeros_like(cells.valid_Shw[:1])
    joined = replace(
        cells,
        valid_Shw=torch.cat([cells.valid_Shw[1:2], gap, cells.valid_Shw[2:3]], 2),
        exist_Shw=torch.cat([cells.exist_Shw[1:2], gap, cells.exist_Shw[2:3]], 2),
        crop_S=torch.tensor([0]),
        crops=1,
    )

    def beside(values: Tensor) -> Tensor:
        return torch.cat([values[1:2], torch.zeros_like(values[:1]), values[2:3]], 3)

    value = kind.crop_values(beside(logits), {name: beside(target) for name, target in teacher.items()}, joined)
    torch.testing.assert_close(value[0], kind.crop_values(logits, teacher, cells)[2])


@pytest.mark.parametrize("kind", [ZeroOrder(), ZeroOrder(form="squared"), Dist(), ChannelWise()], ids=describe)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(kind: Knowledge) -> None:
    """Also where both find a class nowhere, and whatever constant is in a cell's logits."""
    _, teacher, cells = example()
    soft = teacher["soft"].clamp(min=-1e3)
    shift = torch.randn((4, 1, 3, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = (soft + 10 * shift).requires_grad_()
    value = kind.crop_values(logits, {"soft": soft.log_softmax(1)}, cells).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    assert abs(value.item()) < 1e-12
    assert gradient.abs().max() < 1e-9


def test_dist_is_blind_to_scale_and_shift_and_zero_order_is_not() -> None:
    """In each cell: p' = (p + 1 / C) / 2 correlates perfectly with p over the classes, and over the cells."""
    _, teacher, cells = example()
    logits = ((teacher["soft"].softmax(1) + 1 / CLASSES) / 2).log()
    assert Dist().crop_values(logits, teacher, cells)[[0, 2]].abs().max() < 1e-4
    assert ZeroOrder().crop_values(logits, teacher, cells)[[0, 2]].min() > 0.05


def test_dist_takes_what_a_bound_on_kl_leaves_free_for_constant() -> None:
    """A class of less than 1e-3 whose shape is the rounding's."""
    _, _, cells = example()
    generator = torch.Generator().manual_seed(0)
    p, q = torch.full((2, 4, CLASSES, 3, 4), 1.0, dtype=torch.float64)
    for probabilities in (p, q):
        probabilities[:, 3] = 1e-3 * torch.rand((4, 3, 4), generator=generator, dtype=torch.float64)
    assert Dist(inter=0.0).crop_values(p.log(), {"soft": q.log().log_softmax(1)}, cells).max() < 0.01


def test_channel_wise_sees_what_is_unlikely() -> None:
    """A class of log-probability -20 or less whose place is wrong costs channel-wise much and KL next to nothing."""
    _, _, cells = example()
    scores = torch.zeros((4, CLASSES, 3, 4), dtype=torch.float64)
    scores[:, 3] = -20.0 - 5.0 * torch.arange(4)
    other = scores.clone()
    other[:, 3] = scores[:, 3].flip(-1)
    given = {"soft": scores.log_softmax(1)}
    assert ChannelWise().crop_values(other, given, cells)[[0, 2]].min() > 1
    assert ZeroOrder().crop_values(other, given, cells)[[0, 2]].max() < 1e-7


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_wise_learns_nothing_of_a_class_that_the_teacher_rules_out_in_an_exact_cache(
    temperature: float, views: bool
) -> None:
    """It is kept as a finite number, less what normalises each cell: a map that nobody has meant."""
    logits, teacher, cells = example()
    scores = teacher["soft"].masked_fill((torch.arange(CLASSES) == 3)[:, None, None], -torch.inf).log_softmax(1)
    if views:  # what an average over views makes of -inf
        scores = scores.clamp_min(LOWEST).log_softmax(1)
    coder = ExactDistribution()
    rungs = torch.zeros(4, dtype=torch.uint8)
    kept = coder.decode(coder.encode(scores.float(), rungs), rungs).double()
    kind = ChannelWise(temperature=temperature)
    ruled_out = scores.masked_fill(scores <= LOWEST, -torch.inf)
    values_N, exact_N = (kind.crop_values(logits, {"soft": soft}, cells) for soft in (ruled_out, kept))
    torch.testing.assert_close(exact_N[[0, 2]], values_N[[0, 2]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ZeroOrder, {"weight": -1.0}, "knowledge.zero_order.weight is -1.0; expected a finite number of at least 0"),
        (
            FirstOrder,
            {"teacher_map": "recomputed", "form": "logits"},
            'knowledge.first_order.teacher_map is recomputed; expected "stored", as form is "logits"',
        ),
        (FirstOrder, {"weight": math.nan}, "knowledge.first_order.weight is nan; expected a finite number of at least"),
        (ZeroOrder, {"temperature": 0.0}, "knowledge.zero_order.temperature is 0.0; expected a finite number above 0"),
        (Dist, {"temperature": math.inf}, "knowledge.dist.temperature is inf; expected a finite number above 0 (1 ="),
        (Dist, {"intra": -2.0}, "knowledge.dist.intra is -2.0; expected a finite number of at least 0 (0 = off)"),
        (
            Dist,
            {"inter": 0.0, "intra": 0.0},
            "knowledge.dist.inter and intra are both 0; raise one, or set knowledge.dist.weight = 0",
        ),
        (ChannelWise, {"temperature": -1.0}, "knowledge.channel_wise.temperature is -1.0; expected a finite number"),
    ],
)
def test_bad_settings(kind: Callable[..., object], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        kind(**values)
    assert str(error.value).startswith(message)


def factors(schedule: Schedule, steps: int) -> list[float]:
    return [factor(schedule, step, steps) for step in range(steps)]


def test_schedules() -> None:
    assert factors("constant", 3) == [1, 1, 1]
    assert factors("rise", 4) == [0.25, 0.5, 0.75, 1]
    assert factors("fall", 4) == [1, 0.75, 0.5, 0.25]


@given(st.floats(0.01, 100), st.integers(1, 10**6), st.data())
def test_a_weight_at_a_step_is_a_constant_weight_above_0(weight: float, steps: int, data: st.DataObject) -> None:
    """So what is computed and needed is the same at every step; and what has risen or fallen together stays."""
    step = data.draw(st.integers(0, steps - 1))
    rising, falling = (Dist(weight=weight, schedule=schedule).at(step, steps) for schedule in ("rise", "fall"))
    assert rising.schedule == falling.schedule == "constant"
    assert 0 < min(rising.weight, falling.weight) <= max(rising.weight, falling.weight) <= weight
    assert rising.weight + falling.weight == pytest.approx(weight * (1 + 1 / steps))
