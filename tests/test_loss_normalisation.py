"""Who weighs how much in a step: what one sample does to the gradients of the others.

Run as a script, this file is one process of the test with several.

Shapes: N crops of H,W pixels; C classes; h, w cells.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkd.pipeline.data.batch import Batch, Sources
from segkd.pipeline.models.network import Grid
from segkd.pipeline.student.knowledge.channel_wise import ChannelWise
from segkd.pipeline.student.knowledge.dist import Dist
from segkd.pipeline.student.knowledge.first_order import FirstOrder
from segkd.pipeline.student.knowledge.pseudo_labels import PseudoLabels
from segkd.pipeline.student.knowledge.zero_order import ZeroOrder
from segkd.pipeline.student.losses import Denominators, LossConfig, Objective, total_loss

CLASSES = 3
NO_LABELS = LossConfig(cross_entropy=0.0)
KNOWLEDGE = {
    name: Objective(loss=NO_LABELS, knowledge=(replace(kind, weight=1.0),))
    for name, kind in {
        "zero-order": ZeroOrder(),
        "first-order": FirstOrder(),
        "DIST": Dist(),
        "channel-wise": ChannelWise(),
        "pseudo-labels": PseudoLabels(form="confidence"),
    }.items()
}
LABELS = Objective()
EVERYTHING = Objective(
    knowledge=(
        ZeroOrder(),
        FirstOrder(weight=5.0),
        Dist(weight=0.5),
        ChannelWise(weight=2.0),
        PseudoLabels(weight=0.3, on="auxiliary"),
    )
)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A sample as the student sees it, with the ``cells`` (rows, columns) of its window that count."""

    seed: int
    cells: tuple[int, int] = (4, 4)
    ignored: float = 0.2
    labelled: bool = True
    pixels: int = 16

    def draw(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed))

    @property
    def labels(self) -> Tensor:
        labels = (self.draw(self.pixels, self.pixels) * 997).long() % CLASSES
        return labels.masked_fill(self.draw(self.pixels, self.pixels) < self.ignored, 255)

    @property
    def logits(self) -> Tensor:
        return 4 * self.draw(CLASSES, self.pixels // 4, self.pixels // 4)


def collate(crops: Sequence[Crop]) -> tuple[Batch, dict[str, Tensor]]:
    pixels = crops[0].pixels
    window = 8
    counts = torch.zeros((len(crops), window, window), dtype=torch.bool)
    firsts = counts.clone()
    for n, crop in enumerate(crops):
        counts[n, : crop.cells[0], : crop.cells[1]] = True
        firsts[n, : max(crop.cells[0] - 1, 0), : max(crop.cells[1] - 1, 0)] = True
    sources = Sources(
        crop_S=torch.arange(len(crops)),
        cell_to_crop_S22=torch.tensor([[[3.7, 1.0], [-3.7, pixels - 2.0]]] * len(crops), dtype=torch.float64),
        counts_Shw=counts,
        counts_first_Shw=firsts,
        codes={},
        rungs={},
    )
    batch = Batch(
        images_N3HW=torch.stack([crop.draw(3, pixels, pixels) for crop in crops]),
        labels_NHW=torch.stack([crop.labels for crop in crops]),
        labelled_N=torch.tensor([crop.labelled for crop in crops]),
        sources=sources,
    )
    scores = torch.stack([5 * crop.draw(CLASSES, window, window).flip(0) for crop in crops])
    maps = torch.stack([crop.draw(1, window, window) for crop in crops])
    return batch, {"soft": scores.log_softmax(1), "first_order": maps}


def gradients(crops: Sequence[Crop], objective: Objective) -> Tensor:
    """Of the loss of one step, with respect to each crop's logits."""
    batch, decoded = collate(crops)
    logits = torch.stack([crop.logits for crop in crops]).requires_grad_()
    student = Grid(stride=4).mapping(*batch.labels_NHW.shape[1:])
    (gradient,) = torch.autograd.grad(total_loss(logits, student, batch, decoded, objective)[0], logits)
    assert gradient.count_nonzero() > 0
    return gradient


def pixels_of(*crops: Crop) -> int:
    return sum(int((crop.labels != 255).sum()) for crop in crops)


A, B, C = Crop(seed=1), Crop(seed=2, cells=(3, 4)), Crop(seed=3, ignored=0.6)


def parametrise_knowledge(test: Any) -> Any:
    return pytest.mark.parametrize("objective", KNOWLEDGE.values(), ids=KNOWLEDGE)(test)


@parametrise_knowledge
@pytest.mark.parametrize(
    "other",
    [C, Crop(seed=4, cells=(2, 2)), Crop(seed=5, labelled=False)],
    ids=["a duplicate", "a zoomed-out sample with few cells", "an auxiliary sample"],
)
def test_one_more_sample_is_one_more_in_the_mean_over_samples(objective: Objective, other: Crop) -> None:
    before, after = (gradients(crops, objective) for crops in ([A, B, C], [A, B, C, other]))
    torch.testing.assert_close(after[:3], before * 3 / 4)
    if other is C:
        torch.testing.assert_close(after[3], after[2])


@pytest.mark.parametrize(
    ("term", "cells"), [("zero-order", (0, 0)), ("first-order", (0, 0)), ("first-order", (1, 1))], ids=str
)
def test_a_sample_without_valid_cells_is_not_counted(term: str, cells: tuple[int, int]) -> None:
    """A lone cell counts, but without its neighbours not for the first-order term."""
    objective = KNOWLEDGE[term]
    before, after = gradients([A, B], objective), gradients([A, B, Crop(seed=6, cells=cells)], objective)
    torch.testing.assert_close(after[:2], before)
    assert after[2].count_nonzero() == 0


@parametrise_knowledge
@pytest.mark.parametrize(
    "changed", [replace(C, cells=(2, 3)), replace(C, ignored=0.9), replace(C, labelled=False)], ids=str
)
def test_cells_and_labels_of_one_sample_leave_the_others_alone(objective: Objective, changed: Crop) -> None:
    assert torch.equal(gradients([A, B, C], objective)[:2], gradients([A, B, changed], objective)[:2])


@pytest.mark.parametrize("other", [C, replace(C, ignored=0.95), replace(C, labelled=False)], ids=str)
def test_cross_entropy_is_a_mean_over_the_labelled_pixels_of_the_batch(other: Crop) -> None:
    before, after = (gradients(crops, LABELS) for crops in ([A, B], [A, B, other]))
    valid = pixels_of(other) if other.labelled else 0
    torch.testing.assert_close(after[:2], before * pixels_of(A, B) / (pixels_of(A, B) + valid))


@parametrise_knowledge
def test_terms_do_not_grow_with_the_crops_area(objective: Objective) -> None:
    """Rows alike, so that a window of twice the cells has the same mean."""
    values = []
    for rows in (3, 6):
        batch, decoded = collate([replace(A, pixels=32, cells=(rows + 1, 5))])
        logits = replace(A, pixels=32).logits[:, :1].expand(-1, 8, -1)[None]
        alike = {name: target[:, :, :1].expand_as(target) for name, target in decoded.items()}
        assert batch.sources is not None
        valid = batch.sources.counts_first_Shw.clone()
        valid[:, 0] = False  # Its rows have fewer neighbours.
        batch = replace(batch, sources=replace(batch.sources, counts_first_Shw=valid))
        values.append(total_loss(logits, Grid(stride=4).mapping(32, 32), batch, alike, objective)[0])
    torch.testing.assert_close(values[0], values[1])
    assert values[0] > 0


STEP = [A, B, replace(C, labelled=False), Crop(seed=7, cells=(0, 0)), Crop(seed=8, ignored=1.0, cells=(2, 4))]
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 4.0])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, CLASSES, 4, stride=4)


