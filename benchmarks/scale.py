"""What a store of a million small samples costs to open, to hold and to read, against one of a thousand.

    python benchmarks/scale.py [--samples 1000000] [--folder FOLDER] [--json]

Both stores are generated through the real writer: maps of 8x8 cells and 4 classes, one tile each. It writes about
400 MB into a temporary folder (beneath --folder) and removes them. A `read` finds a sample by its id and reads
its whole map; reads are warm: a first pass has brought the files into memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from overhead import count

from segkd.storage.coding import CompandedDistribution
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import PlannedSample, plan_units
from segkd.storage.reader import CacheReader
from segkd.storage.shards import INDEX_BYTES, TABLE_BYTES
from segkd.storage.spec import CacheSpec, TargetSpec
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter

CELLS, CLASSES, UNIT_SAMPLES = 8, 4, 512
LIMIT = INDEX_BYTES + TABLE_BYTES + (64 << 20)
"""The most that a worker may hold beyond what imports take: its caches, the directory, and room to work."""


@dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    samples: int
    what: str
    value: float
    unit: str
    how: str


def name_of(number: int) -> str:
    return f"train/{number:07}"


def write(path: Path, samples: int) -> int:
    """Writes a store; the bytes of its tiles."""
    soft = TargetSpec(
        name="soft",
        channels=CLASSES,
        coder=CompandedDistribution.for_bound(1e-3, CLASSES),
        bound=1e-3,
        measures=("kl_cells", "kl_pixels"),
        bounded=("kl_cells", "kl_pixels"),
        parameters={"temperatures": [1.0]},
    )
    names = tuple(f"class-{number}" for number in range(CLASSES))
    spec = CacheSpec(classes=names, targets={"soft": soft}, tile=CELLS, fingerprints={}, teacher={})
    mapping = Mapping(network_axis(4 * CELLS, CELLS), network_axis(4 * CELLS, CELLS))
    size = 4 * CELLS, 4 * CELLS
    planned = [PlannedSample(id=name_of(k), role="train", image_size=size, mapping=mapping) for k in range(samples)]
    writer = CacheWriter(path, spec, plan_units(planned, unit_samples=UNIT_SAMPLES, tile=CELLS))
    rng, payload = np.random.default_rng(0), 0
    for unit in writer.pending():
        fields = rng.integers(0, 9, (unit.samples, CLASSES, 2, 2), np.uint8).repeat(4, axis=2).repeat(4, axis=3)
        digests = rng.bytes(16 * unit.samples)
        coded = [
            CodedSample(
                image_digest=digests[16 * k : 16 * k + 16],
                codes={"soft": field},
                rungs={"soft": 0},
                measures={"soft": {"kl_cells": 5e-4, "kl_pixels": 4e-4}},
            )
            for k, field in enumerate(fields)
        ]
        written = writer.write(unit, coded)
        assert written is not None
        payload += written
    assert writer.seal()
    return payload


def measure(path: Path, samples: int, reads: int) -> Iterator[Measurement]:
    begin = time.perf_counter()
    total = write(path, samples)
    seconds = time.perf_counter() - begin
    yield Measurement(samples, "written", seconds, "s", f"{samples / seconds:,.0f} samples/s, {total / 1e6:,.1f} MB")
    yield from overhead(path)
    # By a process that has not written, so that its memory is a worker's.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield from pool.apply(reading, (path, samples, reads))


def overhead(path: Path) -> Iterator[Measurement]:
    """Bytes of a sample that are not its codes."""
    found = count(path)
    parts = ", ".join(f"{name} {size / found.samples:.1f}" for name, size in found.parts.items())
    yield Measurement(found.samples, "besides the codes", found.a_sample, "bytes/sample", parts)
    codes = found.payload / found.samples
    yield Measurement(found.samples, "codes", codes, "bytes/sample", f"{CLASSES}x{CELLS}x{CELLS}")


def reading(path: Path, samples: int, reads: int) -> list[Measurement]:
    before = resident()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        reader = CacheReader(path)
        times.append(time.perf_counter() - begin)
    order = np.random.default_rng(1).integers(0, samples, reads).tolist()
    # One sample of every unit: each table and each index has been read once.
    _read(reader, [*range(0, samples, UNIT_SAMPLES), *order[: reads // 10]])
    durations = _read(reader, order)
    p50, p99 = np.percentile(durations, [50, 99])
    grown = resident() - before
    return [
        Measurement(samples, "opening", float(np.median(times)) * 1000, "ms", "every metadata file checked"),
        Measurement(samples, "read, p50", float(p50) * 1e6, "us", f"{reads:,} random ones, found by id"),
        Measurement(samples, "read, p99", float(p99) * 1e6, "us", ""),
        Measurement(samples, "memory", grown / 1e6, "MB", f"grown by opening and reading; limit {LIMIT / 1e6:.0f} MB"),
    ]


def _read(reader: CacheReader, numbers: Sequence[int]) -> list[float]:
    cells, durations = range(CELLS), []
    for number in numbers:
        begin = time.perf_counter()
        reader.window(reader.entry(name_of(number)), "soft", cells, cells)
        durations.append(time.perf_counter() - begin)
    return durations


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples of the large store")
    parser.add_argument("--reads", type=int, default=20_000, help="random reads that are timed")
    parser.add_argument("--folder", help="where the stores are written, and removed again")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    rows: list[Measurement] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for samples in (1000, arguments.samples):
            for row in measure(Path(folder) / f"{samples}.zarr", samples, arguments.reads):
                rows.append(row)
                if not arguments.json:
                    print(f"{row.samples:>9,} {row.what:<20}{row.value:>12,.2f} {row.unit:<14}{row.how}", flush=True)
    small, large = (row.value for row in rows if row.what == "read, p50")
    rows.append(Measurement(arguments.samples, "read, p50, ratio", large / small, "x", "of that at 1,000"))
    if arguments.json:
        print(json.dumps({"measurements": [dataclasses.asdict(row) for row in rows]}))
    else:
        print(f"{rows[-1].samples:>9,} {rows[-1].what:<20}{rows[-1].value:>12,.2f} {rows[-1].unit:<14}{rows[-1].how}")


if __name__ == "__main__":
    main()
