"""Pseudo-labels: the teacher's argmax in each cell, as if it were a label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.evidence import Row
from segkd.pipeline.student.knowledge.base import Cells, Knowledge, Need


@dataclass(frozen=True, kw_only=True)
class PseudoLabels(Knowledge):
    """Cross-entropy of the student with the teacher's argmax in each cell.

    Mean over the valid cells of a crop, those that weigh nothing included (as in FixMatch, Sohn et al., 2020), so
    crops that the teacher is unsure of weigh less.
    """

    name: ClassVar[str] = "pseudo_labels"
    evidence: ClassVar[Mapping[str, Row | None]] = {"": None}

    form: Literal["hard", "confidence"] = "hard"
    """What a cell weighs: ``hard``: 1; ``confidence``: the teacher's largest probability."""
    least_confidence: float = 0.0
    """Cells where the teacher's largest probability is less weigh nothing; 0 = all of them count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("least_confidence", 0 <= self.least_confidence <= 1, "a probability, 0 to 1")

    def needs(self) -> tuple[Need, ...]:
        # Every coding keeps the argmax; probabilities have a bound where the cache gives one.
        return (Need(target="soft", temperatures=(1.0,) if self._reads_confidence else ()),)

    def crop_values(self, logits_SChw: Tensor, teacher: Mapping[str, Tensor], cells: Cells) -> Tensor:
        log_confidence_Shw, labels_Shw = teacher["soft"].max(1)
        values_Shw = F.cross_entropy(logits_SChw, labels_Shw, reduction="none")
        if self._reads_confidence:
            confidence_Shw = log_confidence_Shw.exp()
            weights_Shw = confidence_Shw if self.form == "confidence" else confidence_Shw.new_ones(())
            values_Shw = values_Shw * weights_Shw.where(confidence_Shw >= self.least_confidence, 0.0)
        return cells.means(values_Shw)

    @property
    def _reads_confidence(self) -> bool:
        return self.form == "confidence" or self.least_confidence > 0
