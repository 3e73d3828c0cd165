"""What is damaged: the files of a cache, and the samples that they concern.

A tile is a chunk of its own, ``[bytes, compression, crc32c]``, so one wrong byte costs one tile and not a shard: within
a damaged shard the tiles tell which samples are lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from segkd.storage.chunks import CHECKSUM, unwrap
from segkd.storage.coding import EXACT
from segkd.storage.errors import CacheDamagedError
from segkd.storage.generation import ONLY_CHUNK, UNITS, Generation, shard_name, table_name, target_arrays
from segkd.storage.layout import tile_shape
from segkd.storage.packing import EMPTY
from segkd.storage.shards import ShardReader
from segkd.storage.table import directory_dtype


@dataclass(frozen=True)
class Affected:
    """Samples that are no longer what was written."""

    ids: tuple[str, ...] = ()
    unnamed: int = 0
    """Samples that cannot be named, because the table that does is damaged itself: a whole unit's."""
    first: str = ""
    """The id of the first of the unnamed ones, where the directory tells; the others follow it in order."""
    replaced: int = 0
    """Entries besides that a later generation has replaced or removed, which nobody reads."""

    def __str__(self) -> str:
        if not self.unnamed:
            return ", ".join(self.ids)
        return f"{self.unnamed:,} " + (f"in order from {self.first} on" if self.first else "that cannot be named")


NOBODY = Affected()


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file that is not as it was written."""

    file: str
    """Its name within the cache."""
    wrong: str
    generation: int | None = None
    unit: int | None = None
    """The unit that has to be written again; None for a file that can be made again from the others."""
    affected: Affected = NOBODY

    @property
    def idle(self) -> bool:
        """Whether only entries are damaged that a later generation has replaced or removed."""
        return bool(self.affected.replaced) and not (self.affected.ids or self.affected.unnamed)

    def __str__(self) -> str:
        if self.idle:
            return f"{self.file}: {self.wrong}; concerns no sample in use (only entries replaced or removed since)"
        samples = str(self.affected)
        return f"{self.file}: {self.wrong}" + (f"; samples: {samples}" if samples else "")


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What an audit has found."""

    path: str
    sealed: bool
    """Whether the cache is finished; if not, only what is committed was checked."""
    units: int
    """Units of the plans."""
    pending: int
    """Units that are not written yet."""
    files: int
    """Files whose bytes were compared."""
    bytes: int
    damage: tuple[Damage, ...]
    strays: tuple[str, ...]
    """Files that belong to nothing, and what interrupted attempts have left: no damage, and no part of the cache."""

    @property
    def whole(self) -> bool:
        """Whether every byte that was written is there."""
        return not self.damage

    @property
    def idle(self) -> bool:
        """Whether there is damage, and none that concerns a sample in use."""
        return not self.whole and all(damage.idle for damage in self.damage)

    @property
    def samples(self) -> tuple[str, ...]:
        """Ids of the damaged samples that can be named, sorted."""
        return tuple(sorted({name for damage in self.damage for name in damage.affected.ids}))

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        damage = [
            {
                **vars(entry),
                "affected": list(entry.affected.ids),
                "unnamed": entry.affected.unnamed,
                "first": entry.affected.first,
                "replaced": entry.affected.replaced,
            }
            for entry in self.damage
        ]
        return {**vars(self), "whole": self.whole, "samples": self.samples, "damage": damage}

    def lines(self) -> list[str]:
        """For people."""
        checked = f"{self.files:,} files, {self.bytes / 1e6:,.2f} MB in all of them"
        state = "finished" if self.sealed else f"NOT finished: {self.pending:,} of {self.units:,} units are not written"
        if self.whole:
            lines = [f"{self.path}: whole; {state}; {checked}"]
        else:
            lines = [f"{self.path}: DAMAGED in {len(self.damage):,} files; {state}; {checked}"]
            lines += [f"  {damage}" for damage in self.damage]
            lines.append(f"  segkd cache repair {self.path} --config RUN.toml writes this again, and nothing else")
            if self.idle:
                lines.append(f"  no sample in use is lost; segkd cache compact {self.path} NEW drops what is damaged")
        if not self.sealed:
            lines.append("  metadata files are compared when segkd teacher-cache goes on; run it again")
        if self.strays:
            lines.append(f"  {len(self.strays):,} files belong to nothing: {', '.join(self.strays[:5])}")
        return lines


