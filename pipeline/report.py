"""What folders of training runs hold, side by side: who learned from what, how it went, which settings differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from segkd.pipeline.student.folder import RunFolder, numbers
from segkd.storage.differences import leaves
from segkd.storage.errors import CheckpointError

SELECT = "select"
"""Where a line of metrics.jsonl has the scores of a validation, which is on role select."""

_OF_NO_ARM = ("ablate.", "train.seed", "fingerprints.code")
"""What runs of one group may differ in: what a sweep is told beside its arms, the seed, and segkd itself."""

_NEEDED = ("distill", "student.reference", "train.seed", "train.steps")
_TOLD = ("versions", "device", "threads")
"""What a page says of every run."""

Curve = Mapping[int, float]
"""A measured number by step."""


@dataclass(frozen=True)
class Run:
    """A folder that ``train-student`` wrote, finished or not."""

    name: str
    """Its folder, below the folder that was asked for."""
    description: Mapping[str, Any]
    """What run.json holds."""
    records: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The run file, resolved, and what the cache was made of, by dotted keys."""
        return dict(leaves(self.description["configuration"]))

    @property
    def arm(self) -> dict[str, Any]:
        """The settings that runs of one group have in common."""
        return {key: value for key, value in self.settings.items() if not key.startswith(_OF_NO_ARM)}

    @property
    def teachers(self) -> str:
        """What it learns from, for people. A cache can be learned from without a word of its teacher."""
        if not self.settings["distill"]:
            return "labels alone"
        return f"labels, {self.settings.get('teacher.reference') or self.settings['cache.path']}"

    @property
    def seed(self) -> int:
        """What the run's order and augmentation were drawn by."""
        return int(self.settings["train.seed"])

    @property
    def step(self) -> int:
        """The last step that is logged."""
        return max((int(record["step"]) for record in self.records), default=0)

    @property
    def speed(self) -> float | None:
        """Images a second, the median of the logged steps."""
        seen = [record["images_per_second"] for record in self.records if "images_per_second" in record]
        return median(seen) if seen else None

    @property
    def validation(self) -> tuple[int, Mapping[str, Any]] | None:
        """The last validation: its step and its scores."""
        found = [(int(record["step"]), record[SELECT]) for record in self.records if SELECT in record]
        return found[-1] if found else None

    @cached_property
    def curves(self) -> Mapping[str, Curve]:
        """All that was logged, by its path (``gradient/zero_order``, ``select/miou``)."""
        curves: dict[str, dict[int, float]] = {}
        for record in self.records:
            for name, value in numbers(record):
                curves.setdefault(name, {})[int(record["step"])] = value
        return curves


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: Sequence[Run]

    @property
    def steps(self) -> str:
        """How far the runs are, for people."""
        states = (
            f"{run.step:,}"
            if run.step == run.settings["train.steps"]
            else f"{run.step:,} of {run.settings['train.steps']:,}"
            for run in self.runs
        )
        return ", ".join(dict.fromkeys(states))

    @property
    def speed(self) -> float | None:
        """Images a second, the median of the runs."""
        speeds = [run.speed for run in self.runs if run.speed is not None]
        return median(speeds) if speeds else None

    @property
    def validations(self) -> list[Mapping[str, Any]]:
        """The last validation of those runs that have been validated as late as any."""
        found = [run.validation for run in self.runs if run.validation is not None]
        latest = max((step for step, _ in found), default=0)
        return [scores for step, scores in found if step == latest]

    def mean(self, score: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation of a score of :attr:`validations`; None without any, the latter of one alone."""
        found = [scores[score] for scores in self.validations if scores.get(score) is not None]
        return (fmean(found), stdev(found) if len(found) > 1 else None) if found else None

    def iou(self, name: str) -> float | None:
        """The mean IoU of a class in :attr:`validations`."""
        found = [scores["per_class"].get(name) for scores in self.validations]
        known = [iou for iou in found if iou is not None]
        return fmean(known) if known else None

    def curve(self, name: str) -> Curve:
        """The mean of the runs at the steps that all of them have reached."""
        curves = [run.curves.get(name, {}) for run in self.runs]
        return {step: fmean(curve[step] for curve in curves) for step in sorted(set.intersection(*map(set, curves)))}


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in folders and below them, by name. Raises CheckpointError where there is none or one is damaged."""
    runs = {}
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: there is no such folder; name one that train-student or ablate has written"
            )
        paths = sorted(path.parent for path in folder.rglob("run.json"))
        if not paths:
            raise CheckpointError(
                f"{folder}: no run is in it or below; name a folder that train-student or ablate has written (--output)"
            )
        for path in paths:
            runs[path.resolve()] = _read(path, path.relative_to(folder.parent if len(folders) > 1 else folder))
    return [*runs.values()]


def groups_of(runs: Iterable[Run]) -> list[Group]:
    """Runs that differ in their seed alone, together, in the order of the first of each."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(json.dumps(run.arm, sort_keys=True), []).append(run)
    return [Group(_common_name(members), sorted(members, key=lambda run: run.seed)) for members in together.values()]


def differing_settings(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The settings in which groups differ: key -> the value of each group; None where it has no such setting, which by
    itself is no difference: a run that learns from labels alone has no cache."""
    arms = [group.runs[0].arm for group in groups]
    keys = dict.fromkeys(key for arm in arms for key in arm)
    held = {key: [arm[key] for arm in arms if key in arm] for key in keys}
    differing = [key for key, values in held.items() if any(value != values[0] for value in values)]
    return {key: [arm.get(key) for arm in arms] for key in differing}


def _read(path: Path, name: Path) -> Run:
    folder = RunFolder(path, tensorboard=False)
    try:
        description = json.loads(folder.run.read_text())
        run = Run(name.as_posix(), description, list(folder.records()))
        # Whatever is missing is missed here.
        _ = run.curves, run.step, [description[name] for name in _TOLD], [run.settings[name] for name in _NEEDED]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: run.json or metrics.jsonl is damaged or no run's ({type(error).__name__}: {error}); "
            "leave the folder out, or take another copy"
        ) from None
    return run


def _common_name(runs: Sequence[Run]) -> str:
    """The folders that the names of runs share, or the first's name where they share none."""
    if len(runs) == 1:
        return runs[0].name
    parts = [run.name.split("/") for run in runs]
    shared = [level[0] for level in zip(*parts, strict=False) if len(set(level)) == 1]
    return "/".join(shared) or f"{runs[0].name} and {len(runs) - 1} more"
