"""Writes a cache unit by unit.

Shapes: codes channels,h,w of one sample; tiles channels,t,t.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.buffer import Buffer as AnyBuffer
from zarr.buffer.cpu import Buffer
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from segkd.storage.errors import CacheExistsError, CacheMismatchError
from segkd.storage.layout import Plan, PlannedSample, Unit, tile_shape
from segkd.storage.publish import COMMITS, UnitPublisher, create_whole, explained, read_document, record_name
from segkd.storage.spec import CacheSpec, require_equal
from segkd.storage.statistics import Statistics

SAMPLES = "samples"
ZSTD_LEVEL = 9


@dataclass(frozen=True, kw_only=True)
class CodedSample:
    """What a unit's owner hands over for one sample."""

    image_digest: bytes
    codes: Mapping[str, npt.NDArray[Any]]
    """Per target its codes, channels,h,w."""
    rungs: Mapping[str, int]


class CacheWriter:
    """Creates the cache at ``path``, or continues it when it has the same specification.

    Raises CacheExistsError for something else at ``path``, CacheMismatchError for a cache of another specification.
    """

    def __init__(self, path: str | Path, spec: CacheSpec, plan: Plan) -> None:
        self.root = Path(path)
        self.spec = spec
        self.plan = plan
        self.publisher = UnitPublisher(self.root)
        self._metadata = _metadata_documents(spec)
        with explained(self.root):
            self._create_or_compare()

    def pending(self) -> list[Unit]:
        """The units that are not committed, after finishing those that an interrupted run had decided."""
        return [unit for unit in self.plan.units if not self.publisher.recover(unit.number)]

    def write(self, unit: Unit, coded: Sequence[CodedSample], statistics: Statistics) -> int | None:
        """Commits a unit; its bytes, or None when another worker committed it first."""
        objects = self._encode(unit, coded)
        if self.publisher.publish(unit.number, objects, statistics.to_dict(), unit.samples):
            return sum(map(len, objects.values()))
        return None

    def seal(self) -> bool:
        """Writes the seal when every unit is committed; says whether the cache is sealed now.

        The seal is a pure function of the commit records and the metadata, so it does not matter who writes it.
        """
        if not all(self.publisher.committed(unit.number) for unit in self.plan.units):
            return False
        self.publisher.seal(seal_document(self.root, self.spec))
        return True

    def _create_or_compare(self) -> None:
        root_document = self.root / "zarr.json"
        if self.root.exists() and not root_document.exists() and self._foreign():
            raise CacheExistsError(f"{self.root} exists and is not a cache; choose another path or remove it")
        if root_document.exists():
            require_equal(self.spec, read_spec(self.root), str(self.root))
        # The root's metadata comes last: without it there is no cache.
        for name in sorted(self._metadata, key=lambda name: name == "zarr.json"):
            create_whole(self.root / name, self._metadata[name], self.publisher.attempts)
        require_equal(self.spec, read_spec(self.root), str(self.root))
        for name, content in self._metadata.items():
            if read_document(self.root / name) != json.loads(content):
                raise CacheMismatchError(
                    f"{self.root / name} differs from what this version of segkd and zarr {zarr.__version__} writes; "
                    "continue the cache with the versions that began it, or write a new one"
                )

    def _foreign(self) -> bool:
        if not self.root.is_dir():
            return True
        expected = {name.split("/")[0] for name in self._metadata}
        return any(entry.name not in expected and not entry.name.startswith(".") for entry in self.root.iterdir())

    def _encode(self, unit: Unit, coded: Sequence[CodedSample]) -> dict[str, bytes]:
        """The unit's objects by their names in the cache, as zarr writes them."""
        objects: dict[str, AnyBuffer] = {name: Buffer.from_bytes(content) for name, content in self._metadata.items()}
        group = zarr.open_group(MemoryStore(objects), mode="r+", zarr_format=3)
        planned = self.plan.of(unit)
        first = unit.first_tiles[0]
        for name, target in self.spec.targets.items():
            tiles = np.concatenate(
                [cut_into_tiles(sample.codes[name], self.plan.spec.tile, target.coder.dtype) for sample in coded]
            )
            _array(group, name)[first : first + len(tiles)] = tiles
        rows = np.zeros(self.plan.spec.unit_samples, self.spec.row_dtype())
        for row, sample, result, first_tile in zip(rows, planned, coded, unit.first_tiles, strict=False):
            _fill_row(row, sample, result, first_tile)
        start = unit.first_row(self.plan.spec)
        _array(group, SAMPLES)[start : start + len(rows)] = rows.view(np.uint8).reshape(len(rows), -1)
        return {name: content.to_bytes() for name, content in objects.items() if name not in self._metadata}


