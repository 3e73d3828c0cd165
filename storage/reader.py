"""Reads windows of targets out of a cache.

Shapes: codes channels,h,w of one window; values S,channels,h,w.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from segkd.storage.coding import EXACT, Array
from segkd.storage.errors import CacheDamagedError, CacheMismatchError, CacheNotFoundError, IncompleteCacheError
from segkd.storage.generation import METADATA, SAMPLES, Generation, generations_of, read_spec, target_arrays
from segkd.storage.layout import tile_shape
from segkd.storage.publish import read_signed
from segkd.storage.spec import CacheSpec
from segkd.storage.statistics import Statistics
from segkd.storage.table import Entry, entry_of


class CacheReader:
    """A cache, opened for reading. Picklable; every process opens its own files, when it first needs them.

    Raises CacheNotFoundError, CacheMismatchError for another format and IncompleteCacheError for a cache that
    is not sealed, unless ``partial`` says that its finished units will do.
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        self.path = Path(path)
        if not (self.path / METADATA).exists():
            raise CacheNotFoundError(f"there is no cache at {self.path}; write one with segkd teacher-cache")
        self.spec: CacheSpec = read_spec(self.path)
        found = generations_of(self.path, self.spec)
        self.sealed = bool(found) and all(generation.sealed for generation in found)
        first_is_done = bool(found) and found[0].sealed
        if not first_is_done and not partial:
            done, units = (len(found[0].committed()), found[0].plan.units) if found else (0, "its")
            raise IncompleteCacheError(
                f"{self.path} is not finished: {done} of {units} units are written; "
                "run segkd teacher-cache again to finish it"
            )
        self.generations: list[Generation] = []
        for generation in found:
            if not generation.sealed and not partial:
                break
            self.generations.append(generation)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "spec", "sealed", "generations")
        return {name: value for name, value in vars(self).items() if name in kept}

    def records(self) -> list[dict[str, Any]]:
        """The commit records, in the order of units. Raises CacheDamagedError where a finished cache has lost one."""
        records = []
        for generation in self.generations:
            done, units = generation.committed(), generation.units()
            if generation.sealed and len(done) < len(units):
                lost = f"{len(units) - len(done)} of its {len(units)} commit records"
                raise CacheDamagedError(
                    f"{self.path} was finished and has lost {lost}; run segkd teacher-cache again to write those units"
                )
            records += [{"generation": generation.number, **read_signed(generation.record_path(k))} for k in done]
        return records

    def statistics(self) -> Statistics:
        """What the coding of all written units has cost."""
        total = Statistics()
        for record in self.records():
            total.merge(Statistics.from_dict(record["statistics"]))
        return total

    def entries(self, *roles: str) -> Sequence[Entry]:
        """The samples of the given roles (of all, if none is given), in cache order."""
        return [entry for entry in self._entries.values() if not roles or entry.role in roles]

    def entry(self, sample_id: str) -> Entry:
        """The sample of that id. Raises CacheMismatchError when the cache does not hold it."""
        try:
            return self._entries[sample_id]
        except KeyError:
            raise CacheMismatchError(
                f"{self.path} holds no sample {sample_id!r}; its lists differ from the data's: "
                "write a cache of these samples with segkd teacher-cache"
            ) from None

    def window(self, entry: Entry, target: str, rows: range, columns: range) -> npt.NDArray[Any]:
        """Codes ``(channels, len(rows), len(columns))`` of a rectangle of the sample's cells.

        Only the tiles that the window overlaps are read. Raises CacheDamagedError for one that is lost or damaged.
        """
        spec, tile = self.spec.targets[target], self.spec.tile
        across = tile_shape(entry.mapping.shape, tile)[1]
        exact = entry.rungs[target] == EXACT
        array = f"{target}_exact" if exact else target
        codes = np.empty((spec.channels, len(rows), len(columns)), np.float16 if exact else spec.coder.dtype)
        for tile_row, in_rows, out_rows in _overlaps(rows, tile):
            for tile_column, in_columns, out_columns in _overlaps(columns, tile):
                number = entry.first_tile + tile_row * across + tile_column
                codes[:, out_rows, out_columns] = self._read((entry.generation, array), number)[:, in_rows, in_columns]
        return codes

    def decode(self, target: str, codes_SChw: Array, rungs_S: Array) -> Array:
        """float32 values of codes: log-probabilities for ``soft``, map values for the others. numpy or torch."""
        return self.spec.targets[target].coder.decode(codes_SChw, rungs_S)

    def values(self, entry: Entry, target: str) -> npt.NDArray[np.float32]:
        """All of one sample's values, channels,h,w."""
        height, width = entry.mapping.shape
        codes = self.window(entry, target, range(height), range(width))
        decoded: npt.NDArray[np.float32] = self.decode(target, codes[None], np.asarray([entry.rungs[target]]))[0]
        return decoded

    def _read(self, place: tuple[int, str], first: int, stop: int | None = None) -> npt.NDArray[Any]:
        """One tile of a target's array, or a unit's rows ``first`` to ``stop`` of the table: part of a single file."""
        array, folder = self._arrays[place], self.generations[place[0]].array_folder(place[1])
        rows = (array.shards or array.chunks)[0]
        file = folder / array.metadata.encode_chunk_key((first // rows, *(0 for _ in array.shape[1:])))
        try:
            if not file.exists():  # which zarr would read as zeros
                raise FileNotFoundError("its file is lost")
            return np.asarray(array[first if stop is None else slice(first, stop)])
        except Exception as error:  # zarr's codecs raise what their libraries raise
            raise CacheDamagedError(f"{file} cannot be read ({error}); restore the cache or write it again") from error

    @cached_property
    def _arrays(self) -> dict[tuple[int, str], zarr.Array[Any]]:
        return {
            (generation.number, name): zarr.open_array(generation.array_folder(name), mode="r", zarr_format=3)
            for generation in self.generations
            for name in (*target_arrays(self.spec), SAMPLES)
        }

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        records = self.records()
        for generation in self.generations:
            for name in generation.removed:
                entries.pop(name, None)
            for record in (record for record in records if record["generation"] == generation.number):
                first = record["unit"] * generation.plan.unit_samples
                packed = np.ascontiguousarray(
                    self._read((generation.number, SAMPLES), first, first + record["samples"])
                )
                for number, row in enumerate(packed.view(generation.row_dtype())[:, 0], first):
                    entry = entry_of(row, self.spec, generation=generation.number, unit=record["unit"], number=number)
                    entries[entry.id] = entry
        return entries


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
