"""CWD: where in a crop each class is likely (Shu et al., ICCV 2021).

Shapes: N crops; C classes; S sources with windows of h,w teacher cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.evidence import Evidence
from segkd.pipeline.student.knowledge.base import Cells, Knowledge, Need

RULED_OUT = -90.0
"""Log-probabilities below this are what a teacher rules out. They are finite in a cache, -65504 and less, or about -100
where views were averaged, and what cells differ in there is nothing that the teacher said."""


@dataclass(frozen=True, kw_only=True)
class ChannelWise(Knowledge):
    """Channel-wise distillation (Shu et al., 2021): T^2 / C times the sum over classes of KL(teacher || student) of
    softmax(log-probability / T) over the valid cells of a crop. It needs a cache of profile "exact".

    The authors compare logits. The cache has log-probabilities, so both sides are log-probabilities here: logits, less
    in each cell what all of its classes share. (They take T = 4 and weigh the term by 3.)
    """

    name: ClassVar[str] = "channel_wise"
    evidence: ClassVar[Evidence] = {"": None}

    temperature: float = 1.0
    """T of the softmax over the cells."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_temperature(self.temperature)

    def needs(self) -> tuple[Need, ...]:
        why = "compares where a class is likely however unlikely it is, and codes hold no small probabilities"
        return (Need(target="soft", exact=why),)

    def crop_values(self, logits_SChw: Tensor, teacher: Mapping[str, Tensor], cells: Cells) -> Tensor:
        student_SChw = _log_shares(logits_SChw.log_softmax(1) / self.temperature, cells)
        soft_SChw = teacher["soft"].masked_fill(teacher["soft"] < RULED_OUT, -torch.inf)
        teacher_SChw = _log_shares(soft_SChw / self.temperature, cells).exp()
        divergence_NC = cells.sums(F.kl_div(student_SChw, teacher_SChw, reduction="none"))
        return self.temperature**2 * divergence_NC.mean(1)


def _log_shares(scores_SChw: Tensor, cells: Cells) -> Tensor:
    """Log-softmax over the valid cells of a crop, all its sources together; 0 where a cell is not valid.

    A class that is -inf in all of them has no share anywhere (-inf), and with it nothing to teach.
    """
    valid_S1hw = cells.valid_Shw[:, None]
    top_SC = scores_SChw.detach().masked_fill(~valid_S1hw, -torch.inf).amax((2, 3))
    index_SC = cells.crop_S[:, None].expand_as(top_SC)
    top_NC = top_SC.new_full((cells.crops, top_SC.shape[1]), -torch.inf).scatter_reduce(0, index_SC, top_SC, "amax")
    scores_SChw = scores_SChw - cells.spread(top_NC.where(top_NC.isfinite(), 0.0))
    scores_SChw = scores_SChw.masked_fill(~valid_S1hw, 0.0)
    totals_NC = cells.sums(scores_SChw.exp())
    # A total is 1 at least, unless there is nothing to add up.
    return (scores_SChw - cells.spread(totals_NC.clamp_min(0.5).log())).masked_fill(~valid_S1hw, 0.0)
