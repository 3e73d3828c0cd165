"""Reads windows of targets out of a cache.

Shapes: codes channels,h,w of one window; values S,channels,h,w.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from segkd.storage.chunks import require, require_known
from segkd.storage.coding import EXACT, Array
from segkd.storage.errors import CacheDamagedError, CacheMismatchError, GeometryError
from segkd.storage.generation import METADATA, Generation, target_arrays
from segkd.storage.layout import tile_shape
from segkd.storage.lookup import Lookup
from segkd.storage.opening import open_cache
from segkd.storage.publish import read_signed
from segkd.storage.shards import ShardReader, TileArray, damaged
from segkd.storage.statistics import Statistics
from segkd.storage.table import Entry


class WindowRequest(NamedTuple):
    """A rectangle of the cells of one sample's target."""

    entry: Entry
    target: str
    rows: range
    columns: range


class CacheReader:
    """A cache, opened for reading; threads may share it. Picklable; files are opened when they are first needed.

    Opening and memory do not grow with the number of samples: see the constants of :mod:`segkd.storage.shards`.

    Raises CacheNotFoundError, CacheMismatchError for another format, CacheDamagedError where metadata are lost or
    damaged, and IncompleteCacheError for a cache that is not sealed, unless ``partial`` says that its finished units
    will do. Everything that reads raises CacheChangedError once units of a finished generation are written anew, as
    soon as it needs a file that it has not open: rows of one version are never used with tiles of another.
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        self.path = Path(path)
        # Sealed: every generation is finished, those that do not count yet included.
        self.spec, opened, self.sealed = open_cache(self.path, partial=partial)
        self._shards = ShardReader()
        self._lookups = [Lookup(each.generation, each.seal, self._shards) for each in opened]
        self._seals = [each.seal for each in opened]
        self._arrays = [
            {name: _tile_array(lookup, name, exact) for name, (_, exact) in target_arrays(self.spec).items()}
            for lookup in self._lookups
        ]

    @property
    def generations(self) -> list[Generation]:
        """The generations that count."""
        return [lookup.generation for lookup in self._lookups]

    @property
    def usable(self) -> bool:
        """Whether it was finished once: students can learn from it, while something is being added to it, too."""
        return bool(self._seals) and self._seals[0] is not None

    def records(self) -> list[dict[str, Any]]:
        """The commit records, in the order of units. Raises CacheDamagedError where a finished cache has lost one."""
        records = []
        for generation in self.generations:
            done, units = generation.committed(), generation.units()
            if generation.sealed and len(done) < len(units):
                lost = f"{len(units) - len(done)} of its {len(units)} commit records"
                raise CacheDamagedError(
                    f"{self.path} was finished and has lost {lost}; segkd cache repair writes them again"
                )
            records += [{"generation": generation.number, **read_signed(generation.record_path(k))} for k in done]
        return records

    def statistics(self) -> Statistics:
        """What the coding of all written units has cost."""
        total = Statistics()
        unfinished = {opened for opened, seal in enumerate(self._seals) if seal is None}
        records = self.records() if unfinished else []
        for seal in (*self._seals, *(record for record in records if record["generation"] in unfinished)):
            if seal is not None:
                total.merge(Statistics.from_dict(seal["statistics"]))
        return total

    def entries(self, *roles: str) -> Entries:
        """The samples of the given roles (of all, if none is given), in cache order, read as they are asked for."""
        return Entries(self._lookups, roles)

    def count(self, *roles: str) -> int:
        """How many samples of the given roles (of all, if none is given) there are."""
        return len(self.entries(*roles))

    def entry(self, sample_id: str) -> Entry:
        """The sample of that id.

        Raises CacheMismatchError when the cache does not hold it, CacheDamagedError when its row is lost or damaged.
        """
        failure: CacheDamagedError | CacheMismatchError | None = None
        for lookup in reversed(self._lookups):
            try:
                found = lookup.find(sample_id)
            except CacheDamagedError as error:  # an earlier generation may have it still
                failure, found = error, None
            if found is not None:
                return found
            if lookup.removes(sample_id):
                break
        if failure is None and self.usable and not self.sealed:
            failure = CacheMismatchError(
                f"{self.path} holds no sample {sample_id!r} yet: what is being added to it is not finished; "
                "run segkd teacher-cache to finish it, or train on the data that the cache had before"
            )
        raise failure or CacheMismatchError(
            f"{self.path} holds no sample {sample_id!r}: its role is none of cache.roles, or the data have changed; "
            "write a cache of these samples with segkd teacher-cache"
        )

    def prepare(self) -> None:
        """Loads the compiled code that tiles are decoded with, so that workers that are forked later have it.

        Without this call it is loaded with the first tile; what reads no tile does without. Raises ConfigError where
        the compiler is not installed.
        """
        for target in self.spec.targets.values():
            require(target.codec)

    def window(self, entry: Entry, target: str, rows: range, columns: range) -> npt.NDArray[Any]:
        """Codes ``(channels, len(rows), len(columns))`` of a rectangle of the sample's cells.

        They are float16 where the sample is on the rung EXACT of the target. Only the tiles that the window overlaps
        are read. Raises CacheDamagedError for one that is lost or damaged, GeometryError for a window that leaves the
        sample's grid, CacheMismatchError for a target that the cache does not keep.
        """
        return self.windows([WindowRequest(entry, target, rows, columns)])[0]

    def windows(self, requests: Sequence[WindowRequest]) -> list[npt.NDArray[Any]]:
        """The codes of each window, see :meth:`window`: read in the order of the files, each tile once."""
        results: list[npt.NDArray[Any]] = []
        wanted: dict[tuple[int, str], dict[int, list[_Part]]] = {}
        for request in requests:
            entry, target, rows, columns = request
            _require_inside(request)
            if target not in self.spec.targets:
                raise CacheMismatchError(f"{self.path} keeps {', '.join(self.spec.targets)}, and no {target!r}")
            name = f"{target}_exact" if entry.rungs[target] == EXACT else target
            if name not in self._arrays[entry.generation]:
                raise damaged(self.path / METADATA, ValueError(f"{entry.id} needs the array {name}, which it lacks"))
            array = self._arrays[entry.generation][name]
            codes = np.empty((array.shape[0], len(rows), len(columns)), array.dtype)
            results.append(codes)
            tiles = wanted.setdefault((entry.generation, name), {})
            for number, part in _parts(entry, codes, rows, columns, self.spec.tile):
                tiles.setdefault(number, []).append(part)
        for (generation, name), tiles in sorted(wanted.items(), key=lambda item: item[0]):
            stops = {number: max(part.rows.stop for part in parts) for number, parts in tiles.items()}
            for number, tile in self._shards.tiles(self._arrays[generation][name], stops):
                for part in tiles[number]:
                    part.out[:] = tile[:, part.rows, part.columns]
        return results

    def decode(self, target: str, codes_SChw: Array, rungs_S: Array) -> Array:
        """float32 values of codes: log-probabilities for ``soft``, map values for the others. numpy or torch."""
        return self.spec.targets[target].coder.decode(codes_SChw, rungs_S)

    def values(self, entry: Entry, target: str) -> npt.NDArray[np.float32]:
        """All of one sample's values, channels,h,w."""
        height, width = entry.mapping.shape
        codes = self.window(entry, target, range(height), range(width))
        decoded: npt.NDArray[np.float32] = self.decode(target, codes[None], np.asarray([entry.rungs[target]]))[0]
        return decoded


