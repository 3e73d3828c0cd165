"""``segkd teacher-cache``: from a run's description to a finished cache."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.sample import Role
from segkd.pipeline.progress import SILENT, Progress, Task
from segkd.pipeline.student.leaks import HIDDEN, beginnings, look_for_label_leaks
from segkd.pipeline.teacher.budget import resolve_budget
from segkd.pipeline.teacher.division import Share
from segkd.pipeline.teacher.increments import find_work
from segkd.pipeline.teacher.opened import open_run
from segkd.storage.generation import Generation
from segkd.storage.layout import Unit
from segkd.storage.locks import at_work
from segkd.storage.publish import explained, read_signed
from segkd.storage.reader import CacheReader
from segkd.storage.statistics import Statistics
from segkd.storage.writer import CacheWriter

logger = logging.getLogger("segkd")


@dataclass(frozen=True, kw_only=True)
class CacheSummary:
    """What a cache holds, what it cost to write and what writing it has cost in fidelity."""

    path: str
    roles: dict[str, int]
    classes: int
    written: int | None
    """Samples that this run has written, 0 when the cache was complete before; None when it was only looked at."""
    bytes: int
    """Bytes of all targets and tables, without the metadata files."""
    float32_pixels_bytes: int
    """What dense float32 distributions at pixel size would take."""
    float16_grid_bytes: int
    """What float16 logits on the native grid would take, uncompressed."""
    sealed: bool
    usable: bool
    """Whether students can learn from it, which they can while something is being added to it, too."""
    report: dict[str, Any]
    """The coding report: per target the mean and the maximum over the samples of each measure."""
    replaced: int = 0
    """Entries that a later generation has replaced or removed; they are stored until the cache is compacted."""
    seconds: float = 0.0
    task: str | None = None
    """The task that this run was, where several share the work: the figures are of its units, unless all are done."""
    pending_units: int = 0
    """Units that are yet to be written, by other tasks or by whoever goes on."""
    changes: dict[str, int] | None = None
    """Samples added, changed and removed, where the run has added to a finished cache."""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))

    def lines(self) -> list[str]:
        """For people."""
        samples = sum(self.roles.values())
        per_sample = self.bytes / max(samples + self.replaced, 1)
        of_what = "sample, entries replaced since among them" if self.replaced else "sample"
        roles = ", ".join(f"{count:,} {role}" for role, count in self.roles.items())
        unfinished = "usable, but what is being added is NOT complete" if self.usable else "NOT complete"
        state = "complete" if self.sealed else unfinished
        if self.sealed and self.written == 0:
            state += " (not verified: segkd cache verify checks every byte)"
        done = f"; {self.written:,} samples in {self.seconds:.1f} s" if self.written else "; nothing to do"
        task = f"; {self.task}" if self.task else ""
        lines = [
            f"{self.path}: {state}{task}; {roles or 'no samples'}{'' if self.written is None else done}",
            f"  {self.bytes / 1e6:,.2f} MB of targets and tables, {per_sample:,.0f} bytes a {of_what}: 1/"
            f"{self.float32_pixels_bytes / max(self.bytes, 1):,.0f} of float32 at pixel size, 1/"
            f"{self.float16_grid_bytes / max(self.bytes, 1):,.1f} of float16 on the teacher's grid",
        ]
        for target, report in self.report.items():
            measures = ", ".join(
                f"{name} {values['mean']:.2e} (largest {values['maximum']:.2e})"
                for name, values in report["measures"].items()
            )
            over = f"; {report['over_bound']:,} samples OVER the bound" if report["over_bound"] else ""
            lines.append(f"  {target}: {measures}{over}")
        if self.changes is not None:
            lines.append("  since it was finished: " + ", ".join(f"{n:,} {what}" for what, n in self.changes.items()))
        if self.replaced:
            lines.append(f"  {self.replaced:,} replaced entries are still stored; segkd cache compact removes them")
        if self.pending_units and self.written is None:
            lines.append(f"  units that are not written: {self.pending_units:,}; segkd teacher-cache goes on with them")
        elif self.pending_units:
            lines.append(
                f"  {self.pending_units:,} units are pending elsewhere; whoever writes the last one finishes it"
            )
        return lines


def teacher_cache(
    run: RunConfig,
    *,
    share: Share | None = None,
    dask: str | None = None,
    close: bool = False,
    progress: Progress = SILENT,
) -> CacheSummary:
    """Writes the cache that ``run`` describes, or what is missing of it, or what its list has gained since.

    ``share``: this task's part of the units. ``dask``: the workers that do the work, as ``local:N`` or the address of a
    scheduler. ``close``: an unfinished generation that was begun with another list is sealed with what it has.

    Raises ConfigError, DataError, NetworkError and CacheError with what to do; units that are finished by then stay.
    """
    began = time.monotonic()
    opened = open_run(resolve_budget(run))
    with ExitStack() as stack:
        # Of a cache under repair nothing is to be read either; one that is not there yet is locked once it is.
        root = Path(opened.config.path)
        if not root.exists():
            with explained(journal_path(root)):  # of a cache that is gone
                journal_path(root).unlink(missing_ok=True)
        if root.is_dir():
            stack.enter_context(at_work(root, alone=False))
        work = find_work(opened, close=close, progress=progress)
        if work is None:
            return replace(summarise(opened.config.path, written=0), seconds=time.monotonic() - began)
        if (share is None or share.number == 0) and run.data.compare_contents != "off":
            look_for_label_leaks(beginnings(run.teacher), opened.data, HIDDEN, progress)
        writer = work.writer(opened)
        stack.enter_context(at_work(writer.root, alone=False))
        pending = writer.pending()
        for number in writer.unrecorded(pending):
            logger.warning("%s: unit %d is written again: its commit record is lost", writer.generation.folder, number)
        mine = pending if share is None else share.of(pending)
        if share is not None:
            logger.info("%s (%s): %d of %d pending units", share, share.origin, len(mine), len(pending))
        theirs = {unit.number for unit in pending} - {unit.number for unit in mine}
        total = sum(unit.samples for unit in work.plan.units if unit.number not in theirs)
        with progress.task("teacher-cache", total, done=total - sum(unit.samples for unit in mine)) as task:
            journal = _Journal(writer, opened.predictor.device, task, began)
            if mine and dask is not None:
                from segkd.pipeline.teacher.dask_run import write_units

                write_units(dask, replace(run, cache=opened.config), work.generation, mine, journal.unit)
            elif mine:
                opened.stage(work.plan).run(writer, mine, journal.unit)
        writer.seal()
        summary = summarise(opened.config.path, written=journal.samples, own=None if share is None else share.owns)
    return replace(
        summary,
        seconds=time.monotonic() - began,
        changes=work.changes.counts() if work.generation else None,
        task=None if share is None else str(share),
    )


def summarise(
    path: str | Path, *, written: int | None = None, own: Callable[[int], bool] | None = None
) -> CacheSummary:
    """The summary of a cache as it stands, finished or not; of a finished generation, its seal alone is read.

    ``own``: of an unfinished generation only the units of these numbers, not what other tasks have written of it.
    Figures of size count everything that is stored, entries that a later generation has replaced included.
    """
    reader = CacheReader(path, partial=True)
    classes = len(reader.spec.classes)
    parts = [part for generation in reader.generations for part in _parts(generation, own)]
    totals = {name: sum(part[name] for part in parts) for name in ("bytes", "samples", "pixels", "cells")}
    statistics, stored = Statistics(), Counter[str]()
    for part in parts:
        statistics.merge(Statistics.from_dict(part["statistics"]))
        stored.update(part["roles"])
    if len(reader.generations) > 1 and own is None:
        stored = Counter({role: reader.count(role) for role in Role if reader.count(role)})
    report = {
        target: {
            "measures": {
                name: {"mean": measure.mean, "maximum": measure.largest} for name, measure in measures.items()
            },
            "rungs": dict(statistics.rungs[target]),
            "over_bound": statistics.over_bound[target],
        }
        for target, measures in statistics.measures.items()
    }
    return CacheSummary(
        path=str(path),
        roles=dict(sorted(stored.items())),
        replaced=totals["samples"] - stored.total(),
        classes=classes,
        written=written,
        bytes=totals["bytes"],
        float32_pixels_bytes=4 * classes * totals["pixels"],
        float16_grid_bytes=2 * classes * totals["cells"],
        sealed=reader.sealed,
        usable=reader.usable,
        report=report,
        pending_units=sum(
            len(generation.units()) - len(generation.committed())
            for generation in reader.generations
            if not generation.sealed
        ),
    )


def _parts(generation: Generation, own: Callable[[int], bool] | None) -> Iterator[dict[str, Any]]:
    """Totals of what a generation holds: its seal, or without one the records of its units, of ``own`` ones alone."""
    if generation.sealed:
        yield read_signed(generation.seal_path)
        return
    for unit in generation.committed():
        if own is None or own(unit):
            record = read_signed(generation.record_path(unit))
            size = sum(entry["bytes"] for entry in record["objects"].values())
            yield {**record, "bytes": size, "roles": {record["role"]: record["samples"]}}


def journal_path(root: Path) -> Path:
    """Where the log of the cache at ``root`` lies."""
    # A relative path may have no name of its own: ".".
    return Path(f"{root.resolve()}.log")


class _Journal:
    """Tells of finished units: to the progress display, and to a log beside the cache.

    Hosts, times and rates stand in that log and never inside the cache, whose bytes do not depend on who wrote it.
    """

    def __init__(self, writer: CacheWriter, device: torch.device, task: Task, began: float) -> None:
        """``began``: when the run did, by the monotonic clock."""
        self.writer, self.device, self.task = writer, device, task
        self.path = journal_path(writer.root)
        self.began, self.began_at = began, time.time()
        self.samples = self.bytes = self.pixels = 0

    def unit(self, unit: Unit, size: int | None, **worker: Any) -> None:
        """``size``: the unit's bytes, or None when another worker was first; ``worker``: who else has done it."""
        notes = {}
        if size is not None:
            self.samples += unit.samples
            self.bytes += size
            self.pixels += sum(math.prod(sample.image_size) for sample in self.writer.plan.of(unit))
            dense = 4 * len(self.writer.spec.classes) * self.pixels
            notes = {"MB": f"{self.bytes / 1e6:.1f}", "ratio": f"1/{dense / self.bytes:.0f}"}
        self.task.advance(unit.samples, **notes)
        line = {
            "time": time.time(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "began": self.began_at,
            "unit": unit.number,
            "committed": size is not None,
            "samples": unit.samples,
            "bytes": size,
            "seconds_since_start": time.monotonic() - self.began,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **worker,
        }
        with explained(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
