"""Which unit owns which samples, tiles, rows and shards: a pure function of the sample list and a few numbers.

Every task that plans from the same list arrives at the same plan, so tasks need no coordinator. A sample's grid is cut
into square tiles, numbered row by row; the tiles of all samples stand in one array per target. A unit owns whole
shards of every array and one chunk of the sample table. A unit's samples have one role.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from segkd.storage.errors import CacheError
from segkd.storage.geometry import Mapping
from segkd.storage.spec import PlanSpec


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


def plan_units(samples: Sequence[PlannedSample], *, unit_samples: int, tile: int) -> Plan:
    """The plan for a list of samples; their order does not matter. Raises CacheError for an empty or ambiguous list."""
    ordered = tuple(sorted(samples, key=lambda sample: (sample.role, sample.id)))
    if not ordered:
        raise CacheError("there is no sample to cache; check the roles and the lists of the data")
    names = [sample.id for sample in ordered]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CacheError(f"two samples have the id {twice!r}; ids must be unique in a cache")
    # A unit of typical samples fills one shard; one of larger samples holds fewer of them, or takes several shards.
    typical = statistics.median_high(sample.tiles(tile) for sample in ordered)
    shard_tiles = min(unit_samples, len(ordered)) * typical
    units: list[Unit] = []
    first_sample = first_shard = 0
    for role, sizes in _runs(ordered, unit_samples=unit_samples, shard_tiles=shard_tiles, tile=tile):
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
    roles = {role: sum(sample.role == role for sample in ordered) for role in sorted({s.role for s in ordered})}
    spec = PlanSpec(
        digest=_digest(ordered),
        roles=roles,
        units=len(units),
        shards=first_shard,
        unit_samples=unit_samples,
        shard_tiles=shard_tiles,
        name_bytes=max(len(name.encode()) for name in names),
    )
    return Plan(samples=ordered, units=tuple(units), spec=spec)


def _runs(
    samples: Sequence[PlannedSample], *, unit_samples: int, shard_tiles: int, tile: int
) -> Iterator[tuple[str, list[int]]]:
    """Role and tile counts of each unit's samples, in order."""
    run: list[int] = []
    role = samples[0].role
    for sample in samples:
        size = sample.tiles(tile)
        full = len(run) == unit_samples or sum(run) + size > shard_tiles
        if run and (full or sample.role != role):
            yield role, run
            run = []
        role = sample.role
        run.append(size)
    yield role, run


def _digest(samples: Sequence[PlannedSample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        y, x = sample.mapping.y, sample.mapping.x
        row = [sample.role, sample.id, *sample.image_size, *vars(y).values(), *vars(x).values()]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
