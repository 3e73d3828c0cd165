"""What a training run reads, opened and found to fit together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from segkd.pipeline import processes
from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.batch import Sources
from segkd.pipeline.data.contamination import find_twins, require_apart
from segkd.pipeline.data.contents import read_contents
from segkd.pipeline.data.kept import KeptSource
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import IGNORE, LEARNED, SCORED, DataSource, Role, Sample, with_role
from segkd.pipeline.data.sources import Looks
from segkd.pipeline.data.stream import StreamConfig, TrainStream
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.progress import SILENT, Progress
from segkd.pipeline.student.config import TrainConfig
from segkd.pipeline.student.knowledge.base import ClassWeighted, Knowledge
from segkd.pipeline.student.knowledge.config import KnowledgeConfig
from segkd.pipeline.student.leaks import beginnings, labels_before, warn_of_label_leaks
from segkd.pipeline.student.live import open_live_teacher
from segkd.pipeline.student.losses import Objective
from segkd.pipeline.student.seen import SampleList, Seen
from segkd.pipeline.student.trainer import Targets
from segkd.pipeline.teacher.named import require_named_teacher
from segkd.storage.coding import ExactDistribution
from segkd.storage.errors import CacheMismatchError, ConfigError
from segkd.storage.reader import CacheReader
from segkd.storage.spec import CacheSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The open data of a run."""

    source: DataSource
    fingerprints: Mapping[str, str]
    """Of what the cache or the teacher is; empty when nothing is distilled."""
    targets: Targets | None
    """The teacher's side of a batch; None when nothing is distilled."""
    objective: Objective
    """The terms of the run; without distillation those of the labels alone."""
    stream: TrainStream
    select: tuple[Sample, ...]
    """What the run validates on; empty when it does not."""
    class_weights: Tensor | None
    seen: Seen
    """What the network will have seen of which samples."""


def open_inputs(run: RunConfig, student: NetworkConfig, *, distill: bool, progress: Progress = SILENT) -> Inputs:
    """Opens data and cache or teacher, and compares what images show. ``student`` is the complete description, see
    :func:`segkd.pipeline.models.references.described`.

    Raises ConfigError, DataError, CacheError or ContaminationError where they do not fit each other or the run.
    """
    train = run.train
    objective = Objective(loss=run.loss, knowledge=run.knowledge.kinds() if distill else ())
    if distill:
        check_knowledge(objective.knowledge, train)
    if train.auxiliary and not distill:
        raise ConfigError(
            f"train.auxiliary is {train.auxiliary}, but without distillation nothing can be learned from samples "
            "without labels; set it to 0"
        )
    source = open_data(run.data)
    if student.class_map or student.classes not in (None, source.classes.names):
        raise ConfigError(
            "student.classes and student.class_map do not apply in training: it learns the data's classes"
        )
    select = with_role(source, Role.SELECT) if train.validate_every else ()
    if train.validate_every and not select:
        logger.warning(
            "the data has no sample of role select to validate on: no best.safetensors is written, "
            "last.safetensors is what training gives"
        )
    teacher, targets, fingerprints = _open_teacher(run, source, objective) if distill else (None, None, {})
    config = StreamConfig(
        labelled=train.labelled,
        auxiliary=train.auxiliary,
        least_confidence=train.least_confidence,
        most_entropy=train.most_entropy,
        seed=train.seed,
        on_damage=train.on_damage,
        processes=processes.count(),
        rank=processes.rank(),
    )
    _warn_of_padding(run, source)
    kept = KeptSource(source, train.kept_bytes)
    stream = TrainStream(kept, teacher, objective.targets, config, run.augment, student.preprocessing)
    seen = _compare(run, source, stream.samples, select, student, distill, progress)
    return Inputs(
        source=source,
        fingerprints=fingerprints,
        targets=targets,
        objective=objective,
        stream=stream,
        select=select,
        class_weights=class_weights(source, train, objective.knowledge),
        seen=seen,
    )


