"""First-order knowledge: how much a cell's output differs from its neighbours' (Xie et al., BMVC 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from segkd.pipeline.evidence import Evidence, Row
from segkd.pipeline.first_order import Features, features_of, first_order_map
from segkd.pipeline.student.knowledge.base import Cells, Knowledge, Need


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Knowledge):
    """How much a cell's output differs from its neighbours' (Xie et al., 2018): the squared difference of the student's
    first-order map from the teacher's.

    Mean over the cells of a crop whose neighbours inside the image lie in the crop too. The term starts about fifty
    times below KL, so sweep its weight over decades.
    """

    name: ClassVar[str] = "first_order"
    # So that the student's neighbours, the cells that count, are those that the teacher's map was made from.
    with_neighbours: ClassVar[bool] = True
    evidence: ClassVar[Evidence] = {
        "form=softmax": Row("camvid-s.md", "auxiliary-zero-first-30 ‡"),
        "form=logits": None,
    }

    weight: float = 10.0
    """Weight of the term; 0 = off."""
    form: Features = "softmax"
    """What the map compares between neighbours, see :func:`segkd.pipeline.first_order.features_of`."""

    def needs(self) -> tuple[Need, ...]:
        return (Need(target=self._target),)

    def crop_values(self, logits_SChw: Tensor, teacher: Mapping[str, Tensor], cells: Cells) -> Tensor:
        student_Shw = first_order_map(features_of(logits_SChw, self.form), cells.exist_Shw)
        return cells.means((student_Shw - teacher[self._target][:, 0]).square())

    @property
    def _target(self) -> str:
        return "first_order" if self.form == "softmax" else "first_order_logits"
