"""The loop of stage 1: decoding, inference with coding, and writing overlap.

Images are decoded and prepared by threads, ahead of the teacher; the teacher's output is turned into codes on its own
device, so that only codes cross the bus; finished units are compressed and written by further threads while the next
ones are computed, at most :data:`WRITERS` at a time, so that memory holds the codes of one unit more than that.

Batches never cross a unit and are a pure function of its list, so that a unit's bytes do not depend on what was
finished before.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TypeVar

import torch
from torch import Tensor

from segkd.pipeline.data.sample import DataSource, Sample
from segkd.pipeline.models.predictor import Predictor, batched
from segkd.pipeline.teacher.coded import Coded, code_targets
from segkd.storage.errors import DataError, NetworkError
from segkd.storage.layout import Plan, PlannedSample, Unit
from segkd.storage.spec import CacheSpec
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter

WRITERS = 2
"""Units that are compressed and written at once: one waits for the disk while the other one is compressed."""

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Prepared:
    """A decoded image, ready for the teacher."""

    inputs: tuple[Tensor, ...]
    """3,H',W' for each of the teacher's views."""
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Stage1:
    """Everything that turns a unit's samples into codes."""

    data: DataSource
    samples: dict[str, Sample]
    predictor: Predictor
    spec: CacheSpec
    plan: Plan
    batch: int
    decoders: int

    def run(self, writer: CacheWriter, units: Sequence[Unit], on_unit: Callable[[Unit, int | None], None]) -> None:
        """Computes and commits ``units``; ``on_unit`` hears of each with its bytes (None: another worker was first)."""
        jobs = (sample for unit in units for batch in self.batches(unit) for sample in batch)
        telling = threading.Lock()

        def write(unit: Unit, coded: Sequence[CodedSample]) -> None:
            size = writer.write(unit, coded)
            with telling:
                on_unit(unit, size)

        with (
            ThreadPoolExecutor(self.decoders) as decoders,
            ThreadPoolExecutor(WRITERS) as writers,
            closing(ahead(decoders, self.prepare, jobs, 2 * self.batch)) as prepared,
        ):
            writing: set[Future[None]] = set()
            for unit in units:
                coded = self._code_unit(unit, prepared, lambda: _collect(writing))
                while len(writing) >= WRITERS:
                    wait(writing, return_when=FIRST_COMPLETED)
                    _collect(writing)
                writing.add(writers.submit(write, unit, coded))
            for future in writing:
                future.result()

    def batches(self, unit: Unit) -> list[list[PlannedSample]]:
        """The unit's samples in batches of one image size."""
        by_size = sorted(self.plan.of(unit), key=lambda sample: sample.image_size)
        groups = (list(group) for _, group in groupby(by_size, key=lambda sample: sample.image_size))
        return [group[k : k + self.batch] for group in groups for k in range(0, len(group), self.batch)]

    def prepare(self, planned: PlannedSample) -> Prepared:
        """Decodes one image. Raises DataError when it is not the one that was planned."""
        sample = self.samples[planned.id]
        image = self.data.image(sample)
        if image.shape[:2] != planned.image_size:
            raise DataError(
                f"{planned.id} decodes to {image.shape[0]}x{image.shape[1]} pixels, its header says "
                f"{planned.image_size[0]}x{planned.image_size[1]}; repair or remove the file"
            )
        return Prepared(self.predictor.prepare(image), self.data.image_digest(sample))

    def _code_unit(
        self, unit: Unit, prepared: Iterator[Prepared], before_batch: Callable[[], None]
    ) -> list[CodedSample]:
        results: dict[str, CodedSample] = {}
        for batch in self.batches(unit):
            before_batch()
            inputs = list(islice(prepared, len(batch)))
            coded = self._code_batch(batch, batched([entry.inputs for entry in inputs]))
            for k, (sample, entry) in enumerate(zip(batch, inputs, strict=True)):
                results[sample.id] = CodedSample(
                    image_digest=entry.digest,
                    codes={name: target.codes[k].numpy() for name, target in coded.items()},
                    rungs={name: int(target.rungs[k]) for name, target in coded.items()},
                    measures={
                        name: {measure: float(value[k]) for measure, value in target.measures.items()}
                        for name, target in coded.items()
                    },
                )
        return [results[sample.id] for sample in self.plan.of(unit)]

    @torch.inference_mode()
    def _code_batch(self, batch: Sequence[PlannedSample], inputs: Sequence[Tensor]) -> dict[str, Coded]:
        """The batch's targets, coded and brought to the host; in two halves when the device runs out of memory."""
        try:
            return self._code_at_once(batch, inputs)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                height, width = batch[0].image_size
                raise NetworkError(
                    f"the device has no memory for one image of {height}x{width} pixels; run "
                    + ("" if len(self.predictor.views) == 1 else "without the largest of teacher.views.scales, ")
                    + 'with a teacher.views.window that is smaller, on another device or with precision = "bf16"'
                ) from None
        # Not in the handler: as long as the exception lives, so does every tensor of the calls that it came through.
        half = len(batch) // 2
        first = self._code_batch(batch[:half], [of_view_N3HW[:half] for of_view_N3HW in inputs])
        second = self._code_batch(batch[half:], [of_view_N3HW[half:] for of_view_N3HW in inputs])
        return {name: first[name].followed_by(second[name]) for name in first}

    def _code_at_once(self, batch: Sequence[PlannedSample], inputs: Sequence[Tensor]) -> dict[str, Coded]:
        size = batch[0].image_size
        names = [sample.id for sample in batch]
        log_probs, mapping = self.predictor.infer(inputs, size, names)
        coded = code_targets(self.spec.targets, log_probs, mapping, size, names)
        return {name: target.on_host() for name, target in coded.items()}


def ahead(
    executor: ThreadPoolExecutor, work: Callable[[Job], Result], jobs: Iterable[Job], depth: int
) -> Generator[Result]:
    """``work`` of each job in order, with at most ``depth`` jobs under way before their turn; none after closing."""
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(executor.submit(work, job))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _collect(writing: set[Future[None]]) -> None:
    """Takes out what is written. Raises what a write has raised: soon, not when the next unit is computed."""
    for future in [future for future in writing if future.done()]:
        writing.remove(future)
        future.result()
