"""What is damaged: the files of a cache, and the samples that they concern.

A tile is a chunk of its own, ``[bytes, compression, crc32c]``, so one wrong byte costs one tile and not a shard: within
a damaged shard the tiles tell which samples are lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr

from segkd.storage.coding import EXACT
from segkd.storage.generation import ONLY_CHUNK, SAMPLES, UNITS, Generation, target_arrays
from segkd.storage.layout import tile_shape
from segkd.storage.table import directory_dtype

CHECKSUM = 4
"""Bytes of a crc32c."""
ABSENT = 2**64 - 1
"""Offset and length of a tile that was not written, in a shard's index."""


@dataclass(frozen=True)
class Affected:
    """Samples that are no longer what was written."""

    ids: tuple[str, ...] = ()
    following: int = 0
    """Samples beside these that cannot be named, because the table that does is damaged itself: those that follow."""

    def __str__(self) -> str:
        if not self.following:
            return ", ".join(self.ids)
        if not self.ids:
            return f"{self.following:,} samples whose ids are lost with them"
        return f"{self.ids[0]} and the {self.following:,} that follow it"


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

    def __str__(self) -> str:
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
    def samples(self) -> tuple[str, ...]:
        """Ids of the damaged samples that can be named, sorted."""
        return tuple(sorted({name for damage in self.damage for name in damage.affected.ids}))

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        damage = [
            {**vars(entry), "affected": list(entry.affected.ids), "following": entry.affected.following}
            for entry in self.damage
        ]
        return {**vars(self), "whole": self.whole, "samples": self.samples, "damage": damage}

    def lines(self) -> list[str]:
        """For people."""
        checked = f"{self.files:,} files, {self.bytes / 1e6:,.2f} MB"
        state = "finished" if self.sealed else f"NOT finished: {self.pending:,} of {self.units:,} units are not written"
        if self.whole:
            lines = [f"{self.path}: whole; {state}; {checked}"]
        else:
            lines = [f"{self.path}: DAMAGED in {len(self.damage):,} files; {state}; {checked}"]
            lines += [f"  {damage}" for damage in self.damage]
            lines.append(f"  segkd cache repair {self.path} --config RUN.toml writes this again, and nothing else")
        if not self.sealed:
            lines.append("  metadata files are compared when segkd teacher-cache goes on; run it again")
        if self.strays:
            lines.append(f"  {len(self.strays):,} files belong to nothing: {', '.join(self.strays[:5])}")
        return lines


def affected(generation: Generation, unit: int, objects: Iterable[str]) -> Affected:
    """The samples of a unit that damage to ``objects``, named as in its commit record, concerns.

    Only for a generation whose metadata are intact, or told to be so by nothing better.
    """
    rows = rows_of(generation, unit)
    if rows is None:
        return _from_directory(generation, unit)
    lost: set[str] = set()
    arrays, shard_tiles = target_arrays(generation.spec), generation.plan.shard_tiles
    for name in objects:
        array, _, chunk = name.partition("/c.")
        if array not in arrays:
            continue
        target, exact = arrays[array]
        first = int(chunk.split(".")[0]) * shard_tiles
        bad = {first + tile for tile in failing_tiles(generation.folder / name, shard_tiles)}
        for row in rows:
            if (row[f"rung_{target}"] == EXACT) == exact and not bad.isdisjoint(_tiles(generation, row)):
                lost.add(row["id"].decode())
    return Affected(tuple(sorted(lost)))


def objects_of(generation: Generation, unit: int) -> list[str]:
    """The names of a unit's objects in the generation's folder, as far as its rows tell: without its commit record."""
    rows = rows_of(generation, unit)
    names = [f"{SAMPLES}/c.{unit}.0"]
    if rows is None:
        return names
    for array, (target, exact) in target_arrays(generation.spec).items():
        tiles = [_tiles(generation, row) for row in rows if (row[f"rung_{target}"] == EXACT) == exact]
        shards = {tile // generation.plan.shard_tiles for run in tiles for tile in run}
        names += [f"{array}/c.{shard}.0.0.0" for shard in sorted(shards)]
    return names


def rows_of(generation: Generation, unit: int) -> npt.NDArray[Any] | None:
    """The samples' rows of a unit's part of the sample table, None where it cannot be read."""
    first = unit * generation.plan.unit_samples
    packed = _read(generation, SAMPLES, f"c.{unit}.0", slice(first, first + generation.plan.unit_samples))
    try:
        rows = None if packed is None else packed.view(generation.row_dtype())[:, 0]
    except ValueError:
        return None
    return None if rows is None else rows[rows["state"] == 1]


def directory(generation: Generation) -> npt.NDArray[Any] | None:
    """The directory of a generation's units, None where it cannot be read."""
    packed = _read(generation, UNITS, ONLY_CHUNK, slice(None))
    try:
        return None if packed is None else packed.view(directory_dtype(generation.plan))[:, 0]
    except ValueError:
        return None


def failing_tiles(shard: Path, shard_tiles: int) -> set[int]:
    """The tiles of a shard, numbered within it, whose bytes are not those that were written, or that it lacks."""
    try:
        with shard.open("rb") as file:
            tail = shard_tiles * 16 + CHECKSUM
            file.seek(-tail, 2)
            index = file.read(tail)
            if not checked(index):
                return set(range(shard_tiles))
            places = np.frombuffer(index[:-CHECKSUM], "<u8").reshape(shard_tiles, 2)
            bad = set()
            for tile, (offset, length) in enumerate(places.tolist()):
                if length == ABSENT:
                    bad.add(tile)
                    continue
                file.seek(offset)
                if not checked(file.read(length)):
                    bad.add(tile)
            return bad
    except (OSError, ValueError):
        return set(range(shard_tiles))


def checked(content: bytes) -> bool:
    """Whether bytes end in their own crc32c."""
    body, checksum = content[:-CHECKSUM], content[-CHECKSUM:]
    return len(content) > CHECKSUM and google_crc32c.value(body) == int.from_bytes(checksum, "little")


def _tiles(generation: Generation, row: npt.NDArray[Any]) -> range:
    rows, columns = tile_shape((int(row["grid_height"]), int(row["grid_width"])), generation.spec.tile)
    return range(int(row["first_tile"]), int(row["first_tile"]) + rows * columns)


def _from_directory(generation: Generation, unit: int) -> Affected:
    units = directory(generation)
    if units is None or unit >= len(units):
        return Affected((), generation.plan.unit_samples)
    return Affected((units[unit]["first_id"].decode(errors="replace"),), int(units[unit]["samples"]) - 1)


def _read(generation: Generation, array: str, chunk: str, part: slice) -> npt.NDArray[np.uint8] | None:
    folder = generation.array_folder(array)
    try:
        if not (folder / chunk).is_file():  # which zarr would read as zeros
            return None
        opened = zarr.open_array(folder, mode="r", zarr_format=3)
        return np.ascontiguousarray(opened[part], np.uint8)
    except Exception:  # zarr and its codecs raise what their libraries raise
        return None
