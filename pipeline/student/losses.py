"""What a student is trained by: labels, and the teacher's zero- and first-order knowledge from the cache.

Every term is a mean over the *global* batch, all parts of a step and all processes together: cross-entropy over its
valid labelled pixels; the knowledge terms over the valid cells of a crop first and then over the crops that have any,
so that neither a crop's area nor the share of it that counts changes how much it weighs. :class:`Denominators` holds
the counts. Nothing valid is exactly 0, with a gradient of 0.

Shapes: N crops of H,W pixels; logits N,C,h,w on the student's grid; S sources with windows of h,w teacher cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.data.batch import Batch
from segkd.pipeline.data.sample import IGNORE
from segkd.pipeline.first_order import Features, features_of, first_order_map
from segkd.pipeline.resample import to_pixels
from segkd.pipeline.student.alignment import align
from segkd.storage import geometry
from segkd.storage.errors import ConfigError

ZeroOrder = Literal["kl", "squared"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The terms of the loss. A term of weight 0 is never computed, and its target not needed."""

    cross_entropy: float = 1.0
    """Weight of the cross-entropy with the labels."""
    zero_order: float = 1.0
    """Weight of the zero-order term: the teacher's class distribution in each cell."""
    zero_order_form: ZeroOrder = "kl"
    """``kl``: T^2 KL(teacher || student); ``squared``: squared difference of probabilities. Summed over classes."""
    temperature: float = 1.0
    """T of the zero-order term, which compares softmax(logits / T)."""
    first_order: float = 10.0
    """Weight of the first-order term; the term starts about fifty times below KL, so sweep it over decades."""
    first_order_form: Features = "softmax"
    """What the first-order map compares between neighbours, see :func:`segkd.pipeline.first_order.features_of`."""
    allow_unpromised: bool = False
    """Whether to train at a temperature that the cache gives no bound on its coding error for."""

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("cross_entropy", "zero_order", "first_order")}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"loss.{name} is {weight}; a weight is a finite number of at least 0 (0 = off)")
        if not any(weights.values()):
            raise ConfigError(f"every weight of the loss is 0; give at least one of {', '.join(weights)} a weight")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"loss.temperature is {self.temperature}; expected a finite number above 0 (1 = as is)")


def needed_targets(config: LossConfig) -> tuple[str, ...]:
    """The cache's targets that the loss reads, in the cache's names."""
    return tuple(use.target for use in uses(config))


@dataclass(frozen=True)
class Use:
    """What one knowledge term reads of the cache."""

    term: str
    target: str
    temperature: float | None
    """The temperature at which it reads class distributions; None where it reads the target as it is."""


def uses(config: LossConfig) -> tuple[Use, ...]:
    """What the loss's knowledge terms read; a term of weight 0 reads nothing."""
    zero_order = Use("zero_order", "soft", config.temperature)
    first_order = Use("first_order", _first_order_target(config), None)
    return tuple(use for use in (zero_order, first_order) if getattr(config, use.term))


def _first_order_target(config: LossConfig) -> str:
    return "first_order" if config.first_order_form == "softmax" else "first_order_logits"


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """What the terms' sums are divided by: counts of the global batch over the number of processes.

    The division by the number of processes cancels DistributedDataParallel's averaging of gradients. Where a count is
    0, the sum is 0 too and 1 stands here.
    """

    pixels: Tensor
    """Valid pixels of labelled crops, each counted with its class weight."""
    crops: Tensor
    """Crops with a cell that counts."""
    crops_first: Tensor
    """Crops with a cell that counts for the first-order term."""

    @classmethod
    def of(cls, *parts: Batch, class_weights: Tensor | None = None) -> Denominators:
        """Counts of a step's batch, all its parts together. A collective call where torch.distributed is running."""
        counts = torch.stack([_counts(part, class_weights) for part in parts]).sum(0)
        processes = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
            torch.distributed.all_reduce(counts)
        pixels, crops, crops_first = (counts.masked_fill(counts == 0, 1.0) / processes).unbind()
        return cls(pixels=pixels, crops=crops, crops_first=crops_first)


def _counts(batch: Batch, class_weights: Tensor | None) -> Tensor:
    """This process's pixels, crops and first-order crops (float32)."""
    labels = batch.labels_NHW[batch.labelled_N]
    valid = labels != IGNORE
    pixels = valid.sum() if class_weights is None else class_weights[labels[valid]].sum()
    crops = crops_first = torch.zeros_like(pixels)
    if batch.sources is not None:
        crops = (_by_crop(batch.sources.counts_Shw.sum((1, 2)), batch) > 0).sum()
        crops_first = (_by_crop(batch.sources.counts_first_Shw.sum((1, 2)), batch) > 0).sum()
    return torch.stack([count.float() for count in (pixels, crops, crops_first)])


