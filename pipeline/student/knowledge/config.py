"""All kinds of knowledge, one table of the run file each."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from segkd.pipeline.student.knowledge.base import Knowledge
from segkd.pipeline.student.knowledge.channel_wise import ChannelWise
from segkd.pipeline.student.knowledge.dist import Dist
from segkd.pipeline.student.knowledge.first_order import FirstOrder
from segkd.pipeline.student.knowledge.pseudo_labels import PseudoLabels
from segkd.pipeline.student.knowledge.zero_order import ZeroOrder


@dataclass(frozen=True, kw_only=True)
class KnowledgeConfig:
    """What the student learns of the teacher. A kind of weight 0 is never computed, and its targets are not needed."""

    zero_order: ZeroOrder = field(default_factory=ZeroOrder)
    """The teacher's class distributions."""
    first_order: FirstOrder = field(default_factory=FirstOrder)
    """How its output differs between neighbours."""
    dist: Dist = field(default_factory=Dist)
    """DIST, for comparison."""
    channel_wise: ChannelWise = field(default_factory=ChannelWise)
    """Channel-wise distillation, for comparison."""
    pseudo_labels: PseudoLabels = field(default_factory=PseudoLabels)
    """The teacher's argmax as labels, for comparison."""

    def kinds(self) -> tuple[Knowledge, ...]:
        """All of them, in their order."""
        return tuple(getattr(self, kind.name) for kind in fields(self))
