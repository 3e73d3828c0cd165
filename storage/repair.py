"""What of a damaged cache can be made again from what is intact: metadata, seals, commit records, the plan.

A metadata file is replaced only by bytes that an intact seal vouches for, or, where the seal itself is damaged, by what
the plan determines, whose digest of the samples is compared. The units' objects are the teacher's to make again.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from segkd.storage.compact import entries_of, planned
from segkd.storage.damage import NOBODY, affected, directory_of_units, objects_of, rows_of
from segkd.storage.errors import CacheDamagedError
from segkd.storage.generation import GENERATIONS, METADATA, SAMPLES, Generation, root_documents, table_name
from segkd.storage.geometry import Axis
from segkd.storage.geometry import Mapping as GridMapping
from segkd.storage.layout import Plan, PlannedSample, Unit, list_digest
from segkd.storage.publish import (
    ATTEMPTS,
    CLOSED,
    canonical,
    read_document,
    read_signed,
    record_name,
    signed,
    sync_folder,
    write_synced,
)
from segkd.storage.spec import CacheSpec, PlanSpec
from segkd.storage.statistics import unit_content
from segkd.storage.table import row_dtype
from segkd.storage.writer import CacheWriter

UNKNOWN = GridMapping(Axis(1.0, 0.0, 0), Axis(1.0, 0.0, 0))


class ReplacingWriter(CacheWriter):
    """A writer whose units take the place of damaged ones, each in the moment in which it is there."""

    def write(self, unit: Unit, coded: Sequence[Any]) -> int | None:
        """Withdraws what there is of the unit and commits the new one; see :meth:`CacheWriter.write`."""
        self.withdraw(unit)
        return super().write(unit, coded)


def intact_seal(generation: Generation) -> dict[str, Any] | None:
    """The seal, unless there is none or it is damaged."""
    try:
        return read_signed(generation.seal_path)
    except (CacheDamagedError, OSError):
        return None


def restore(folder: Path, documents: Mapping[str, bytes], wanted: Mapping[str, str | None], scratch: Path) -> list[str]:
    """Replaces files of ``folder`` by those of ``documents`` that are wanted; returns the names of those replaced.

    ``wanted``: the SHA-256 that each is to have, None where nothing tells; others are left as they are.
    """
    done = []
    for name, digest in wanted.items():
        content = documents.get(name)
        if content is not None and digest in (None, hashlib.sha256(content).hexdigest()):
            replace_whole(folder / name, content, scratch)
            done.append(name)
    return done


def restore_root(root: Path, spec: CacheSpec, damaged: Iterable[str], seals: Iterable[Mapping[str, Any]]) -> list[str]:
    """Writes the cache's own damaged metadata files again, where a seal vouches that they are of this specification."""
    vouched: dict[str, str] = {}
    for seal in seals:
        vouched.update(seal["metadata_sha256"])
    wanted = {name: vouched[name] for name in damaged if name in vouched}
    return restore(root, root_documents(spec), wanted, root / "generations" / "0" / ATTEMPTS)


def restore_closed(generation: Generation, seal: Mapping[str, Any]) -> None:
    """Writes the list of the units that the generation was closed without again."""
    content = canonical(signed({"missing": seal["missing"]}))
    replace_whole(generation.folder / CLOSED, content, generation.folder / ATTEMPTS)


