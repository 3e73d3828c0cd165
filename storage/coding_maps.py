"""Maps of non-negative numbers in equal steps, and any values as they are.

Shapes: values and codes S,C,h,w (S samples, or a batch); rungs S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace, device

from segkd.storage.coding_exact import Array


@dataclass(frozen=True, kw_only=True)
class UniformSteps:
    """Values of at least 0 in 255 equal steps up to the rung's reach; what lies beyond is clipped to it.

    The absolute error is at most half a step where nothing is clipped.
    """

    kind: ClassVar[str] = "uniform-steps"

    reach: tuple[float, ...]
    """The largest value of each rung, ascending."""

    @property
    def rungs(self) -> int:
        return len(self.reach)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    def step(self, rung: int) -> float:
        """The distance of two neighbouring values on a rung."""
        return float(np.float32(self.reach[rung] / 255))

    def encode(self, values_SChw: Array, rungs_S: Array) -> Array:
        xp = array_namespace(values_SChw)
        return xp.astype(xp.clip(xp.round(values_SChw / self._steps(xp, rungs_S, values_SChw)), 0, 255), xp.uint8)

    def decode(self, codes_SChw: Array, rungs_S: Array) -> Array:
        xp = array_namespace(codes_SChw)
        return xp.astype(codes_SChw, xp.float32) * self._steps(xp, rungs_S, codes_SChw)

    def _steps(self, xp: Any, rungs_S: Array, like: Array) -> Array:
        """Each sample's step, S,1,1,1."""
        steps = np.asarray([self.step(rung) for rung in range(self.rungs)], np.float32)
        chosen = xp.take(xp.asarray(steps, device=device(like)), xp.astype(rungs_S, xp.int64), axis=0)
        return chosen[:, None, None, None]


SOFTMAX_REACH = math.sqrt(2.0)
"""The largest distance of two distributions."""


@dataclass(frozen=True, kw_only=True)
class Raw:
    """float32 values as they are."""

    kind: ClassVar[str] = "raw"

    @property
    def rungs(self) -> int:
        return 1

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def encode(self, values_SChw: Array, rungs_S: Array) -> Array:  # noqa: ARG002  # the protocol's
        return values_SChw

    def decode(self, codes_SChw: Array, rungs_S: Array) -> Array:  # noqa: ARG002  # the protocol's
        return codes_SChw
