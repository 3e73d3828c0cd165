"""A few samples through stage 1 as it will be: what they take in bytes, in coding error and in time.

The trial's samples are put into units of one batch each, every unit spread over all of them: so any few units are a
fair share of the data, and how they differ tells how far off a figure may be. They go through the loop and the writer
of ``segkd teacher-cache`` itself, into a cache that is thrown away.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from segkd.pipeline.evaluation.speed import synchronise
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.teacher.coded import Coded
from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.loop import Prepared, Stage1
from segkd.pipeline.teacher.opened import Opened, target_specs
from segkd.storage.generation import SAMPLES, target_arrays
from segkd.storage.geometry import Mapping as GridMapping
from segkd.storage.layout import PlannedSample, Unit, plan_units
from segkd.storage.reader import CacheReader
from segkd.storage.statistics import Statistics
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter

TRIED = 48
"""Samples of a trial, unless another number is asked for; a budget's bound always rests on so many."""
REMEMBERED_BYTES = 2**30
"""Most that a teacher's answers take that are kept for a further trial at another bound."""


def spread(samples: Sequence[PlannedSample], count: int) -> list[PlannedSample]:
    """``count`` of the samples, spread over sizes and, within one size, over roles and ids.

    A pure function of the samples. In order of cells, role and id they are cut into ``count`` stretches, so that every
    size has its share; a hash chooses one of each, because what is every n-th may have something in common, such as its
    place in a sequence of n frames.
    """
    ordered = sorted(samples, key=lambda sample: (math.prod(sample.mapping.shape), sample.role, sample.id))
    count = min(count, len(ordered))
    edges = [number * len(ordered) // count for number in range(count + 1)]
    return [
        min(ordered[start:stop], key=lambda sample: hashlib.sha256(sample.id.encode()).digest())
        for start, stop in pairwise(edges)
    ]


def shard_index_bytes(shard_tiles: int) -> int:
    """Offset and length of each tile, 8 bytes each, and their crc32c: what a shard holds besides its tiles."""
    return 16 * shard_tiles + 4


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a few samples took."""

    samples: int
    cells: int
    input_pixels: int
    """Pixels that the teacher was fed."""
    payload: Mapping[str, int]
    """Bytes of each target array, without shard indexes."""
    table_bytes: int
    record_bytes: int
    """Of all commit records."""
    seal_bytes: int
    units: int
    spread_of_units: float
    """Standard deviation of the units' payload a cell, relative to its mean."""
    statistics: Statistics
    timed: int
    """Samples that the figures of time rest on: those after the first unit, which warms the teacher up."""
    timed_pixels: int
    """Pixels that the teacher was fed with them."""
    seconds: float
    """Time that the loop took for them, all its parts overlapping."""
    parts: Mapping[str, float]
    """Time of each part over the same samples: decode (in all threads), infer, code, write."""


class Trials:
    """Trials of one choice of samples at any bound."""

    def __init__(self, opened: Opened, count: int, *, remember: bool = False) -> None:
        """``count`` samples, or as many as there are; ``remember`` the teacher's answers for trials at other bounds."""
        self.opened = opened
        chosen = spread(opened.planned, count)
        batch = min(opened.config.batch, max(len(chosen) // 4, 1))
        units = max(len(chosen) // batch, 1)
        # The plan cuts units at roles: with its number for a role, each is what it is meant to be.
        self.plan = plan_units(
            [replace(sample, role=f"{number % units:06d}") for number, sample in enumerate(chosen)],
            unit_samples=-(-len(chosen) // units),
            tile=opened.spec.tile,
        )
        self._clock = _Clock()
        self._predictor = _Observed(opened.predictor, self._clock, room=REMEMBERED_BYTES if remember else 0)

    def run(self, config: CacheConfig, *, seconds: float = math.inf) -> Trial:
        """The samples through stage 1 with the targets of ``config``; about ``seconds`` long, two units at least.

        Raises what stage 1 raises.
        """
        spec = replace(
            self.opened.spec, targets=target_specs(config, len(self.opened.spec.classes), self.opened.spec.tile)
        )
        opened = replace(self.opened, predictor=self._predictor, spec=spec)
        finished: list[tuple[Unit, float]] = []

        def on_unit(unit: Unit, _: int | None) -> None:
            finished.append((unit, time.monotonic()))

        with tempfile.TemporaryDirectory(prefix="segkd-plan-") as folder:
            writer = _Writer(Path(folder) / "cache.zarr", spec, self.plan)
            writer.clock = self._clock
            inherited = opened.stage(self.plan)
            stage = _Stage(**{f.name: getattr(inherited, f.name) for f in fields(Stage1)}, clock=self._clock)
            warm_up, *others = self.plan.units
            began = time.monotonic()
            self._clock.reset()
            stage.run(writer, [warm_up], on_unit)
            if others:
                warm = time.monotonic()
                others = others[: int(max(2, min(seconds / (warm - began), len(others))))]
                self._clock.reset()
                stage.run(writer, others, on_unit)
                began = warm
            return self._measured(writer, finished, began)

    def _measured(self, writer: CacheWriter, finished: Sequence[tuple[Unit, float]], began: float) -> Trial:
        records = CacheReader(writer.root, partial=True).records()
        writer.close()
        arrays, index = target_arrays(writer.spec), shard_index_bytes(self.plan.spec.shard_tiles)
        payload: Counter[str] = Counter(dict.fromkeys(arrays, 0))
        table, merged, per_cell = 0, Statistics(), []
        for record in records:
            merged.merge(Statistics.from_dict(record["statistics"]))
            before = payload.total()
            for name, entry in record["objects"].items():
                array = name.split("/")[0]
                if array in arrays:
                    payload[array] += entry["bytes"] - index
                elif array == SAMPLES:
                    table += entry["bytes"]
            per_cell.append((payload.total() - before) / record["cells"])
        # The parts' clock ran over all units but the one that warmed up.
        ran = finished[1:] or finished
        timed, seconds = _steady([unit for unit, _ in ran], [at for _, at in ran], began)
        share = sum(unit.samples for unit in timed) / sum(unit.samples for unit, _ in ran)
        parts = {part: share * spent for part, spent in self._clock.spent.items()}
        return Trial(
            samples=sum(record["samples"] for record in records),
            cells=sum(record["cells"] for record in records),
            input_pixels=sum(self._input_pixels(unit) for unit, _ in finished),
            payload=payload,
            table_bytes=table,
            record_bytes=sum(writer.generation.record_path(unit.number).stat().st_size for unit, _ in finished),
            seal_bytes=writer.generation.seal_path.stat().st_size,
            units=len(records),
            spread_of_units=statistics.stdev(per_cell) / statistics.mean(per_cell) if len(per_cell) > 1 else 0.0,
            statistics=merged,
            timed=sum(unit.samples for unit in timed),
            timed_pixels=sum(self._input_pixels(unit) for unit in timed),
            # What was decoded ahead of the first of them was decoded all the same.
            seconds=max(seconds, parts["decode"] / self.opened.config.decoders),
            parts=parts,
        )

    def _input_pixels(self, unit: Unit) -> int:
        return sum(input_pixels(self.opened.predictor, sample.image_size) for sample in self.plan.of(unit))


def input_pixels(predictor: Predictor, size: tuple[int, int]) -> int:
    """Pixels that a teacher is fed with an image of ``size``, in all its views, window by window."""
    return sum(math.prod(seen) for seen in predictor.seen(*size))


def _steady(units: Sequence[Unit], ended: Sequence[float], began: float) -> tuple[Sequence[Unit], float]:
    """The units of a run during which the loop was full, and their time.

    From the end of one unit to the end of another, neither filling nor emptying the loop counts.
    """
    return (units[1:], ended[-1] - ended[0]) if len(units) > 2 else (units, ended[-1] - began)


class _Clock:
    """Seconds by part, added up over all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.spent: dict[str, float] = dict.fromkeys(("decode", "infer", "code", "write"), 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(part, time.monotonic() - began)

    def add(self, part: str, seconds: float) -> None:
        with self._lock:
            self.spent[part] += seconds


class _Observed(Predictor):
    """A predictor that is timed, and remembers its answers as far as there is room."""

    def __init__(self, predictor: Predictor, clock: _Clock, *, room: int) -> None:
        vars(self).update(vars(predictor))
        self._clock, self._room = clock, room
        self._answers: dict[tuple[str, ...], tuple[Tensor, GridMapping]] = {}

    def infer(
        self, prepared: Sequence[Tensor], image_size: tuple[int, int], names: Sequence[str] = ()
    ) -> tuple[Tensor, GridMapping]:
        known = self._answers.get(tuple(names))
        if known is not None:
            return known
        with self._clock("infer"):
            log_probs, mapping = super().infer(prepared, image_size, names)
            synchronise(self.device)
        if log_probs.nbytes <= self._room:
            self._room -= log_probs.nbytes
            self._answers[tuple(names)] = log_probs, mapping
        return log_probs, mapping


@dataclass(frozen=True, kw_only=True)
class _Stage(Stage1):
    """Stage 1 with a clock."""

    clock: _Clock

    def prepare(self, planned: PlannedSample) -> Prepared:
        with self.clock("decode"):
            return super().prepare(planned)

    def _code_at_once(self, batch: Sequence[PlannedSample], inputs: Sequence[Tensor]) -> dict[str, Coded]:
        before = self.clock.spent["infer"]
        with self.clock("code"):
            coded = super()._code_at_once(batch, inputs)
        self.clock.add("code", before - self.clock.spent["infer"])
        return coded


class _Writer(CacheWriter):
    """The cache's writer with a clock."""

    clock: _Clock

    def write(self, unit: Unit, coded: Sequence[CodedSample]) -> int | None:
        with self.clock("write"):
            return super().write(unit, coded)