def rebuilt_record(generation: Generation, unit: int) -> bytes | None:
    """A unit's commit record, made again from its objects; None unless every checksum in them is right."""
    rows, names = rows_of(generation, unit), objects_of(generation, unit)
    if rows is None or affected(generation, unit, names) != NOBODY:
        return None
    objects = {}
    for name in names:
        try:
            content = (generation.folder / name).read_bytes()
        except OSError:
            return None
        objects[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return canonical(signed({**unit_content(rows, generation.spec), "unit": unit, "objects": objects}))


def restore_records(generation: Generation, units: Iterable[int]) -> set[int]:
    """Writes units' commit records again from their objects; returns the units that have theirs again.

    Nothing is written unless, where a seal stands, all records are then those that it was made of.
    """
    records = {unit: content for unit in units if (content := rebuilt_record(generation, unit)) is not None}
    if not _fit_seal(generation, records):
        return set()
    for unit, content in records.items():
        replace_whole(generation.folder / record_name(unit), content, generation.folder / ATTEMPTS)
    return set(records)


def _fit_seal(generation: Generation, records: Mapping[int, bytes]) -> bool:
    if not generation.seal_path.exists():
        return True
    seal, digest = intact_seal(generation), hashlib.sha256()
    try:
        for unit in generation.units():
            digest.update(records.get(unit) or canonical(read_signed(generation.record_path(unit))))
    except (CacheDamagedError, OSError):
        return False
    return seal is not None and digest.hexdigest() == seal["commits_sha256"]


def plan_of(generation: Generation, candidates: Iterable[PlannedSample]) -> tuple[Plan, frozenset[int]]:
    """The generation's plan as its directory and rows tell it, and the units of which nothing tells the samples.

    A unit whose rows are damaged or not there is made of the ``candidates`` between the ids at which it and the next
    one begin, if then the digest of the whole list is the plan's. Raises CacheDamagedError where the directory cannot
    be read.
    """
    numbers, tile = generation.plan, generation.spec.tile
    directory = directory_of_units(generation)
    pool = sorted(candidates, key=lambda sample: sample.id)
    samples: list[PlannedSample] = []
    units: list[Unit] = []
    guessed: set[int] = set()
    without: set[int] = set()
    ends = [int(row["first_tile"]) // numbers.shard_tiles for row in directory[1:]] + [numbers.shards]
    for unit, (row, end) in enumerate(zip(directory, ends, strict=True)):
        role, first_id, count = row["role"].decode(), row["first_id"].decode(), int(row["samples"])
        entries = entries_of(generation, unit)
        if entries is not None:
            held, first_tiles = [planned(entry) for entry in entries], [entry.first_tile for entry in entries]
        else:
            after = directory[unit + 1] if unit + 1 < len(directory) else None
            limit = after["first_id"].decode() if after is not None and after["role"] == row["role"] else None
            held = [s for s in pool if s.role == role and s.id >= first_id and (limit is None or s.id < limit)]
            guessed.add(unit)
            if len(held) != count or held[0].id != first_id:
                without.add(unit)
                held = [PlannedSample(id=first_id, role=role, image_size=(0, 0), mapping=UNKNOWN)] * count
            sizes = [sample.tiles(tile) for sample in held[:-1]]
            first_tiles = list(accumulate(sizes, initial=int(row["first_tile"])))
        first_shard = int(row["first_tile"]) // numbers.shard_tiles
        units.append(
            Unit(
                number=unit,
                role=role,
                first_sample=len(samples),
                samples=count,
                first_shard=first_shard,
                shards=end - first_shard,
                first_tiles=tuple(first_tiles),
            )
        )
        samples += held
    if guessed and (without or list_digest(samples) != numbers.digest):
        without = guessed
    return Plan(samples=tuple(samples), units=tuple(units), spec=numbers), frozenset(without)


def list_of(root: Path, spec: CacheSpec, number: int) -> tuple[list[PlannedSample], int]:
    """The samples of a generation and its ``unit_samples``, from its rows and its arrays' metadata alone.

    For a generation whose own metadata file is damaged. Raises CacheDamagedError where rows cannot be read.
    """
    folder = root / GENERATIONS / str(number)
    table = read_document(folder / SAMPLES / METADATA)
    rows, width = table["shape"]
    unit_samples = table["chunk_grid"]["configuration"]["chunk_shape"][0]
    numbers = PlanSpec(digest="", roles={}, units=0, shards=0, unit_samples=unit_samples, shard_tiles=1, name_bytes=1)
    numbers = replace(numbers, name_bytes=1 + width - row_dtype(spec, numbers).itemsize)
    generation = Generation(root, spec, number, numbers)
    samples: list[PlannedSample] = []
    for unit in range(rows // unit_samples):
        entries = entries_of(generation, unit)
        if entries is None:
            raise CacheDamagedError(f"{folder / table_name(unit)} cannot be read")
        samples += map(planned, entries)
    return samples, unit_samples


def differing(folder: Path, documents: Mapping[str, bytes]) -> list[str]:
    """The metadata files that do not say what they must, though zarr of another version may say it otherwise."""
    return [name for name, content in documents.items() if not _says(folder / name, content)]


def _says(path: Path, content: bytes) -> bool:
    try:
        found = path.read_bytes()
        return found == content or (path.suffix == ".json" and json.loads(found) == json.loads(content))
    except (OSError, ValueError, RecursionError):
        return False


def replace_whole(path: Path, content: bytes, scratch: Path) -> None:
    """Makes ``path`` hold ``content``, on the disk, or leaves it as it was; ``scratch`` is of the same file system."""
    scratch.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = scratch / uuid.uuid4().hex
    write_synced(temporary, content)
    temporary.replace(path)
    sync_folder(path.parent)
