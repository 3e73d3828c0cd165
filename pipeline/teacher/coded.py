"""A batch's targets, each sample on a rung that keeps its bound, or exactly where none does.

Shapes: log-probabilities N,C,h,w on the teacher's grid; codes channels,h,w; measures N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from segkd.pipeline.teacher.targets import TARGETS, Output, Target
from segkd.storage.coding import EXACT, ExactDistribution, from_float16, to_float16
from segkd.storage.errors import CacheError
from segkd.storage.geometry import Mapping as GridMapping
from segkd.storage.spec import TargetSpec


@dataclass(frozen=True, kw_only=True)
class Coded:
    """One target of a batch, coded."""

    codes: Sequence[Tensor]
    """Each sample's, channels,h,w; float16 on the rung EXACT."""
    rungs: Tensor
    errors: Tensor
    """The largest of the measures that the bound is about."""
    measures: Mapping[str, Tensor]

    def followed_by(self, other: Coded) -> Coded:
        """The samples of this and then those of the other."""
        return Coded(
            codes=[*self.codes, *other.codes],
            rungs=torch.cat([self.rungs, other.rungs]),
            errors=torch.cat([self.errors, other.errors]),
            measures={name: torch.cat([value, other.measures[name]]) for name, value in self.measures.items()},
        )

    def on_host(self) -> Coded:
        """The same on the CPU."""
        return Coded(
            codes=[codes.cpu() for codes in self.codes],
            rungs=self.rungs.cpu(),
            errors=self.errors.cpu(),
            measures={name: value.cpu() for name, value in self.measures.items()},
        )


def code_targets(
    specs: Mapping[str, TargetSpec],
    log_probs_NChw: Tensor,
    mapping: GridMapping,
    image_size: tuple[int, int],
    names: Sequence[str],
) -> dict[str, Coded]:
    """Every target of a batch of samples, ``names``, distributions first. Raises CacheError as :func:`code` does."""
    output = Output(log_probs_NChw=log_probs_NChw, mapping=mapping, image_size=image_size)
    coded: dict[str, Coded] = {}
    for name in sorted(specs, key=lambda name: name != "soft"):
        coded[name], decoded = code(TARGETS[name](), specs[name], output, names)
        if name == "soft":
            output = replace(output, kept_NChw=decoded)
    return {name: coded[name] for name in specs}


def code(target: Target, spec: TargetSpec, output: Output, names: Sequence[str]) -> tuple[Coded, Tensor]:
    """Codes each sample on a rung that keeps the bound, exactly where none does; with what a reader will see of it.

    Raises CacheError, naming the sample, where none does and the target keeps nothing exactly.
    """
    values = target.values(output)
    rungs = target.rungs(spec, values)
    codes = spec.coder.encode(values, rungs)
    decoded = spec.coder.decode(codes, rungs)
    measures = target.measure(spec, values, decoded, output)

    def renew(samples: Tensor, newly: Tensor) -> None:
        decoded[samples] = newly
        for name, value in target.measure(spec, values[samples], newly, output.of(samples)).items():
            measures[name][samples] = value

    while True:
        excess = _largest(measures, spec) / max(spec.bound, 1e-30)
        finer = torch.where(excess > 1, target.finer(spec, rungs, excess), rungs)
        again = (finer != rungs).nonzero()[:, 0]
        if not len(again):
            break
        rungs = finer
        codes[again] = spec.coder.encode(values[again], rungs[again])
        renew(again, spec.coder.decode(codes[again], rungs[again]))
    kept = list(codes)
    if len(beyond := (excess > 1).nonzero()[:, 0]) and not isinstance(spec.coder, ExactDistribution):
        if not spec.fallback:
            raise _beyond(spec, names[int(beyond[0])], float(excess[beyond[0]]) * spec.bound)
        exact = to_float16(values[beyond])
        for k, sample in enumerate(beyond.tolist()):
            kept[sample] = exact[k]
        rungs = rungs.index_fill(0, beyond, EXACT)
        renew(beyond, from_float16(exact))
    return Coded(codes=kept, rungs=rungs, errors=_largest(measures, spec), measures=measures), decoded


def _largest(measures: Mapping[str, Tensor], spec: TargetSpec) -> Tensor:
    """The largest of each sample's measures that the bound is about, N."""
    return torch.stack([measures[name].double() for name in spec.bounded]).amax(0)


def _beyond(spec: TargetSpec, name: str, error: float) -> CacheError:
    if spec.name == "soft":
        remedy = 'allow more with cache.max_kl, or keep such samples exactly with cache.beyond = "exact"'
    else:
        remedy = (
            "allow more with cache.max_first_order_error"
            if spec.name == "first_order"
            else 'keep "first_order" instead'
        )
    return CacheError(f"{name}: {spec.name} is off by {error:.3g} at best, the bound is {spec.bound:.3g}; {remedy}")
