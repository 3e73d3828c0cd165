"""Class distributions as levels of a power of the probability: what the profiles ``plain`` and ``dense`` keep.

Shapes: values and codes S,C,h,w (S samples, or a batch); rungs S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace, device

from segkd.storage.coding_exact import Array, from_float16, looked_up, require_log_probabilities
from segkd.storage.errors import ConfigError

TOP = 255
"""The code of a cell's argmax, whose probability is what the others leave."""
FLOORS = (0.44, 0.259, 0.152, 0.09, 0.053)
"""What a code of 0 may decode to, in levels: each 1.7 times the next, which costs about 1 % of the KL at most."""
RUNGS_OF_A_LADDER = 250
"""Levels times floors, without the finest level: a row has one byte for the rung."""
MOST_COUNTED = 8
"""Up to so many codes that are not 0 raise what the zeros of a cell decode to: more say no more about the others."""
_TIMES = np.zeros((1 + MOST_COUNTED, 256), np.float32)
"""What is added to the logarithm that each code stands for, where a 0 holds so many times its floor; see below."""
_TIMES[1:, 0] = np.log(np.arange(1, MOST_COUNTED + 1))
_KNOWN = np.zeros(256, np.float32)
"""What is added to have the logarithms of those codes alone that have a probability of their own."""
_KNOWN[[0, TOP]] = -np.inf
AHEAD = 1.001
"""How many times the next probability the argmax has at least, where the others leave less than that."""


