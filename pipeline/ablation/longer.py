"""How much longer a student alone may train for what distillation costs: "alone-longer".

Distilling takes the time of stage 1 and of the full arm's steps. The factor is how many steps the student alone takes
in that time, over the run file's steps.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from segkd.pipeline.ablation.arms import FULL, Arm, resolve_arms
from segkd.pipeline.ablation.config import AblateConfig
from segkd.pipeline.ablation.ledger import Ledger
from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.stream import loader
from segkd.pipeline.device import find_device
from segkd.pipeline.evaluation.speed import synchronise
from segkd.pipeline.models.references import described
from segkd.pipeline.student.inputs import open_inputs
from segkd.pipeline.student.runtime import torch_settings
from segkd.pipeline.student.train import begin
from segkd.pipeline.teacher.cache import journal_path
from segkd.storage.errors import ConfigError
from segkd.storage.reader import CacheReader

logger = logging.getLogger(__name__)

WARMUP, STEPS = 3, 20
"""Steps before those that are timed, and those."""
REMEDY = "set ablate.longer to the factor yourself, or leave alone-longer out of ablate.ladder"


def has_longer(run: RunConfig) -> bool:
    """Whether the sweep has an arm that trains for longer."""
    own = (arm.like for arm in run.ablate.arms.values())
    return "alone-longer" in (*run.ablate.ladder, *own)


def stated_longer(run: RunConfig, ledger: Ledger) -> float | None:
    """The factor as the run file sets it, or as the ledger has settled it; None where neither does, or none is needed.

    Raises ConfigError where the two contradict each other.
    """
    if not has_longer(run):
        return None
    fixed, settled = run.ablate.longer, ledger.settled()
    if settled is not None and fixed and settled["longer"] != fixed:
        raise ConfigError(
            f"ablate.longer is {fixed:g}, but {ledger.plan} has settled on {settled['longer']:g}; "
            "leave it out, or name another folder in ablate.ledger"
        )
    return fixed or (None if settled is None else float(settled["longer"]))


def measure_longer(run: RunConfig) -> dict[str, Any]:
    """The factor and what it follows from, JSON-ready. Raises ConfigError where stage 1's time is not known here."""
    try:
        arms = resolve_arms(replace(run, ablate=AblateConfig(ladder=(FULL, "alone"))), None)
    except ConfigError as error:
        raise ConfigError(
            f"the length of alone-longer follows from the time of {FULL}, but {error}; {REMEDY}"
        ) from None
    device = find_device(run.train.device)
    stage_1 = stage_1_seconds(journal_path(Path(run.cache.path)), device, run.train.threads)
    full, alone = (step_seconds(arms[name]) for name in (FULL, "alone"))
    factor = round(max(1.0, (stage_1 / run.train.steps + full) / alone), 1)
    logger.info(
        "alone-longer: %g times the steps; stage 1 took %.1f s, a step %.4f s (%s) and %.4f s (alone)",
        factor,
        stage_1,
        full,
        FULL,
        alone,
    )
    measured = {"stage_1_seconds": stage_1, f"{FULL}_step_seconds": full, "alone_step_seconds": alone}
    return {"longer": factor, "of": circumstances(run), "measured": {**measured, "host": socket.gethostname()}}


def circumstances(run: RunConfig) -> dict[str, Any]:
    """What the factor was measured for, JSON-ready: of anything else it says nothing."""
    student = run.the_student()
    given: dict[str, Any] = {
        "train": {"steps": run.train.steps, "labelled": run.train.labelled, "auxiliary": run.train.auxiliary},
        "augment": {"crop": run.augment.crop},
        "student": {"reference": student.reference, "arguments": student.arguments},
        "cache": dict(CacheReader(run.cache.path, partial=True).spec.fingerprints),
    }
    plain: dict[str, Any] = json.loads(json.dumps(given))
    return plain


def stage_1_seconds(log: Path, device: torch.device, threads: int = 0) -> float:
    """The time that processes have spent writing a cache, by the log beside it, as a student's ``device`` would.

    On a CPU, seconds of a thread over ``threads`` (0: as many as torch takes): as if more threads had made stage 1
    faster by as much, so that its time is never taken for less than it is. Raises ConfigError where there is no log, or
    where it tells of another machine or device, or not of its threads.
    """
    if not log.exists():
        raise ConfigError(f"{log}: there is no log of stage 1, so its time is not known; {REMEDY}")
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.strip()]
    if any("began" not in line or "threads" not in line for line in lines):
        raise ConfigError(f"{log}: an earlier segkd wrote it, which did not count threads; {REMEDY}")
    _require_one(log, "ran on", {line["host"] for line in lines}, "no machine", socket.gethostname())
    _require_one(log, "computed on", {line["device"] for line in lines}, "nothing", str(device))
    # A process is told from another one of its number by when it began.
    last = {(line["process"], line["began"], line["threads"]): line["seconds_since_start"] for line in lines}
    if device.type != "cpu":
        return math.fsum(last.values())
    return math.fsum(seconds * used for (_, _, used), seconds in last.items()) / (threads or torch.get_num_threads())


def _require_one(log: Path, what: str, found: set[str], nothing: str, here: str) -> None:
    others = ", ".join(sorted(found - {here}))
    if others or not found:
        raise ConfigError(
            f"{log}: stage 1 {what} {others or nothing}, and this is {here}, so the times of the two do not compare; "
            f"{REMEDY}"
        )


def step_seconds(arm: Arm) -> float:
    """Median time of a training step of the arm, the wait for its batch included. Trains a network and forgets it."""
    run, config = arm.run, arm.run.train
    device = find_device(config.device)
    with torch_settings(config), torch.random.fork_rng():
        student = described(run.the_student())
        inputs = open_inputs(run, student, distill=arm.distills)
        trainer = begin(student, inputs, config, device)
        seconds = []
        began = time.perf_counter()
        for step, batch in enumerate(loader(inputs.stream, 0, WARMUP + STEPS, config.workers)):
            trainer.step(batch, min(step, config.steps - 1))
            synchronise(device)
            now = time.perf_counter()
            seconds.append(now - began)
            began = now
    return statistics.median(seconds[WARMUP:])
