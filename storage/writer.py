"""Writes a generation of a cache unit by unit.

Shapes: codes channels,h,w of one sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from segkd.storage.coding import EXACT
from segkd.storage.differences import differing
from segkd.storage.errors import CacheError, CacheExistsError, CacheMismatchError
from segkd.storage.generation import (
    GENERATIONS,
    METADATA,
    Generation,
    generation_documents,
    generations_of,
    read_spec,
    root_documents,
    shard_name,
    table_name,
    target_arrays,
)
from segkd.storage.layout import Plan, Unit
from segkd.storage.packing import encode_chunk, pack_shards, threads
from segkd.storage.publish import UnitPublisher, create_whole, explained, read_document, remove_synced
from segkd.storage.sealing import close_generation, seal_generation
from segkd.storage.spec import CacheSpec, require_equal
from segkd.storage.statistics import unit_content
from segkd.storage.table import CodedSample, as_bytes, fill_row


class CacheWriter:
    """Creates a generation of the cache at ``path``, or continues it when it has the same specification and plan.

    ``removed``: ids of entries of earlier generations that this one removes or replaces.

    Raises CacheExistsError for something else at ``path``, CacheMismatchError for a cache of another specification or
    a generation of another list of samples, CacheError for a new generation upon one that is not finished.
    """

    def __init__(
        self, path: str | Path, spec: CacheSpec, plan: Plan, *, generation: int = 0, removed: Sequence[str] = ()
    ) -> None:
        self.root = Path(path)
        self.spec = spec
        self.plan = plan
        self.generation = Generation(self.root, spec, generation, plan.spec)
        units = {unit.number: unit for unit in plan.units}
        self.publisher = UnitPublisher(
            self.root, self.generation.folder, lambda number: self._object_names(units[number])
        )
        if not plan.units and not generation:
            raise CacheError("there is no sample to cache; check the roles and the lists of the data")
        self._documents = generation_documents(spec, plan, generation, removed)
        with explained(self.root):
            self._create_or_compare()

    def pending(self) -> list[Unit]:
        """The units that are not committed, after finishing those that an interrupted run had decided."""
        expected = set(self.generation.units())
        return [unit for unit in self.plan.units if unit.number in expected and not self.publisher.recover(unit.number)]

    def unrecorded(self, units: Iterable[Unit]) -> list[int]:
        """Those whose table stands although they are not committed: their commit record was lost."""
        # A worker under way has decided before its table stands, and recovering commits what is decided.
        folder = self.generation.folder
        found = [unit.number for unit in units if (folder / table_name(unit.number)).exists()]
        return [number for number in found if not self.publisher.recover(number)]

    def write(self, unit: Unit, coded: Sequence[CodedSample]) -> int | None:
        """Commits a unit; its bytes, or None when another worker committed it first, or closed the generation."""
        if unit.number in self.generation.missing:
            return None
        rows = self._rows(unit, coded)
        objects = self._encode(unit, coded, rows)
        content = unit_content(rows[: unit.samples], self.spec)
        absent = [name for name in self._object_names(unit) if name not in objects]
        if self.publisher.publish(unit.number, objects, content, absent):
            return sum(map(len, objects.values()))
        return None

    def seal(self) -> bool:
        """Writes the seal when every unit is committed; says whether the generation is sealed now.

        A generation is sealed after the one before it.
        """
        return seal_generation(self.generation)

    def close(self) -> None:
        """Seals the generation as it stands: what is not committed by now is for a later generation to hold.

        For a list of samples that changed before the cache was finished. Raises CacheError if the generation before is
        not sealed.
        """
        close_generation(self.generation)

    def withdraw(self, unit: Unit) -> None:
        """Takes a unit out again, so that it is pending; the seal goes first, and with it those of later generations.

        An interruption at any moment leaves a cache that says that it is not finished, or one as it was.
        """
        with explained(self.root):
            for generation in reversed(generations_of(self.root, self.spec)[self.generation.number :]):
                remove_synced(generation.seal_path)
            self.publisher.withdraw(unit.number, self._object_names(unit))

    def _create_or_compare(self) -> None:
        if self.root.exists() and not (self.root / METADATA).exists() and self._foreign():
            raise CacheExistsError(f"{self.root} exists and is not a cache; choose another path or remove it")
        if (self.root / METADATA).exists():
            require_equal(self.spec, read_spec(self.root), str(self.root))
        if self.generation.number:
            self._require_begun_upon_a_finished_one()
        # The specification and the plan come first: whoever creates them decides what all the others must be.
        for folder, documents in ((self.root, root_documents(self.spec)), (self.generation.folder, self._documents)):
            for name, content in documents.items():
                if not create_whole(folder / name, content, self.publisher.attempts):
                    self._compare(folder / name, content)

    def _compare(self, path: Path, content: bytes) -> None:
        if path.read_bytes() == content:
            return
        if path == self.root / METADATA:
            require_equal(self.spec, read_spec(self.root), str(self.root))
        if path == self.generation.folder / METADATA:
            found = Generation.open(self.root, self.spec, self.generation.number).plan
            if found != self.plan.spec:
                begun, asked = found.unit_samples, self.plan.spec.unit_samples
                if found.digest == self.plan.spec.digest and begun != asked:
                    raise CacheMismatchError(
                        f"{self.generation.folder} was begun with cache.unit_samples = {begun}, and this run has "
                        f"{asked}; go on with {begun}"
                    )
                what = "list of samples"
                if found.digest == self.plan.spec.digest:
                    what = f"unit plan: {', '.join(differing(found.to_dict(), self.plan.spec.to_dict()))}"
                raise CacheMismatchError(
                    f"{self.root} was written with another {what}; "
                    "give this run another cache path, or remove the old cache"
                )
        if path.name != METADATA or read_document(path) != json.loads(content):
            raise CacheMismatchError(
                f"{path} differs from what this version of segkd and zarr {zarr.__version__} writes; "
                "continue the cache with the versions that began it, or write a new one"
            )

    def _require_begun_upon_a_finished_one(self) -> None:
        if (self.generation.folder / METADATA).exists():
            return
        before = self.root / GENERATIONS / str(self.generation.number - 1)
        if not (before / METADATA).exists() or not Generation.open(self.root, self.spec, int(before.name)).sealed:
            raise CacheError(
                f"{self.root} cannot be added to: its generation {before.name} is not finished; "
                "run segkd teacher-cache with the list that began it first"
            )

    def _foreign(self) -> bool:
        if not self.root.is_dir():
            return True
        return any(entry.name != GENERATIONS and not entry.name.startswith(".") for entry in self.root.iterdir())

    def _object_names(self, unit: Unit) -> list[str]:
        """Every object that the unit may have; which ones it has depends on the rungs of its samples."""
        shards = range(unit.first_shard, unit.first_shard + unit.shards)
        names = [shard_name(array, shard) for array in target_arrays(self.spec) for shard in shards]
        return [*names, table_name(unit.number)]

    def _rows(self, unit: Unit, coded: Sequence[CodedSample]) -> npt.NDArray[Any]:
        """The unit's chunk of the sample table, zero beyond its samples."""
        rows = np.zeros(self.plan.spec.unit_samples, self.generation.row_dtype())
        for row, sample, result, first in zip(rows, self.plan.of(unit), coded, unit.first_tiles, strict=False):
            fill_row(row, self.spec, sample, result, first)
        return rows

    def _encode(self, unit: Unit, coded: Sequence[CodedSample], rows: npt.NDArray[Any]) -> dict[str, bytes]:
        """The unit's objects by their names in the generation's folder."""
        objects: dict[str, bytes] = {}
        with ThreadPoolExecutor(threads()) as executor:
            for name, (target, exact) in target_arrays(self.spec).items():
                samples = zip(unit.first_tiles, coded, strict=True)
                shards = pack_shards(
                    [(first, it.codes[target]) for first, it in samples if (it.rungs[target] == EXACT) == exact],
                    tile=self.spec.tile,
                    shard_tiles=self.plan.spec.shard_tiles,
                    dtype=np.dtype(np.float16) if exact else self.spec.targets[target].coder.dtype,
                    codec="zstd" if exact else self.spec.targets[target].codec,
                    executor=executor,
                )
                objects.update({shard_name(name, shard): content for shard, content in shards})
        objects[table_name(unit.number)] = encode_chunk(as_bytes(rows))
        return objects
