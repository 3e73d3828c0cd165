"""The maps that are derived from a teacher's output: what each is, on which rungs it may be kept, what coding it costs.

A target is one object of one kind; a further one is a further class here and an entry in :data:`TARGETS`.

Shapes: log-probabilities N,C,h,w on the teacher's grid; values N,channels,h,w; measures N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from segkd.pipeline.first_order import EPSILON, Features, features_of, first_order_map
from segkd.pipeline.resample import LOWEST, pixel_tiles
from segkd.pipeline.teacher.config import CacheConfig
from segkd.storage.coding import (
    Coder,
    CompandedDistribution,
    ExactDistribution,
    PredictedDistribution,
    UniformSteps,
)
from segkd.storage.errors import NonFiniteError
from segkd.storage.geometry import Mapping as GridMapping
from segkd.storage.spec import TargetSpec

LEAST_FORETOLD = 3e-4
"""Nats: for less, foretold values have too few levels where a teacher hesitates between many classes."""
LOGITS_BOUND = 0.25
"""Absolute error of the first-order map of the logits, whose values are mostly between 1 and 30."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """A teacher's output for images of one size, and what a cache keeps of it."""

    log_probs_NChw: Tensor
    mapping: GridMapping
    image_size: tuple[int, int]
    kept_NChw: Tensor | None = None
    """The log-probabilities that a reader of the cache will see, once they are coded."""

    def of(self, samples: Tensor) -> Output:
        """The output for some of the images."""
        kept = None if self.kept_NChw is None else self.kept_NChw[samples]
        return replace(self, log_probs_NChw=self.log_probs_NChw[samples], kept_NChw=kept)


Laddered = CompandedDistribution | PredictedDistribution
"""Coders whose rungs are levels, times floors of each."""


class Target(Protocol):
    """One map derived from the teacher."""

    def spec(self, config: CacheConfig, classes: int, tile: int) -> TargetSpec:
        """What a cache with tiles of this side says about it."""
        ...

    def values(self, output: Output) -> Tensor:
        """The values to be kept, from the uncoded teacher and where its cells lie."""
        ...

    def rungs(self, spec: TargetSpec, values: Tensor) -> Tensor:  # noqa: ARG002  # a default
        """The rung to try first, N: a guess by whatever is cheap."""
        return torch.zeros(len(values), dtype=torch.int64, device=values.device)

    def finer(self, spec: TargetSpec, rungs: Tensor, excess: Tensor) -> Tensor:  # noqa: ARG002  # a default
        """The rung to try after one whose error was ``excess`` times the bound, N; the same one where none is left."""
        return rungs

    def measure(self, spec: TargetSpec, values: Tensor, decoded: Tensor, output: Output) -> dict[str, Tensor]:
        """What coding has cost each sample, by the names that the specification lists."""
        ...


