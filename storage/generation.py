"""The generations of a cache: where their files stand, and the metadata that describes them.

A cache begins as generation 0. Images that are added or changed later go to a further generation, beside a list of the
entries that this one removes; what stands is never changed. A generation counts once its seal stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer as AnyBuffer
from zarr.storage import MemoryStore

from segkd.storage.errors import CacheError, CacheExistsError
from segkd.storage.fields import Fields
from segkd.storage.layout import Plan
from segkd.storage.packing import stored_dtype, zarr_codecs
from segkd.storage.publish import CLOSED, COMMITS, SEAL, read_document, read_signed, record_name
from segkd.storage.spec import CacheSpec, PlanSpec
from segkd.storage.table import as_bytes, directory_of, packed_ids, row_dtype

GENERATIONS = "generations"
SAMPLES = "samples"
UNITS = "units"
REMOVED = "removed"
METADATA = "zarr.json"
ONLY_CHUNK = "c.0.0"
"""The file of a table that has one chunk."""
CHUNK_KEYS: dict[str, Any] = {"name": "default", "separator": "."}
"""A shard is one file in its array's folder: with zarr's own choice it would stand four folders deeper, alone."""


@dataclass(frozen=True)
class Generation:
    """One generation of the cache at ``root``."""

    root: Path
    spec: CacheSpec
    number: int
    plan: PlanSpec

    @classmethod
    def open(cls, root: Path, spec: CacheSpec, number: int) -> Generation:
        """The generation as its metadata describes it.

        Raises FileNotFoundError where there is none, CacheDamagedError where they say what no generation's say.
        """
        path = root / GENERATIONS / str(number) / METADATA
        plan = Fields(read_document(path), str(path)).within("attributes").within("segkd").within("plan")
        return cls(root, spec, number, PlanSpec.from_fields(plan))

    @property
    def name(self) -> str:
        """Its folder within the cache."""
        return f"{GENERATIONS}/{self.number}"

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.root / self.name

    @property
    def sealed(self) -> bool:
        """Whether it counts."""
        return self.seal_path.exists()

    @property
    def seal_path(self) -> Path:
        """Where its seal stands, once it does."""
        return self.folder / SEAL

    def record_path(self, unit: int) -> Path:
        """Where a unit's commit record stands, once it does."""
        return self.folder / record_name(unit)

    def array_folder(self, name: str) -> Path:
        """The folder of an array: a target, ``<target>_exact`` or a table."""
        return self.folder / name

    def row_dtype(self) -> np.dtype[Any]:
        """One row of its sample table."""
        return row_dtype(self.spec, self.plan)

    @property
    def missing(self) -> frozenset[int]:
        """The units that it was closed without; none, unless its list of samples changed before it was finished."""
        path = self.folder / CLOSED
        return frozenset(read_signed(path)["missing"]) if path.exists() else frozenset()

    def units(self) -> list[int]:
        """The numbers of the units that belong to it: all, unless it was closed before all were written."""
        missing = self.missing
        return [unit for unit in range(self.plan.units) if unit not in missing]

    def committed(self) -> list[int]:
        """The numbers of the units that are written."""
        return [unit for unit in self.units() if self.record_path(unit).exists()]

    @property
    def begun(self) -> bool:
        """Whether it has anything to read: an interruption may have come before the last of its metadata files."""
        return all((self.root / name).exists() for name in self.metadata_names()) or bool(self.committed())

    def metadata_names(self) -> list[str]:
        """Every metadata file that its seal covers, by its name within the cache, in order."""
        arrays = [*target_arrays(self.spec), SAMPLES, UNITS]
        names = [METADATA, *(f"{array}/{METADATA}" for array in [*arrays, COMMITS])]
        if self.plan.units:
            names.append(f"{UNITS}/{ONLY_CHUNK}")
        if (self.array_folder(REMOVED) / METADATA).exists():
            names += [f"{REMOVED}/{METADATA}", f"{REMOVED}/{ONLY_CHUNK}"]
        return sorted([METADATA, f"{GENERATIONS}/{METADATA}", *(f"{self.name}/{name}" for name in names)])

    @cached_property
    def removed(self) -> frozenset[str]:
        """The ids of the entries of earlier generations that it removes or replaces."""
        folder = self.array_folder(REMOVED)
        if not (folder / METADATA).exists():
            return frozenset()
        packed = np.ascontiguousarray(zarr.open_array(folder, mode="r", zarr_format=3)[:])
        return frozenset(name.decode() for name in packed.view(f"S{packed.shape[1]}")[:, 0])


def there_is_a_cache(root: Path) -> bool:
    """Whether a cache was begun at ``root``: its specification, or what is left of one that has lost it."""
    return any((root / name).exists() for name in (METADATA, *(f"{GENERATIONS}/0/{name}" for name in (METADATA, SEAL))))


