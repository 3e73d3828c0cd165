"""Which of a plan's units a task owns, when several share the work without a coordinator.

Every task plans alike, so it knows its units by their numbers: task I of N takes those with ``number % N == I``. Which
task wrote what leaves no trace in a cache, so a run may be divided anew, or not at all, whenever it is taken up again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from segkd.pipeline import processes
from segkd.storage.errors import ConfigError
from segkd.storage.layout import Unit

TASKS_VARIABLE = "SEGKD_TASKS"
"""How many tasks a Kubernetes job has: an indexed job tells its pods their number, but not how many there are."""
OFF = "off"
"""The task that is all of them, whatever the environment says."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Task ``number`` (from 0) of ``tasks``."""

    number: int
    tasks: int
    origin: str
    """What said so, for messages."""

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.tasks:
            raise ConfigError(
                f"{self.origin}: there is no task {self.number} of {self.tasks}; expected I/N with I from 0 to N-1"
            )

    def __str__(self) -> str:
        return f"task {self.number}/{self.tasks}"

    def owns(self, unit: int) -> bool:
        """Whether the unit of that number is this task's to write."""
        return unit % self.tasks == self.number

    def of(self, units: Iterable[Unit]) -> list[Unit]:
        """Its part of the units."""
        return [unit for unit in units if self.owns(unit.number)]


def find_share(option: str | None, environment: Mapping[str, str]) -> Share | None:
    """The task that ``--task`` names, or else the one that Slurm or Kubernetes made this process; None for all units.

    Where torchrun has started several processes, each has its part of that. ``option``: ``I/N``, ``off`` or None.
    Raises ConfigError for another one, and for an array without a usable number.
    """
    if option == OFF:
        return None
    share = _of_task(option, environment)
    if processes.started(environment) == 1:
        return share
    rank, among = _number(environment, "RANK"), processes.started(environment)
    origin = "torchrun's RANK and WORLD_SIZE"
    if share is None:
        return Share(number=rank, tasks=among, origin=origin)
    return Share(number=share.number * among + rank, tasks=share.tasks * among, origin=f"{share.origin}, with {origin}")


def _of_task(option: str | None, environment: Mapping[str, str]) -> Share | None:
    if option is not None:
        matched = re.fullmatch(r"(\d+)/(\d+)", option)
        if not matched:
            raise ConfigError(f"--task {option!r}: expected I/N with I from 0 to N-1, such as 0/8, or {OFF}")
        return Share(number=int(matched[1]), tasks=int(matched[2]), origin=f"--task {option}")
    if "SLURM_ARRAY_TASK_ID" in environment:
        return _of_slurm(environment)
    if "JOB_COMPLETION_INDEX" in environment:
        return _of_kubernetes(environment)
    return None


def _of_slurm(environment: Mapping[str, str]) -> Share:
    number, first, last, step, count = (
        _number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "STEP", "COUNT")
    )
    if step < 1 or (last - first) // step + 1 != count or (number - first) % step:
        raise ConfigError(
            f"the Slurm array of {count} tasks from {first} to {last} has gaps, so that a task cannot tell its part; "
            "submit a whole range (finished units are not done again), or give --task I/N"
        )
    return Share(number=(number - first) // step, tasks=count, origin="Slurm's array variables")


def _of_kubernetes(environment: Mapping[str, str]) -> Share:
    if TASKS_VARIABLE not in environment:
        raise ConfigError(
            f"JOB_COMPLETION_INDEX is set, but not how many pods the job has: set {TASKS_VARIABLE} to its completions, "
            f"or give --task I/N (--task {OFF} for all units)"
        )
    return Share(
        number=_number(environment, "JOB_COMPLETION_INDEX"),
        tasks=_number(environment, TASKS_VARIABLE),
        origin=f"JOB_COMPLETION_INDEX and {TASKS_VARIABLE}",
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment.get(name, ""))
    except ValueError:
        raise ConfigError(
            f"{name} is {environment.get(name)!r}, expected a number; give --task I/N (--task {OFF} for all units)"
        ) from None
