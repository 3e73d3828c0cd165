"""From a target's values to the integer codes that are kept, and back.

A coder has a fixed ladder of *rungs*, and a sample is written on one that keeps the target's bound. The choice rests on
that sample alone and stands in its row, so nothing is fitted over a cache and writers need not talk to each other.
Codes are found by comparing with tables that are made once on the host in float64, so from the same float32 values
numpy and torch give the same codes on every device: everything here is written once against the array API.

Shapes: values and codes S,C,h,w (S samples, or a batch); rungs S.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any, ClassVar, Protocol

import numpy as np

from segkd.storage.coding_distribution import TOP, CompandedDistribution
from segkd.storage.coding_exact import EXACT, Array, ExactDistribution, from_float16, to_float16
from segkd.storage.coding_maps import SOFTMAX_REACH, Raw, UniformSteps
from segkd.storage.coding_predicted import PredictedDistribution
from segkd.storage.errors import CacheMismatchError

__all__ = [
    "CODERS",
    "EXACT",
    "SOFTMAX_REACH",
    "TOP",
    "Array",
    "Coder",
    "CompandedDistribution",
    "ExactDistribution",
    "PredictedDistribution",
    "Raw",
    "UniformSteps",
    "coder_from_dict",
    "coder_to_dict",
    "from_float16",
    "to_float16",
]


class Coder(Protocol):
    """How the values of one target are written. A frozen dataclass; its fields stand in the cache's specification."""

    kind: ClassVar[str]

    @property
    def rungs(self) -> int:
        """Rungs of the ladder; the number of each stands in the rows of its samples."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the codes are kept as."""
        ...

    def encode(self, values_SChw: Array, rungs_S: Array) -> Array:
        """Codes of float32 values, each sample on its own rung."""
        ...

    def decode(self, codes_SChw: Array, rungs_S: Array) -> Array:
        """float32 values of codes, each sample on its own rung."""
        ...


CODERS: dict[str, Any] = {
    coder.kind: coder for coder in (CompandedDistribution, PredictedDistribution, ExactDistribution, UniformSteps, Raw)
}


def coder_to_dict(coder: Coder) -> dict[str, Any]:
    """The coder as JSON keeps it."""
    return {"kind": coder.kind, **asdict(coder)}  # type: ignore[call-overload]  # every coder is a dataclass


def coder_from_dict(table: dict[str, Any]) -> Coder:
    """The coder that a cache's specification names; keys that a newer minor version has added are left aside.

    Raises CacheMismatchError for one that this version lacks, ValueError for parameters that no coder has.
    """
    kind = table.get("kind")
    if kind not in [*CODERS]:  # a list, because whatever stands there need not have a hash
        raise CacheMismatchError(
            f"the cache is coded with {kind!r}; this version of segkd reads {sorted(CODERS)}; install a newer one"
        )
    given: dict[str, Any] = {}
    for field in fields(CODERS[kind]):
        value: Any = table.get(field.name)
        several = str(field.type).startswith("tuple")
        if isinstance(value, list) is not several or not all(map(_is_parameter, value if several else [value])):
            raise ValueError(f"{field.name} must be {'numbers' if several else 'a number'} above 0")
        given[field.name] = tuple(value) if several else value
    coder: Coder = CODERS[kind](**given)
    return coder


def _is_parameter(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