def affected(generation: Generation, unit: int, objects: Iterable[str]) -> Affected:
    """The samples of a unit that damage to ``objects``, named as in its commit record, concerns."""
    rows = rows_of(generation, unit)
    if rows is None:
        return _from_directory(generation, unit)
    lost: set[str] = set()
    for name, shard, held in _shards_of(generation, rows):
        if name in objects:
            first = shard * generation.plan.shard_tiles
            bad = {first + tile for tile in failing_tiles(generation.folder / name, generation.plan.shard_tiles)}
            lost.update(bytes(row["id"]).decode() for row in held if not bad.isdisjoint(_tiles(generation, row)))
    return Affected(tuple(sorted(lost)))


def objects_of(generation: Generation, unit: int) -> list[str]:
    """The names of a unit's objects in the generation's folder, as far as its rows tell: without its commit record."""
    rows = rows_of(generation, unit)
    names = [] if rows is None else [name for name, _, _ in _shards_of(generation, rows)]
    return [*names, table_name(unit)]


def rows_of(generation: Generation, unit: int) -> npt.NDArray[Any] | None:
    """The samples' rows of a unit's part of the sample table, None where it cannot be read."""
    try:
        rows = _table(generation, table_name(unit), generation.plan.unit_samples, generation.row_dtype())
    except (CacheDamagedError, ValueError, TypeError):  # the latter where nothing vouches for the plan
        return None
    present: npt.NDArray[Any] = rows[rows["state"] == 1]
    return present


def directory_of_units(generation: Generation) -> npt.NDArray[Any]:
    """The directory of a generation's units. Raises CacheDamagedError where it cannot be read."""
    return _table(generation, f"{UNITS}/{ONLY_CHUNK}", generation.plan.units, directory_dtype(generation.plan))


def failing_tiles(shard: Path, shard_tiles: int) -> set[int]:
    """The tiles of a shard, numbered within it, whose bytes are not those that were written, or that it lacks."""
    try:
        with shard.open("rb") as file:
            tail = shard_tiles * 16 + CHECKSUM
            file.seek(-tail, os.SEEK_END)
            places = np.frombuffer(unwrap(file.read(tail)), "<u8").reshape(shard_tiles, 2)
            return {tile for tile, (offset, length) in enumerate(places.tolist()) if not _reads(file, offset, length)}
    except (OSError, ValueError):
        return set(range(shard_tiles))


def _reads(file: BinaryIO, offset: int, length: int) -> bool:
    if length == EMPTY:
        return False
    try:
        file.seek(offset)
        return bool(unwrap(file.read(length)))
    except ValueError:
        return False


def _shards_of(generation: Generation, rows: npt.NDArray[Any]) -> Iterator[tuple[str, int, list[npt.NDArray[Any]]]]:
    """Name, number and rows of every shard that holds tiles of these samples."""
    for array, (target, exact) in target_arrays(generation.spec).items():
        shards: dict[int, list[npt.NDArray[Any]]] = {}
        for row in rows:
            if (row[f"rung_{target}"] == EXACT) == exact:
                for shard in {tile // generation.plan.shard_tiles for tile in _tiles(generation, row)}:
                    shards.setdefault(shard, []).append(row)
        yield from ((shard_name(array, shard), shard, held) for shard, held in sorted(shards.items()))


def _tiles(generation: Generation, row: npt.NDArray[Any]) -> range:
    rows, columns = tile_shape((int(row["grid_height"]), int(row["grid_width"])), generation.spec.tile)
    return range(int(row["first_tile"]), int(row["first_tile"]) + rows * columns)


def _from_directory(generation: Generation, unit: int) -> Affected:
    try:
        units = directory_of_units(generation)
        return Affected((), int(units[unit]["samples"]), units[unit]["first_id"].decode(errors="replace"))
    except (CacheDamagedError, ValueError, TypeError, IndexError):
        return Affected((), generation.plan.unit_samples)


def _table(generation: Generation, name: str, rows: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return ShardReader().table(generation.folder / name, rows, dtype, keep=False)