def cut_into_tiles(codes: npt.NDArray[Any], tile: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Codes channels,h,w as tiles ``(number, channels, tile, tile)``, row by row, zero beyond the grid."""
    channels, height, width = codes.shape
    rows, columns = tile_shape((height, width), tile)
    padded = np.zeros((channels, rows * tile, columns * tile), dtype)
    padded[:, :height, :width] = codes
    split = padded.reshape(channels, rows, tile, columns, tile)
    return split.transpose(1, 3, 0, 2, 4).reshape(rows * columns, channels, tile, tile)


def read_spec(root: Path) -> CacheSpec:
    """The specification in a cache's root metadata. Raises CacheMismatchError for another format."""
    document = read_document(root / "zarr.json")
    attributes = document.get("attributes", {})
    if "segkd" not in attributes:
        raise CacheExistsError(f"{root} is a Zarr group but not a segkd cache; choose another path")
    return CacheSpec.from_dict(attributes["segkd"], str(root))


def seal_document(root: Path, spec: CacheSpec) -> dict[str, Any]:
    """The seal of a cache whose units are all committed."""
    statistics, bytes_ = Statistics(), 0
    commits = hashlib.sha256()
    for unit in range(spec.plan.units):
        content = (root / record_name(unit)).read_bytes()
        commits.update(content)
        record = json.loads(content)
        statistics.merge(Statistics.from_dict(record["statistics"]))
        bytes_ += sum(entry["bytes"] for entry in record["objects"].values())
    metadata = {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in sorted(_metadata_documents(spec))
    }
    return {
        "units": spec.plan.units,
        "bytes": bytes_,
        "commits_sha256": commits.hexdigest(),
        "metadata_sha256": metadata,
        "statistics": statistics.to_dict(),
    }


def _metadata_documents(spec: CacheSpec) -> dict[str, bytes]:
    """Every metadata file of the cache by its name, as zarr writes it."""
    documents: dict[str, AnyBuffer] = {}
    group = zarr.create_group(MemoryStore(documents), zarr_format=3, attributes={"segkd": spec.to_dict()})
    group.create_group(COMMITS)
    plan = spec.plan
    for target in spec.targets.values():
        group.create_array(
            target.name,
            shape=(plan.shards * plan.shard_tiles, target.channels, plan.tile, plan.tile),
            shards=(plan.shard_tiles, target.channels, plan.tile, plan.tile),
            chunks=(1, target.channels, plan.tile, plan.tile),
            dtype=target.coder.dtype,
            compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
            filters=None,
            fill_value=0,
            dimension_names=("tile", "channel", "cell_y", "cell_x"),
        )
    group.create_array(
        SAMPLES,
        shape=(plan.units * plan.unit_samples, spec.row_dtype().itemsize),
        chunks=(plan.unit_samples, spec.row_dtype().itemsize),
        dtype=np.uint8,
        compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
        filters=None,
        fill_value=0,
        dimension_names=("row", "byte"),
    )
    return {name: content.to_bytes() for name, content in documents.items()}


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """An array of the group that writes every chunk, constant ones too: else a lost chunk and a flat one look alike."""
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array.with_config({"write_empty_chunks": True})


def _fill_row(row: np.void, sample: PlannedSample, coded: CodedSample, first_tile: int) -> None:
    mapping = sample.mapping
    row["id"], row["role"] = sample.id.encode(), sample.role.encode()
    row["height"], row["width"] = sample.image_size
    row["grid_height"], row["grid_width"] = mapping.shape
    row["scale_y"], row["offset_y"] = mapping.y.scale, mapping.y.offset
    row["scale_x"], row["offset_x"] = mapping.x.scale, mapping.x.offset
    row["first_tile"] = first_tile
    row["image_digest"] = np.frombuffer(coded.image_digest, np.uint8)
    for name, rung in coded.rungs.items():
        row[f"rung_{name}"] = rung