def _warn_of_padding(run: RunConfig, source: DataSource) -> None:
    """Of crops that are mostly padding at any scale, by the first image to learn from."""
    learned = with_role(source, Role.TRAIN) or with_role(source, Role.AUXILIARY)
    if not learned:
        return
    height, width = source.size(learned[0])
    crop, scale = run.augment.crop, run.augment.scale[1]
    shown = min(crop[0], height * scale) * min(crop[1], width * scale)
    if 2 * shown < crop[0] * crop[1]:
        logger.warning(
            "augment.crop is %d x %d, and %s has %d x %d pixels: at the largest augment.scale, %g, more than half of a "
            "crop is padding; lower augment.crop",
            *(*crop, learned[0].id, height, width, scale),
        )


def _open_teacher(
    run: RunConfig, source: DataSource, objective: Objective
) -> tuple[CacheReader | Looks, Targets, Mapping[str, str]]:
    """What a stream has the teacher's side from, what makes targets of it, and the fingerprints of what that is."""
    view = run.train.teacher_view
    if view != "cache":
        live = open_live_teacher(run, source.classes, objective.targets)
        return live.looks(source, view), live, live.fingerprints
    cache = _open_cache(run, objective)
    return cache, partial(_decoded, cache, objective.targets), cache.spec.fingerprints


def _open_cache(run: RunConfig, objective: Objective) -> CacheReader:
    """The run's cache. Raises CacheError where it is not one that the run can learn from."""
    cache = CacheReader(run.cache.path)
    if not cache.sealed:
        logger.warning(
            "%s has a generation that is not finished, and training sees the cache before it; "
            "run segkd teacher-cache, or segkd cache repair if one was interrupted, to finish it",
            run.cache.path,
        )
    require_named_teacher(cache.spec, run.teacher, cache.path)
    cache.prepare()
    if not run.loss.allow_unpromised:
        check_promise(cache.spec, objective.knowledge, str(cache.path))
    return cache


def _decoded(cache: CacheReader, targets: Sequence[str], sources: Sources) -> dict[str, Tensor]:
    return {name: cache.decode(name, sources.codes[name], sources.rungs[name]) for name in targets}


def _compare(
    run: RunConfig,
    source: DataSource,
    learned: Sequence[Sample],
    select: Sequence[Sample],
    student: NetworkConfig,
    distill: bool,
    progress: Progress,
) -> Seen:
    """Holds what the run learns from against what it is scored on. Raises ContaminationError."""
    policy = run.data.compare_contents
    contents, contaminated = None, None
    before = [*beginnings(student), *beginnings(run.teacher if distill else None)]
    if policy != "off":
        samples = (*learned, *with_role(source, *SCORED))
        with processes.one_a_machine_first():
            contents = read_contents(source, samples, progress=progress)
        twins = find_twins(samples, contents)
        require_apart(twins, source, policy)
        contaminated = len(twins.contaminated)
        warn_of_label_leaks(before, source, contents)
    labelled, auxiliary = ([sample for sample in learned if sample.role is role] for role in LEARNED)
    return Seen(
        labels_of=SampleList.of(labelled, contents),
        labels_before=labels_before(before),
        images_of=SampleList.of(auxiliary, contents),
        selected_on=SampleList.of(select, contents),
        contaminated=contaminated,
    )


def check_knowledge(knowledge: Sequence[Knowledge], train: TrainConfig) -> None:
    """Raises ConfigError where nothing would be distilled, or something from images that no batch holds."""
    if not knowledge:
        raise ConfigError(
            "every weight in [knowledge] is 0, so nothing would be distilled; give one of "
            f"{', '.join(kind.name for kind in KnowledgeConfig().kinds())} a weight, "
            "or train on labels alone with --no-distill"
        )
    for kind in knowledge:
        if _is_class_weighted(kind) and (train.class_weights is None or not train.labelled):
            raise ConfigError(
                f"knowledge.{kind.name}.class_weighted is true, but train.class_weights is not given or train.labelled "
                "is 0, so classes have no weights; give both, or leave class_weighted out"
            )
        if kind.on == "auxiliary" and not train.auxiliary:
            raise ConfigError(
                f'knowledge.{kind.name}.on is "auxiliary", but train.auxiliary is 0, so it would never act; '
                f'raise train.auxiliary, set on = "all", or knowledge.{kind.name}.weight = 0'
            )


