"""How the weight of a knowledge changes over training."""

from __future__ import annotations

from dataclasses import dataclass

from segkd.storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The weight rises linearly to its value, stays, and falls linearly; as it stands it is constant.

    Durations are shares of train.steps.
    """

    rise: float = 0.0
    """The share over which the weight rises from almost nothing, from the first step on; 0 = there from the start."""
    fall: float = 0.0
    """The share over which it falls to almost nothing, up to the last step; 0 = there to the end."""

    def __post_init__(self) -> None:
        for name in ("rise", "fall"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share of the steps, 0 to 1")
        if self.rise + self.fall > 1:
            raise ConfigError(
                f"rise is {self.rise} and fall {self.fall}, more than all steps together; shorten one of them"
            )

    def factor(self, step: int, steps: int) -> float:
        """What the weight is multiplied by at ``step`` (from 0) of ``steps``: above 0, at most 1."""
        rise, fall = self.rise * steps, self.fall * steps
        risen = (step + 1) / rise if rise else 1.0
        left = (steps - step) / fall if fall else 1.0
        return min(risen, left, 1.0)
