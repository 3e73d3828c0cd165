"""What a student is trained by: labels, and the teacher's knowledge from the cache.

Every term is a mean over the *global* batch, all parts of a step and all processes together: cross-entropy over its
valid labelled pixels; the knowledge over the crops that have a valid cell, each of which is a mean over such cells or
something else that does not grow with their number, so that neither a crop's area nor the share of it that counts
changes how much it weighs. :class:`Denominators` holds the counts. Nothing valid is exactly 0, with a gradient of 0.

Shapes: N crops of H,W pixels; logits N,C,h,w on the student's grid; S sources with windows of h,w teacher cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from segkd.pipeline import processes
from segkd.pipeline.data.batch import Batch
from segkd.pipeline.data.sample import IGNORE
from segkd.pipeline.evidence import Evidence, Row
from segkd.pipeline.student.alignment import align
from segkd.pipeline.student.knowledge.base import Knowledge
from segkd.pipeline.student.label_loss import summed_cross_entropy
from segkd.storage import geometry
from segkd.storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is learned from the labels, and how strictly the cache's promise is taken."""

    evidence: ClassVar[Evidence] = {
        "cross_entropy": None,
        "label_smoothing": Row("camvid-s.md", "label-smoothing"),
        "ohem_threshold": Row("camvid-s.md", "ohem"),
        "ohem_min_kept": None,
    }

    cross_entropy: float = 1.0
    """Weight of the cross-entropy with the labels; 0 = off, and never computed."""
    label_smoothing: float = 0.0
    """What the classes share out equally of a label's probability of 1, as torch's; 0 = none."""
    ohem_threshold: float = 0.0
    """Online hard example mining: the cross-entropy is of those pixels alone to whose label the student gives a
    probability below this; 0.7 is common; 0 = off, all pixels."""
    ohem_min_kept: float = 1 / 16
    """Share of a crop's labelled pixels that mining keeps where fewer are hard: those of the smallest probability."""
    allow_unpromised: bool = False
    """Whether knowledge may be read of a cache that gives no bound on the coding error that matters to it."""

    def __post_init__(self) -> None:
        if not 0 <= self.cross_entropy < math.inf:
            raise ConfigError(
                f"loss.cross_entropy is {self.cross_entropy}; expected a finite number of at least 0 (0 = off)"
            )
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigError(f"loss.label_smoothing is {self.label_smoothing}; expected a share, 0 to 1 (0 = none)")
        if not 0 <= self.ohem_threshold < 1:
            raise ConfigError(
                f"loss.ohem_threshold is {self.ohem_threshold}; expected a probability, 0 to below 1 (0 = off)"
            )
        if not 0 < self.ohem_min_kept <= 1:
            raise ConfigError(f"loss.ohem_min_kept is {self.ohem_min_kept}; expected a share above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """All that a student is trained towards. Raises ConfigError where that is nothing."""

    loss: LossConfig = field(default_factory=LossConfig)
    knowledge: tuple[Knowledge, ...] = ()
    """Those with a weight: others are left out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "knowledge", tuple(kind for kind in self.knowledge if kind.weight))
        if not self.weights:
            raise ConfigError(
                "every weight of the loss is 0; give loss.cross_entropy or a kind of knowledge, such as "
                "knowledge.zero_order.weight, one above 0"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms, by name."""
        labels = {"cross_entropy": self.loss.cross_entropy} if self.loss.cross_entropy else {}
        return labels | {kind.name: kind.weight for kind in self.knowledge}

    @property
    def targets(self) -> tuple[str, ...]:
        """What it reads of the cache, in the cache's names."""
        return tuple(dict.fromkeys(need.target for kind in self.knowledge for need in kind.needs()))

    def at(self, step: int, steps: int) -> Objective:
        """The same with the weights that the schedules give at ``step`` (from 0) of ``steps``."""
        return replace(self, knowledge=tuple(kind.at(step, steps) for kind in self.knowledge))


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """What the terms' sums are divided by: counts of the global batch over the number of processes.

    The division by the number of processes cancels that gradients are averaged over them. Where a count is 0, the sum
    is 0 too and 1 stands here.
    """

    pixels: Tensor
    """Valid pixels of labelled crops, each counted with its class weight."""
    crops: Mapping[str, Tensor]
    """Per kind of knowledge the crops with a cell that is valid for it."""

    @classmethod
    def of(cls, *parts: Batch, objective: Objective, class_weights: Tensor | None = None) -> Denominators:
        """Counts of a step's batch, all its parts together. A collective call where torch.distributed is running."""
        counts = torch.stack([_counts(part, objective, class_weights) for part in parts]).sum(0)
        counts = processes.total(counts)
        pixels, *crops = (counts.masked_fill(counts == 0, 1.0) / processes.count()).unbind()
        names = [kind.name for kind in objective.knowledge]
        return cls(pixels=pixels, crops=dict(zip(names, crops, strict=True)))


def _counts(batch: Batch, objective: Objective, class_weights: Tensor | None) -> Tensor:
    """This process's pixels, and the crops of each kind of knowledge (float32)."""
    labels = batch.labels_NHW[batch.labelled_N]
    pixels = torch.bincount(labels.flatten(), minlength=IGNORE)[:IGNORE]
    if class_weights is not None:
        pixels = pixels[: len(class_weights)] * class_weights
    crops = [kind.cells(batch).any().sum() for kind in objective.knowledge]
    return torch.stack([count.float() for count in (pixels.sum(), *crops)])


def total_loss(
    logits_NChw: Tensor,
    student_mapping: geometry.Mapping,
    batch: Batch,
    decoded: Mapping[str, Tensor],
    objective: Objective,
    class_weights: Tensor | None = None,
    *,
    denominators: Denominators | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of :func:`loss_terms`; and each term by name, unweighted and detached."""
    terms = loss_terms(
        logits_NChw, student_mapping, batch, decoded, objective, class_weights, denominators=denominators
    )
    loss = torch.stack([weight * terms[name] for name, weight in objective.weights.items()]).sum()
    return loss, {name: term.detach() for name, term in terms.items()}


def loss_terms(
    logits_NChw: Tensor,
    student_mapping: geometry.Mapping,
    batch: Batch,
    decoded: Mapping[str, Tensor],
    objective: Objective,
    class_weights: Tensor | None = None,
    *,
    denominators: Denominators | None = None,
) -> dict[str, Tensor]:
    """The objective's terms by name, unweighted. Float32, even under autocast.

    ``student_mapping`` places the student's grid in crop pixels. ``decoded`` holds the objective's targets of the
    batch's sources, (S,channels,h,w): log-probabilities ``soft`` (-inf is legal) and first-order maps, as written; what
    stands where nothing counts is never used. ``class_weights`` (C,) makes cross-entropy a weighted mean, as torch's.

    A step in several parts passes the ``denominators`` of them all with each part and adds up the results; without
    them, ``batch`` is the whole step. Under torch.distributed the mean over the processes is the global batch's value:
    of the loss, its gradient and each term.
    """
    if denominators is None:
        denominators = Denominators.of(batch, objective=objective, class_weights=class_weights)
    terms: dict[str, Tensor] = {}
    with torch.autocast(logits_NChw.device.type, enabled=False):
        if objective.loss.cross_entropy:
            # Crops without labels are not even brought to pixels.
            labelled, smoothing = batch.labelled_N, objective.loss.label_smoothing
            pixel_sum = summed_cross_entropy(
                logits_NChw[labelled], student_mapping, batch.labels_NHW[labelled], class_weights, smoothing
            )
            terms["cross_entropy"] = pixel_sum / denominators.pixels
        if objective.knowledge:
            assert batch.sources is not None, "knowledge needs a batch with sources"
            aligned_SChw = align(logits_NChw, student_mapping, batch.sources)
            for kind in objective.knowledge:
                crop_sum = _knowledge(aligned_SChw, batch, decoded, kind, class_weights)
                terms[kind.name] = crop_sum / denominators.crops[kind.name]
    return terms


def _knowledge(
    aligned_SChw: Tensor,
    batch: Batch,
    decoded: Mapping[str, Tensor],
    kind: Knowledge,
    class_weights: Tensor | None,
) -> Tensor:
    """Summed over the crops that have a valid cell."""
    cells = kind.cells(batch, class_weights)
    absent_S1hw = ~cells.exist_Shw[:, None]
    teacher = {need.target: decoded[need.target].masked_fill(absent_S1hw, 0.0) for need in kind.needs()}
    return kind.crop_values(aligned_SChw, teacher, cells).where(cells.any(), 0.0).sum()
