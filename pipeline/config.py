"""A run: everything that a run file describes, one table a component."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from segkd.pipeline.ablation.config import AblateConfig
from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.transforms import AugmentConfig
from segkd.pipeline.models.network import Described, NetworkConfig, TeacherConfig
from segkd.pipeline.run_file import read_toml
from segkd.pipeline.settings import parse
from segkd.pipeline.student.config import TrainConfig
from segkd.pipeline.student.knowledge.config import KnowledgeConfig
from segkd.pipeline.student.losses import LossConfig
from segkd.pipeline.teacher.config import CacheConfig
from segkd.storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run file: which data, which teacher cached how, which student trained how."""

    data: DataConfig
    """The images, labels and classes."""
    teacher: TeacherConfig | None = None
    """The network that stage 1 asks."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """What stage 1 keeps of its answers, and where."""
    student: NetworkConfig | None = None
    """The network that stage 2 trains."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What it learns from the labels."""
    knowledge: KnowledgeConfig = field(default_factory=KnowledgeConfig)
    """What it learns of the teacher."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """The crops that it sees."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimiser, schedule, batches, checkpoints."""
    ablate: AblateConfig = field(default_factory=AblateConfig)
    """What ``segkd ablate`` compares."""

    def the_teacher(self) -> TeacherConfig:
        """The teacher. Raises ConfigError where none is described."""
        return _described("teacher", self.teacher)

    def the_student(self) -> NetworkConfig:
        """The student. Raises ConfigError where none is described."""
        return _described("student", self.student)


def _described(table: str, network: Described | None) -> Described:
    if network is None:
        raise ConfigError(
            f"the run has no {table}: expected a table [{table}] with the network's reference; "
            f"add it to the run file, or give --set {table}.reference=NAME"
        )
    return network


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a file describes (none: the defaults) with ``key=value`` overrides. Raises ConfigError."""
    if path is None:
        return parse(RunConfig, {}, overrides=overrides)
    file = read_toml(path)
    return parse(RunConfig, file.tables, place=file.place, overrides=overrides)
