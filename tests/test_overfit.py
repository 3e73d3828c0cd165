"""Every loss form can be learned: a tiny student overfits four samples, and the term falls by 90 %.

Shapes: N crops of H,W pixels; C classes; h, w cells.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkd.pipeline.data.batch import Batch, Sources
from segkd.pipeline.first_order import features_of, first_order_map
from segkd.pipeline.models.network import Grid
from segkd.pipeline.student.knowledge.base import Knowledge
from segkd.pipeline.student.knowledge.channel_wise import ChannelWise
from segkd.pipeline.student.knowledge.dist import Dist
from segkd.pipeline.student.knowledge.first_order import FirstOrder
from segkd.pipeline.student.knowledge.pseudo_labels import PseudoLabels
from segkd.pipeline.student.knowledge.zero_order import ZeroOrder
from segkd.pipeline.student.losses import LossConfig, Objective, total_loss

PIXELS, CELLS, CLASSES, SAMPLES = 32, 8, 5, 4
KNOWLEDGE: dict[str, tuple[Knowledge, ...]] = {
    "kl": (ZeroOrder(),),
    "kl at T=4": (ZeroOrder(temperature=4.0),),
    "squared": (ZeroOrder(form="squared"),),
    "first-order of softmax": (FirstOrder(),),
    "first-order of logits": (FirstOrder(form="logits"),),
    "zero- and first-order": (ZeroOrder(), FirstOrder()),
    "DIST": (Dist(weight=1.0),),
    "channel-wise": (ChannelWise(weight=1.0),),
    "pseudo-labels": (PseudoLabels(weight=1.0),),
}
OBJECTIVES = {"cross-entropy": Objective()} | {
    name: Objective(loss=LossConfig(cross_entropy=0.0), knowledge=kinds) for name, kinds in KNOWLEDGE.items()
}


def four_samples() -> tuple[Batch, dict[str, Tensor]]:
    """Regions of one class each, seen by a teacher at 4 pixels a cell; two crops are flipped, one is auxiliary."""
    generator = torch.Generator().manual_seed(0)
    regions = torch.rand((SAMPLES, CLASSES, 3, 3), generator=generator)
    scores = 8 * F.interpolate(regions, (CELLS, CELLS), mode="bilinear")
    labels = F.interpolate(regions, (PIXELS, PIXELS), mode="bilinear").argmax(1)
    flipped = torch.tensor([False, True, False, True])
    labels = torch.where(flipped[:, None, None], labels.flip(-1), labels)
    colours = torch.rand((CLASSES, 3), generator=generator)
    noise = torch.randn((SAMPLES, 3, PIXELS, PIXELS), generator=generator)
    straight, mirrored = (4.0, 1.5), (-4.0, PIXELS - 2.5)
    cell_to_crop = [[straight, mirrored if flip else straight] for flip in flipped]
    everywhere = torch.ones((SAMPLES, CELLS, CELLS), dtype=torch.bool)
    batch = Batch(
        images_N3HW=colours[labels].movedim(-1, 1) + 0.1 * noise,
        labels_NHW=labels,
        labelled_N=torch.tensor([True, True, True, False]),
        sources=Sources(
            crop_S=torch.arange(SAMPLES),
            cell_to_crop_S22=torch.tensor(cell_to_crop, dtype=torch.float64),
            counts_Shw=everywhere,
            counts_first_Shw=everywhere,
            codes={},
            rungs={},
        ),
    )
    return batch, {
        "soft": scores.log_softmax(1),
        "first_order": first_order_map(features_of(scores, "softmax"))[:, None],
        "first_order_logits": first_order_map(features_of(scores, "logits"))[:, None],
    }


def tiny_student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, CLASSES, 1),
    )


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_student_overfits_four_samples(objective: Objective) -> None:
    batch, decoded = four_samples()
    student, mapping = tiny_student(), Grid(stride=4).mapping(PIXELS, PIXELS)
    optimiser = torch.optim.Adam(student.parameters(), lr=5e-3)
    history = []
    for _ in range(250):
        loss, terms = total_loss(student(batch.images_N3HW), mapping, batch, decoded, objective)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        history.append({name: term.item() for name, term in terms.items()})
        if all(term < 0.1 * history[0][name] for name, term in history[-1].items()):
            break
    assert {name: term / history[0][name] for name, term in history[-1].items() if term >= 0.1 * history[0][name]} == {}