def backward(model: nn.Module, crops: Sequence[Crop], denominators: Denominators | None) -> dict[str, Tensor]:
    batch, decoded = collate(crops)
    student = Grid(stride=4).mapping(16, 16)
    loss, terms = total_loss(
        model(batch.images_N3HW), student, batch, decoded, EVERYTHING, CLASS_WEIGHTS, denominators=denominators
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": loss.detach()} | terms


def parameters_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("parts", [[STEP[:2], STEP[2:]], [STEP[:4], STEP[4:]], [[crop] for crop in STEP]])
def test_a_step_in_parts_is_the_whole_step(parts: list[list[Crop]]) -> None:
    whole, split = network(), network()
    expected = backward(whole, STEP, None)
    denominators = Denominators.of(
        *(collate(part)[0] for part in parts), objective=EVERYTHING, class_weights=CLASS_WEIGHTS
    )
    values = [backward(split, part, denominators) for part in parts]
    torch.testing.assert_close(parameters_gradient(split), parameters_gradient(whole))
    for name, value in expected.items():
        torch.testing.assert_close(sum(part[name] for part in values), value)


PROCESSES = [[STEP[:4], STEP[4:]], [STEP[:3], [STEP[3], replace(STEP[3], labelled=False)]]]
"""Steps over two processes: uneven shares; and one process with nothing valid at all."""


def process(rank: int, meeting: str, output: str) -> None:
    """One of two processes: its gradients and terms after DistributedDataParallel's averaging."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    results = []
    for shares in PROCESSES:
        model = nn.parallel.DistributedDataParallel(network())
        terms = backward(model, shares[rank], None)
        results.append({"gradient": parameters_gradient(model), "terms": terms})
    torch.save(results, output)
    torch.distributed.destroy_process_group()


def test_a_step_over_two_processes_is_the_whole_step(tmp_path: Path) -> None:
    outputs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    command = [sys.executable, __file__]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting"), str(output)], stderr=subprocess.PIPE)
        for rank, output in enumerate(outputs)
    ]
    try:
        for child in running:
            _, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors.decode()
    finally:
        for child in running:
            child.kill()
    for shares, *results in zip(PROCESSES, *(torch.load(output) for output in outputs), strict=True):
        whole = network()
        expected = backward(whole, shares[0] + shares[1], None)
        for result in results:
            torch.testing.assert_close(result["gradient"], parameters_gradient(whole))
        for name, value in expected.items():
            torch.testing.assert_close((results[0]["terms"][name] + results[1]["terms"][name]) / 2, value)


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2], sys.argv[3])
