"""``segkd teacher-cache``: from a run's description to a finished cache."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segkd.pipeline.config import RunConfig
from segkd.pipeline.progress import SILENT, Progress, Task
from segkd.pipeline.teacher.budget import resolve_budget
from segkd.pipeline.teacher.opened import open_run
from segkd.storage.layout import Unit
from segkd.storage.publish import explained
from segkd.storage.reader import CacheReader
from segkd.storage.writer import CacheWriter


@dataclass(frozen=True, kw_only=True)
class CacheSummary:
    """What a cache holds, what it cost to write and what writing it has cost in fidelity."""

    path: str
    roles: dict[str, int]
    classes: int
    written: int | None
    """Samples that this run has written, 0 when the cache was complete before; None when it was only looked at."""
    seconds: float
    bytes: int
    """Bytes of all targets and tables, without the metadata files."""
    float32_pixels_bytes: int
    """What dense float32 distributions at pixel size would take."""
    float16_grid_bytes: int
    """What float16 logits on the native grid would take, uncompressed."""
    sealed: bool
    report: dict[str, Any]
    """The coding report: per target the mean and the maximum over the samples of each measure."""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))

    def lines(self) -> list[str]:
        """For people."""
        samples = sum(self.roles.values())
        per_sample = self.bytes / max(samples, 1)
        roles = ", ".join(f"{count:,} {role}" for role, count in self.roles.items())
        state = "complete" if self.sealed else "NOT complete"
        done = f"; {self.written:,} samples in {self.seconds:.1f} s" if self.written else "; nothing to do"
        lines = [
            f"{self.path}: {state}; {roles}{'' if self.written is None else done}",
            f"  {self.bytes / 1e6:,.2f} MB, {per_sample:,.0f} bytes a sample: 1/"
            f"{self.float32_pixels_bytes / max(self.bytes, 1):,.0f} of float32 at pixel size, 1/"
            f"{self.float16_grid_bytes / max(self.bytes, 1):,.1f} of float16 on the teacher's grid",
        ]
        for target, report in self.report.items():
            measures = ", ".join(
                f"{name} {values['mean']:.2e} (at most {values['maximum']:.2e})"
                for name, values in report["measures"].items()
            )
            over = f"; {report['over_bound']:,} samples OVER the bound" if report["over_bound"] else ""
            lines.append(f"  {target}: {measures}{over}")
        return lines


def teacher_cache(run: RunConfig, *, progress: Progress = SILENT) -> CacheSummary:
    """Writes the cache that ``run`` describes, or what is missing of it.

    Raises ConfigError, DataError, NetworkError and CacheError with what to do; units that are finished by then stay.
    """
    run = resolve_budget(run)
    opened, config = open_run(run), run.cache
    plan = opened.units(opened.planned)
    writer = CacheWriter(config.path, opened.spec, plan)
    stage = opened.stage(plan)
    began = time.monotonic()
    pending = writer.pending()
    finished = len(opened.samples) - sum(unit.samples for unit in pending)
    with progress.task("teacher-cache", len(opened.samples), done=finished) as task:
        journal = _Journal(writer, opened.predictor.device, task)
        if pending:
            stage.run(writer, pending, journal.unit)
    writer.seal()
    return summarise(config.path, written=journal.samples, seconds=time.monotonic() - began)


def summarise(path: str | Path, *, written: int | None = None, seconds: float = 0.0) -> CacheSummary:
    """The summary of a cache as it stands, finished or not."""
    reader = CacheReader(path, partial=True)
    records, statistics = reader.records(), reader.statistics()
    entries = reader.entries()
    classes = len(reader.spec.classes)
    sizes = [entry.image_size[0] * entry.image_size[1] for entry in entries]
    cells = [entry.mapping.shape[0] * entry.mapping.shape[1] for entry in entries]
    roles = {role: sum(entry.role == role for entry in entries) for role in sorted({entry.role for entry in entries})}
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
        roles=roles,
        classes=classes,
        written=written,
        seconds=seconds,
        bytes=sum(entry["bytes"] for record in records for entry in record["objects"].values()),
        float32_pixels_bytes=4 * classes * sum(sizes),
        float16_grid_bytes=2 * classes * sum(cells),
        sealed=reader.sealed,
        report=report,
    )


class _Journal:
    """Tells of finished units: to the progress display, and to a log beside the cache.

    Hosts, times and rates stand in that log and never inside the cache, whose bytes do not depend on who wrote it.
    """

    def __init__(self, writer: CacheWriter, device: torch.device, task: Task) -> None:
        self.writer, self.device, self.task = writer, device, task
        # A relative path may have no name of its own: ".".
        self.path = Path(f"{writer.root.resolve()}.log")
        self.began = time.monotonic()
        self.samples = self.bytes = self.pixels = 0

    def unit(self, unit: Unit, size: int | None) -> None:
        """``size``: the unit's bytes, or None when another worker was first."""
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
            "unit": unit.number,
            "committed": size is not None,
            "samples": unit.samples,
            "bytes": size,
            "seconds_since_start": time.monotonic() - self.began,
            "device": str(self.device),
            "torch": torch.__version__,
        }
        with explained(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
