"""How a sweep of ablations is described in a run file."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from segkd.storage.errors import ConfigError

BuiltIn = Literal[
    "alone",
    "alone-augmented",
    "alone-longer",
    "label-smoothing",
    "zero",
    "first",
    "zero-first",
    "auxiliary-zero",
    "auxiliary-zero-first",
    "pseudo-labels",
]
LADDER: tuple[BuiltIn, ...] = get_args(BuiltIn)
"""The built-in arms, in the order of the table."""


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """An arm of one's own: a built-in one with other settings."""

    like: BuiltIn = "auxiliary-zero-first"
    """The built-in arm that it changes, and is compared with."""
    set: tuple[str, ...] = ()
    """What it changes, as ``--set`` takes it: ``["knowledge.first_order.weight=30"]``."""


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Arms x seeds at matched compute: what ``segkd ablate`` trains and compares. Other commands leave it aside."""

    ladder: tuple[BuiltIn, ...] = LADDER
    """The built-in arms to train, see docs/ablation.md."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """Arms of one's own by name, a table each, such as ``[ablate.arms.first-30]``."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every arm is trained once with each of these for train.seed."""
    longer: float = 0.0
    """How many times train.steps the arm "alone-longer" is trained for; 0 measures it, once a sweep: as long as stage 1
    and the arm "auxiliary-zero-first" take together."""
    label_smoothing: float = 0.1
    """loss.label_smoothing of the arm "label-smoothing"."""
    upper: str = ""
    """The arm that is taken for an upper bound, such as the same student on all labels: of each arm the table then has
    the share of the gap between "alone" and it that the arm closes."""
    block: int = 10
    """Consecutive frames of a group that the bootstrap over images keeps together."""
    resamples: int = 2000
    """How often it draws."""
    margin: float = 0.5
    """Two arms are equal where the interval of their difference lies within this many mIoU of 0 on either side."""
    ledger: str = ""
    """The folder of records, one small file a finished run; empty: ``ledger`` in the output folder. A run whose record
    is there is not done again, wherever it was done."""
    allow_shared_select: bool = False
    """Whether role select and role report may have images in common; tables then say that they do."""

    def __post_init__(self) -> None:
        if not self.ladder and not self.arms:
            raise ConfigError("ablate.ladder and ablate.arms are both empty; name arms to train")
        for name, values in (("ladder", self.ladder), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ConfigError(f"ablate.{name} names something twice: {list(values)}; name each once")
        if not self.seeds or min(self.seeds) < 0:
            raise ConfigError(f"ablate.seeds is {list(self.seeds)}; give at least one, each 0 or more")
        for name in self.arms:
            if name in LADDER or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ConfigError(
                    f"ablate.arms has an arm {name!r}; its name is made of letters, digits, - and _, "
                    "and is not that of a built-in arm"
                )
        for name, most in (("longer", math.inf), ("margin", math.inf), ("label_smoothing", 1.0)):
            value = getattr(self, name)
            if not (0 <= value <= most and math.isfinite(value)):
                expected = "0 or more" if most == math.inf else f"0 to {most:g}"
                raise ConfigError(f"ablate.{name} is {value}; expected {expected}")
        for name, least in (("block", 1), ("resamples", 100)):
            if getattr(self, name) < least:
                raise ConfigError(f"ablate.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.upper and self.upper not in (*self.ladder, *self.arms):
            raise ConfigError(
                f"ablate.upper is {self.upper!r}, which is no arm of this sweep; "
                f"its arms are {', '.join((*self.ladder, *self.arms))}"
            )
