"""``segkd cache repair``: what is damaged in a cache is written again, and nothing else.

Metadata, seals and commit records are made again from what is intact; units are computed again by the teacher, each
from the images that it was made of, and take the damaged one's place in the moment in which they are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segkd.pipeline.config import RunConfig
from segkd.pipeline.progress import SILENT, Progress
from segkd.pipeline.teacher.budget import resolve_budget
from segkd.pipeline.teacher.opened import Opened, open_run
from segkd.storage.audit import verify
from segkd.storage.compact import entries_of
from segkd.storage.damage import AuditReport
from segkd.storage.errors import CacheDamagedError
from segkd.storage.generation import METADATA, Generation, generation_documents, generations_of, read_spec
from segkd.storage.layout import Plan, PlannedSample, Unit, plan_units
from segkd.storage.locks import at_work
from segkd.storage.publish import CLOSED, SEAL, explained, record_name, remove_synced
from segkd.storage.repair import (
    ReplacingWriter,
    differing,
    intact_seal,
    list_of,
    plan_of,
    restore,
    restore_closed,
    restore_records,
    restore_root,
)
from segkd.storage.sealing import seal_generations
from segkd.storage.spec import PlanSpec, require_equal

_NO_PLAN = PlanSpec(digest="", roles={}, units=0, shards=0, unit_samples=1, shard_tiles=1, name_bytes=1)


@dataclass(frozen=True, kw_only=True)
class RepairSummary:
    """What a repair has done, and what it could not do."""

    path: str
    restored: tuple[str, ...]
    """Metadata files, seals and commit records that were made again from what is intact."""
    units: int
    """Units that the teacher has computed again, or for the first time where the cache was not finished."""
    samples: int
    """Samples of these units."""
    failures: tuple[str, ...]
    """What could not be repaired, and why."""
    whole: bool
    idle: bool
    """Whether what is still damaged concerns no sample in use."""
    sealed: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))

    def lines(self) -> list[str]:
        """For people."""
        state = f"{'whole' if self.whole else 'STILL DAMAGED'} and {'finished' if self.sealed else 'NOT finished'}"
        done = f"{self.units:,} units of {self.samples:,} samples written again" if self.units else "no unit written"
        if not (self.units or self.restored or self.failures):
            done = "nothing to do"
        lines = [f"{self.path}: {state}; {done}; {self.seconds:.1f} s"]
        if self.restored:
            lines.append(f"  made again from what is intact: {', '.join(self.restored)}")
        lines += [f"  not repaired: {failure}" for failure in self.failures]
        if self.idle:
            lines.append(f"  no sample in use is lost; segkd cache compact {self.path} NEW drops what is damaged")
        elif self.failures:
            lines.append(
                f"  segkd cache compact {self.path} NEW --skip-damaged leaves these samples out; "
                "segkd teacher-cache into NEW adds them as they are now"
            )
        return lines


def repair(run: RunConfig, *, workers: int = 4, progress: Progress = SILENT) -> RepairSummary:
    """Repairs the cache at ``run.cache.path``, and finishes it where units are pending; every byte is checked again.

    At every moment the cache is complete, or says that it is damaged or not finished. Interrupted, the same call goes
    on. Raises what :func:`segkd.pipeline.teacher.opened.open_run` does, CacheMismatchError for a cache of another
    specification and CacheDamagedError for metadata that nothing intact determines.
    """
    began = time.monotonic()
    report = verify(run.cache.path, workers=workers)
    if report.whole and report.sealed:
        return _summary(report, began)
    with at_work(Path(run.cache.path), alone=True):
        # Once more: a repair that has just ended may have left nothing to do.
        work = _Repair(open_run(resolve_budget(run)), verify(run.cache.path, workers=workers))
        with explained(work.root):
            work.restore()
            work.redo(progress)
        return _summary(verify(run.cache.path, workers=workers), began, work)


def _summary(report: AuditReport, began: float, work: _Repair | None = None) -> RepairSummary:
    return RepairSummary(
        path=report.path,
        restored=() if work is None else tuple(work.restored),
        units=0 if work is None else work.units,
        samples=0 if work is None else work.samples,
        failures=() if work is None else tuple(work.failures),
        whole=report.whole,
        idle=report.idle,
        sealed=report.sealed,
        seconds=time.monotonic() - began,
    )


class _Repair:
    """A repair under way."""

    def __init__(self, opened: Opened, report: AuditReport) -> None:
        self.opened, self.report = opened, report
        self.root = Path(report.path)
        self.restored: list[str] = []
        self.failures: list[str] = []
        self.units = self.samples = 0

    def restore(self) -> None:
        """Makes again what is a pure function of what is intact, the cache's own metadata first."""
        root, spec = self.root, self.opened.spec
        damaged = [damage.file for damage in self.report.damage if "/" not in damage.file.removeprefix("generations/")]
        # An intact seal is one whatever stands around it, and there are as many as generations.
        seals = [seal for number in self._numbers() if (seal := intact_seal(self._closed_book(number)))]
        self.restored += restore_root(root, spec, damaged, seals)
        left = [name for name in damaged if name not in self.restored]
        if left:
            raise CacheDamagedError(
                f"{root / left[0]} is damaged, and no seal says that it is what this run file leads to; "
                "give the run file that the cache was written with, or restore the file from a copy"
            )
        require_equal(spec, read_spec(root), str(root))
        for number in self._numbers():
            self._restore_generation(number)

    def redo(self, progress: Progress) -> None:
        """Computes the damaged and the pending units again and seals what is complete."""
        for generation in generations_of(self.root, self.opened.spec):
            damaged = {
                damage.unit
                for damage in self.report.damage
                if damage.generation == generation.number and damage.unit is not None
            }
            damaged -= self._restore_records(generation)
            if not damaged and len(generation.committed()) == len(generation.units()):
                continue
            plan, unknown = plan_of(generation, self._candidates(generation))
            writer = ReplacingWriter(
                self.root, self.opened.spec, plan, generation=generation.number, removed=sorted(generation.removed)
            )
            numbers = damaged | {unit.number for unit in writer.pending()}
            units = [
                unit for unit in plan.units if unit.number in numbers and self._can(generation, plan, unit, unknown)
            ]
            with progress.task("repair", sum(unit.samples for unit in units)) as task:

                def on_unit(unit: Unit, size: int | None) -> None:  # noqa: ARG001  # the protocol's
                    self.units += 1
                    self.samples += unit.samples
                    task.advance(unit.samples)

                if units:
                    self.opened.stage(plan).run(writer, units, on_unit)
        try:
            seal_generations(self.root)
        except CacheDamagedError:
            # The commit record of a unit that could not be repaired: nothing is sealed over it.
            if not self.failures:
                raise

    def _numbers(self) -> list[int]:
        folders = (self.root / "generations").glob("*")
        return sorted(
            int(folder.name)
            for folder in folders
            if folder.name.isdecimal() and any((folder / name).exists() for name in (METADATA, SEAL))
        )

    def _closed_book(self, number: int) -> Generation:
        """A generation by its folder alone, before its plan is known."""
        return Generation(self.root, self.opened.spec, number, _NO_PLAN)

    def _restore_generation(self, number: int) -> None:
        book = self._closed_book(number)
        prefix = f"{book.name}/"
        damaged = [
            damage.file.removeprefix(prefix)
            for damage in self.report.damage
            if damage.file.startswith(prefix) and damage.unit is None
        ]
        if not damaged:
            return
        seal = intact_seal(book)
        if seal is not None and CLOSED in damaged:
            restore_closed(book, seal)
            self.restored.append(prefix + CLOSED)
        wanted: dict[str, str | None] = {}
        if seal is not None:
            digests = seal["metadata_sha256"]
            wanted = {name: digests[prefix + name] for name in damaged if prefix + name in digests}
        if wanted or SEAL in damaged:
            documents = next(self._documents(number, wanted), {})
            if SEAL in damaged:
                wanted = dict.fromkeys(differing(book.folder, documents))
            done = restore(book.folder, documents, wanted, book.folder / "commits" / "attempts")
            self.restored += [prefix + name for name in done]
            left = [name for name in wanted if name not in done]
            if left or not documents:
                raise CacheDamagedError(
                    f"{book.folder / (left or damaged)[0]} is damaged, and too little is intact to make it again; "
                    "restore the file from a copy, or write a new cache"
                )
        if SEAL in damaged:
            remove_synced(book.seal_path)
            self.restored.append(prefix + SEAL)

    def _documents(self, number: int, wanted: dict[str, str | None]) -> Iterator[dict[str, bytes]]:
        """The generation's metadata files as they must have been; the first that have the digests that are wanted."""
        for plan in self._plans(number):
            for removed in self._removals(number):
                documents = generation_documents(self.opened.spec, plan, number, sorted(removed))
                found = {name: hashlib.sha256(documents.get(name, b"")).hexdigest() for name in wanted}
                if all(digest in (None, found[name]) for name, digest in wanted.items()):
                    yield documents

    def _plans(self, number: int) -> Iterator[Plan]:
        """Plans that the generation may have, from what is intact of it, and of the run's list as it is."""
        spec = self.opened.spec
        with contextlib.suppress(CacheDamagedError, OSError, ValueError, KeyError, TypeError):
            generation = Generation.open(self.root, spec, number)
            plan, unknown = plan_of(generation, self._candidates(generation))
            if not unknown:
                yield plan
        with contextlib.suppress(CacheDamagedError, OSError, ValueError, KeyError, TypeError, IndexError):
            samples, unit_samples = list_of(self.root, spec, number)
            yield plan_units(samples, unit_samples=unit_samples, tile=spec.tile, cell_bytes=spec.cell_bytes)
        yield self.opened.units(self.opened.planned)

    def _removals(self, number: int) -> Iterator[set[str]]:
        """What the generation may remove of those before it."""
        with contextlib.suppress(Exception):  # whatever is wrong with the list, it is not used then
            yield set(self._closed_book(number).removed)
        if number:
            before = self._ids(range(number))
            later = self._ids(range(number + 1, len(self._numbers())))
            replaced = before & self._ids([number])
            yield replaced | {name for name in before - later if name not in self.opened.samples}

    def _ids(self, numbers: Iterable[int]) -> set[str]:
        """The ids in those generations' tables, as far as they can be read."""
        ids: set[str] = set()
        for number in numbers:
            with contextlib.suppress(CacheDamagedError, OSError, ValueError, KeyError, TypeError):
                generation = Generation.open(self.root, self.opened.spec, number)
                for unit in generation.units():
                    ids.update(entry.id for entry in entries_of(generation, unit) or ())
        return ids

    def _candidates(self, generation: Generation) -> list[PlannedSample]:
        """Samples of the list, as it is now, that may be those of a unit whose rows are lost."""
        others = [number for number in self._numbers() if number != generation.number]
        elsewhere = self._ids(others) - generation.removed
        return [sample for sample in self.opened.planned if sample.id not in elsewhere]

    def _restore_records(self, generation: Generation) -> set[int]:
        """The units of which nothing but the commit record was damaged, and that have it again."""
        files: dict[int, list[str]] = {}
        for damage in self.report.damage:
            if damage.generation == generation.number and damage.unit is not None:
                files.setdefault(damage.unit, []).append(damage.file)
        alone = {unit: names[0] for unit, names in files.items() if names == [f"{generation.name}/{record_name(unit)}"]}
        done = restore_records(generation, alone)
        self.restored += [alone[unit] for unit in sorted(done)]
        return done

    def _can(self, generation: Generation, plan: Plan, unit: Unit, unknown: frozenset[int]) -> bool:
        """Whether the unit's images are still those that it was made of; notes why not."""
        where = f"unit {unit.number} of generation {generation.number}"
        if unit.number in unknown:
            first = plan.of(unit)[0].id
            self.failures.append(
                f"{where}: which {unit.samples:,} samples it holds, from {first} on, is lost, "
                "and they are not those of the list as it is now"
            )
            return False
        now = {sample.id: sample for sample in self.opened.planned}
        digests = {entry.id: entry.image_digest for entry in entries_of(generation, unit.number) or ()}
        gone, changed = [], []
        for sample in plan.of(unit):
            if sample.id not in now:
                gone.append(sample.id)
            elif now[sample.id] != sample or digests.get(sample.id, digest := self._digest(sample)) != digest:
                changed.append(sample.id)
        for what, ids in (("are no longer in the list", gone), ("have changed since", changed)):
            if ids:
                self.failures.append(f"{where}: images that it was made of {what}: {', '.join(ids)}")
        return not gone and not changed

    def _digest(self, sample: PlannedSample) -> bytes:
        return self.opened.data.image_digest(self.opened.samples[sample.id])
