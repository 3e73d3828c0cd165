"""The batches of a training run: which samples, cut how, with which of the teacher's cells.

A batch is a pure function of the seed and its step, whatever the number of processes and wherever a run was resumed.

Shapes: N crops of H,W pixels; S sources (here one a crop), each with a window of h,w teacher cells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from segkd.pipeline.data.batch import Batch, Sources
from segkd.pipeline.data.photometric import jitter
from segkd.pipeline.data.sample import IGNORE, DataSource, Role, Sample, with_role
from segkd.pipeline.data.transforms import AugmentConfig, BoolArray, Crop, Window, window_of
from segkd.pipeline.models.network import Preprocessing
from segkd.pipeline.models.preprocessing import normalise
from segkd.storage.errors import CacheDamagedError, CacheMismatchError, ConfigError, ContaminationError, DataError
from segkd.storage.reader import CacheReader
from segkd.storage.table import Entry


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What a batch is made of."""

    labelled: int
    """Samples of role train in a batch."""
    auxiliary: int = 0
    """Samples of role auxiliary in a batch; their labels are never read."""
    seed: int = 0
    """Of the order and the augmentation."""
    on_damage: Literal["fail", "skip"] = "fail"
    """What is done about a crop whose part of the cache is damaged: raise, or leave the teacher's knowledge out."""

    def __post_init__(self) -> None:
        for name in ("labelled", "auxiliary", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.labelled + self.auxiliary == 0:
            raise ConfigError("labelled and auxiliary are both 0; a batch needs samples: raise one of them")


@dataclass(frozen=True)
class Draw:
    """One crop of a batch, before it is cut: nothing else decides what it shows."""

    sample: Sample
    epoch: int


@dataclass(frozen=True)
class _Knowledge:
    """What the cache holds of one crop."""

    window: Window
    codes: Mapping[str, npt.NDArray[np.generic]]
    rungs: Mapping[str, int]


@dataclass(frozen=True)
class _Item:
    """One crop: image H,W,3, labels H,W and the teacher's knowledge of it."""

    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    labelled: bool
    knowledge: _Knowledge | None
    damage: str | None
    """What is wrong with the cache's part of this crop, which is left out."""


class TrainStream(Dataset[Batch]):
    """Training batches by step: ``stream[step]``, without end.

    Labelled and auxiliary samples come from two pools, each in a new order every epoch of its own. Samples of role
    select or report are never drawn. With ``cache=None`` nothing is distilled and a batch has no sources. Where damage
    to the cache is skipped, a crop that it concerns has a source of which no cell counts.

    Raises ConfigError for a pool without samples and for auxiliary samples without a cache, CacheMismatchError where
    the cache is of other classes, targets, samples or images, and ContaminationError where a sample that is to be
    learned from is one of role select or report in the cache. A batch raises CacheDamagedError unless that is skipped.
    """

    def __init__(
        self,
        source: DataSource,
        cache: CacheReader | None,
        targets: tuple[str, ...],
        stream: StreamConfig,
        augment: AugmentConfig,
        preprocessing: Preprocessing,
    ) -> None:
        if stream.auxiliary and cache is None:
            raise ConfigError(
                f"a batch has {stream.auxiliary} auxiliary samples but there is no cache; "
                "they are learned from through the teacher alone: set auxiliary to 0, or distil"
            )
        self._source = source
        self._cache = cache
        self._targets = targets
        self._config = stream
        self._augment = augment
        self._preprocessing = preprocessing
        self._labelled = _Pool(source, Role.TRAIN, stream.labelled, stream.seed)
        self._auxiliary = _Pool(source, Role.AUXILIARY, stream.auxiliary, stream.seed)
        self._verified: set[str] = set()
        if cache is not None:
            _check_cache(cache, source, targets, (*self._labelled.samples, *self._auxiliary.samples), stream.on_damage)

    def draws(self, step: int) -> tuple[Draw, ...]:
        """The crops of a batch in its order, labelled ones first."""
        return (*self._labelled.draws(step), *self._auxiliary.draws(step))

    def __getitem__(self, step: int) -> Batch:
        draws = self.draws(step)
        items = [self._item(draw) for draw in draws]
        images_NHW3 = np.stack([item.image for item in items])
        images_N3HW = torch.from_numpy(np.ascontiguousarray(images_NHW3.transpose(0, 3, 1, 2)))
        return Batch(
            images_N3HW=normalise(images_N3HW, self._preprocessing),
            labels_NHW=torch.from_numpy(np.stack([item.labels for item in items])).long(),
            labelled_N=torch.tensor([item.labelled for item in items]),
            sources=None if self._cache is None else _collate(self._cache, items, self._targets),
            damaged={draw.sample.id: item.damage for draw, item in zip(draws, items, strict=True) if item.damage},
        )

    def _item(self, draw: Draw) -> _Item:
        sample = draw.sample
        labelled = sample.role is Role.TRAIN
        rng = np.random.default_rng([self._config.seed, draw.epoch, *_words(sample.id)])
        image = self._source.image(sample)
        crop = Crop.draw(rng, image.shape[:2], self._augment)
        strength = self._augment.photometric if labelled else self._augment.auxiliary_photometric
        owned = self._owned(sample, crop) if labelled else crop.inside()
        knowledge, damage = self._knowledge_or_damage(sample, crop, owned)
        return _Item(
            image=jitter(crop.image(image), rng, strength),
            labels=crop.labels(self._label_map(sample, crop)) if labelled else np.full(crop.size, IGNORE, np.uint8),
            labelled=labelled,
            knowledge=knowledge,
            damage=damage,
        )

    def _label_map(self, sample: Sample, crop: Crop) -> npt.NDArray[np.uint8]:
        labels = self._source.labels(sample)
        if labels.shape != crop.image_size:
            raise DataError(
                f"the labels of {sample.id} are {_by(labels.shape)} pixels, its image is {_by(crop.image_size)}; "
                "they must be of one size: segkd data check lists all such samples"
            )
        return labels

    def _owned(self, sample: Sample, crop: Crop) -> BoolArray:
        """H,W of the crop: pixels that show the image, and of it something of the scene."""
        excluded = None if self._cache is None else self._source.excluded(sample)
        return crop.inside() if excluded is None else crop.labels(excluded.astype(np.uint8)) == 0

    def _knowledge_or_damage(
        self, sample: Sample, crop: Crop, owned: BoolArray
    ) -> tuple[_Knowledge | None, str | None]:
        if self._cache is None:
            return None, None
        try:
            return self._knowledge(self._cache, sample, crop, owned), None
        except CacheDamagedError as error:
            if self._config.on_damage == "fail":
                raise CacheDamagedError(
                    f"sample {sample.id}: {error}; or go on without what the teacher knows of such samples: "
                    "--on-damage skip --resume"
                ) from error
            return _no_knowledge(self._cache, self._targets), str(error)

    def _knowledge(self, cache: CacheReader, sample: Sample, crop: Crop, owned: BoolArray) -> _Knowledge:
        entry = cache.entry(sample.id)
        self._check_image(sample, entry, crop)
        window = window_of(crop, entry.mapping, owned)
        return _Knowledge(
            window=window,
            codes={name: cache.window(entry, name, window.rows, window.columns) for name in self._targets},
            rungs={name: entry.rungs[name] for name in self._targets},
        )

    def _check_image(self, sample: Sample, entry: Entry, crop: Crop) -> None:
        """The image must be the one that the teacher saw; its digest is computed once a process."""
        remedy = "run segkd teacher-cache again"
        if crop.image_size != entry.image_size:
            raise CacheMismatchError(
                f"the image of {sample.id} is {_by(crop.image_size)} pixels, "
                f"the teacher saw one of {_by(entry.image_size)}; {remedy}"
            )
        if sample.id not in self._verified:
            if self._source.image_digest(sample) != entry.image_digest:
                raise CacheMismatchError(
                    f"the image of {sample.id} is not the one that the teacher saw: its digest differs; {remedy}"
                )
            self._verified.add(sample.id)


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


class _Pool:
    """The samples of one role, in an order that is a pure function of (seed, epoch)."""

    def __init__(self, source: DataSource, role: Role, share: int, seed: int) -> None:
        self.samples = with_role(source, role) if share else ()
        if share and not self.samples:
            raise ConfigError(
                f"a batch needs {share} samples of role {role}, but the data has none; "
                "give some samples this role, or ask for 0"
            )
        self._share = share
        self._entropy = (seed, list(Role).index(role))
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def draws(self, step: int) -> list[Draw]:
        """The pool's part of a batch: the next samples of one endless sequence of epochs."""
        return [self._draw(k) for k in range(step * self._share, (step + 1) * self._share)]

    def _draw(self, k: int) -> Draw:
        epoch, position = divmod(k, len(self.samples))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([*self._entropy, epoch]).permutation(len(self.samples))
        return Draw(self.samples[self._order[1][position]], epoch)


def _check_cache(
    cache: CacheReader,
    source: DataSource,
    targets: tuple[str, ...],
    samples: Sequence[Sample],
    on_damage: Literal["fail", "skip"],
) -> None:
    """Raises where the cache cannot serve these samples, or must not."""
    if cache.spec.classes != source.classes.names:
        raise CacheMismatchError(
            f"the cache is of the classes {', '.join(cache.spec.classes)}, "
            f"the data of {', '.join(source.classes.names)}; use a cache written for these data"
        )
    for name in targets:
        if name not in cache.spec.targets:
            raise CacheMismatchError(
                f"the cache keeps no target {name!r}, only {', '.join(cache.spec.targets)}; "
                "write it again with that target, or give its loss the weight 0"
            )
    for sample in samples:
        try:
            role = cache.entry(sample.id).role
        except CacheDamagedError as error:
            if on_damage == "fail":
                raise CacheDamagedError(
                    f"sample {sample.id}: {error}; or train without what the teacher knows of such samples: "
                    "--on-damage skip"
                ) from error
            continue
        if role in (Role.SELECT, Role.REPORT):
            raise ContaminationError(
                f"sample {sample.id} has role {sample.role} in the data but {role} in the cache, "
                "and such samples must not be learned from; correct the lists of the data"
            )
        if role != sample.role:
            raise CacheMismatchError(
                f"sample {sample.id} has role {sample.role} in the data but {role} in the cache; "
                "correct the lists of the data, or run segkd teacher-cache again"
            )


def _no_knowledge(cache: CacheReader, targets: tuple[str, ...]) -> _Knowledge:
    """One cell that does not count: a crop whose part of the cache is damaged is still a crop with a source."""
    uncounted = np.zeros((1, 1), np.bool_)
    specs = {name: cache.spec.targets[name] for name in targets}
    return _Knowledge(
        window=Window(range(1), range(1), np.array([[1.0, 0.0], [1.0, 0.0]]), uncounted, uncounted),
        codes={name: np.zeros((spec.channels, 1, 1), spec.coder.dtype) for name, spec in specs.items()},
        rungs=dict.fromkeys(targets, 0),
    )


def _collate(cache: CacheReader, crops: Sequence[_Item], targets: tuple[str, ...]) -> Sources:
    items = [crop.knowledge for crop in crops if crop.knowledge is not None]
    height, width = (max(item.window.counts.shape[axis] for item in items) for axis in (0, 1))
    padded = {name: _pad(_of_one_kind(cache, name, items), height, width) for name in targets}
    return Sources(
        crop_S=torch.arange(len(items)),
        cell_to_crop_S22=torch.from_numpy(np.stack([item.window.cell_to_crop for item in items])),
        counts_Shw=_pad([item.window.counts for item in items], height, width),
        counts_first_Shw=_pad([item.window.counts_first for item in items], height, width),
        codes=padded,
        rungs={name: torch.tensor([item.rungs[name] for item in items]) for name in targets},
    )


def _of_one_kind(cache: CacheReader, target: str, items: Sequence[_Knowledge]) -> list[npt.NDArray[np.generic]]:
    """The items' codes; float32 values of all of them where only some are kept exactly.

    Such values stand for themselves as codes: decoding leaves them as they are.
    """
    codes = [item.codes[target] for item in items]
    if len({array.dtype for array in codes}) == 1:
        return codes
    rungs = [np.array([item.rungs[target]]) for item in items]
    return [cache.decode(target, array[None], rung)[0] for array, rung in zip(codes, rungs, strict=True)]


def _pad(arrays: Sequence[npt.NDArray[np.generic]], height: int, width: int) -> torch.Tensor:
    """Arrays (..., h, w), filled up with zeros at the end of both axes and stacked."""
    stacked = np.zeros((len(arrays), *arrays[0].shape[:-2], height, width), arrays[0].dtype)
    for target, array in zip(stacked, arrays, strict=True):
        target[..., : array.shape[-2], : array.shape[-1]] = array
    return torch.from_numpy(stacked)


def _words(sample_id: str) -> npt.NDArray[np.uint32]:
    """A sample's id as numbers that are the same on every machine and in every process."""
    return np.frombuffer(hashlib.sha256(sample_id.encode()).digest(), "<u4")


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
