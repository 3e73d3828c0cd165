"""The maps that are derived from a teacher's output: what each is, how it is coded, what coding it costs.

A target is one object of one kind; a further one is a further class here and an entry in :data:`TARGETS`.

Shapes: log-probabilities N,C,h,w on the teacher's grid; values N,channels,h,w; measures N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from segkd.pipeline.first_order import EPSILON, Features, features_of, first_order_map
from segkd.pipeline.resample import pixel_tiles
from segkd.pipeline.teacher.config import CacheConfig
from segkd.storage.coding import SOFTMAX_REACH, CompandedDistribution, UniformSteps
from segkd.storage.errors import NonFiniteError
from segkd.storage.geometry import Mapping as GridMapping
from segkd.storage.spec import TargetSpec

LOWEST = -100.0
"""What -inf is measured as: e^-100 is nothing, and unlike -inf it can be multiplied by 0."""


class Target(Protocol):
    """One map derived from the teacher."""

    def spec(self, config: CacheConfig, classes: int) -> TargetSpec:
        """What the cache says about it."""
        ...

    def values(self, log_probs_NChw: Tensor, mapping: GridMapping) -> Tensor:
        """The values to be kept, from the uncoded teacher and where its cells lie."""
        ...

    def measure(
        self, values: Tensor, decoded: Tensor, mapping: GridMapping, image_size: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Per sample the error that the bound is about, and what the coding report lists."""
        ...


