"""Bytes of a finished cache that change or go missing, and what the audit and the reader then say.

The cache has two generations, samples of two roles and several sizes, and some that are kept exactly. It is written by
the storage room alone, with made-up codes, so that a thousand damages take a minute.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
from fault_runs import Finding, differing, files_of

from segkd.storage.audit import verify
from segkd.storage.coding import EXACT, CompandedDistribution, UniformSteps
from segkd.storage.errors import SegkdError
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import Plan, PlannedSample, plan_units
from segkd.storage.reader import CacheReader
from segkd.storage.spec import CacheSpec, TargetSpec
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter

TILE = 8
SIZES = ((40, 70), (64, 64), (16, 20), (8, 8))
SPEC = CacheSpec(
    classes=("a", "b", "c"),
    targets={
        "soft": TargetSpec(
            name="soft",
            channels=3,
            coder=CompandedDistribution(),
            bound=1e-3,
            measures=("kl_cells",),
            bounded=("kl_cells",),
            parameters={"temperatures": [1.0]},
            fallback=True,
        ),
        "first_order": TargetSpec(
            name="first_order",
            channels=1,
            coder=UniformSteps(reach=(1.5,)),
            bound=0.01,
            measures=("largest_error",),
            bounded=("largest_error",),
            parameters={},
        ),
    },
    tile=TILE,
    fingerprints=dict.fromkeys(("teacher", "preprocessing", "classes", "coding"), "0" * 64),
    teacher={"reference": "none"},
)
FIRST = tuple(f"{'train' if number % 3 else 'report'}/{number:02}" for number in range(14))
SECOND = (*FIRST[1:3], "train/20", "train/23", "report/21")
REMOVED = FIRST[1:4]
"""The ids of the two generations: the second replaces two samples of the first and removes one."""


def write_cache(path: Path) -> None:
    """A cache of the two generations."""
    write_generation(path, FIRST)
    write_generation(path, SECOND, number=1, removed=REMOVED)


def write_generation(
    path: Path, names: Sequence[str], *, number: int = 0, removed: Sequence[str] = (), stop: int | None = None
) -> None:
    """One generation, or its first ``stop`` units, sealed if that is all; its number is the seed of its codes."""
    plan = plan_of(names)
    writer = CacheWriter(path, SPEC, plan, generation=number, removed=removed)
    for unit in plan.units[:stop]:
        writer.write(unit, [coded(sample, number) for sample in plan.of(unit)])
    writer.seal()


def plan_of(names: Sequence[str]) -> Plan:
    """The units of samples with these ids, ``role/number``."""
    return plan_units(list(map(planned, names)), unit_samples=3, tile=TILE, cell_bytes=SPEC.cell_bytes)


def planned(name: str) -> PlannedSample:
    """A sample whose size its number decides."""
    size = SIZES[int(name.split("/")[1]) % len(SIZES)]
    axes = [network_axis(pixels, -(-pixels // 4)) for pixels in size]
    return PlannedSample(id=name, role=name.split("/")[0], image_size=size, mapping=Mapping(*axes))


def coded(sample: PlannedSample, seed: int) -> CodedSample:
    """Codes that the id and a seed decide; a sample in seven is kept exactly."""
    rng = np.random.default_rng([seed, *sample.id.encode()])
    exact, shape = int(sample.id.split("/")[1]) % 7 == 1, sample.mapping.shape
    levels = rng.integers(0, 255, (3, *shape), np.uint8)
    values = np.log(rng.dirichlet(np.ones(3), shape).transpose(2, 0, 1)).astype(np.float16)
    return CodedSample(
        image_digest=hashlib.sha256(f"{sample.id} {seed}".encode()).digest()[:16],
        codes={"soft": values if exact else levels, "first_order": rng.integers(0, 256, (1, *shape), np.uint8)},
        rungs={"soft": EXACT if exact else 0, "first_order": 0},
        measures={"soft": {"kl_cells": rng.uniform(0, 1e-3)}, "first_order": {"largest_error": rng.uniform(0, 0.01)}},
    )


@dataclass(frozen=True)
class Content:
    """Everything that a reader returns; each part is None where it raised an error of the project's own."""

    parts: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> Content:
        """Reads a cache afresh. An error of any other kind passes through."""
        opened = _attempt(lambda: CacheReader(path))
        if opened is None:
            return cls({})
        parts = {"spec": opened.spec.to_dict()}
        for part, read in (("statistics", lambda: opened.statistics().to_dict()), ("ids", lambda: _ids(opened))):
            parts[part] = _attempt(read)
        for name in sorted({*FIRST, *SECOND}):
            entry = parts[name] = _attempt(partial(opened.entry, name))
            for target in opened.spec.targets if entry is not None else ():
                values = _attempt(partial(opened.values, entry, target))
                parts[f"{name} {target}"] = None if values is None else values.tobytes()
        return cls(parts)

    def differences(self, expected: Content) -> list[str]:
        """What was returned and is not what was written."""
        return [name for name, value in self.parts.items() if value is not None and value != expected.parts.get(name)]


