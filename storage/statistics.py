"""Statistics that add exactly, so that a cache's coding report does not depend on who wrote what, or in which order.

Each sample contributes one number a measure (its mean KL, its largest error). Numbers are kept as integers in units
of ``UNIT``; sums, maxima and histograms of integers are the same in any order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from segkd.storage.spec import CacheSpec

UNIT = 1e-12
"""Fixed-point unit of the sums and maxima."""
BINS = 64
"""Histogram bins: bin ``k`` counts numbers in ``[2^(k-48), 2^(k-47))``; the first also anything less."""


@dataclass
class Measure:
    """One measure over samples."""

    samples: int = 0
    total: int = 0
    maximum: int = 0
    histogram: dict[int, int] = field(default_factory=dict)

    def add(self, value: float) -> None:
        """Counts one sample's number, which must be finite and at least 0."""
        if not math.isfinite(value):
            raise ValueError(f"a coding measure must be finite, got {value}")
        fixed = round(max(value, 0.0) / UNIT)
        self.samples += 1
        self.total += fixed
        self.maximum = max(self.maximum, fixed)
        exponent = math.frexp(value)[1] + 47 if value > 0 else 0
        bin_ = min(max(exponent, 0), BINS - 1)
        self.histogram[bin_] = self.histogram.get(bin_, 0) + 1

    def merge(self, other: Measure) -> None:
        """Counts all that another has counted."""
        self.samples += other.samples
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)
        for bin_, count in other.histogram.items():
            self.histogram[bin_] = self.histogram.get(bin_, 0) + count

    @property
    def mean(self) -> float:
        """Mean over the samples; 0 without any."""
        return self.total * UNIT / self.samples if self.samples else 0.0

    @property
    def largest(self) -> float:
        """The largest number of any sample; 0 without any."""
        return self.maximum * UNIT

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        histogram = {str(bin_): count for bin_, count in sorted(self.histogram.items())}
        return {"samples": self.samples, "total": self.total, "maximum": self.maximum, "histogram": histogram}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Measure:
        """The inverse of :meth:`to_dict`."""
        histogram = {int(bin_): int(count) for bin_, count in table["histogram"].items()}
        return cls(int(table["samples"]), int(table["total"]), int(table["maximum"]), histogram)


@dataclass
class Statistics:
    """The coding report in the making: per target its measures, and how often each rung was chosen."""

    measures: dict[str, dict[str, Measure]] = field(default_factory=dict)
    rungs: dict[str, dict[int, int]] = field(default_factory=dict)
    over_bound: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: npt.NDArray[Any], spec: CacheSpec) -> Statistics:
        """The statistics of rows of the sample table; nothing else decides them, so they can be made again."""
        statistics = cls()
        for target in spec.targets.values():
            bound = np.float32(target.bound)  # as the rows are: rounding keeps what is within it within it
            for row in rows:
                values = {measure: row[f"{target.name}_{measure}"] for measure in target.measures}
                statistics.add(
                    target.name,
                    int(row[f"rung_{target.name}"]),
                    {measure: float(value) for measure, value in values.items()},
                    within_bound=all(values[measure] <= bound for measure in target.bounded),
                )
        return statistics

    def add(self, target: str, rung: int, values: Mapping[str, float], *, within_bound: bool) -> None:
        """Counts one sample of one target."""
        for name, value in values.items():
            self.measures.setdefault(target, {}).setdefault(name, Measure()).add(value)
        counts = self.rungs.setdefault(target, {})
        counts[rung] = counts.get(rung, 0) + 1
        self.over_bound[target] = self.over_bound.get(target, 0) + (not within_bound)

    def merge(self, other: Statistics) -> None:
        """Counts all that another has counted."""
        for target, measures in other.measures.items():
            for name, measure in measures.items():
                self.measures.setdefault(target, {}).setdefault(name, Measure()).merge(measure)
        for target, rungs in other.rungs.items():
            counts = self.rungs.setdefault(target, {})
            for rung, count in rungs.items():
                counts[rung] = counts.get(rung, 0) + count
        for target, count in other.over_bound.items():
            self.over_bound[target] = self.over_bound.get(target, 0) + count

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            target: {
                "measures": {name: measure.to_dict() for name, measure in sorted(measures.items())},
                "rungs": {str(rung): count for rung, count in sorted(self.rungs[target].items())},
                "over_bound": self.over_bound[target],
            }
            for target, measures in sorted(self.measures.items())
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Statistics:
        """The inverse of :meth:`to_dict`."""
        statistics = cls()
        for target, kept in table.items():
            statistics.measures[target] = {n: Measure.from_dict(m) for n, m in kept["measures"].items()}
            statistics.rungs[target] = {int(rung): int(count) for rung, count in kept["rungs"].items()}
            statistics.over_bound[target] = int(kept["over_bound"])
        return statistics


def unit_content(rows: npt.NDArray[Any], spec: CacheSpec) -> dict[str, Any]:
    """What a unit's commit record says of its samples, whose rows alone decide it."""
    return {
        "role": rows["role"][0].decode(),
        "samples": len(rows),
        "pixels": sum(int(row["height"]) * int(row["width"]) for row in rows),
        "cells": sum(int(row["grid_height"]) * int(row["grid_width"]) for row in rows),
        "statistics": Statistics.of(rows, spec).to_dict(),
    }
