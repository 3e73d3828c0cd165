"""What a cache holds: the descriptions that its metadata carry, as JSON both ways.

Two caches with equal specifications and equal inputs are equal. Nothing here tells who wrote a cache, where or when.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from segkd.storage.coding import Coder, ExactDistribution, PredictedDistribution, coder_from_dict, coder_to_dict
from segkd.storage.differences import differing
from segkd.storage.errors import AFTER_DAMAGE, CacheMismatchError, ConfigError
from segkd.storage.fields import MANY, Fields

FORMAT = "1.0"
"""Version of the layout on disk. Every 1.x reads every 1.y: a minor version only adds what others may ignore."""
SIDE = 65_535
"""No tile has more channels or cells on a side, no shard more tiles and no id more bytes."""
UNSEEN = ("weights", "code")
"""The fingerprints of what no description tells."""
TOLD = 5
"""Differences that a message names one by one."""


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """One map derived from the teacher."""

    name: str
    channels: int
    coder: Coder
    bound: float
    """What each of the ``bounded`` measures of a sample may be at most."""
    measures: tuple[str, ...]
    """What is measured of each sample, one column of the sample table each; the first is the one the bound is about."""
    bounded: tuple[str, ...]
    """The measures that the bound covers."""
    parameters: Mapping[str, Any]
    """What the values depend on besides the teacher's output, such as the first-order map's features."""
    fallback: bool = False
    """Whether samples that no rung serves are kept in float16, in an array ``<name>_exact`` of their own."""
    codec: str = "zstd"
    """How a tile's codes become bytes: ``zstd``, ``residuals`` for values of
    :class:`~segkd.storage.coding.PredictedDistribution`, or ``context`` for codes of one byte each.
    """

    def __post_init__(self) -> None:
        if self.codec == "context" and self.coder.dtype != np.uint8:
            raise ConfigError(
                f"{self.name} is kept in {self.coder.dtype}, and the codec 'context' takes uint8 alone; choose 'zstd'"
            )
        foretold = isinstance(self.coder, PredictedDistribution)
        if self.codec in ("zstd", "residuals") and (self.codec == "residuals") != foretold:
            raise ConfigError(
                f"{self.name} is kept by {self.coder.kind} with the codec {self.codec!r}, but 'residuals' goes with "
                f"{PredictedDistribution.kind} and with nothing else; choose these two together"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            **vars(self),
            "coder": coder_to_dict(self.coder),
            "measures": list(self.measures),
            "bounded": list(self.bounded),
            "parameters": dict(self.parameters),
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> TargetSpec:
        """The inverse of :meth:`to_dict`; keys that a newer minor version has added are left aside.

        Raises CacheDamagedError for what no cache says.
        """
        coder = fields.table("coder")
        try:
            kept = coder_from_dict(coder)
        except (ValueError, TypeError, OverflowError) as error:
            if isinstance(error, CacheMismatchError):
                raise
            raise fields.wrong("coder", coder, f"a coder: {error}") from error
        measures, bounded = fields.strings("measures"), fields.strings("bounded")
        if not {*bounded} <= {*measures}:
            raise fields.wrong("bounded", list(bounded), f"some of the measures {', '.join(measures)}")
        try:
            return cls(
                name=fields.name("name"),
                channels=fields.whole("channels", 1, SIDE),
                coder=kept,
                bound=fields.number("bound"),
                measures=measures,
                bounded=bounded,
                parameters=fields.table("parameters"),
                fallback=fields.flag("fallback"),
                codec=fields.text("codec"),
            )
        except ConfigError as error:
            raise fields.wrong("codec", fields.text("codec"), f"one that goes with the coder: {error}") from error


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """A generation's unit plan in numbers; the plan itself is a pure function of the sample list with this digest."""

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
    name_bytes: int
    """Room for a sample's id in the sample table."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {**vars(self), "roles": dict(self.roles)}

    @classmethod
    def from_fields(cls, fields: Fields) -> PlanSpec:
        """The inverse of :meth:`to_dict`; keys that a newer minor version has added are left aside.

        Raises CacheDamagedError for what no plan says: a unit has a shard at least, and 1 to ``unit_samples`` samples.
        """
        roles = fields.wholes("roles", 0, MANY)
        shards = fields.whole("shards", 0, MANY)
        samples, unit_samples = sum(roles.values()), fields.whole("unit_samples", 1, MANY)
        return cls(
            digest=fields.text("digest"),
            roles=roles,
            units=fields.whole("units", -(-samples // unit_samples), min(samples, shards)),
            shards=shards,
            unit_samples=unit_samples,
            shard_tiles=fields.whole("shard_tiles", 1, SIDE),
            name_bytes=fields.whole("name_bytes", 1, SIDE),
        )


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Everything that determines what a cache keeps of a sample, whatever the samples are."""

    classes: tuple[str, ...]
    targets: Mapping[str, TargetSpec]
    tile: int
    """Side of a tile in cells."""
    fingerprints: Mapping[str, str]
    """Digests of the teacher's description, its weights, its code, its preprocessing, of classes and coding."""
    teacher: Mapping[str, Any]
    """The teacher's description and numerical precision, to tell what differs; nothing is ever loaded from here."""

    def __post_init__(self) -> None:
        for target in self.targets.values():
            if isinstance(target.coder, PredictedDistribution) and target.coder.side != self.tile:
                raise ConfigError(
                    f"{target.name} is foretold within {target.coder.side} cells and kept in tiles of {self.tile}; "
                    "give its coder the side of the tiles"
                )

    @property
    def cell_bytes(self) -> int:
        """Bytes of a cell's codes, over all targets."""
        return sum(target.channels * target.coder.dtype.itemsize for target in self.targets.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            "format": FORMAT,
            "classes": list(self.classes),
            "targets": [target.to_dict() for target in self.targets.values()],
            "tile": self.tile,
            "fingerprints": dict(self.fingerprints),
            "teacher": dict(self.teacher),
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], where: str) -> CacheSpec:
        """The inverse of :meth:`to_dict`; ``where`` names the cache in messages.

        Raises CacheMismatchError for a 0.x cache and for one of a newer major version, a newer minor version being
        read, and CacheDamagedError for what no cache says.
        """
        fields = Fields(table, f"{where}/zarr.json")
        _require_readable(table.get("format"), where)
        targets = [TargetSpec.from_fields(target) for target in fields.each("targets")]
        names = [target.name for target in targets]
        if not names or len({*names}) < len(names):
            raise fields.wrong("targets", names, "one at least, each of another name")
        try:
            return cls(
                classes=fields.strings("classes"),
                targets={target.name: target for target in targets},
                tile=fields.whole("tile", 1, SIDE),
                fingerprints=fields.texts("fingerprints"),
                teacher=fields.table("teacher"),
            )
        except ConfigError as error:
            raise fields.wrong("tile", table.get("tile"), f"that of the coder: {error}") from error


