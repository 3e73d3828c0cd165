"""The rows of a cache's tables: one a sample in the sample table, one a unit in the directory.

Rows are packed and little-endian, so that any program reads them without knowing of numpy; ``docs/format.md`` explains
the fields. Within a generation the samples are sorted by role and id, so a sample is found by searching the directory
and then one unit's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from segkd.storage.geometry import Axis
from segkd.storage.geometry import Mapping as GridMapping
from segkd.storage.layout import Plan, PlannedSample
from segkd.storage.spec import CacheSpec, PlanSpec

ROLE_BYTES = 9
"""Room for a role: ``auxiliary`` is the longest."""
DIGEST_BYTES = 16
"""What is kept of an image's SHA-256. It is for noticing that an image has changed, which 128 bits do as surely as 256:
to choose another image of the same digest is as far out of reach. Digests do not compress, so this is a fifth of a row.
"""


@dataclass(frozen=True, kw_only=True)
class CodedSample:
    """What a unit's owner hands over for one sample."""

    image_digest: bytes
    """The first ``DIGEST_BYTES`` of the SHA-256 of the image."""
    codes: Mapping[str, npt.NDArray[Any]]
    """Per target its codes, channels,h,w; float16 log-probabilities on the rung EXACT."""
    rungs: Mapping[str, int]
    measures: Mapping[str, Mapping[str, float]]
    """Per target what was measured; at least the measures that its specification names."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One sample of a cache."""

    id: str
    role: str
    generation: int
    row: int
    """Its row in the generation's sample table."""
    unit: int
    image_size: tuple[int, int]
    mapping: GridMapping
    """Its cells in the pixels of the EXIF-upright image; all their centres lie in the image."""
    first_tile: int
    image_digest: bytes
    rungs: dict[str, int]
    measures: dict[str, float]
    """What coding has cost, by ``<target>.<measure>``."""


def row_dtype(spec: CacheSpec, plan: PlanSpec) -> np.dtype[Any]:
    """One row of the sample table."""
    fields: list[tuple[Any, ...]] = [
        ("id", f"S{plan.name_bytes}"),
        ("role", f"S{ROLE_BYTES}"),
        ("state", "u1"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("grid_height", "<i4"),
        ("grid_width", "<i4"),
        ("scale_y", "<f8"),
        ("offset_y", "<f8"),
        ("scale_x", "<f8"),
        ("offset_x", "<f8"),
        ("first_tile", "<i8"),
        ("image_digest", "u1", (DIGEST_BYTES,)),
    ]
    for target in spec.targets.values():
        fields.append((f"rung_{target.name}", "u1"))
        fields.extend((f"{target.name}_{measure}", "<f4") for measure in target.measures)
    return np.dtype(fields)


def directory_dtype(plan: PlanSpec) -> np.dtype[Any]:
    """One row of the directory of units."""
    return np.dtype(
        [("role", f"S{ROLE_BYTES}"), ("first_id", f"S{plan.name_bytes}"), ("samples", "<i4"), ("first_tile", "<i8")]
    )


def directory_of(plan: Plan) -> npt.NDArray[Any]:
    """The directory of a plan's units: a pure function of the plan."""
    rows = np.zeros(len(plan.units), directory_dtype(plan.spec))
    for row, unit in zip(rows, plan.units, strict=True):
        row["role"], row["first_id"] = unit.role.encode(), plan.samples[unit.first_sample].id.encode()
        row["samples"], row["first_tile"] = unit.samples, unit.first_tiles[0]
    return rows


def fill_row(row: np.void, spec: CacheSpec, sample: PlannedSample, coded: CodedSample, first_tile: int) -> None:
    """Writes one sample into its row."""
    mapping = sample.mapping
    row["id"], row["role"], row["state"] = sample.id.encode(), sample.role.encode(), 1
    row["height"], row["width"] = sample.image_size
    row["grid_height"], row["grid_width"] = mapping.shape
    row["scale_y"], row["offset_y"] = mapping.y.scale, mapping.y.offset
    row["scale_x"], row["offset_x"] = mapping.x.scale, mapping.x.offset
    row["first_tile"] = first_tile
    row["image_digest"] = np.frombuffer(coded.image_digest, np.uint8)
    for target in spec.targets.values():
        row[f"rung_{target.name}"] = coded.rungs[target.name]
        for measure in target.measures:
            row[f"{target.name}_{measure}"] = coded.measures[target.name][measure]


def entry_of(row: np.void, spec: CacheSpec, *, generation: int, unit: int, number: int) -> Entry:
    """The sample that stands in row ``number`` of a generation's table."""
    return Entry(
        id=row["id"].decode(),
        role=row["role"].decode(),
        generation=generation,
        row=number,
        unit=unit,
        image_size=(int(row["height"]), int(row["width"])),
        mapping=GridMapping(
            Axis(float(row["scale_y"]), float(row["offset_y"]), int(row["grid_height"])),
            Axis(float(row["scale_x"]), float(row["offset_x"]), int(row["grid_width"])),
        ),
        first_tile=int(row["first_tile"]),
        image_digest=row["image_digest"].tobytes(),
        rungs={name: int(row[f"rung_{name}"]) for name in spec.targets},
        measures={
            f"{target.name}.{measure}": float(row[f"{target.name}_{measure}"])
            for target in spec.targets.values()
            for measure in target.measures
        },
    )


def as_bytes(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Rows as their bytes ``(rows, bytes)``, as a cache keeps them."""
    return rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize)


def packed_ids(ids: Sequence[str]) -> npt.NDArray[np.bytes_]:
    """Ids as rows of a table of ids, sorted."""
    return np.array(sorted(name.encode() for name in ids))
