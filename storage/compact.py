"""Rewrites what is live of a cache's generations into a cache of one generation, without the teacher.

Codes, rungs and measures are copied as they are, everything else is a function of them and of the sample list: the
result is what a fresh cache of these samples would be, byte for byte where the teacher's codes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segkd.storage.audit import verify
from segkd.storage.damage import AuditReport, rows_of
from segkd.storage.errors import CacheDamagedError, CacheExistsError, CacheMismatchError, IncompleteCacheError
from segkd.storage.generation import Generation
from segkd.storage.layout import PlannedSample, plan_units
from segkd.storage.reader import CacheReader
from segkd.storage.table import CodedSample, Entry, entry_of
from segkd.storage.writer import CacheWriter


@dataclass(frozen=True, kw_only=True)
class CompactSummary:
    """What was rewritten."""

    source: str
    path: str
    generations: int
    """Generations of the source."""
    samples: int
    written: int
    """Samples that this run has written; the others were there from an earlier one."""
    skipped: tuple[str, ...]
    """Samples left out because they are damaged, as far as they can be named."""
    unnamed: int
    """Samples left out that cannot be named, because their table is damaged."""
    source_bytes: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))

    def lines(self) -> list[str]:
        """For people."""
        done = f"{self.written:,} samples written" if self.written else "nothing to do"
        lines = [
            f"{self.path}: complete; {self.samples:,} samples of {self.generations:,} generations of {self.source} in "
            f"one; {done}; {self.bytes / 1e6:,.2f} MB in all files instead of "
            f"{self.source_bytes / 1e6:,.2f} MB"
        ]
        if self.skipped or self.unnamed:
            more = f" and {self.unnamed:,} that cannot be named" if self.unnamed else ""
            lines.append(
                f"  left out as damaged: {', '.join(self.skipped)}{more}; "
                f"segkd teacher-cache with cache.path={self.path} adds them again"
            )
        return lines


def compact(
    source: str | Path,
    path: str | Path,
    *,
    skip_damaged: bool = False,
    workers: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> CompactSummary:
    """Writes the live samples of the cache at ``source`` into a new cache at ``path``, or what is missing of it.

    Every byte of the source is checked first. ``on_progress(done, total)`` hears of samples. One unit is in memory at
    a time, beside the list of samples, which planning needs.

    Raises CacheDamagedError for a source of which a sample is damaged, unless such samples may be left out;
    IncompleteCacheError for an unfinished one; CacheExistsError and CacheMismatchError where something else stands at
    ``path``.
    """
    if Path(source).resolve() == Path(path).resolve():
        raise CacheExistsError(f"{path} is the cache to be compacted; give the new one another path")
    if Path(path).resolve().is_relative_to(Path(source).resolve()):
        raise CacheExistsError(f"{path} is inside the cache to be compacted; give the new one a path beside it")
    report = verify(source, workers=workers)
    reader = CacheReader(source)
    if not reader.sealed:
        raise IncompleteCacheError(f"{source} is not finished; run segkd teacher-cache again to finish it")
    if not (report.whole or report.idle or skip_damaged):
        raise CacheDamagedError(
            f"{source} is damaged in {len(report.damage):,} files; write them again with segkd cache repair, "
            "or leave the damaged samples out with --skip-damaged"
        )
    samples = [planned(entry) for entry in _live(reader, report)]
    plan = plan_units(
        samples,
        unit_samples=reader.generations[-1].plan.unit_samples,
        tile=reader.spec.tile,
        cell_bytes=reader.spec.cell_bytes,
    )
    writer = CacheWriter(path, reader.spec, plan)
    pending = writer.pending()
    _require_same(reader, path)
    total, left = len(samples), sum(unit.samples for unit in pending)
    done = total - left
    for unit in pending:
        writer.write(unit, [_copied(reader, sample.id) for sample in plan.of(unit)])
        done += unit.samples
        if on_progress is not None:
            on_progress(done, total)
    writer.seal()
    return CompactSummary(
        source=str(source),
        path=str(path),
        generations=len(reader.generations),
        samples=total,
        written=left,
        skipped=report.samples,
        unnamed=sum(damage.affected.unnamed for damage in report.damage),
        source_bytes=report.bytes,
        bytes=sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()),
    )


def planned(entry: Entry) -> PlannedSample:
    """What planning needs of a sample that a cache holds."""
    return PlannedSample(id=entry.id, role=entry.role, image_size=entry.image_size, mapping=entry.mapping)


def entries_of(generation: Generation, unit: int) -> list[Entry] | None:
    """A unit's samples, replaced ones too, or None where its part of the sample table cannot be read."""
    rows, first = rows_of(generation, unit), unit * generation.plan.unit_samples
    if rows is None:
        return None
    return [
        entry_of(row, generation.spec, generation=generation.number, unit=unit, number=number)
        for number, row in enumerate(rows, first)
    ]


def _live(reader: CacheReader, report: AuditReport) -> Iterator[Entry]:
    """The entries that no later generation has replaced and no damage concerns."""
    damaged = {(entry.generation, name) for entry in report.damage for name in entry.affected.ids}
    for generation in reader.generations:
        replaced = {name for later in reader.generations[generation.number + 1 :] for name in later.removed}
        for unit in generation.units():
            for entry in entries_of(generation, unit) or ():
                if entry.id not in replaced and (generation.number, entry.id) not in damaged:
                    yield entry


def _copied(reader: CacheReader, sample: str) -> CodedSample:
    entry = reader.entry(sample)
    height, width = entry.mapping.shape
    targets = reader.spec.targets
    return CodedSample(
        image_digest=entry.image_digest,
        codes={name: reader.window(entry, name, range(height), range(width)) for name in targets},
        rungs=entry.rungs,
        measures={
            name: {measure: entry.measures[f"{name}.{measure}"] for measure in target.measures}
            for name, target in targets.items()
        },
    )


def _require_same(reader: CacheReader, path: str | Path) -> None:
    """Raises CacheMismatchError unless what an earlier run has written at ``path`` is of the source as it is now."""
    begun = CacheReader(path, partial=True)
    generation = begun.generations[0]
    if len(begun.generations) > 1:
        raise CacheExistsError(f"{path} is a cache that images were added to; give the new one another path")
    for unit in generation.committed():
        for entry in entries_of(generation, unit) or ():
            held = reader.entry(entry.id)
            if (entry.image_digest, entry.rungs, entry.measures) != (held.image_digest, held.rungs, held.measures):
                raise CacheMismatchError(
                    f"{path} holds another {entry.id} than {reader.path}; remove it, or give the new cache another path"
                )
