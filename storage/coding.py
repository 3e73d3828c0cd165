"""From a target's values to the integer codes that are kept, and back.

A coder has a fixed ladder of *rungs*, tried in order: a sample is written with the first one that keeps the target's
bound. The choice rests on that sample alone and stands in its row, so nothing is fitted over a cache and writers need
not talk to each other. Codes
are found by comparing with tables that are made once on the host in float64, so from the same float32 values numpy and
torch give the same codes on every device: everything here is written once against the array API.

Shapes: values and codes S,C,h,w (S samples, or a batch); rungs S.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace, device

from segkd.storage.errors import CacheMismatchError, ConfigError

Array = Any
"""An array of any library with an array-API namespace: numpy or torch here."""


EXACT = 255
"""The rung of a sample that no rung serves: it is kept as float16 values, in an array of its own."""


class Coder(Protocol):
    """How the values of one target are written. A frozen dataclass; its fields stand in the cache's specification."""

    kind: ClassVar[str]

    @property
    def rungs(self) -> int:
        """Rungs of the ladder, in the order in which they are tried."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the codes are kept as."""
        ...

    def encode(self, values_SChw: Array, rung: int) -> Array:
        """Codes of float32 values on one rung."""
        ...

    def decode(self, codes_SChw: Array, rungs_S: Array) -> Array:
        """float32 values of codes, each sample on its own rung."""
        ...


@dataclass(frozen=True, kw_only=True)
class CompandedDistribution:
    """Class distributions as levels of the square root of the probability.

    The square root is uniform in the Fisher-Rao metric, so equal steps cost equal KL wherever the probability is not
    close to 0 (KL = 2 * sum((delta sqrt p)^2) to second order). Near 0 the value that a zero decodes to decides:
    ``floor`` of a level. The argmax of every cell is kept (ties: the lowest index).

    Values are log-probabilities; -inf is legal on the way in, decoded ones are finite and normalised.
    """

    kind: ClassVar[str] = "companded-distribution"

    levels: tuple[int, ...] = (255,)
    """Levels of each rung, ascending; at most 255."""
    floor: float = 0.3
    """What a code of zero decodes to, in levels."""

    def __post_init__(self) -> None:
        if not self.levels or any(not 3 <= levels <= 255 for levels in self.levels):
            raise ConfigError(f"levels must be between 3 and 255, got {list(self.levels)}")
        if not 0 < self.floor < 1:
            raise ConfigError(f"floor must lie between 0 and 1 levels, got {self.floor}")

    @property
    def rungs(self) -> int:
        return len(self.levels)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    def encode(self, values_SChw: Array, rung: int) -> Array:
        xp = array_namespace(values_SChw)
        levels = self.levels[rung]
        # Comparing logarithms spares the exponential, whose last bit differs between devices.
        thresholds = 2 * np.log((np.arange(1, levels + 1) - 0.5) / levels)
        table = xp.asarray(thresholds.astype(np.float32), device=device(values_SChw))
        codes = xp.searchsorted(table, values_SChw, side="right")
        return xp.astype(_keep_argmax(xp, codes, xp.argmax(values_SChw, axis=1, keepdims=True)), xp.uint8)

    def decode(self, codes_SChw: Array, rungs_S: Array) -> Array:
        xp = array_namespace(codes_SChw)
        table = xp.asarray(self._decoded.ravel(), device=device(codes_SChw))
        index = xp.astype(codes_SChw, xp.int64) + 256 * xp.astype(rungs_S, xp.int64)[:, None, None, None]
        logits = xp.reshape(xp.take(table, xp.reshape(index, (-1,)), axis=0), codes_SChw.shape)
        highest = xp.max(logits, axis=1, keepdims=True)
        return logits - highest - xp.log(xp.sum(xp.exp(logits - highest), axis=1, keepdims=True))

    @property
    def _decoded(self) -> npt.NDArray[np.float32]:
        """Unnormalised log-probability of each code on each rung, ``(rungs, 256)``."""
        codes = np.maximum(np.arange(256), self.floor)
        return np.stack([2 * np.log(codes / levels) for levels in self.levels]).astype(np.float32)


def _keep_argmax(xp: Any, codes: Array, top: Array) -> Array:
    """Raises the top class's code to the least that leaves it the argmax, the lowest index winning ties.

    Two classes whose codes are at the highest level would have to share more than the whole probability, so the raised
    code never passes it.
    """
    classes = xp.arange(codes.shape[1], device=device(codes))[None, :, None, None]
    below = xp.max(xp.where(classes < top, codes, -1), axis=1, keepdims=True) + 1
    above = xp.max(xp.where(classes > top, codes, -1), axis=1, keepdims=True)
    return xp.where(classes == top, xp.maximum(codes, xp.maximum(below, above)), codes)


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

    def encode(self, values_SChw: Array, rung: int) -> Array:
        xp = array_namespace(values_SChw)
        return xp.astype(xp.clip(xp.round(values_SChw / self.step(rung)), 0, 255), xp.uint8)

    def decode(self, codes_SChw: Array, rungs_S: Array) -> Array:
        xp = array_namespace(codes_SChw)
        steps = xp.asarray(
            np.asarray([self.step(rung) for rung in range(self.rungs)], np.float32), device=device(codes_SChw)
        )
        chosen = xp.take(steps, xp.astype(rungs_S, xp.int64), axis=0)
        return xp.astype(codes_SChw, xp.float32) * chosen[:, None, None, None]


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

    def encode(self, values_SChw: Array, rung: int) -> Array:  # noqa: ARG002  # the protocol's
        return values_SChw

    def decode(self, codes_SChw: Array, rungs_S: Array) -> Array:  # noqa: ARG002  # the protocol's
        return codes_SChw


CODERS: dict[str, type[CompandedDistribution] | type[UniformSteps] | type[Raw]] = {
    coder.kind: coder for coder in (CompandedDistribution, UniformSteps, Raw)
}


def coder_to_dict(coder: Coder) -> dict[str, Any]:
    """The coder as JSON keeps it."""
    return {"kind": coder.kind, **asdict(coder)}  # type: ignore[call-overload]  # every coder is a dataclass


def coder_from_dict(table: dict[str, Any]) -> Coder:
    """The coder that a cache's specification names. Raises CacheMismatchError for one that this version lacks."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    kind = fields.pop("kind", None)
    if kind not in CODERS:
        raise CacheMismatchError(
            f"the cache is coded with {kind!r}; this version of segkd reads {sorted(CODERS)}; install a newer one"
        )
    return CODERS[kind](**fields)