def check_promise(spec: CacheSpec, knowledge: Sequence[Knowledge], where: str) -> None:
    """Raises CacheMismatchError where a knowledge needs a bound on the coding error that the cache does not give.

    A bound at one temperature says nothing about another: what is next to nothing at T = 1 counts at T = 4. Where every
    sample is kept exactly there is nothing to count at any.
    """
    override = "or set loss.allow_unpromised = true"
    for kind in knowledge:
        for need in kind.needs():
            target = spec.targets.get(need.target)
            # The stream refuses a cache without the target; one that is not of distributions has no temperature.
            if target is None or isinstance(target.coder, ExactDistribution):
                continue
            if need.exact is not None:
                raise CacheMismatchError(
                    f"knowledge.{kind.name} {need.exact}: {where} is bounded at {target.bound:g} nats; "
                    f'write it again with cache.profile = "exact", {override}'
                )
            promised = target.parameters.get("temperatures")
            missing = [] if promised is None else [t for t in need.temperatures if t not in promised]
            if promised is not None and missing:
                raise CacheMismatchError(
                    f"knowledge.{kind.name} reads distributions at T = {missing[0]:g}, but {where} keeps its bound of "
                    f"{target.bound:g} nats at T = {', '.join(f'{t:g}' for t in promised)} only; "
                    f"write it again with {missing[0]:g} among cache.temperatures, {override}"
                )


def _is_class_weighted(kind: Knowledge) -> bool:
    return isinstance(kind, ClassWeighted) and kind.class_weighted


def class_weights(source: DataSource, config: TrainConfig, knowledge: Sequence[Knowledge]) -> Tensor | None:
    """Weights of the classes, float32. Raises ConfigError where their number is not the classes'.

    Cross-entropy divides by their sum, so only their ratios matter to it. Where knowledge takes them too, they have a
    mean of 1 over the labelled training pixels.

    "log_frequency" is ``1 / ln(1.02 + p)``, p the share of those pixels that the class has (Paszke et al. 2016, ENet):
    ratios of up to 36.
    """
    count = len(source.classes)
    if config.class_weights is None or not config.labelled:
        return None
    if config.class_weights != "log_frequency" and len(config.class_weights) != count:
        raise ConfigError(
            f"train.class_weights has {len(config.class_weights)} weights, the data {count} classes "
            f"({', '.join(source.classes.names)}); give one a class"
        )
    shared = any(map(_is_class_weighted, knowledge))
    if config.class_weights != "log_frequency" and not shared:
        return torch.tensor(config.class_weights)  # no label map need be read
    mine = with_role(source, Role.TRAIN)[processes.rank() :: processes.count()]
    pixels = processes.total(torch.from_numpy(_class_pixels(source, mine))).numpy()
    shares = pixels / max(pixels.sum(), 1)
    given = 1 / np.log(1.02 + shares) if config.class_weights == "log_frequency" else np.asarray(config.class_weights)
    # Where no pixel has a class that weighs anything, nothing is learned from labels, whatever the scale.
    mean = float((given * shares).sum()) or 1.0
    return torch.from_numpy(given / mean if shared else given).float()


def _class_pixels(source: DataSource, samples: Sequence[Sample]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    total = np.zeros(IGNORE + 1, np.int64)
    for sample in samples:
        total += np.bincount(source.labels(sample).ravel(), minlength=len(total))
    return total[: len(source.classes)]
