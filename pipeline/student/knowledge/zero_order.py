"""Zero-order knowledge: the teacher's class distribution in each cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from segkd.pipeline.evidence import Evidence, Row
from segkd.pipeline.resample import LOWEST
from segkd.pipeline.student.knowledge.base import Cells, ClassWeighted, Need


@dataclass(frozen=True, kw_only=True)
class ZeroOrder(ClassWeighted):
    """The teacher's class distribution in each cell (pixel-wise distillation); with form "kl" and a temperature above
    1 this is Hinton's knowledge distillation (2015).

    Mean over the valid cells of a crop. With ``class_weighted`` a cell's value is multiplied by the mean of
    train.class_weights under the teacher's distribution, which moves no minimum: that is the teacher still.
    """

    name: ClassVar[str] = "zero_order"
    evidence: ClassVar[Evidence] = {
        "form=kl": Row("camvid-s.md", "zero"),
        "form=squared": None,
        "temperature": None,
        "class_weighted": Row("camvid-s.md", "zero"),
    }

    weight: float = 1.0
    """Weight of the term; 0 = off."""
    form: Literal["kl", "squared"] = "kl"
    """``kl``: T^2 KL(teacher || student); ``squared``: squared difference of probabilities. Summed over classes."""
    temperature: float = 1.0
    """T: what is compared is softmax(logits / T)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_temperature(self.temperature)

    def needs(self) -> tuple[Need, ...]:
        weighing = (1.0,) if self.class_weighted and self.temperature != 1 else ()
        return (Need(target="soft", temperatures=(self.temperature, *weighing)),)

    def crop_values(self, logits_SChw: Tensor, teacher: Mapping[str, Tensor], cells: Cells) -> Tensor:
        scores_SChw = teacher["soft"] / self.temperature
        if self.form == "squared":
            teacher_SChw = scores_SChw.softmax(1)
            values_Shw = ((logits_SChw / self.temperature).softmax(1) - teacher_SChw).square().sum(1)
        else:
            log_teacher_SChw = scores_SChw.log_softmax(1)
            teacher_SChw = log_teacher_SChw.exp()
            log_student_SChw = (logits_SChw / self.temperature).log_softmax(1)
            # F.kl_div would take the teacher's logarithms again, which is most of its time on a CPU.
            ratios_SChw = log_teacher_SChw.clamp_min(LOWEST) - log_student_SChw
            values_Shw = self.temperature**2 * (teacher_SChw * ratios_SChw).sum(1)
        if self.class_weighted:
            plain_SChw = teacher_SChw if self.temperature == 1 else teacher["soft"].softmax(1)
            values_Shw = values_Shw * cells.class_weights_of(plain_SChw)
        return cells.means(values_Shw)