class SoftTargets:
    """Zero-order knowledge: the teacher's class distribution in each cell."""

    def spec(self, config: CacheConfig, classes: int) -> TargetSpec:
        coder = CompandedDistribution(levels=config.levels)
        return TargetSpec(
            name="soft",
            channels=classes,
            coder=coder,
            bound=config.max_kl,
            measures=("kl_cells", "kl_pixels", "changed_pixels"),
            bounded=("kl_cells", "kl_pixels"),
            parameters={},
        )

    def values(self, log_probs_NChw: Tensor, mapping: GridMapping) -> Tensor:  # noqa: ARG002  # the protocol's
        return log_probs_NChw

    def measure(
        self, values: Tensor, decoded: Tensor, mapping: GridMapping, image_size: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """KL(teacher || kept) over cells and over pixels, in nats, and the share of pixels whose argmax changed.

        The distribution at a pixel is the softmax of the bilinearly upsampled log-probabilities, for both alike.
        """
        kl_cells = kl_divergence(values.clamp_min(LOWEST), decoded).mean((1, 2), dtype=torch.float64)
        kl = torch.zeros_like(kl_cells)
        changed = torch.zeros_like(kl_cells)
        height, width = image_size
        tiles = (pixel_tiles(scores, mapping, height, width) for scores in (values, decoded))
        for (_, _, teacher), (_, _, kept) in zip(*tiles, strict=True):
            kl += kl_divergence(teacher.log_softmax(1), kept.log_softmax(1)).sum((1, 2), dtype=torch.float64)
            changed += (teacher.argmax(1) != kept.argmax(1)).sum((1, 2))
        pixels = height * width
        measures = {"kl_cells": kl_cells, "kl_pixels": kl / pixels, "changed_pixels": changed / pixels}
        return torch.maximum(kl_cells, kl / pixels), measures


def kl_divergence(log_p_NChw: Tensor, log_q_NChw: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) over the classes, N,h,w in nats; rounding never makes it negative."""
    return (log_p_NChw.exp() * (log_p_NChw - log_q_NChw)).sum(1).clamp_min(0)


@dataclass(frozen=True)
class FirstOrderMap:
    """First-order knowledge: how much a cell's output differs from its neighbours', from the uncoded teacher."""

    name: str
    features: Features
    reach: tuple[float, ...]
    bound: float
    """Absolute error, in the unit of the map."""

    def spec(self, config: CacheConfig, classes: int) -> TargetSpec:  # noqa: ARG002  # the protocol's
        parameters: Mapping[str, float | str] = {"features": self.features, "epsilon": EPSILON}
        coder = UniformSteps(reach=self.reach)
        return TargetSpec(
            name=self.name,
            channels=1,
            coder=coder,
            bound=self.bound,
            measures=("largest_error", "mean_error"),
            bounded=("largest_error",),
            parameters=parameters,
        )

    def values(self, log_probs_NChw: Tensor, mapping: GridMapping) -> Tensor:  # noqa: ARG002  # the protocol's
        mapped = first_order_map(features_of(log_probs_NChw, self.features))[:, None]
        if not bool(mapped.isfinite().all()):
            raise NonFiniteError(
                f"{self.name} is not finite where the teacher gives a class the probability 0; "
                'keep the target "first_order" instead'
            )
        return mapped

    def measure(
        self,
        values: Tensor,
        decoded: Tensor,
        mapping: GridMapping,  # noqa: ARG002  # the protocol's
        image_size: tuple[int, int],  # noqa: ARG002  # the protocol's
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The largest and the mean absolute error over the cells."""
        error = (values - decoded).abs().flatten(1)
        largest = error.amax(1)
        return largest, {"largest_error": largest, "mean_error": error.mean(1, dtype=torch.float64)}


TARGETS: dict[str, Callable[[], Target]] = {
    "soft": SoftTargets,
    "first_order": lambda: FirstOrderMap("first_order", "softmax", (SOFTMAX_REACH,), SOFTMAX_REACH / 255),
    "first_order_logits": lambda: FirstOrderMap("first_order_logits", "logits", (8.0, 32.0, 128.0, 512.0), 1.5),
}
"""Every target by its name in the cache."""


@dataclass(frozen=True, kw_only=True)
class Coded:
    """One target of a batch, coded."""

    codes: Tensor
    rungs: Tensor
    errors: Tensor
    measures: Mapping[str, Tensor]

    def improved(self, other: Coded, bound: float) -> Coded:
        """This, but the other for the samples that miss the bound here and are closer to it there."""
        take = (self.errors > bound) & (other.errors < self.errors)
        return Coded(
            codes=torch.where(take[:, None, None, None], other.codes, self.codes),
            rungs=torch.where(take, other.rungs, self.rungs),
            errors=torch.where(take, other.errors, self.errors),
            measures={name: torch.where(take, other.measures[name], kept) for name, kept in self.measures.items()},
        )

    def followed_by(self, other: Coded) -> Coded:
        """The samples of this and then those of the other."""
        return Coded(
            codes=torch.cat([self.codes, other.codes]),
            rungs=torch.cat([self.rungs, other.rungs]),
            errors=torch.cat([self.errors, other.errors]),
            measures={name: torch.cat([value, other.measures[name]]) for name, value in self.measures.items()},
        )

    def on_host(self) -> Coded:
        """The same on the CPU."""
        return Coded(
            codes=self.codes.cpu(),
            rungs=self.rungs.cpu(),
            errors=self.errors.cpu(),
            measures={name: value.cpu() for name, value in self.measures.items()},
        )


def code(
    target: Target, spec: TargetSpec, log_probs_NChw: Tensor, mapping: GridMapping, image_size: tuple[int, int]
) -> Coded:
    """Codes each sample on the first rung that keeps the bound, or on the one with the least error if none does."""
    values = target.values(log_probs_NChw, mapping)
    best: Coded | None = None
    for rung in range(spec.coder.rungs):
        codes = spec.coder.encode(values, rung)
        rungs = torch.full((len(values),), rung, device=values.device)
        errors, measures = target.measure(values, spec.coder.decode(codes, rungs), mapping, image_size)
        coded = Coded(codes=codes, rungs=rungs, errors=errors, measures=measures)
        best = coded if best is None else best.improved(coded, spec.bound)
        if bool((best.errors <= spec.bound).all()):
            break
    assert best is not None, "a ladder has at least one rung"
    return best
