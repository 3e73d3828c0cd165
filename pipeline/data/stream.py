"""The batches of a training run: which samples, cut how, with which of the teacher's cells.

A batch is a pure function of the seed and its step, whatever the number of processes that prepare or share it and
wherever a run was resumed.

Shapes: N crops of H,W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from segkd.pipeline.data.batch import Batch
from segkd.pipeline.data.mixing import Piece, compose, draw_rectangle
from segkd.pipeline.data.photometric import jitter
from segkd.pipeline.data.pools import Draw, Pool, certain
from segkd.pipeline.data.sample import IGNORE, DataSource, Role, Sample, with_role
from segkd.pipeline.data.sources import KnowledgeReader, Looks, OnDamage, TeacherSide, by
from segkd.pipeline.data.transforms import AugmentConfig, BoolArray, Crop
from segkd.pipeline.models.network import Preprocessing
from segkd.pipeline.models.preprocessing import normalise, resized
from segkd.storage.errors import ConfigError, DataError
from segkd.storage.reader import CacheReader


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What a batch is made of."""

    labelled: int
    """Samples of role train in a batch."""
    auxiliary: int = 0
    """Samples of role auxiliary in a batch; their labels are never read."""
    least_confidence: float = 0.0
    """The mean largest class probability, by the cache, that an auxiliary sample must have to be drawn."""
    most_entropy: float = math.inf
    """The mean entropy in nats, by the cache, that an auxiliary sample may have to be drawn."""
    seed: int = 0
    """Of the order and the augmentation."""
    on_damage: OnDamage = "fail"
    """What is done about a crop whose part of the cache is damaged: raise, or leave the teacher's knowledge out."""
    processes: int = 1
    """How many share a batch, in equal parts of either role."""
    rank: int = 0
    """Which of them this one is, from 0."""

    def __post_init__(self) -> None:
        for name in ("labelled", "auxiliary", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.labelled + self.auxiliary == 0:
            raise ConfigError("labelled and auxiliary are both 0; a batch needs samples: raise one of them")
        for name in ("labelled", "auxiliary"):
            if getattr(self, name) % self.processes:
                raise ConfigError(
                    f"{self.processes} processes share a batch, and {name} is {getattr(self, name)}, which they cannot "
                    "share equally: set it to a multiple, or start as many processes as divide it"
                )


@dataclass(frozen=True)
class _Item:
    """One crop: image H',W',3 at the network's scale, labels H,W and the teacher's knowledge of it."""

    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    labelled: bool
    knowledge: Sequence[Any]
    """What the teacher's side has of each image that the crop shows; empty without one."""
    damaged: dict[str, str]
    """What is wrong with the cache's part of samples of this crop, which is left out."""


class TrainStream(Dataset[Batch]):
    """Training batches by step, or this process's parts of them: ``stream[step]``, without end.

    Labelled and auxiliary samples come from two pools, each in a new order every epoch of its own. Samples of role
    select or report are never drawn. ``teacher`` is a cache or, for a teacher that stands beside the student, what it
    is to look at; with None nothing is distilled and a batch has no sources. Where damage to the cache is skipped, a
    crop that it concerns has a source of which no cell counts.

    Raises ConfigError for a pool without samples, auxiliary samples without a teacher and a mix without a second image,
    CacheMismatchError where the cache is of other classes, targets, samples or images, and ContaminationError where a
    sample that is to be learned from is one of role select or report in the cache. A batch raises CacheDamagedError
    unless that is skipped.
    """

    def __init__(
        self,
        source: DataSource,
        teacher: CacheReader | Looks | None,
        targets: tuple[str, ...],
        stream: StreamConfig,
        augment: AugmentConfig,
        preprocessing: Preprocessing,
    ) -> None:
        if stream.auxiliary and teacher is None:
            raise ConfigError(
                f"a batch has {stream.auxiliary} auxiliary samples but there is no cache and no teacher; "
                "they are learned from through the teacher alone: set auxiliary to 0, or distil"
            )
        self._source = source
        self._config = stream
        self._augment = augment
        self._preprocessing = preprocessing
        self._knowledge: TeacherSide | None = None
        labelled = with_role(source, Role.TRAIN) if stream.labelled else ()
        auxiliary = with_role(source, Role.AUXILIARY) if stream.auxiliary else ()
        self._given = {Role.TRAIN: len(labelled), Role.AUXILIARY: len(auxiliary)}
        if isinstance(teacher, Looks):
            self._knowledge = teacher
        elif teacher is not None:
            self._knowledge = reader = KnowledgeReader(teacher, source, targets, stream.on_damage)
            reader.check((*labelled, *auxiliary))
            auxiliary = certain(auxiliary, teacher, stream.least_confidence, stream.most_entropy)
        self._labelled = Pool(labelled, Role.TRAIN, stream.labelled, stream.seed)
        self._auxiliary = Pool(auxiliary, Role.AUXILIARY, stream.auxiliary, stream.seed)
        if augment.cutmix and len(self._auxiliary.samples) == 1:
            raise ConfigError(
                f"augment.cutmix is {augment.cutmix:g}, but there is only one auxiliary sample to draw from, "
                "and a mix needs two; set it to 0, or provide more images"
            )

    @property
    def pools(self) -> dict[str, dict[str, int]]:
        """Per role how many samples a batch could be made of, and how many of them are drawn from."""
        drawn = {Role.TRAIN: self._labelled.samples, Role.AUXILIARY: self._auxiliary.samples}
        return {role: {"samples": count, "drawn": len(drawn[role])} for role, count in self._given.items()}

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Whatever a batch may draw from, labelled ones first."""
        return (*self._labelled.samples, *self._auxiliary.samples)

    def draws(self, step: int) -> tuple[Draw, ...]:
        """The crops of this process's part of a batch, labelled ones first. A mixed crop has a second sample."""
        mine = slice(self._config.rank, None, self._config.processes)
        return (*self._labelled.draws(step)[mine], *self._auxiliary.draws(step)[mine])

    def __getitem__(self, step: int) -> Batch:
        items = [self._item(draw) for draw in self.draws(step)]
        images_NHW3 = np.stack([item.image for item in items])
        images_N3HW = torch.from_numpy(np.ascontiguousarray(images_NHW3.transpose(0, 3, 1, 2)))
        reader = self._knowledge
        return Batch(
            images_N3HW=normalise(images_N3HW, self._preprocessing),
            labels_NHW=torch.from_numpy(np.stack([item.labels for item in items])).long(),
            labelled_N=torch.tensor([item.labelled for item in items]),
            sources=None if reader is None else reader.collate([item.knowledge for item in items]),
            damaged={sample: why for item in items for sample, why in item.damaged.items()},
        )

    def _item(self, draw: Draw) -> _Item:
        labelled = draw.sample.role is Role.TRAIN
        rng = draw.generator(self._config.seed)
        pieces = self._pieces(draw, rng)
        size = pieces[0].crop.size
        strength = self._augment.photometric if labelled else self._augment.auxiliary_photometric
        found = {} if self._knowledge is None else {piece.sample.id: self._knowledge.of(piece) for piece in pieces}
        return _Item(
            image=jitter(resized(compose(pieces), self._preprocessing.scaled(*size)), rng, strength),
            labels=self._labels(pieces[0]) if labelled else np.full(size, IGNORE, np.uint8),
            labelled=labelled,
            knowledge=[knowledge for knowledge, _ in found.values()],
            damaged={sample: damage for sample, (_, damage) in found.items() if damage is not None},
        )

    def _pieces(self, draw: Draw, rng: np.random.Generator) -> list[Piece]:
        """What the crop shows: one image, or a second one in a rectangle of the first."""
        whole = self._piece(draw.sample, rng, np.ones(self._augment.crop, np.bool_))
        if draw.sample.role is not Role.AUXILIARY or not self._augment.cutmix:
            return [whole]
        # A generator of its own, so that the first image is cut and perturbed as it would be alone.
        (mixing,) = rng.spawn(1)
        if mixing.random() >= self._augment.cutmix:
            return [whole]
        rectangle = draw_rectangle(mixing, self._augment.crop)
        other = self._auxiliary.another(draw.sample, mixing)
        return [replace(whole, region=~rectangle), self._piece(other, mixing, rectangle)]

    def _piece(self, sample: Sample, rng: np.random.Generator, region: BoolArray) -> Piece:
        image = self._source.image(sample)
        return Piece(sample, image, Crop.draw(rng, image.shape[:2], self._augment), region)

    def _labels(self, piece: Piece) -> npt.NDArray[np.uint8]:
        labels, crop = self._source.labels(piece.sample), piece.crop
        if labels.shape != crop.image_size:
            raise DataError(
                f"the labels of {piece.sample.id} are {by(labels.shape)} pixels, its image is {by(crop.image_size)}; "
                "they must be of one size: segkd data check lists all such samples"
            )
        return crop.labels(labels)


def loader(stream: TrainStream, start: int, stop: int, workers: int) -> DataLoader[Batch]:
    """The batches of steps ``start`` to ``stop - 1`` in order, prepared by ``workers`` processes (0: by this one)."""
    return DataLoader(
        stream,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        # Without one of its own, a loader draws from torch's global generator, and a resumed run would differ.
        generator=torch.Generator(),
    )
