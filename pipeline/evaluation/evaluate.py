"""Whom to score, how each is asked, and what the answers cost.

Shapes: images H,W,3; log-probabilities 1,C,h,w on a native grid.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.sample import Classes, DataSource, Role, Sample, with_role
from segkd.pipeline.evaluation.cached import CachedTeacher
from segkd.pipeline.evaluation.metrics import ConfusionMatrix
from segkd.pipeline.evaluation.scores import OnSample, Predict, Scores, score
from segkd.pipeline.evaluation.speed import Latency, count_flops, count_parameters, latency
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.progress import SILENT, Progress
from segkd.pipeline.settings import parse
from segkd.pipeline.student import checkpoint
from segkd.storage.errors import DataError
from segkd.storage.reader import CacheReader


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network's answers cost."""

    parameters: int
    flops: int
    """Of one image, in all passes: 2 a multiply-accumulate."""
    shape: tuple[int, int]
    """Height and width of the network's input, in the first pass."""
    passes: int
    """How often the network is asked about an image: a teacher in each view, window by window."""
    latency: Latency | None
    """Of one pass, of ``shape``; None unless it was asked for."""

    def text(self) -> str:
        """For people, one line."""
        at = "x".join(map(str, self.shape))
        line = f"{self.parameters / 1e6:,.2f} M parameters, {self.flops / 1e9:,.2f} GFLOPs "
        line += f"at {at}" if self.passes == 1 else f"in {self.passes} passes"
        if self.latency is not None:
            time = self.latency
            line += "; " if self.passes == 1 else "; the first pass "
            line += (
                f"{time.p50_ms:.1f} ms (p95 {time.p95_ms:.1f}) a batch of {time.batch} at {at} on {time.device}, "
                f"{time.threads} threads, {time.dtype}, {time.runs} runs after {time.warmup}"
            )
        return line


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores on one role, and the cost where a network was asked and not a cache."""

    role: Role
    scores: Scores
    cost: Cost | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        cost = None if self.cost is None else asdict(self.cost)
        return {"role": self.role, "scores": self.scores.to_dict(), "cost": cost}

    def text(self) -> str:
        """For people."""
        return self.scores.table() if self.cost is None else f"{self.scores.table()}\n{self.cost.text()}"


def checkpoint_predictor(
    path: str | Path, classes: Classes | None = None, *, reference: str | None = None, device: torch.device
) -> tuple[Predictor, Classes]:
    """A checkpoint's network over ``classes`` (none: its own), and those classes.

    ``reference`` names the network's code, see :func:`segkd.pipeline.student.checkpoint.network_from_checkpoint`.
    Raises CheckpointError, and NetworkError where the classes do not fit.
    """
    network, config, own = checkpoint.network_from_checkpoint(path, reference=reference)
    over = classes or own
    return Predictor(network, replace(config, classes=config.classes or own.names), over.names, device=device), over


def data_of_checkpoint(path: str | Path) -> DataConfig:
    """The data that a checkpoint's network was trained with. Raises CheckpointError, ConfigError."""
    description, _ = checkpoint.load(path)
    return parse(DataConfig, description.run["data"], place=f"{path}, data")


def evaluate_network(
    predictor: Predictor,
    source: DataSource,
    role: Role,
    *,
    speed: bool = False,
    on_sample: OnSample | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Scores a network on the samples of a role; with ``speed`` it is timed too, at the size of the first of them.

    ``on_sample``: see :func:`segkd.pipeline.evaluation.scores.score`. Raises DataError, NetworkError, NonFiniteError.
    """
    scores = _scored(lambda sample, image: predictor.predict([image], [sample.id]), source, role, progress, on_sample)
    height, width = source.size(with_role(source, role)[0])
    seen = predictor.seen(height, width)
    cost = Cost(
        parameters=count_parameters(predictor.network),
        flops=sum(times * count_flops(predictor.network, size) for size, times in Counter(seen).items()),
        shape=seen[0],
        passes=len(seen),
        latency=latency(predictor.network, seen[0]) if speed else None,
    )
    return Evaluation(role=role, scores=scores, cost=cost)


def evaluate_cache(cache: CacheReader, source: DataSource, role: Role, *, progress: Progress = SILENT) -> Evaluation:
    """Scores the cached teacher on the samples of a role. Raises CacheMismatchError, DataError."""
    scores = _scored(CachedTeacher(cache, source).predict, source, role, progress)
    return Evaluation(role=role, scores=scores, cost=None)


def _scored(
    predict: Predict, source: DataSource, role: Role, progress: Progress, on_sample: OnSample | None = None
) -> Scores:
    samples = with_role(source, role)
    if not samples:
        raise DataError(_none_to_score(source, role))
    with progress.task(f"scoring {role}", len(samples)) as task:

        def scored(sample: Sample, confusion: ConfusionMatrix) -> None:
            task.advance()
            if on_sample is not None:
                on_sample(sample, confusion)

        return score(predict, source, samples, on_sample=scored)


def _none_to_score(source: DataSource, role: Role) -> str:
    """Why nothing can be scored, and what could be instead."""
    counts = Counter(sample.role for sample in source.samples if sample.labelled)
    have = ", ".join(f"{other} {counts[other]}" for other in Role if counts[other]) or "none with labels"
    default = " (the default)" if role is Role.REPORT else ""
    instead = [other for other in (Role.REPORT, Role.SELECT, Role.TRAIN, Role.AUXILIARY) if counts[other]]
    remedy = f"--role {instead[0]}" if instead else "give the labels' place in [data]"
    return f"role {role}{default} has no sample; the data have {have}: {remedy}"