def total_loss(
    logits_NChw: Tensor,
    student_mapping: geometry.Mapping,
    batch: Batch,
    decoded: Mapping[str, Tensor],
    config: LossConfig,
    class_weights: Tensor | None = None,
    *,
    denominators: Denominators | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms; and each term by name, unweighted and detached. Float32, even under autocast.

    ``student_mapping`` places the student's grid in crop pixels. ``decoded`` holds the :func:`needed_targets` of the
    batch's sources, (S,channels,h,w): log-probabilities ``soft`` (-inf is legal) and first-order maps, as written; what
    stands where nothing counts is never used. ``class_weights`` (C,) makes cross-entropy a weighted mean, as torch's.

    A step in several parts passes the ``denominators`` of them all with each part and adds up the results; without
    them, ``batch`` is the whole step. Under torch.distributed the mean over the processes is the global batch's value:
    of the loss, its gradient and each term.
    """
    if denominators is None:
        denominators = Denominators.of(batch, class_weights=class_weights)
    terms: dict[str, Tensor] = {}
    with torch.autocast(logits_NChw.device.type, enabled=False):
        if config.cross_entropy:
            pixel_sum = _cross_entropy(logits_NChw, student_mapping, batch, class_weights)
            terms["cross_entropy"] = pixel_sum / denominators.pixels
        if config.zero_order or config.first_order:
            assert batch.sources is not None, "knowledge terms need a batch with sources"
            aligned_SChw = align(logits_NChw, student_mapping, batch.sources)
            if config.zero_order:
                counts_Shw = batch.sources.counts_Shw
                soft_SChw = decoded["soft"].masked_fill(~counts_Shw[:, None], 0.0)
                cells_Shw = zero_order(aligned_SChw, soft_SChw, config.zero_order_form, config.temperature)
                terms["zero_order"] = _crop_means(cells_Shw, counts_Shw, batch).sum() / denominators.crops
            if config.first_order:
                counts_Shw = batch.sources.counts_first_Shw
                map_Shw = decoded[_first_order_target(config)][:, 0].masked_fill(~counts_Shw, 0.0)
                cells_Shw = first_order(aligned_SChw, map_Shw, batch.sources.counts_Shw, config.first_order_form)
                terms["first_order"] = _crop_means(cells_Shw, counts_Shw, batch).sum() / denominators.crops_first
    loss = torch.stack([getattr(config, name) * term for name, term in terms.items()]).sum()
    return loss, {name: term.detach() for name, term in terms.items()}


def zero_order(logits_SChw: Tensor, log_probs_SChw: Tensor, form: ZeroOrder, temperature: float) -> Tensor:
    """Per cell S,h,w: how far the student's class distribution is from the teacher's (Hinton et al., 2015)."""
    teacher_SChw = (log_probs_SChw / temperature).softmax(1)
    if form == "squared":
        return ((logits_SChw / temperature).softmax(1) - teacher_SChw).square().sum(1)
    student_SChw = (logits_SChw / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(student_SChw, teacher_SChw, reduction="none").sum(1)


def first_order(logits_SChw: Tensor, map_Shw: Tensor, counts_Shw: Tensor, form: Features) -> Tensor:
    """Per cell S,h,w: the squared difference of the student's first-order map from the teacher's.

    The student's neighbours are the cells that count; where all neighbours inside the image do, they are the teacher's.
    """
    return (first_order_map(features_of(logits_SChw, form), counts_Shw) - map_Shw).square()


def _cross_entropy(
    logits_NChw: Tensor, mapping: geometry.Mapping, batch: Batch, class_weights: Tensor | None
) -> Tensor:
    """Summed over the valid pixels of the labelled crops; the others are not even brought to pixels."""
    labels = batch.labels_NHW[batch.labelled_N]
    pixels = to_pixels(logits_NChw[batch.labelled_N], mapping, *labels.shape[1:])
    return F.cross_entropy(pixels, labels, class_weights, ignore_index=IGNORE, reduction="sum")


def _crop_means(cells_Shw: Tensor, valid_Shw: Tensor, batch: Batch) -> Tensor:
    """The mean over the valid cells of each crop, all its sources together: N, with 0 where none is valid."""
    totals_N = _by_crop(cells_Shw.where(valid_Shw, 0.0).sum((1, 2)), batch)
    return totals_N / _by_crop(valid_Shw.sum((1, 2)), batch).clamp_min(1)


def _by_crop(values_S: Tensor, batch: Batch) -> Tensor:
    """The sum over the sources of each crop: N."""
    assert batch.sources is not None
    crop_S = batch.sources.crop_S.to(values_S.device)
    return values_S.new_zeros(len(batch.labels_NHW)).index_add(0, crop_S, values_S)