@dataclass(frozen=True, kw_only=True)
class CompandedDistribution:
    """Class distributions as levels of ``p ** exponent``; the argmax is marked, and its probability not kept.

    With the exponent 1/2 equal steps cost equal KL wherever the probability is not close to 0, the square root being
    uniform in the Fisher-Rao metric (KL = 2 * sum((delta sqrt p)^2) to second order). At temperature T that metric is
    the one of ``p ** (1 / T)``, so an exponent of 1 / (2 T) is uniform there.

    A class other than the argmax has the code 0 below ``first`` levels, and also below ``alone`` levels where the cells
    left and right of it have 0 as well; then 1 up to 1.5 levels, 2 up to 2.5 and so on. A code decodes to its number of
    levels; a 0 to the probability of the rung's floor times the number of codes in its cell that are not 0, at most 8:
    the more classes a cell hesitates between, the more is left for the others. The argmax has what they all leave of 1.

    Values are log-probabilities; -inf is legal on the way in, decoded ones are finite and normalised. float16 codes are
    those of :mod:`segkd.storage.coding_exact`, on whatever rung.
    """

    kind: ClassVar[str] = "companded-distribution"

    exponent: float = 0.5
    levels: tuple[float, ...] = (255.0,)
    """Levels between the probabilities 0 and 1, ascending."""
    floors: tuple[float, ...] = FLOORS
    """What a code of 0 may decode to, in levels. Rung ``len(floors) * i + j`` has levels i and floor j."""
    first: float = 0.62
    """Levels from which on a code is not 0."""
    alone: float = 1.0
    """The same between two cells whose codes are 0: a lone code costs bytes that are better spent on more levels."""

    def __post_init__(self) -> None:
        if not self.levels or any(not 1 < levels < 1e6 for levels in self.levels):
            raise ConfigError(f"levels must be between 1 and 1e6, got {list(self.levels)}")
        if not self.floors or any(not 0 < floor < 1 for floor in self.floors):
            raise ConfigError(f"floors must lie between 0 and 1 levels, got {list(self.floors)}")
        if self.rungs > TOP:
            raise ConfigError(f"levels and floors make {self.rungs} rungs; a ladder has at most {TOP}")

    @classmethod
    def for_bound(cls, max_kl: float, classes: int, temperatures: Sequence[float] = (1.0,)) -> CompandedDistribution:
        """The coder whose ladder serves a bound on the KL, from nearly sure teachers to those that know nothing."""
        hottest = max(temperatures)
        exponent = 1 / (2 * hottest) if len(temperatures) == 1 else 1 / (3 * hottest)
        # To second order KL = sum((delta u)^2) / (2 (exponent T)^2) over the classes, where u = p ** (1 / (2 T)).
        scale = 1 / (exponent * hottest * math.sqrt(max_kl))
        # A class other than the argmax has at most 1/2, so with more levels than these its codes would end at 254.
        finest = 254 / 0.5**exponent
        least = min(max(0.07 * scale, 1.2), finest / 2)
        most = min(max(0.6 * scale * math.sqrt(classes), 4 * least), finest)
        # Above T = 1 hardly a code is 0, so that the floor does not matter and levels may lie five times as close.
        floors = FLOORS if hottest <= 1 else FLOORS[1:2]
        count = RUNGS_OF_A_LADDER // len(floors)
        ratio = (most / least) ** (1 / (count - 1))
        levels = [least * ratio**k for k in range(count)]
        if finest > 1.01 * most:
            levels.append(finest)  # for maps as rough as noise, of which pixels may cost several times what cells do
        return cls(exponent=exponent, levels=tuple(float(f"{level:.4g}") for level in levels), floors=floors)

    @property
    def rungs(self) -> int:
        return len(self.levels) * len(self.floors)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    def encode(self, values_SChw: Array, rungs_S: Array) -> Array:
        """Codes on each sample's rung. Raises NonFiniteError for NaN and +inf."""
        xp = array_namespace(values_SChw)
        require_log_probabilities(values_SChw)
        place = device(values_SChw)
        shifts = xp.take(xp.asarray(self._shifts, device=place), xp.astype(rungs_S, xp.int64), axis=0)
        # Comparing logarithms spares the power, whose last bit differs between devices.
        scaled = values_SChw + shifts[:, None, None, None]
        codes = xp.searchsorted(xp.asarray(self._thresholds, device=place), scaled, side="right")
        classes = xp.arange(codes.shape[1], device=place)[None, :, None, None]
        top = classes == xp.argmax(values_SChw, axis=1, keepdims=True)
        codes = xp.where(top, TOP, codes)
        small = (scaled < self._alone) & ~top & ~_beside(xp, codes != 0)
        return xp.astype(xp.where(small, 0, codes), xp.uint8)

    def decode(self, codes_SChw: Array, rungs_S: Array) -> Array:
        xp = array_namespace(codes_SChw)
        if xp.isdtype(codes_SChw.dtype, "real floating"):
            return from_float16(codes_SChw)
        place, (samples, classes) = device(codes_SChw), codes_SChw.shape[:2]
        logs = looked_up(xp.asarray(self._logs, device=place), xp.astype(rungs_S, xp.int64))
        known = xp.exp(logs + xp.asarray(_KNOWN, device=place))
        # How many times its floor each zero of a cell holds, by how many of the cell's codes are not 0.
        times = np.minimum(np.arange(classes + 1, dtype=np.int32), MOST_COUNTED)
        times[classes] = 0
        # Sums of bytes are much the cheapest, where they fit one.
        counted = xp.sum(
            xp.astype(codes_SChw, xp.bool), axis=1, keepdims=True, dtype=xp.uint8 if classes <= 255 else xp.int32
        )
        counted = xp.astype(counted, xp.int32)
        times = looked_up(xp.asarray(times, device=place), counted)
        floors = xp.exp(logs[:, :1])[:, :, None, None] * xp.astype(times, xp.float32)
        index, sample = xp.astype(codes_SChw, xp.int32), 0
        if samples > 1:
            sample = 256 * xp.arange(samples, dtype=xp.int32, device=place)[:, None, None, None]
            index += sample
        each = looked_up(xp.reshape(known, (-1,)), index)
        others = xp.sum(each, axis=1, keepdims=True) + floors * xp.astype(classes - counted, xp.float32)
        kept = xp.maximum(1 - others, AHEAD * xp.maximum(xp.max(each, axis=1, keepdims=True), floors))
        # Now each sample's table has a row for each of these numbers.
        logs = xp.reshape(logs[:, None, :] + xp.asarray(_TIMES, device=place), (-1,))
        index += 256 * times + MOST_COUNTED * sample
        # The argmax's is the largest, and its code stands for more than that: the lesser of two is what a class has.
        decoded = xp.minimum(looked_up(logs, index), xp.log(kept))
        decoded -= xp.log(others + kept)
        return decoded

    def rungs_of(self, level_S: Array, values_SChw: Array, codes_SChw: Array) -> Array:
        """Each sample's rung of a level: that whose floor fits the values that are coded as 0 best, S.

        With the exponent 1/2 that is the floor with which their probabilities sum to as much as they should, whose KL
        is the least; with a lower one, the same for probabilities at the temperature that the exponent stands for.
        """
        xp = array_namespace(values_SChw)
        zero = codes_SChw == 0
        counted = xp.sum(xp.astype(~zero, xp.float32), axis=1, keepdims=True)
        counted = xp.clip(counted, min=1, max=MOST_COUNTED)
        axes, power = (1, 2, 3), 2 * self.exponent
        held = xp.sum(xp.where(zero, xp.exp(values_SChw * power), 0), axis=axes)
        room = xp.sum(xp.where(zero, counted**power, 0), axis=axes)
        # In levels, as the floors are; a sample without zeros, or with none that holds anything, takes the last.
        tables = xp.asarray(np.asarray(self.levels, np.float32), device=device(values_SChw))
        levels = xp.take(tables, xp.astype(level_S, xp.int64), axis=0)
        wanted = xp.sqrt(held / xp.clip(room, min=1)) * levels
        borders = np.sqrt(np.asarray(self.floors[:-1]) * np.asarray(self.floors[1:]))
        above = wanted[:, None] < xp.asarray(borders.astype(np.float32), device=device(values_SChw))
        rungs: Array = len(self.floors) * level_S + xp.sum(xp.astype(above, xp.int64), axis=1)
        return rungs

    @cached_property
    def _thresholds(self) -> npt.NDArray[np.float32]:
        """Least value of each code from 1 on, as ``log p`` with one level, ``(254,)``."""
        bounds = np.r_[self.first, np.arange(1.5, TOP - 1)]
        thresholds: npt.NDArray[np.float64] = np.log(bounds) / self.exponent
        return thresholds.astype(np.float32)

    @cached_property
    def _alone(self) -> float:
        """The least value that stands alone, likewise."""
        return float(np.float32(math.log(self.alone) / self.exponent))

    @cached_property
    def _shifts(self) -> npt.NDArray[np.float32]:
        """What is added to ``log p`` on each rung to have it as with one level, ``(rungs,)``."""
        return np.repeat(np.log(self.levels) / self.exponent, len(self.floors)).astype(np.float32)

    @cached_property
    def _logs(self) -> npt.NDArray[np.float32]:
        """Log-probability of each code, a 0 standing with one other; more than certainty for TOP, ``(rungs, 256)``."""
        units = np.tile(np.arange(256.0), (self.rungs, 1))
        units[:, 0] = np.tile(self.floors, len(self.levels))
        logs: npt.NDArray[np.float64] = np.log(units / np.repeat(self.levels, len(self.floors))[:, None])
        logs = np.clip(logs / self.exponent, -1e4, 0)
        logs[:, TOP] = 1
        return logs.astype(np.float32)


def _beside(xp: Any, present_SChw: Array) -> Array:
    """Whether the cell to the left or to the right has what ``present_SChw`` tells of a cell."""
    beside = xp.zeros_like(present_SChw)
    beside[..., 1:] |= present_SChw[..., :-1]
    beside[..., :-1] |= present_SChw[..., 1:]
    return beside
