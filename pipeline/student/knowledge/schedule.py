"""How the weight of a knowledge changes over training."""

from __future__ import annotations

from typing import Literal

Schedule = Literal["constant", "rise", "fall"]


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """What a weight is multiplied by at ``step`` (from 0) of ``steps``: above 0, at most 1.

    So what is computed, and needed of the cache, is the same at every step.
    """
    match schedule:
        case "constant":
            return 1.0
        case "rise":
            return (step + 1) / steps
        case "fall":
            return (steps - step) / steps