def _ids(reader: CacheReader) -> list[str]:
    return [entry.id for entry in reader.entries()]


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except SegkdError:
        return None


def damages(folder: Path, flips: int, cuts: int, rng: random.Random) -> Iterator[Finding]:
    """Single bytes changed, and files cut off, at random places of a finished cache.

    Half of the places are in a file drawn evenly from all of the cache's, metadata included; the other half are a byte
    drawn evenly from all of its bytes. Each damage is made alone: the file is restored before the next.
    """
    path = folder / "bytes.zarr"
    write_cache(path)
    whole, expected = files_of(path), Content.of(path)
    names = list(whole)
    sizes = [len(whole[name]) for name in names]

    def place() -> tuple[str, int]:
        name = rng.choice(names) if rng.random() < 0.5 else rng.choices(names, sizes)[0]
        return name, rng.randrange(len(whole[name]))

    def flipped() -> tuple[str, int, bytes]:
        name, at = place()
        content = bytearray(whole[name])
        content[at] ^= rng.randrange(1, 256)
        return name, at, bytes(content)

    def cut() -> tuple[str, int, bytes]:
        name, at = place()
        return name, at, whole[name][:at]

    how = "half in files drawn evenly, half in bytes drawn evenly; verify finds it, the reader finds it or is right"
    for fault, count, damaged in (("changed byte", flips, flipped), ("truncation", cuts, cut)):
        finding = Finding(fault, how)
        for _ in range(count):
            name, at, content = damaged()
            (path / name).write_bytes(content)
            _try_damaged(finding, path, f"{name} at {at}", expected)
            (path / name).write_bytes(whole[name])
            finding.tried += 1
        finding.failures += differing(files_of(path), whole)
        yield finding


def _try_damaged(finding: Finding, path: Path, where: str, expected: Content) -> None:
    try:
        finding.require(not verify(path, workers=1).whole, f"{where}: verify calls the cache whole")
    except SegkdError:
        finding.note("refused by verify")
    except Exception as error:
        finding.failures.append(f"{where}: verify raised {error!r}")
    try:
        found = Content.of(path)
    except Exception as error:
        finding.failures.append(f"{where}: the reader raised {error!r}")
        return
    differences = found.differences(expected)
    finding.require(not differences, f"{where}: the reader returned other {', '.join(differences[:3])}")
    finding.note("without effect on what is read" if found == expected else "detected by the reader")


def two_outcomes(folder: Path, rounds: int) -> Finding:
    """Two workers whose bytes differ publish the same units at the same moment: each unit is wholly of one of them."""
    finding = Finding("two workers", "of one unit at once, with different bytes; each unit is of one of them, whole")
    plan = plan_of(FIRST)
    for number in range(rounds):
        path, barrier = folder / f"contended-{number}.zarr", Barrier(2)
        with ThreadPoolExecutor(2) as executor:
            for worker in [executor.submit(_contend, path, plan, seed, barrier) for seed in (0, 1)]:
                worker.result()
        report = verify(path, workers=1)
        finding.require(report.whole and report.sealed and not report.strays, f"round {number}: {report.lines()}")
        reader, owners = CacheReader(path), Counter[tuple[int, int]]()
        for entry in reader.entries():
            digests = [coded(planned(entry.id), seed).image_digest for seed in (0, 1)]
            owners[entry.unit, digests.index(entry.image_digest)] += 1
        mixed = len(owners) - len(plan.units)
        finding.require(not mixed, f"round {number}: {mixed} units are of both")
        finding.tried += len(plan.units)
    return finding


def _contend(path: Path, plan: Plan, seed: int, barrier: Barrier) -> None:
    writer = CacheWriter(path, SPEC, plan)
    for unit in plan.units:
        samples = [coded(sample, seed) for sample in plan.of(unit)]
        barrier.wait()
        writer.write(unit, samples)
    writer.seal()