def generations_of(root: Path, spec: CacheSpec) -> list[Generation]:
    """The generations of a cache in order, sealed or not."""
    found: list[Generation] = []
    while (root / GENERATIONS / str(len(found)) / METADATA).exists():
        found.append(Generation.open(root, spec, len(found)))
    return found


def read_spec(root: Path) -> CacheSpec:
    """The specification in a cache's root metadata. Raises CacheMismatchError for another format."""
    attributes = read_document(root / METADATA).get("attributes")
    if not isinstance(attributes, dict) or not isinstance(attributes.get("segkd"), dict):
        raise CacheExistsError(f"{root} is a Zarr group but not a segkd cache; choose another path")
    return CacheSpec.from_dict(attributes["segkd"], str(root))


def tile_of(root: Path, usual: int) -> int:
    """The side of the tiles of the cache at ``root``; ``usual`` is what a new one has.

    Metadata may be damaged: what most of them say counts, and ``usual`` as one of them.
    """
    said: list[int] = []
    with suppress(CacheError, OSError):
        said.append(read_spec(root).tile)
    for path in root.glob(f"{GENERATIONS}/*/*/{METADATA}"):
        with suppress(CacheError, OSError):
            match read_document(path).get("shape"):
                case [int(), int(), int(), int(side)]:
                    said.append(side)
    return Counter([*said, usual]).most_common(1)[0][0]


def target_arrays(spec: CacheSpec) -> dict[str, tuple[str, bool]]:
    """The targets' arrays by name: whose they are, and whether they hold the samples on the rung EXACT."""
    arrays: dict[str, tuple[str, bool]] = {}
    for target in spec.targets.values():
        arrays[target.name] = target.name, False
        if target.fallback:
            arrays[f"{target.name}_exact"] = target.name, True
    return arrays


def shard_name(array: str, shard: int) -> str:
    """Where a shard of a target's array stands in its generation's folder."""
    return f"{array}/c.{shard}.0.0.0"


def table_name(unit: int) -> str:
    """Where a unit's chunk of the sample table stands in its generation's folder."""
    return f"{SAMPLES}/c.{unit}.0"


def root_documents(spec: CacheSpec) -> dict[str, bytes]:
    """The metadata files of the cache itself by their names in it, as zarr writes them, the specification first."""
    documents: dict[str, AnyBuffer] = {}
    group = zarr.create_group(MemoryStore(documents), zarr_format=3, attributes={"segkd": spec.to_dict()})
    group.create_group(GENERATIONS)
    return {name: documents[name].to_bytes() for name in (METADATA, f"{GENERATIONS}/{METADATA}")}


def generation_documents(spec: CacheSpec, plan: Plan, number: int, removed: Sequence[str]) -> dict[str, bytes]:
    """Every metadata file of a generation by its name in the generation's folder, as zarr writes it, the plan first."""
    documents: dict[str, AnyBuffer] = {}
    attributes = {"segkd": {"generation": number, "plan": plan.spec.to_dict()}}
    group = zarr.create_group(MemoryStore(documents), zarr_format=3, attributes=attributes)
    group.create_group(COMMITS)
    numbers, tile = plan.spec, spec.tile
    for name, (target, exact) in target_arrays(spec).items():
        channels = spec.targets[target].channels
        group.create_array(
            name,
            shape=(numbers.shards * numbers.shard_tiles, channels, tile, tile),
            shards=(numbers.shard_tiles, channels, tile, tile),
            chunks=(1, channels, tile, tile),
            dtype=np.dtype(np.float16)
            if exact
            else stored_dtype(spec.targets[target].coder.dtype, spec.targets[target].codec),
            fill_value=0,
            chunk_key_encoding=CHUNK_KEYS,
            dimension_names=("tile", "channel", "cell_y", "cell_x"),
            **zarr_codecs("zstd" if exact else spec.targets[target].codec),
        )
    _table(group, SAMPLES, numbers.units * numbers.unit_samples, numbers.unit_samples, row_dtype(spec, numbers))
    directory = directory_of(plan)
    _table(group, UNITS, len(directory), max(len(directory), 1), directory.dtype)[:] = as_bytes(directory)
    if removed:
        names = packed_ids(removed)
        _table(group, REMOVED, len(names), len(names), names.dtype)[:] = as_bytes(names)
    return {name: documents[name].to_bytes() for name in sorted(documents, key=lambda name: name != METADATA)}


def _table(group: zarr.Group, name: str, rows: int, chunk: int, dtype: np.dtype[Any]) -> zarr.Array[Any]:
    array = group.create_array(
        name,
        shape=(rows, dtype.itemsize),
        chunks=(chunk, dtype.itemsize),
        dtype=np.uint8,
        fill_value=0,
        chunk_key_encoding=CHUNK_KEYS,
        dimension_names=("row", "byte"),
        **zarr_codecs("zstd"),
    )
    # Every chunk is written, a constant one too: else a lost one and a flat one look alike.
    return array.with_config({"write_empty_chunks": True})