def require_equal(expected: CacheSpec, found: CacheSpec, where: str) -> None:
    """Raises CacheMismatchError that names what differs between a cache and what was asked for, with both values."""
    # A coder's numbers and the measures follow from the rest, unless another version chose them.
    differences = differing(_stated(found, expected), _stated(expected, found)) or differing(
        _document(found), _document(expected)
    )
    digests = [name for name, digest in expected.fingerprints.items() if found.fingerprints.get(name) != digest]
    # The other digests are of what stands in the specification.
    unseen = [name for name in digests if name in UNSEEN] or (digests if not differences else [])
    reference = str(expected.teacher.get("reference", "the teacher"))
    told = {"code": f"the code of {reference.rpartition(':')[0] or reference}", "weights": "the teacher's weights"}
    differences += [told.get(name, f"the {name}") for name in unseen]
    if differences:
        more = f" and {len(differences) - TOLD} more" if len(differences) > TOLD else ""
        raise CacheMismatchError(
            f"{where} differs from this run in {', '.join(differences[:TOLD])}{more}; "
            "give this run another cache.path, or remove the old cache"
        )


def _document(spec: CacheSpec) -> dict[str, Any]:
    """The specification without digests, with a table for each target."""
    document: dict[str, Any] = json.loads(json.dumps(spec.to_dict()))
    del document["fingerprints"]
    targets = {target.pop("name"): target for target in document.pop("targets")}
    return {**document, "targets": list(targets), **targets}


def _stated(spec: CacheSpec, other: CacheSpec) -> dict[str, Any]:
    """What somebody has asked for, of the targets that both have; coders follow from it."""
    document = _document(spec)
    for name in spec.targets:
        target = document.pop(name)
        if name in other.targets:
            stated = ("bound", "parameters", "fallback", "channels")
            document[name] = {key: target[key] for key in stated} | {"profile": _profile(spec.targets[name])}
    return document


def _profile(target: TargetSpec) -> str:
    """What somebody calls a coder and a codec."""
    if isinstance(target.coder, ExactDistribution):
        return "exact"
    return "dense" if target.codec == "context" else "plain"


def _require_readable(found: object, where: str) -> None:
    if not isinstance(found, str) or re.fullmatch(r"[0-9]+\.[0-9]+", found) is None:
        raise CacheMismatchError(
            f"{where} says {found!r} where the format of a cache should stand, such as {FORMAT!r}: it is no cache of a "
            f"format that segkd knows, or damaged; {AFTER_DAMAGE}"
        )
    if found.startswith("0."):
        raise CacheMismatchError(
            f"{where} has cache format {found}, which was not promised to last; this version of segkd reads "
            f"{FORMAT}: remove it and write it again with segkd teacher-cache"
        )
    if found.split(".")[0] != FORMAT.split(".")[0]:
        raise CacheMismatchError(
            f"{where} has cache format {found}, this version of segkd reads {FORMAT}; "
            "install a newer one: pip install --upgrade segkd"
        )
