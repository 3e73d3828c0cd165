"""Log-probabilities in float16: for samples that no rung serves, and for caches that are to keep everything.

Shapes: values S,C,h,w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace, device

from segkd.storage.errors import NonFiniteError

Array = Any
"""An array of any library with an array-API namespace: numpy or torch here."""

EXACT = 255
"""The rung of a sample that no rung serves: it is kept as float16 values, in an array of its own."""

LOWEST = -65504.0
"""What -inf is kept as: float16's least number, which no sum of probabilities tells from -inf."""
_APART = 2.0**-19
"""What the argmax is ahead of lower classes by: decoding takes at most log C = 11.1 off, and this is twice what float32
resolves there."""


def to_float16(values_SChw: Array) -> Array:
    """float16 values, ``log p - max log p``: 0 for the argmax of each cell, which stays the argmax once decoded.

    Each is off by at most 2^-11 of itself, so the distribution by next to nothing wherever it is of any size. Raises
    NonFiniteError for NaN and +inf.
    """
    xp = array_namespace(values_SChw)
    require_log_probabilities(values_SChw)
    highest = xp.max(values_SChw, axis=1, keepdims=True)
    # A cell without any class that is possible has no distribution; -inf - -inf would be NaN.
    below = xp.clip(values_SChw - xp.where(highest == -xp.inf, 0, highest), min=LOWEST)
    classes = xp.arange(below.shape[1], device=device(below))[None, :, None, None]
    lower = classes < xp.argmax(values_SChw, axis=1, keepdims=True)
    return xp.astype(xp.where(lower, xp.clip(below, max=-_APART), below), xp.float16)


def from_float16(values_SChw: Array) -> Array:
    """float32 log-probabilities of :func:`to_float16`'s values, finite and normalised."""
    xp = array_namespace(values_SChw)
    values = xp.astype(values_SChw, xp.float32)
    values = values - xp.max(values, axis=1, keepdims=True)
    return values - xp.log(xp.sum(xp.exp(values), axis=1, keepdims=True))


def looked_up(table: Array, index: Array) -> Array:
    """Rows of a table by their numbers in it, or single values by an index of any shape; no index may be outside.

    The array API's ``take`` first replaces negative indexes for torch, which takes twice as long as the rest.
    """
    if hasattr(table, "index_select"):
        rows = table.index_select(0, index.reshape(-1))
        return rows if table.ndim > 1 else rows.reshape(index.shape)
    return table.take(index, axis=0, mode="clip")  # the quickest way, as there is nothing to clip


def require_log_probabilities(values_SChw: Array) -> None:
    """Raises NonFiniteError for NaN and +inf; -inf is the logarithm of a probability of 0."""
    xp = array_namespace(values_SChw)
    if not bool(xp.all(values_SChw < xp.inf)):
        raise NonFiniteError(
            "log-probabilities with NaN or +inf cannot be coded; look at the teacher's weights and its preprocessing"
        )


@dataclass(frozen=True, kw_only=True)
class ExactDistribution:
    """Every sample in float16: the profile ``exact``."""

    kind: ClassVar[str] = "float16-distribution"

    @property
    def rungs(self) -> int:
        return 1

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float16)

    def encode(self, values_SChw: Array, rungs_S: Array) -> Array:  # noqa: ARG002  # the protocol's
        return to_float16(values_SChw)

    def decode(self, codes_SChw: Array, rungs_S: Array) -> Array:  # noqa: ARG002  # the protocol's
        return from_float16(codes_SChw)
