"""Pseudo-labels: the teacher's argmax in each cell, as if it were a label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.evidence import Evidence, Row
from segkd.pipeline.student.knowledge.base import Cells, ClassWeighted, Need


@dataclass(frozen=True, kw_only=True)
class PseudoLabels(ClassWeighted):
    """Cross-entropy of the student with the teacher's argmax in each cell (Lee, 2013).

    Mean over the valid cells of a crop, whatever they weigh: crops that the teacher is unsure of count less.
    """

    name: ClassVar[str] = "pseudo_labels"
    evidence: ClassVar[Evidence] = {"form=hard": Row("camvid-s.md", "pseudo-labels"), "form=confidence": None}

    form: Literal["hard", "confidence"] = "hard"
    """What a cell weighs: ``hard``: 1; ``confidence``: the teacher's largest probability."""

    def needs(self) -> tuple[Need, ...]:
        # Every coding keeps the argmax; probabilities have a bound where the cache gives one.
        return (Need(target="soft", temperatures=(1.0,) if self.form == "confidence" else ()),)

    def crop_values(self, logits_SChw: Tensor, teacher: Mapping[str, Tensor], cells: Cells) -> Tensor:
        log_confidence_Shw, labels_Shw = teacher["soft"].max(1)
        values_Shw = F.cross_entropy(logits_SChw, labels_Shw, reduction="none")
        if self.form == "confidence":
            values_Shw = values_Shw * log_confidence_Shw.exp()
        if self.class_weighted:
            one_hot_SChw = F.one_hot(labels_Shw, logits_SChw.shape[1]).movedim(-1, 1)
            values_Shw = values_Shw * cells.class_weights_of(one_hot_SChw)
        return cells.means(values_Shw)
