"""Class distributions for temperatures above 1: levels of the softened probability, each foretold by its neighbours.

There hardly a probability is next to nothing, so a code for each cell and class packs badly by itself, while what
differs from a mean of neighbours packs well. Shapes: values and codes S,C,h,w; rungs S.
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

from segkd.storage.coding_distribution import AHEAD, RUNGS_OF_A_LADDER
from segkd.storage.coding_exact import Array, from_float16, looked_up, require_log_probabilities
from segkd.storage.errors import ConfigError
from segkd.storage.prediction import ARGMAX, ARGMAX_KEPT, UNIT, VALUES, coarse_to_fine

FINEST = 360.0
"""The most levels: sqrt(1/2) of them, the most that a class other than the argmax has, is a value below VALUES."""
assert UNIT * FINEST * math.sqrt(0.5) + UNIT < VALUES
PARTS = 1 << 14
"""What square roots of probabilities are counted in before they are normalised."""


@dataclass(frozen=True, kw_only=True)
class PredictedDistribution:
    """Class distributions as values on ``sqrt(q) * levels``, where q is the softmax of the log-probabilities / T.

    The square root is uniform in the Fisher-Rao metric: equal steps cost equal KL at the temperature T. A value is a
    whole number of levels off what its neighbours foretell (:mod:`segkd.storage.prediction`): none if it is off by less
    than ``first``, 1 up to ``first + 1`` and so on. The argmax is marked. What its class is foretold there serves its
    neighbours; its q is what the others leave of 1.

    Codes are int16 values, 32 to a level. Values are log-probabilities; -inf is legal on the way in, decoded ones are
    finite and normalised. float16 codes are those of :mod:`segkd.storage.coding_exact`, on whatever rung.
    """

    kind: ClassVar[str] = "predicted-distribution"

    temperature: float
    levels: tuple[float, ...]
    """Levels between the probabilities 0 and 1, ascending, one rung each."""
    side: int
    """Cells of a tile's side: values are foretold by neighbours of the same tile."""
    floors: tuple[float, ...] = (0.25,)
    """The least that a class decodes to, in levels."""
    first: float = 0.59375
    """Levels from which on a difference is kept: small ones cost bytes that are better spent on more levels."""

    def __post_init__(self) -> None:
        if not self.levels or any(not 1 < levels <= FINEST for levels in self.levels) or self.rungs > 255:
            raise ConfigError(
                f"levels must be 1 to 255 numbers above 1 and up to {FINEST:g}, got {len(self.levels)} numbers, "
                f"the last {self.levels[-1] if self.levels else None}"
            )
        if len(self.floors) != 1 or not 0 < self.floors[0] < 1:
            raise ConfigError(f"floors must be one number between 0 and 1 levels, got {list(self.floors)}")
        if not 0.5 <= self.first < 1:
            raise ConfigError(f"first must be at least 0.5 and less than 1 levels, got {self.first}")
        if not isinstance(self.side, int) or self.side < 1:
            raise ConfigError(f"side must be a whole number above 0, got {self.side}")
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}")

    @classmethod
    def for_bound(cls, max_kl: float, temperatures: Sequence[float], side: int) -> PredictedDistribution:
        """The coder whose ladder serves a bound on the KL, from nearly sure teachers to those that know nothing."""
        # The metric of one temperature has to serve all of them; where it lies was tried, see docs/design.md.
        temperature = min(1.25 * max(temperatures), 2.5 + min(temperatures))
        # KL = 2 sum((delta sqrt q)^2) to second order, and differences below first come to about 0.1 levels squared.
        scale = math.sqrt(2 * 0.1 / max_kl)
        least = min(max(0.25 * scale, 1.2), FINEST / 2)
        # What a temperature below the coder's makes of an error is up to its square: all levels may be needed.
        ratio = (FINEST / least) ** (1 / (RUNGS_OF_A_LADDER - 1))
        levels = [least * ratio**k for k in range(RUNGS_OF_A_LADDER)]
        return cls(
            temperature=float(f"{temperature:.4g}"),
            levels=tuple(min(float(f"{level:.4g}"), FINEST) for level in levels),
            side=side,
        )

    @property
    def rungs(self) -> int:
        return len(self.levels)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int16)

    def encode(self, values_SChw: Array, rungs_S: Array) -> Array:
        """Values on each sample's rung. Raises NonFiniteError for NaN and +inf."""
        xp = array_namespace(values_SChw)
        wanted = self._wanted(values_SChw, rungs_S)
        classes = xp.arange(values_SChw.shape[1], device=device(wanted))[None, :, None, None]
        wanted = xp.where(classes == xp.argmax(values_SChw, axis=1, keepdims=True), ARGMAX, wanted)
        (samples, count, height, width), side = wanted.shape, self.side
        down, across = -(-height // side), -(-width // side)
        rows, columns = side if down > 1 else height, side if across > 1 else width
        # Like the argmax, what lies beyond the grid takes the values that are foretold for it.
        padded = xp.full((samples, count, down * rows, across * columns), ARGMAX, dtype=xp.int32, device=device(wanted))
        padded[..., :height, :width] = wanted
        tiles = xp.permute_dims(xp.reshape(padded, (samples, count, down, rows, across, columns)), (0, 2, 4, 1, 3, 5))
        settled = xp.permute_dims(self._settled(tiles), (0, 3, 1, 4, 2, 5))
        codes = xp.reshape(settled, (samples, count, down * rows, across * columns))[..., :height, :width]
        return xp.astype(xp.where(wanted == ARGMAX, ARGMAX, codes), xp.int16)

    def _wanted(self, values_SChw: Array, rungs_S: Array) -> Array:
        """``sqrt(q) * levels`` of all classes, rounded to int32 values."""
        xp = array_namespace(values_SChw)
        require_log_probabilities(values_SChw)
        place = device(values_SChw)
        # A power's last bit differs between devices: which threshold is the last that a value reaches does not. Sums
        # of whole numbers have no order, and a root, a quotient and a product in float64 are rounded alike everywhere.
        thresholds = xp.asarray(self._thresholds, device=place)
        roots = xp.astype(xp.exp(values_SChw * (0.5 / self.temperature)) * PARTS + 0.5, xp.int64)
        roots = xp.clip(roots, max=PARTS)
        roots += xp.astype(values_SChw >= looked_up(thresholds, roots + 1), xp.int64)
        roots -= xp.astype(values_SChw < looked_up(thresholds, roots), xp.int64)
        length = xp.sqrt(xp.astype(xp.sum(roots * roots, axis=1, keepdims=True), xp.float64))
        scales = looked_up(xp.asarray(self._scales, device=place), xp.astype(rungs_S, xp.int64))
        shares = xp.astype(roots, xp.float64)
        del roots
        shares /= xp.clip(length, min=1)  # a cell of which no class is possible has no distribution
        shares *= scales[:, None, None, None]
        shares += 0.5
        return xp.astype(xp.floor(shares), xp.int32)

    def _settled(self, wanted: Array) -> Array:
        """The values of tiles' parts …,h,w: those that are foretold where the wanted one is ARGMAX, and beyond."""
        xp = array_namespace(wanted)
        late = UNIT - _rounded(self.first * UNIT)

        def settle(foretold: Array, rows: slice, columns: slice) -> Array:
            here = wanted[..., rows, columns]
            inside = foretold[..., : here.shape[-2], : here.shape[-1]]
            off = here - inside
            steps = xp.sign(off) * ((xp.abs(off) + late) // UNIT)
            steps = xp.maximum(steps, -(inside // UNIT))  # no value is less than 0
            steps = xp.where(xp.abs(steps) == -ARGMAX_KEPT, steps - xp.sign(steps), steps)
            inside += xp.where(here == ARGMAX, 0, steps * UNIT)
            return foretold

        start = xp.zeros((*wanted.shape[:-2], 1, 1), dtype=xp.int32, device=device(wanted))
        return coarse_to_fine(settle, start, self.side, *wanted.shape[-2:])

    def decode(self, codes_SChw: Array, rungs_S: Array) -> Array:
        xp = array_namespace(codes_SChw)
        if xp.isdtype(codes_SChw.dtype, "real floating"):
            return from_float16(codes_SChw)
        scales = looked_up(xp.asarray(1 / self._scales, device=device(codes_SChw)), xp.astype(rungs_S, xp.int64))
        roots = xp.clip(xp.astype(codes_SChw, xp.float32), min=self.floors[0] * UNIT)
        roots *= xp.astype(scales, xp.float32)[:, None, None, None]
        others = xp.where(codes_SChw < 0, 0, roots * roots)
        kept = xp.maximum(1 - xp.sum(others, axis=1, keepdims=True), AHEAD * xp.max(others, axis=1, keepdims=True))
        decoded = xp.log(xp.where(codes_SChw < 0, kept, others))
        decoded *= self.temperature
        decoded -= xp.max(decoded, axis=1, keepdims=True)
        decoded -= xp.log(xp.sum(xp.exp(decoded), axis=1, keepdims=True))
        return decoded

    def rungs_of(self, level_S: Array, values_SChw: Array, codes_SChw: Array) -> Array:  # noqa: ARG002
        """Each sample's rung of a level, S: there is one floor."""
        return level_S

    @cached_property
    def _thresholds(self) -> npt.NDArray[np.float32]:
        """Least log p whose ``p ** (1 / 2T)`` rounds to 0, 1, 2 … PARTS parts of 1; then infinity, (PARTS + 2,)."""
        least = 2 * self.temperature * np.log((np.arange(PARTS) + 0.5) / PARTS)
        thresholds: npt.NDArray[np.float64] = np.concatenate([[-np.inf], least, [np.inf]])
        return thresholds.astype(np.float32)

    @cached_property
    def _scales(self) -> npt.NDArray[np.float64]:
        """Values between the probabilities 0 and 1 on each rung, ``(rungs,)``."""
        return UNIT * np.asarray(self.levels)


def _rounded(number: float) -> int:
    """The nearest whole number, halves going up."""
    return math.floor(number + 0.5)
