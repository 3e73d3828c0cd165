"""What a run of stage 1 has to write: the first generation of a cache, the rest of one, or what its list has gained.

A finished cache is compared with the list sample by sample: by role, size and grid, then by the image's content.
Samples that it lacks, or holds otherwise, make a further generation; that one's ``removed`` names what it takes away.
Whoever finds such a generation unfinished learns from its ``removed`` which images had changed, and reads none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from segkd.pipeline.progress import SILENT, Progress
from segkd.pipeline.teacher.loop import ahead
from segkd.pipeline.teacher.opened import Opened
from segkd.storage.errors import CacheError, CacheMismatchError
from segkd.storage.generation import METADATA, ONLY_CHUNK, REMOVED, Generation, generations_of, read_spec
from segkd.storage.layout import Plan, PlannedSample
from segkd.storage.reader import CacheReader
from segkd.storage.sealing import close_generation, seal_generations
from segkd.storage.spec import require_equal
from segkd.storage.table import Entry
from segkd.storage.writer import CacheWriter

logger = logging.getLogger("segkd")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """How a list of samples differs from what a cache holds; ids, sorted."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        return f"{len(self.added):,} added, {len(self.changed):,} changed, {len(self.removed):,} removed"

    def with_changed(self, ids: Iterable[str]) -> Changes:
        """With further samples that have changed."""
        return replace(self, changed=tuple(sorted((*self.changed, *ids))))

    def counts(self) -> dict[str, int]:
        """For summaries."""
        return {name: len(ids) for name, ids in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Work:
    """A generation of a cache and what it is made of."""

    generation: int
    plan: Plan
    changes: Changes
    """Against the generations before; none for the first."""

    def writer(self, opened: Opened) -> CacheWriter:
        """The writer of that generation."""
        removed = sorted(self.changes.changed + self.changes.removed)
        return CacheWriter(opened.config.path, opened.spec, self.plan, generation=self.generation, removed=removed)


def find_work(opened: Opened, *, close: bool = False, progress: Progress = SILENT) -> Work | None:
    """What is to be written, or None for a finished cache that holds the list as it is.

    ``close``: a generation that was begun with another list is sealed with what it has, and the rest makes the next.
    Raises CacheMismatchError for a cache of another specification, and without ``close`` for such a generation.
    """
    root = Path(opened.config.path)
    if not (root / METADATA).exists():
        return Work(generation=0, plan=opened.units(opened.planned), changes=Changes())
    require_equal(opened.spec, read_spec(root), str(root))
    generations = generations_of(root, opened.spec)
    last = generations[-1] if generations else None
    if last is None:
        return Work(generation=0, plan=opened.units(opened.planned), changes=Changes())
    if any(not before.sealed for before in generations[:-1]) and not seal_generations(root):
        raise CacheError(f"{root} lacks units of an earlier generation; write them with segkd cache repair first")
    if last.sealed:
        return _further(opened, len(generations), progress)
    work = _continued(opened, last, progress)
    if work is not None:
        return work
    if not close:
        raise CacheMismatchError(_other_list(opened, last))
    close_generation(last)
    logger.info("%s: generation %d is closed with what it has", root, last.number)
    return _further(opened, len(generations), progress)


def _further(opened: Opened, generation: int, progress: Progress) -> Work | None:
    """The next generation of a cache whose generations are all sealed."""
    reader = CacheReader(opened.config.path)
    changes, kept = _compare(opened, reader.entries())
    changes = changes.with_changed(_changed_content(opened, kept, progress))
    if changes:
        logger.info("%s: %s since it was finished; they make generation %d", reader.path, changes, generation)
        return _work(opened, generation, changes)
    first = opened.units(opened.planned)
    if generation == 1 and first.spec == reader.generations[0].plan:
        return Work(generation=0, plan=first, changes=changes)
    return None


def _continued(opened: Opened, unfinished: Generation, progress: Progress) -> Work | None:
    """The unfinished generation, if it was begun with this list."""
    if unfinished.number == 0:
        work = Work(generation=0, plan=opened.units(opened.planned), changes=Changes())
    else:
        changes, kept = _compare(opened, CacheReader(opened.config.path).entries())
        if _says_what_it_removes(unfinished):
            content = [name for name in kept if name in unfinished.removed]
        else:
            content = _changed_content(opened, kept, progress)
        changes = changes.with_changed(content)
        if _says_what_it_removes(unfinished) and unfinished.removed != {*changes.changed, *changes.removed}:
            return None
        work = _work(opened, unfinished.number, changes)
    # Another unit plan over the same list is for the writer to refuse.
    return work if work.plan.spec.digest == unfinished.plan.digest else None


def _says_what_it_removes(unfinished: Generation) -> bool:
    """Whether its metadata are complete: an interruption may have come before the last of them, that list."""
    return (unfinished.array_folder(REMOVED) / ONLY_CHUNK).exists() or bool(unfinished.committed())


def _work(opened: Opened, generation: int, changes: Changes) -> Work:
    written = {*changes.added, *changes.changed}
    plan = opened.units([sample for sample in opened.planned if sample.id in written])
    return Work(generation=generation, plan=plan, changes=changes)


def _compare(opened: Opened, entries: Iterable[Entry]) -> tuple[Changes, dict[str, bytes]]:
    """What differs without a look at any image; and the others' digests in the cache, by id."""
    left = {sample.id: sample for sample in opened.planned}
    changed, removed, kept = [], [], {}
    for entry in entries:
        sample = left.pop(entry.id, None)
        if sample is None:
            removed.append(entry.id)
        elif not _alike(entry, sample):
            changed.append(entry.id)
        else:
            kept[entry.id] = entry.image_digest
    names = (tuple(sorted(ids)) for ids in (left, changed, removed))
    return Changes(**dict(zip(("added", "changed", "removed"), names, strict=True))), kept


def _alike(entry: Entry, sample: PlannedSample) -> bool:
    return (entry.role, entry.image_size, entry.mapping) == (sample.role, sample.image_size, sample.mapping)


def _changed_content(opened: Opened, digests: Mapping[str, bytes], progress: Progress) -> list[str]:
    """Which of the images are not those that the teacher saw; every one is read once."""
    threads = opened.config.decoders
    changed = []
    with (
        progress.task("comparing images", len(digests)) as task,
        ThreadPoolExecutor(threads) as executor,
        closing(
            ahead(executor, lambda name: opened.data.image_digest(opened.samples[name]), digests, 4 * threads)
        ) as now,
    ):
        for (name, before), digest in zip(digests.items(), now, strict=True):
            if digest != before:
                changed.append(name)
            task.advance()
    return changed


def _other_list(opened: Opened, unfinished: Generation) -> str:
    """Says how the list differs from the one that an unfinished generation was begun with, as far as it is known.

    A sample that is not written yet stands in no table, but the counts of a generation's samples are known.
    """
    root = opened.config.path
    entries = CacheReader(root, partial=True).entries() if unfinished.committed() else ()
    written = [entry for entry in entries if entry.generation == unfinished.number]
    listed = {sample.id: sample for sample in opened.planned}
    gone = sum(entry.id not in listed for entry in written)
    other = sum(entry.id in listed and not _alike(entry, listed[entry.id]) for entry in written)
    begun = sum(unfinished.plan.roles.values())
    return (
        f"{root} was begun with another list of samples and is not finished: "
        f"generation {unfinished.number} was to hold {begun:,} and has {len(written):,}, "
        f"of which the list has removed {gone:,} and changed {other:,}; it has {len(listed):,} now. "
        "Give --close: what is written stays, and the rest is added; or finish it with the list that it was begun with"
    )
