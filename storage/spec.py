"""What a cache holds: the one description that its root metadata carries, as JSON both ways.

Two caches with equal specifications and equal inputs are equal. Nothing here tells who wrote a cache, where or when.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from segkd.storage.coding import Coder, coder_from_dict, coder_to_dict
from segkd.storage.errors import CacheMismatchError

FORMAT = "0.1"
"""Version of the layout on disk. A 0.x cache is read by the release that wrote it and by no other."""


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """One map derived from the teacher."""

    name: str
    channels: int
    coder: Coder
    bound: float
    """The coding error that each sample keeps; in the unit of the target's first measure."""
    parameters: Mapping[str, float | str]
    """What the values depend on besides the teacher's output, such as the first-order map's features."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            "name": self.name,
            "channels": self.channels,
            "coder": coder_to_dict(self.coder),
            "bound": self.bound,
            "parameters": dict(self.parameters),
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> TargetSpec:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**table, "coder": coder_from_dict(dict(table["coder"]))})


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """The unit plan in numbers; the plan itself is a pure function of the sample list, whose digest stands here."""

    digest: str
    """SHA-256 of the sorted list of samples: role, id, image size, grid and mapping."""
    roles: Mapping[str, int]
    """Samples of each role."""
    units: int
    shards: int
    """Shards of each target's array, over all units."""
    unit_samples: int
    """Rows of a unit in the sample table; at most so many samples are lost with a worker."""
    shard_tiles: int
    """Tiles of a shard."""
    tile: int
    """Side of a tile in cells."""
    name_bytes: int
    """Room for a sample's id in the sample table."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {**vars(self), "roles": dict(self.roles)}


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Everything that determines a cache's content."""

    classes: tuple[str, ...]
    targets: Mapping[str, TargetSpec]
    plan: PlanSpec
    fingerprints: Mapping[str, str]
    """Digests of teacher (reference, arguments, weights), preprocessing, classes and coding."""
    teacher: Mapping[str, Any]
    """The teacher's description, for people; nothing is ever loaded from here."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            "format": FORMAT,
            "classes": list(self.classes),
            "targets": [target.to_dict() for target in self.targets.values()],
            "plan": self.plan.to_dict(),
            "fingerprints": dict(self.fingerprints),
            "teacher": dict(self.teacher),
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], where: str) -> CacheSpec:
        """The inverse of :meth:`to_dict`; ``where`` names the cache in messages. Raises CacheMismatchError."""
        found = table.get("format")
        if found != FORMAT:
            raise CacheMismatchError(
                f"{where} has cache format {found}, this version of segkd reads {FORMAT}; "
                "write it again with segkd teacher-cache, or use the version of segkd that wrote it"
            )
        targets = [TargetSpec.from_dict(target) for target in table["targets"]]
        return cls(
            classes=tuple(table["classes"]),
            targets={target.name: target for target in targets},
            plan=PlanSpec(**table["plan"]),
            fingerprints=table["fingerprints"],
            teacher=table["teacher"],
        )

    def row_dtype(self) -> np.dtype[Any]:
        """One row of the sample table, packed, little-endian; ``docs/format.md`` explains the fields."""
        fields: list[tuple[Any, ...]] = [
            ("id", f"S{self.plan.name_bytes}"),
            ("role", "S9"),
            ("height", "<i4"),
            ("width", "<i4"),
            ("grid_height", "<i4"),
            ("grid_width", "<i4"),
            ("scale_y", "<f8"),
            ("offset_y", "<f8"),
            ("scale_x", "<f8"),
            ("offset_x", "<f8"),
            ("first_tile", "<i8"),
            ("image_digest", "u1", (32,)),
        ]
        return np.dtype([*fields, *((f"rung_{name}", "u1") for name in self.targets)])


def require_equal(expected: CacheSpec, found: CacheSpec, where: str) -> None:
    """Raises CacheMismatchError that names what differs between a cache and what was asked for."""
    differing = [name for name, digest in expected.fingerprints.items() if found.fingerprints.get(name) != digest]
    if expected.classes != found.classes:
        counts = f"{len(found.classes)} in the cache, {len(expected.classes)} asked for"
        differing = [f"classes ({counts})", *(name for name in differing if name != "classes")]
    if expected.plan.digest != found.plan.digest:
        differing.append("list of samples")
    elif expected.plan != found.plan:
        differing.append("unit plan")
    if differing or json.dumps(expected.to_dict(), sort_keys=True) != json.dumps(found.to_dict(), sort_keys=True):
        raise CacheMismatchError(
            f"{where} was written with another {', '.join(dict.fromkeys(differing)) or 'description'}; "
            "give this run another cache path, or remove the old cache"
        )
