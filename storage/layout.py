"""Which unit owns which samples, tiles, rows and shards: a pure function of the sample list and a few numbers.

Every task that plans from the same list arrives at the same plan, so tasks need no coordinator. A sample's grid is cut
into square tiles, numbered row by row; the tiles of all samples stand in one array per target. A unit owns whole
shards of every array and one chunk of the sample table. A unit's samples have one role.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from segkd.storage.errors import CacheError
from segkd.storage.geometry import Mapping
from segkd.storage.spec import PlanSpec

UNIT_BYTES = 1 << 27
"""Codes that a unit may have, padding included: they are in memory until the unit is written."""
SHARD_TILES = 1024
"""Tiles that a shard may have: a reader fetches the whole index of a shard, 16 bytes a tile, before its first tile."""
WHOLE = 128
"""Cells on the longer side of a grid up to which samples are better kept in one tile than cut into several."""
CUT = 64
"""Side of the tiles that larger grids are cut into, in cells: with it windows of 64x64 cells are read most quickly."""
ENTRY_COST = 16
"""Bytes of a tile's entry in the index of its shard."""
SHARD_COST = 2200
"""Bytes that any shard costs besides: half a block of the file system, and a line in its unit's commit record."""


@dataclass(frozen=True, kw_only=True)
class PlannedSample:
    """What planning needs of a sample: known from the image's header and the network's description."""

    id: str
    role: str
    image_size: tuple[int, int]
    mapping: Mapping

    def tiles(self, tile: int) -> int:
        """Tiles that its grid is cut into."""
        rows, columns = tile_shape(self.mapping.shape, tile)
        return rows * columns


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The samples that one worker owns: of work, commit, resume and repair."""

    number: int
    role: str
    first_sample: int
    """Position of its first sample in the plan."""
    samples: int
    first_shard: int
    shards: int
    first_tiles: tuple[int, ...]
    """The number of each sample's first tile in the arrays."""

    def first_row(self, plan: PlanSpec) -> int:
        """Its first row in the sample table."""
        return self.number * plan.unit_samples


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sorted samples, their units and the numbers that go into the specification."""

    samples: tuple[PlannedSample, ...]
    units: tuple[Unit, ...]
    spec: PlanSpec

    def of(self, unit: Unit) -> Sequence[PlannedSample]:
        """The samples of a unit."""
        return self.samples[unit.first_sample : unit.first_sample + unit.samples]


def tile_shape(grid: tuple[int, int], tile: int) -> tuple[int, int]:
    """Rows and columns of tiles that a grid of h, w cells is cut into."""
    return -(-grid[0] // tile), -(-grid[1] // tile)


def usual_tile(samples: Sequence[PlannedSample]) -> int:
    """The side of a tile, in cells, that suits these samples; a pure function of the sizes of their grids.

    Where half of the grids or more fit in ``WHOLE`` cells, nine in ten of those are one tile each, and so are longer
    ones by up to a quarter: an entry a sample in the index, one read a window, and no padding beside the longest, which
    costs codes. Any other is cut, rather than that all have a tile of its size, but not into tiles below ``CUT``.
    """
    sides = sorted(max(sample.mapping.shape) for sample in samples)
    fitting = [side for side in sides if side <= WHOLE]
    if not fitting or 2 * len(fitting) < len(sides):
        return CUT
    usual = fitting[(9 * len(fitting) - 1) // 10]
    tile = max(side for side in fitting if 4 * side <= 5 * usual)
    return tile if tile == sides[-1] else max(tile, CUT)


def plan_units(samples: Sequence[PlannedSample], *, unit_samples: int, tile: int, cell_bytes: int = 1) -> Plan:
    """The plan for a list of samples; their order does not matter. An empty list has no units.

    A unit has at most ``unit_samples`` samples and ``UNIT_BYTES`` of codes, of which a cell has ``cell_bytes`` over all
    targets; a single sample that is larger has a unit to itself. Raises CacheError for an ambiguous list.
    """
    ordered = tuple(sorted(samples, key=lambda sample: (sample.role, sample.id)))
    names = Counter(sample.id for sample in ordered)
    if len(names) != len(ordered):
        raise CacheError(f"two samples have the id {names.most_common(1)[0][0]!r}; ids must be unique in a cache")
    unit_tiles = max(UNIT_BYTES // (tile * tile * cell_bytes), 1)
    runs = list(_runs(ordered, unit_samples=unit_samples, unit_tiles=unit_tiles, tile=tile))
    shard_tiles = _shard_tiles(Counter(sum(sizes) for _, sizes in runs))
    units: list[Unit] = []
    first_sample = first_shard = 0
    for role, sizes in runs:
        shards = -(-sum(sizes) // shard_tiles)
        base = first_shard * shard_tiles
        units.append(
            Unit(
                number=len(units),
                role=role,
                first_sample=first_sample,
                samples=len(sizes),
                first_shard=first_shard,
                shards=shards,
                first_tiles=tuple(accumulate(sizes[:-1], initial=base)),
            )
        )
        first_sample += len(sizes)
        first_shard += shards
    spec = PlanSpec(
        digest=list_digest(ordered),
        roles=dict(sorted(Counter(sample.role for sample in ordered).items())),
        units=len(units),
        shards=first_shard,
        unit_samples=unit_samples,
        shard_tiles=shard_tiles,
        name_bytes=max((len(name.encode()) for name in names), default=1),
    )
    return Plan(samples=ordered, units=tuple(units), spec=spec)


def _runs(
    samples: Sequence[PlannedSample], *, unit_samples: int, unit_tiles: int, tile: int
) -> Iterator[tuple[str, list[int]]]:
    """Role and tile counts of each unit's samples, in order."""
    run: list[int] = []
    total, role = 0, ""
    for sample in samples:
        size = sample.tiles(tile)
        if run and (len(run) == unit_samples or total + size > unit_tiles or sample.role != role):
            yield role, run
            run, total = [], 0
        role = sample.role
        run.append(size)
        total += size
    if run:
        yield role, run


def _shard_tiles(units: Counter[int]) -> int:
    """Tiles of a shard, such that shards cost least; ``units`` counts the units of each number of tiles.

    A shard costs an index entry for every tile that it has room for, used or not, and what any file costs. Units are
    of very different sizes where images are, but all shards of an array are alike.
    """
    tiles, count = np.array(list(units), np.int64), np.array(list(units.values()), np.int64)
    frequent = [total for total, _ in sorted(units.items(), key=lambda item: (-item[1], item[0]))[:64]]
    candidates = {min(-(-total // parts), SHARD_TILES) for total in frequent for parts in range(1, 65)}
    costs = {size: int((count * -(-tiles // size)).sum()) * (SHARD_COST + ENTRY_COST * size) for size in candidates}
    return min(costs, key=lambda size: (costs[size], size), default=1)


def list_digest(samples: Sequence[PlannedSample]) -> str:
    """SHA-256 of a sorted list of samples: role, id, image size, grid and mapping."""
    digest = hashlib.sha256()
    for sample in samples:
        y, x = sample.mapping.y, sample.mapping.x
        row = [sample.role, sample.id, *sample.image_size, *vars(y).values(), *vars(x).values()]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
