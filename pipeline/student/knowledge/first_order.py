"""First-order knowledge: how much a cell's output differs from its neighbours' (Xie et al., BMVC 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from segkd.pipeline.evidence import Evidence, Row
from segkd.pipeline.first_order import Features, class_edges, features_of, first_order_map
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
        "form=softmax": Row("camvid-s.md", "auxiliary-zero-first"),
        "form=logits": Row("first-order.md", "logits"),
        "teacher_map": Row("first-order.md", "recomputed"),
        "near": Row("first-order.md", "edges"),
    }

    weight: float = 10.0
    """Weight of the term; 0 = off."""
    form: Features = "softmax"
    """What the map compares between neighbours, see :func:`segkd.pipeline.first_order.features_of`."""
    teacher_map: Literal["stored", "recomputed"] = "stored"
    """Where the teacher's map comes from: the cache's own, or worked out of the cache's class distributions, which is
    then all that the cache must keep."""
    near: Literal["everywhere", "edges"] = "everywhere"
    """Which cells are compared: all, or those alone that have a neighbour of another class by the teacher's argmax.
    The others then count as equal, so that a weight means the same for both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # What coding leaves of a class that the teacher rules out says nothing of its logit.
        self._require(
            "teacher_map", self.form == "softmax" or self.teacher_map == "stored", '"stored", as form is "logits"'
        )

    def needs(self) -> tuple[Need, ...]:
        soft = Need(target="soft", temperatures=(1.0,) if self.teacher_map == "recomputed" else ())
        stored = [] if self.teacher_map == "recomputed" else [Need(target=self._target)]
        return (*stored, *([soft] if self.teacher_map == "recomputed" or self.near == "edges" else []))

    def crop_values(self, logits_SChw: Tensor, teacher: Mapping[str, Tensor], cells: Cells) -> Tensor:
        student_Shw = first_order_map(features_of(logits_SChw, self.form), cells.exist_Shw)
        if self.teacher_map == "stored":
            teacher_Shw = teacher[self._target][:, 0]
        else:
            teacher_Shw = first_order_map(features_of(teacher["soft"], self.form), cells.exist_Shw)
        values_Shw = (student_Shw - teacher_Shw).square()
        if self.near == "edges":
            values_Shw = values_Shw * class_edges(teacher["soft"].argmax(1), cells.exist_Shw)
        return cells.means(values_Shw)

    @property
    def _target(self) -> str:
        return "first_order" if self.form == "softmax" else "first_order_logits"