class SoftTargets(Target):
    """Zero-order knowledge: the teacher's class distribution in each cell."""

    def spec(self, config: CacheConfig, classes: int, tile: int) -> TargetSpec:
        coder, codec = _coder_and_codec(config, classes, tile)
        bounded = tuple(_named(name, t) for t in config.temperatures for name in ("kl_cells", "kl_pixels"))
        return TargetSpec(
            name="soft",
            channels=classes,
            coder=coder,
            bound=config.max_kl,
            measures=(*bounded, "changed_pixels", "entropy", "confidence"),
            bounded=bounded,
            parameters={"temperatures": list(config.temperatures)},
            fallback=config.profile != "exact" and config.beyond == "exact",
            codec=codec,
        )

    def values(self, output: Output) -> Tensor:
        return output.log_probs_NChw

    def rungs(self, spec: TargetSpec, values: Tensor) -> Tensor:
        """The coarsest level whose KL over the cells keeps the bound, found with three or four attempts."""
        coder = spec.coder
        if isinstance(coder, ExactDistribution):
            return super().rungs(spec, values)
        assert isinstance(coder, Laddered)
        fails = torch.full((len(values),), -1, device=values.device)
        keeps = torch.full_like(fails, len(coder.levels))
        level, rungs = torch.full_like(fails, len(coder.levels) // 2), torch.zeros_like(fails)
        while bool((open_ := keeps - fails > 1).any()):
            active = open_.nonzero()[:, 0]
            tried, part = level[active], values[active]
            codes = coder.encode(part, tried * len(coder.floors))
            found = coder.rungs_of(tried, part, codes)
            kept = coder.decode(codes, found)
            excess = (
                torch.stack([_kl_cells(part, kept, t) for t in spec.parameters["temperatures"]]).amax(0) / spec.bound
            )
            within = excess <= 1
            keeps[active], fails[active] = (
                torch.where(within, tried, keeps[active]),
                torch.where(within, fails[active], tried),
            )
            rungs[active] = torch.where(within | (tried == len(coder.levels) - 1), found, rungs[active])
            aim = tried + _levels_for(excess, coder)
            level[active] = aim.clamp(fails[active] + 1, (keeps[active] - 1).clamp_min(0))
        return rungs

    def finer(self, spec: TargetSpec, rungs: Tensor, excess: Tensor) -> Tensor:
        coder = spec.coder
        if isinstance(coder, ExactDistribution):
            return rungs
        assert isinstance(coder, Laddered)
        step, floors = _levels_for(excess, coder).clamp_min(1), len(coder.floors)
        level, last = rungs // floors, len(coder.levels) - 1
        # The last one may lie far beyond the one before, which is tried first.
        level = torch.where(level < last - 1, (level + step).clamp_max(last - 1), last)
        return level * floors + rungs % floors

    def measure(self, spec: TargetSpec, values: Tensor, decoded: Tensor, output: Output) -> dict[str, Tensor]:
        """KL(teacher || kept) over cells and over pixels, in nats, at each temperature; the share of pixels whose
        argmax changed; the teacher's mean entropy, in nats, and mean largest probability.

        The distribution at a pixel is the softmax of the bilinearly upsampled log-probabilities, for both alike.
        """
        temperatures = spec.parameters["temperatures"]
        exactly = _precision(spec)
        measures = {_named("kl_cells", t): _kl_cells(values, decoded, t, exactly) for t in temperatures}
        kl = {t: measures[_named("kl_cells", t)].new_zeros(len(values)) for t in temperatures}
        changed = torch.zeros(len(values), dtype=torch.float64, device=values.device)
        height, width = output.image_size
        tiles = (pixel_tiles(scores, output.mapping, height, width) for scores in (values, decoded))
        for (_, _, teacher), (_, _, kept) in zip(*tiles, strict=True):
            for t in temperatures:
                softened = ((scores.to(exactly) / t).log_softmax(1) for scores in (teacher, kept))
                kl[t] += kl_divergence(*softened).sum((1, 2), dtype=torch.float64)
            changed += _changed(teacher, kept).sum((1, 2))
        pixels = height * width
        finite = values.clamp_min(LOWEST)
        return {
            **measures,
            **{_named("kl_pixels", t): total / pixels for t, total in kl.items()},
            "changed_pixels": changed / pixels,
            "entropy": -(finite.exp() * finite).sum(1).mean((1, 2), dtype=torch.float64),
            "confidence": values.amax(1).exp().mean((1, 2), dtype=torch.float64),
        }


def _coder_and_codec(config: CacheConfig, classes: int, tile: int) -> tuple[Coder, str]:
    """How distributions are kept: by the profile, by whether a temperature makes all classes count, by the bound."""
    if config.profile == "exact":
        return ExactDistribution(), "zstd"
    if config.profile == "plain" and max(config.temperatures) > 1 and config.max_kl >= LEAST_FORETOLD:
        return PredictedDistribution.for_bound(config.max_kl, config.temperatures, tile), "residuals"
    companded = CompandedDistribution.for_bound(config.max_kl, classes, config.temperatures)
    return companded, "context" if config.profile == "dense" else "zstd"


def _changed(teacher_NChw: Tensor, kept_NChw: Tensor) -> Tensor:
    """Where the teacher's most probable class is not the kept one's, N,h,w; of several alike, any will do.

    Two maxima over the classes take a tenth of an argmax's time where classes are planes.
    """
    top_NChw = teacher_NChw == teacher_NChw.amax(1, keepdim=True)
    return kept_NChw.masked_fill(~top_NChw, -torch.inf).amax(1) < kept_NChw.amax(1)


def kl_divergence(log_p_NChw: Tensor, log_q_NChw: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) over the classes, N,h,w in nats; rounding never makes it negative."""
    return (log_p_NChw.exp() * (log_p_NChw - log_q_NChw)).sum(1).clamp_min(0)


def _kl_cells(values: Tensor, decoded: Tensor, temperature: float, dtype: torch.dtype = torch.float32) -> Tensor:
    softened = ((scores.to(dtype) / temperature).clamp_min(LOWEST).log_softmax(1) for scores in (values, decoded))
    return kl_divergence(*softened).mean((1, 2), dtype=torch.float64)


def _precision(spec: TargetSpec) -> torch.dtype:
    """In what the KL is measured: float32 where its rounding is next to nothing beside the bound.

    Normalising adds up the probabilities of all classes, and each that is added to nearly 1 is off by up to 2^-24.
    """
    return torch.float32 if 300 * 2.0**-24 * spec.channels <= spec.bound else torch.float64


def _levels_for(excess: Tensor, coder: Laddered) -> Tensor:
    """How many levels finer to go for an error that is ``excess`` times too large: it falls with the square of them."""
    ratio = coder.levels[min(1, len(coder.levels) - 1)] / coder.levels[0]
    steps = excess.clamp_min(1e-9).log() / (2 * math.log(max(ratio, 1.001)))
    return steps.nan_to_num(posinf=1e3).ceil().clamp(-1e3, 1e3).long()


def _named(measure: str, temperature: float) -> str:
    return measure if temperature == 1 else f"{measure}_t{temperature:g}"


@dataclass(frozen=True)
class FirstOrderMap(Target):
    """First-order knowledge: how much a cell's output differs from its neighbours', from the uncoded teacher."""

    name: str
    features: Features

    def spec(self, config: CacheConfig, classes: int, tile: int) -> TargetSpec:  # noqa: ARG002  # the protocol's
        bound = config.max_first_order_error if self.features == "softmax" else LOGITS_BOUND
        parameters: Mapping[str, float | str] = {"features": self.features, "epsilon": EPSILON}
        recomputed = ("recomputed_largest_error", "recomputed_mean_error") if "soft" in config.targets else ()
        return TargetSpec(
            name=self.name,
            channels=1,
            coder=UniformSteps(reach=(2 * 255 * bound,)),
            bound=bound,
            measures=("largest_error", "mean_error", *recomputed),
            bounded=("largest_error",),
            parameters=parameters,
            codec="context" if config.profile == "dense" else "zstd",
        )

    def values(self, output: Output) -> Tensor:
        mapped = self._map(output.log_probs_NChw)
        if not bool(mapped.isfinite().all()):
            raise NonFiniteError(
                f"{self.name} is not finite where the teacher gives a class the probability 0; "
                'keep the target "first_order" instead'
            )
        return mapped

    def measure(self, spec: TargetSpec, values: Tensor, decoded: Tensor, output: Output) -> dict[str, Tensor]:  # noqa: ARG002
        """The largest and the mean absolute error over the cells; and those of the map that would be recomputed from
        the distributions in the cache, were this one not kept.
        """
        measures = _absolute_errors(values, decoded, "")
        if output.kept_NChw is not None:
            measures |= _absolute_errors(values, self._map(output.kept_NChw), "recomputed_")
        return measures

    def _map(self, log_probs_NChw: Tensor) -> Tensor:
        return first_order_map(features_of(log_probs_NChw, self.features))[:, None]


def _absolute_errors(values: Tensor, others: Tensor, prefix: str) -> dict[str, Tensor]:
    error = (values - others).abs().flatten(1)
    return {f"{prefix}largest_error": error.amax(1), f"{prefix}mean_error": error.mean(1, dtype=torch.float64)}


TARGETS: dict[str, Callable[[], Target]] = {
    "soft": SoftTargets,
    "first_order": lambda: FirstOrderMap("first_order", "softmax"),
    "first_order_logits": lambda: FirstOrderMap("first_order_logits", "logits"),
}
"""Every target by its name in the cache."""
