"""What coding does to training: loss and gradient with coded targets against those with the uncoded teacher.

    OMP_NUM_THREADS=1 python benchmarks/coding_error.py --config configs/camvid-s.toml [--steps 300] [--json]

The teacher of the run file stands beside the student and looks at whole images, as stage 1 does; its answers are coded
at each bound, image by image, by stage 1's own code. No cache is needed or read. The student is trained with the
uncoded targets for --steps steps of the run file's schedule. Before, half-way and after, the same --batches batches, of
steps that training does not reach, give the loss of the knowledge terms, labels left out, and its gradient in all
parameters: with uncoded and with coded targets, of one forward pass. `cosine` and `relative` (norm of the difference
over the norm) are of that gradient; the table has mean and worst over the batches.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.batch import Batch, Look
from segkd.pipeline.models.layers import Network
from segkd.pipeline.models.references import described
from segkd.pipeline.student.batch_norm import BatchNorms
from segkd.pipeline.student.inputs import open_inputs
from segkd.pipeline.student.live import LiveTeacher
from segkd.pipeline.student.losses import LossConfig, Objective, total_loss
from segkd.pipeline.student.runtime import torch_settings
from segkd.pipeline.student.train import begin
from segkd.pipeline.student.trainer import Trainer
from segkd.pipeline.teacher.coded import code_targets
from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.opened import target_specs
from segkd.storage.spec import TargetSpec

BOUNDS: Mapping[str, CacheConfig] = {
    "exact": CacheConfig(profile="exact"),
    **{f"{bound:g}": CacheConfig(max_kl=bound) for bound in (1e-4, 1e-3, 1e-2, 1e-1)},
}
"""How targets are coded, by the name of the row."""


@dataclass(frozen=True)
class Row:
    """One bound at one point of training."""

    step: int
    max_kl: str
    loss: float
    """Of the knowledge terms with the uncoded teacher, mean over the batches."""
    loss_difference: float
    """Relative, mean of the absolute values."""
    worst_loss_difference: float
    cosine: float
    worst_cosine: float
    relative: float
    worst_relative: float


class CodedTeacher(LiveTeacher):
    """The same teacher's answers as a cache of the given specifications would give them back."""

    def __init__(self, uncoded: LiveTeacher, specs: Mapping[str, TargetSpec]) -> None:
        super().__init__(uncoded.predictor, uncoded.targets, uncoded.fingerprints)
        self._uncoded, self._specs = uncoded, specs

    def answer(self, look: Look) -> dict[str, Tensor]:
        height, width = look.image.shape[:2]
        log_probs = self._uncoded.values(look)["soft"][None]
        mapping = self.predictor.mapping(height, width)
        coded = code_targets(self._specs, log_probs, mapping, (height, width), [look.sample])
        return {
            name: self._specs[name].coder.decode(coded[name].codes[0][None], coded[name].rungs)[0]
            for name in self.targets
        }


def gradient(network: nn.Module, loss: Tensor) -> Tensor:
    parts = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None]).double()


def losses(
    network: Network,
    batch_norms: BatchNorms,
    batch: Batch,
    teachers: Mapping[str, LiveTeacher],
    knowledge: Objective,
    class_weights: Tensor | None,
) -> dict[str, Tensor]:
    """The loss of the knowledge terms by each teacher, all of one forward pass."""
    assert batch.sources is not None
    with batch_norms.of_batch(int(batch.labelled_N.sum()), len(batch.images_N3HW)):
        logits = network(batch.images_N3HW)
    (height, width), fed = batch.labels_NHW.shape[-2:], batch.images_N3HW.shape[-2:]
    mapping = network.grid.mapping_in((height, width), (fed[0], fed[1]))
    return {
        name: total_loss(logits, mapping, batch, teacher(batch.sources), knowledge, class_weights)[0]
        for name, teacher in teachers.items()
    }


def measure(run: RunConfig, steps: int, count: int) -> Iterator[Row]:
    run = replace(run, train=replace(run.train, teacher_view="image", device="cpu"))
    student = described(run.the_student())
    inputs = open_inputs(run, student, distill=True)
    uncoded = inputs.targets
    assert isinstance(uncoded, LiveTeacher)
    if "soft" not in inputs.objective.targets:
        raise SystemExit("the run learns nothing of the teacher's distributions; give knowledge.zero_order a weight")
    classes, tile = len(inputs.source.classes), 64  # above T = 1 what coding costs depends on it, next to nothing
    specs = {
        name: {
            target: spec
            for target, spec in target_specs(config, classes, tile).items()
            if target in inputs.objective.targets
        }
        for name, config in BOUNDS.items()
    }
    teachers: dict[str, LiveTeacher] = {
        "uncoded": uncoded,
        **{name: CodedTeacher(uncoded, s) for name, s in specs.items()},
    }
    knowledge = Objective(loss=LossConfig(cross_entropy=0.0), knowledge=inputs.objective.knowledge)
    batches = [inputs.stream[run.train.steps + number] for number in range(count)]
    trainer = begin(student, inputs, run.train, torch.device("cpu"))
    for step in range(steps + 1):
        if step in (0, steps // 2, steps):
            yield from compare(trainer, batches, teachers, knowledge, inputs.class_weights, step)
        if step < steps:
            trainer.step(inputs.stream[step], step)


def compare(
    trainer: Trainer,
    batches: list[Batch],
    teachers: Mapping[str, LiveTeacher],
    knowledge: Objective,
    class_weights: Tensor | None,
    step: int,
) -> Iterator[Row]:
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in teachers if name != "uncoded"}
    reference = []
    # A copy, whose running statistics nobody needs.
    network = copy.deepcopy(trainer.network)
    batch_norms = BatchNorms(network, trainer.config.batch_norm)
    for batch in batches:
        by_name = losses(network, batch_norms, batch, teachers, knowledge, class_weights)
        true_loss = by_name.pop("uncoded")
        true = gradient(network, true_loss)
        reference.append(true_loss.item())
        for name, loss in by_name.items():
            coded = gradient(network, loss)
            cosine = (true @ coded / (true.norm() * coded.norm())).item()
            relative = ((coded - true).norm() / true.norm()).item()
            found[name].append((abs(loss.item() / true_loss.item() - 1), cosine, relative))
    for name, values in found.items():
        difference, cosines, relatives = np.array(values).T
        yield Row(
            step=step,
            max_kl=name,
            loss=float(np.mean(reference)),
            loss_difference=float(difference.mean()),
            worst_loss_difference=float(difference.max()),
            cosine=float(cosines.mean()),
            worst_cosine=float(cosines.min()),
            relative=float(relatives.mean()),
            worst_relative=float(relatives.max()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a run file with [data], [teacher] and [student]")
    parser.add_argument("--steps", type=int, default=300, help="of training between the first point and the last")
    parser.add_argument("--batches", type=int, default=50, help="that are compared at each point")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    run = load(arguments.config)
    with torch_settings(run.train):
        rows = measure(run, arguments.steps, arguments.batches)
        if arguments.json:
            print(json.dumps([dataclasses.asdict(row) for row in rows]))
            return
        print(f"{'step':>6}{'max_kl':>8}{'loss':>9}{'loss differs by':>22}{'cosine':>22}{'relative':>18}")
        for row in rows:
            print(
                f"{row.step:>6}{row.max_kl:>8}{row.loss:>9.4f}"
                f"{row.loss_difference:>11.2e}{row.worst_loss_difference:>11.2e}"
                f"{row.cosine:>11.6f}{row.worst_cosine:>11.6f}{row.relative:>9.4f}{row.worst_relative:>9.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