class Entries(Iterable[Entry]):
    """Samples of a cache: counted without being read, and read anew, unit by unit, by every iteration."""

    def __init__(self, lookups: Sequence[Lookup], roles: tuple[str, ...]) -> None:
        self._lookups, self._roles = lookups, roles

    def __iter__(self) -> Iterator[Entry]:
        for number, lookup in enumerate(self._lookups):
            later = self._lookups[number + 1 :]
            for entry in lookup.entries(*self._roles):
                if not any(other.removes(entry.id) for other in later):
                    yield entry

    def __len__(self) -> int:
        total = 0
        for number, lookup in enumerate(self._lookups):
            removed = {name.decode() for later in self._lookups[number + 1 :] for name in later.removed}
            found = (lookup.find(name) for name in sorted(removed))
            gone = sum(entry is not None and (not self._roles or entry.role in self._roles) for entry in found)
            total += lookup.count(*self._roles) - gone
        return total


class _Part(NamedTuple):
    """Where a tile's part of a window goes, and which part of the tile it is."""

    out: npt.NDArray[Any]
    rows: slice
    columns: slice


def _tile_array(lookup: Lookup, name: str, exact: bool) -> TileArray:
    generation = lookup.generation
    spec = generation.spec.targets[target_arrays(generation.spec)[name][0]]
    codec = "zstd" if exact else spec.codec
    require_known(codec)
    return TileArray(
        folder=str(generation.array_folder(name)),
        shard_tiles=generation.plan.shard_tiles,
        shape=(spec.channels, generation.spec.tile, generation.spec.tile),
        dtype=np.dtype(np.float16) if exact else spec.coder.dtype,
        codec=codec,
        watch=lookup.watch,
    )


def _parts(
    entry: Entry, codes: npt.NDArray[Any], rows: range, columns: range, tile: int
) -> Iterator[tuple[int, _Part]]:
    """The numbers of the tiles that a window overlaps, and what of them goes where in its codes."""
    across = tile_shape(entry.mapping.shape, tile)[1]
    for tile_row, in_rows, out_rows in _overlaps(rows, tile):
        for tile_column, in_columns, out_columns in _overlaps(columns, tile):
            number = entry.first_tile + tile_row * across + tile_column
            yield number, _Part(codes[:, out_rows, out_columns], in_rows, in_columns)


def _require_inside(request: WindowRequest) -> None:
    # Beyond the grid there are the tiles of other samples.
    shape = request.entry.mapping.shape
    for cells, length in zip((request.rows, request.columns), shape, strict=True):
        if cells and not (cells.step == 1 and cells.start >= 0 and cells.stop <= length):
            raise GeometryError(
                f"the window {request.rows}, {request.columns} leaves the grid of {request.entry.id}, "
                f"{shape[0]}x{shape[1]} cells; ask for consecutive cells inside it"
            )


def _overlaps(cells: range, tile: int) -> Iterable[tuple[int, slice, slice]]:
    """Per tile that a run of cells overlaps: its number, the overlap in the tile, the overlap in the run."""
    if not cells:
        return
    for number in range(cells.start // tile, -(-cells.stop // tile)):
        start, stop = max(cells.start, number * tile), min(cells.stop, (number + 1) * tile)
        yield (
            number,
            slice(start - number * tile, stop - number * tile),
            slice(start - cells.start, stop - cells.start),
        )
