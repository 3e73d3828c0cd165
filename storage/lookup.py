"""Finds samples in one generation of a cache without a list of them: by the directory of units, then one unit's rows.

Within a generation the samples are sorted by role and id. The directory, a row a unit, is held in full; the units' rows
are read when they are needed and kept as far as there is room.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segkd.storage.errors import CacheDamagedError
from segkd.storage.fields import MANY
from segkd.storage.generation import METADATA, ONLY_CHUNK, REMOVED, SAMPLES, UNITS, Generation
from segkd.storage.publish import read_document
from segkd.storage.shards import ShardReader, damaged
from segkd.storage.spec import SIDE
from segkd.storage.table import Entry, directory_dtype, entry_of
from segkd.storage.watch import SealWatch


class Lookup:
    """The samples of a generation, of which ``seal`` is the seal, or None if only what is committed counts.

    Raises CacheDamagedError where the directory is lost or damaged, and so does every method for the rows it needs.
    """

    def __init__(self, generation: Generation, seal: Mapping[str, Any] | None, shards: ShardReader) -> None:
        self.generation, self._shards = generation, shards
        self.watch = None if seal is None else SealWatch(generation.seal_path, seal["sha256"])
        plan = generation.plan
        everything = range(plan.units)
        written = set(generation.committed()) if seal is None else set(everything).difference(seal["missing"])
        self.written: frozenset[int] | None = None if len(written) == plan.units else frozenset(written)
        directory = np.empty(0, directory_dtype(plan))
        if plan.units:
            path = generation.array_folder(UNITS) / ONLY_CHUNK
            directory = shards.table(path, plan.units, directory.dtype, keep=False)
        self._samples = directory["samples"].tolist()
        self._first_ids = np.ascontiguousarray(directory["first_id"])
        self._roles = _runs_of(directory["role"])

    def find(self, name: str) -> Entry | None:
        """The sample of that id, None where the generation has none."""
        key, failure = name.encode(), None
        for role, units in list(self._roles.items()):
            unit = bisect_right(self._first_ids, key, units.start, units.stop) - 1
            if unit < units.start or not self._is_written(unit):
                continue
            try:
                rows = self._rows(unit)
            except CacheDamagedError as error:  # the sample may be one of another role
                failure = error
                continue
            place = bisect_left(rows["id"], key)
            if place < len(rows) and rows["id"][place] == key:
                # Whoever asks for a sample of this role is likely to ask for another: look there first.
                self._roles = {role: units, **self._roles}
                return self._entry(rows, unit, place)
        if failure is not None:
            raise failure
        return None

    def entries(self, *roles: str) -> Iterator[Entry]:
        """The samples of the given roles (of all, if none is given), sorted by role and id."""
        for role in sorted(self._roles):
            for unit in self._roles[role] if not roles or role in roles else ():
                if self._is_written(unit):
                    rows = self._rows(unit, keep=False)
                    yield from (self._entry(rows, unit, place) for place in range(len(rows)))

    def count(self, *roles: str) -> int:
        """How many samples of the given roles (of all, if none is given) it has."""
        units = [unit for role, units in self._roles.items() if not roles or role in roles for unit in units]
        return sum(self._samples[unit] for unit in units if self._is_written(unit))

    def removes(self, name: str) -> bool:
        """Whether it removes or replaces the sample of that id of the generations before it."""
        key = name.encode()
        place = bisect_left(self.removed, key)
        return place < len(self.removed) and bool(self.removed[place] == key)

    @cached_property
    def removed(self) -> npt.NDArray[np.bytes_]:
        """The ids that it removes or replaces, sorted."""
        folder = self.generation.array_folder(REMOVED)
        if not (folder / METADATA).exists():
            return np.empty(0, "S1")
        count, width = _shape_of(folder / METADATA)
        rows = self._shards.table(folder / ONLY_CHUNK, count, np.dtype([("id", f"S{width}")]), keep=False)
        return np.ascontiguousarray(rows["id"])

    def _is_written(self, unit: int) -> bool:
        return self.written is None or unit in self.written

    def _rows(self, unit: int, *, keep: bool = True) -> npt.NDArray[Any]:
        path = f"{self.generation.array_folder(SAMPLES)}/c.{unit}.0"
        held = self.generation.plan.unit_samples
        rows = self._shards.table(path, held, self._row_dtype, keep=keep, watch=self.watch)
        return rows[: self._samples[unit]]

    @cached_property
    def _row_dtype(self) -> np.dtype[Any]:
        return self.generation.row_dtype()

    def _entry(self, rows: npt.NDArray[Any], unit: int, place: int) -> Entry:
        generation = self.generation
        number = unit * generation.plan.unit_samples + place
        return entry_of(rows[place], generation.spec, generation=generation.number, unit=unit, number=number)


def _shape_of(metadata: Path) -> tuple[int, int]:
    shape = read_document(metadata).get("shape")
    match shape:
        case [int(rows), int(width)] if 0 < rows <= MANY and 0 < width <= SIDE:
            return rows, width
    raise damaged(metadata, ValueError(f"its shape is {shape!r:.40}, expected that of a table"))


def _runs_of(roles: npt.NDArray[np.bytes_]) -> dict[str, range]:
    """The units of each role, which stand together."""
    starts = [0, *(np.flatnonzero(roles[1:] != roles[:-1]) + 1).tolist(), len(roles)] if len(roles) else []
    return {roles[a].decode(): range(a, b) for a, b in pairwise(starts)}
