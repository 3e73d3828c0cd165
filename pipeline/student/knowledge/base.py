"""What every kind of knowledge is: its table in the run file and its term of the loss, in one object.

Shapes: N crops; C classes; S sources with windows of h,w teacher cells.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from torch import Tensor

from segkd.pipeline.data.batch import Batch
from segkd.pipeline.evidence import Evidence
from segkd.pipeline.student.knowledge.schedule import Schedule, factor
from segkd.storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a knowledge reads of the cache, and how well it must have been kept."""

    target: str
    """The cache's name of it."""
    temperatures: tuple[float, ...] = ()
    """Where it reads class distributions for their values: at which temperatures."""
    exact: str | None = None
    """Why nothing but exactly kept values will do; None where the bound at ``temperatures`` will."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The teacher's cells in which a knowledge is compared, and reductions over those of each crop.

    All sources of a crop are taken together. Values are ``(S,h,w)`` or ``(S,C,h,w)``; what stands where a cell is not
    valid takes no part, if it is finite.
    """

    valid_Shw: Tensor
    """bool: the cells in which it is compared."""
    exist_Shw: Tensor
    """bool: the cells that count at all, such as a valid cell's neighbours."""
    crop_S: Tensor
    """int64: the crop that each source belongs to."""
    crops: int
    class_weights_C: Tensor | None = None
    """Those of the cross-entropy, of mean 1 over the labelled pixels; None where classes have none."""

    def class_weights_of(self, probabilities_SChw: Tensor) -> Tensor:
        """What each cell weighs by its classes, S,h,w: the mean of their weights under its distribution."""
        assert self.class_weights_C is not None, "class-weighted knowledge needs class weights"
        return (probabilities_SChw * self.class_weights_C[:, None, None]).sum(1)

    def any(self) -> Tensor:
        """N, bool: whether a crop has a valid cell."""
        return self.sums(self.valid_Shw.float()) > 0

    def sums(self, values: Tensor) -> Tensor:
        """N or N,C."""
        valid = self.valid_Shw if values.ndim == 3 else self.valid_Shw[:, None]
        sums = values.where(valid, 0.0).sum((-2, -1))
        return sums.new_zeros((self.crops, *sums.shape[1:])).index_add(0, self.crop_S, sums)

    def means(self, values: Tensor) -> Tensor:
        """N or N,C; 0 where a crop has no valid cell."""
        counts_N = self.sums(self.valid_Shw.to(values.dtype)).clamp_min(1)
        return self.sums(values) / (counts_N if values.ndim == 3 else counts_N[:, None])

    def spread(self, values_NC: Tensor) -> Tensor:
        """Each crop's values at all of its cells: S,C,1,1."""
        return values_NC[self.crop_S][:, :, None, None]


@dataclass(frozen=True, kw_only=True)
class Knowledge(ABC):
    """One kind of knowledge. Subclasses add their settings and say what they need and how they compare.

    Its term is the mean over the crops of the global batch that have a valid cell; with weight 0 it is never computed
    and needs nothing.
    """

    name: ClassVar[str]
    """Its table is ``[knowledge.<name>]``."""
    with_neighbours: ClassVar[bool] = False
    """Whether only those cells are valid whose neighbours inside the image all count too."""
    evidence: ClassVar[Evidence] = {
        "on=auxiliary": None,
        "schedule=rise": None,
        "schedule=fall": None,
    }
    """What was measured, see :mod:`segkd.pipeline.evidence`."""

    weight: float = 0.0
    """Weight of the term; 0 = off."""
    on: Literal["all", "auxiliary"] = "all"
    """The crops that it acts on: all, or those of auxiliary images only."""
    schedule: Schedule = "constant"
    """How the weight changes over the run: not at all, linearly from almost 0 to all of it, or linearly from all of it
    to almost 0."""

    def __post_init__(self) -> None:
        self._require("weight", 0 <= self.weight < math.inf, "a finite number of at least 0 (0 = off)")

    @abstractmethod
    def needs(self) -> tuple[Need, ...]:
        """What it reads of the cache."""

    @abstractmethod
    def crop_values(self, logits_SChw: Tensor, teacher: Mapping[str, Tensor], cells: Cells) -> Tensor:
        """N: how far the student is from the teacher in each crop; what crops without a valid cell get is not used.

        ``logits_SChw`` are the student's, brought to the teacher's cells. ``teacher`` has the targets of :meth:`needs`
        in the cache's names, (S,channels,h,w), 0 where a cell does not exist; of log-probabilities -inf is legal.
        """

    def cells(self, batch: Batch, class_weights_C: Tensor | None = None) -> Cells:
        """The cells of a batch that it acts on. The batch must have sources."""
        sources = batch.sources
        assert sources is not None, "knowledge needs a batch with sources"
        valid_Shw = sources.counts_first_Shw if self.with_neighbours else sources.counts_Shw
        crop_S = sources.crop_S.to(valid_Shw.device, non_blocking=True)
        if self.on == "auxiliary":
            valid_Shw = valid_Shw & ~batch.labelled_N[crop_S][:, None, None]
        return Cells(
            valid_Shw=valid_Shw,
            exist_Shw=sources.counts_Shw,
            crop_S=crop_S,
            crops=len(batch.labelled_N),
            class_weights_C=class_weights_C,
        )

    def at(self, step: int, steps: int) -> Self:
        """The same with the constant weight that its schedule gives it at ``step`` (from 0) of ``steps``."""
        return replace(self, weight=self.weight * factor(self.schedule, step, steps), schedule="constant")

    def _require(self, key: str, fulfilled: bool, expected: str) -> None:
        if not fulfilled:
            raise ConfigError(f"knowledge.{self.name}.{key} is {getattr(self, key)}; expected {expected}")

    def _require_temperature(self, temperature: float) -> None:
        self._require("temperature", 0 < temperature < math.inf, "a finite number above 0 (1 = as is)")


@dataclass(frozen=True, kw_only=True)
class ClassWeighted(Knowledge):
    """One whose cells may weigh as classes weigh in the cross-entropy."""

    class_weighted: bool = False
    """Whether cells weigh as train.class_weights weighs the classes that the teacher sees there."""
