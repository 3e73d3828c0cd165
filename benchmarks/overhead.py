"""What a cache takes besides its tiles' codes: indexes, checksums, tables, records and metadata, byte by byte.

    python benchmarks/overhead.py --cache cache.zarr [--json]

Every file counts, and every shard's own index tells how many bytes of it are codes.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segkd.storage.chunks import CHECKSUM
from segkd.storage.generation import METADATA, SAMPLES, Generation, target_arrays
from segkd.storage.layout import ENTRY_COST, tile_shape
from segkd.storage.packing import EMPTY
from segkd.storage.publish import COMMITS
from segkd.storage.reader import CacheReader


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Bytes of a cache that are not codes."""

    samples: int
    cut: int
    """Samples of more than one tile."""
    tile: int
    """Side of a tile in cells."""
    payload: int
    """Bytes of codes, as the codec leaves them."""
    parts: Mapping[str, int]
    """Bytes besides, by what they are."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def a_sample(self) -> float:
        return self.total / self.samples

    def lines(self) -> list[str]:
        """For people."""
        rows = [*self.parts.items(), ("all besides the codes", self.total), ("codes", self.payload)]
        return [
            f"{self.samples:,} samples, {self.cut:,} of them in several tiles of {self.tile}x{self.tile} cells",
            f"{'':<24}{'bytes':>14}{'a sample':>12}{'of the codes':>14}",
            *(f"{name:<24}{n:>14,}{n / self.samples:>12,.1f}{n / self.payload:>13.2%}" for name, n in rows),
        ]

    def to_dict(self) -> dict[str, object]:
        """For ``--json``."""
        derived = {"total": self.total, "a_sample": self.a_sample, "of_the_codes": self.total / self.payload}
        return {**vars(self), "parts": dict(self.parts), **derived}


def count(path: Path) -> Overhead:
    """The bytes of the cache at ``path``; raises what :class:`CacheReader` does."""
    reader = CacheReader(path)
    parts: Counter[str] = Counter()
    payload = 0
    arrays = target_arrays(reader.spec)
    tiles = {generation.array_folder(name): generation for generation in reader.generations for name in arrays}
    for file in path.rglob("*"):
        if not file.is_file():
            continue
        size = file.stat().st_size
        if file.parent in tiles and file.name != METADATA:
            index, checksums = _shard(file, tiles[file.parent])
            parts["shard indexes"] += index
            parts["tiles' checksums"] += checksums
            payload += size - index - checksums
        elif file.name != METADATA and file.parent.name in (SAMPLES, COMMITS):
            parts["sample tables" if file.parent.name == SAMPLES else "records and seals"] += size
        else:
            parts["metadata"] += size
    side = reader.spec.tile
    cut = sum(tile_shape(entry.mapping.shape, side) != (1, 1) for entry in reader.entries())
    return Overhead(samples=reader.count(), cut=cut, tile=side, payload=payload, parts=dict(sorted(parts.items())))


def _shard(file: Path, generation: Generation) -> tuple[int, int]:
    """Bytes of a shard's index, and of its tiles' checksums."""
    tail = ENTRY_COST * generation.plan.shard_tiles + CHECKSUM
    with file.open("rb") as opened:
        opened.seek(-tail, 2)
        lengths = np.frombuffer(opened.read(tail - CHECKSUM), "<u8").reshape(-1, 2)[:, 1]
    return tail, CHECKSUM * int((lengths != EMPTY).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, type=Path, help="a finished cache")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    found = count(arguments.cache)
    print(json.dumps(found.to_dict()) if arguments.json else "\n".join(found.lines()))


if __name__ == "__main__":
    main()
