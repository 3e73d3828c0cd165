"""DIST: correlations instead of distances (Huang et al., NeurIPS 2022).

Shapes: N crops; C classes; S sources with windows of h,w teacher cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from segkd.pipeline.evidence import Evidence
from segkd.pipeline.student.knowledge.base import Cells, Knowledge, Need
from segkd.storage.errors import ConfigError

EPSILON = 1e-3
"""Standard deviation of probabilities below which they are as good as constant, and have no correlation to learn: a
cache's bound of 1e-3 nats leaves probabilities below about 1e-3 free, whose correlations would be those of rounding."""


@dataclass(frozen=True, kw_only=True)
class Dist(Knowledge):
    """DIST (Huang et al., 2022): T^2 (inter (1 - r) + intra (1 - r')), with Pearson's correlations of student's and
    teacher's probabilities: r over the classes of a cell, mean over the valid cells of a crop; r' over the valid cells
    of a crop for a class, mean over the classes. (In the authors' code for segmentation r' is over the cells of all
    crops of a batch together, and T is 1.)
    """

    name: ClassVar[str] = "dist"
    evidence: ClassVar[Evidence] = {"": None}

    temperature: float = 1.0
    """T: what is compared is softmax(logits / T)."""
    inter: float = 1.0
    """Weight of the inter-class part: how classes relate in a cell."""
    intra: float = 1.0
    """Weight of the intra-class part: how cells relate in a class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_temperature(self.temperature)
        for key in ("inter", "intra"):
            self._require(key, 0 <= getattr(self, key) < math.inf, "a finite number of at least 0 (0 = off)")
        if self.inter == self.intra == 0:
            raise ConfigError("knowledge.dist.inter and intra are both 0; raise one, or set knowledge.dist.weight = 0")

    def needs(self) -> tuple[Need, ...]:
        return (Need(target="soft", temperatures=(self.temperature,)),)

    def crop_values(self, logits_SChw: Tensor, teacher: Mapping[str, Tensor], cells: Cells) -> Tensor:
        student = (logits_SChw / self.temperature).softmax(1)
        given = (teacher["soft"] / self.temperature).softmax(1)
        # Over the classes probabilities have the mean 1 / C.
        a, b = (values - 1 / values.shape[1] for values in (student, given))
        correlation_Shw = _correlation((a * b).mean(1), a.square().mean(1), b.square().mean(1))
        a, b = (values - cells.spread(cells.means(values)) for values in (student, given))
        correlation_NC = _correlation(cells.means(a * b), cells.means(a.square()), cells.means(b.square()))
        inter_N, intra_N = cells.means(1 - correlation_Shw), (1 - correlation_NC).mean(1)
        return self.temperature**2 * (self.inter * inter_N + self.intra * intra_N)


def _correlation(covariance: Tensor, variance_a: Tensor, variance_b: Tensor) -> Tensor:
    """Pearson's, with EPSILON^2 added to all three.

    So it is 1 for equals, constants among them, and smooth everywhere; the authors add 1e-8 to the denominator alone,
    which leaves a class that teacher and student both find nowhere with a loss of 1.
    """
    floor = EPSILON**2
    return (covariance + floor) / ((variance_a + floor).sqrt() * (variance_b + floor).sqrt())
