"""How much longer a student alone may train for what distillation costs: "alone-longer".

Distilling takes the time of stage 1 and of the full arm's steps. The factor is how many steps the student alone takes
in that time, over the run file's steps.
"""

from __future__ import annotations

import json
import logging
import socket
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from segkd.pipeline.ablation.arms import FULL, Arm, resolve_arms
from segkd.pipeline.ablation.config import AblateConfig
from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.stream import loader
from segkd.pipeline.device import find_device
from segkd.pipeline.evaluation.speed import synchronise
from segkd.pipeline.models.references import described
from segkd.pipeline.student.inputs import open_inputs
from segkd.pipeline.student.runtime import torch_settings
from segkd.pipeline.student.train import begin
from segkd.storage.errors import ConfigError

logger = logging.getLogger(__name__)

WARMUP, STEPS = 3, 20
"""Steps before those that are timed, and those."""
REMEDY = "set ablate.longer to the factor yourself, or leave alone-longer out of ablate.ladder"


def measure_longer(run: RunConfig) -> dict[str, Any]:
    """The factor and what it follows from, JSON-ready. Raises ConfigError where stage 1's time is not known here."""
    arms = resolve_arms(replace(run, ablate=AblateConfig(ladder=(FULL, "alone"))), None)
    stage_1 = stage_1_seconds(Path(f"{Path(run.cache.path).resolve()}.log"))
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
    return {"longer": factor, "measured": {**measured, "steps": run.train.steps, "host": socket.gethostname()}}


def stage_1_seconds(log: Path) -> float:
    """The time that processes have spent writing a cache, by the log beside it.

    Raises ConfigError where there is none, or where it tells of another machine.
    """
    if not log.exists():
        raise ConfigError(f"{log}: there is no log of stage 1, so its time is not known; {REMEDY}")
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.strip()]
    others = {line["host"] for line in lines} - {socket.gethostname()}
    if others or not lines:
        machines = ", ".join(sorted(others)) or "no machine"
        raise ConfigError(
            f"{log}: stage 1 ran on {machines}, and this is {socket.gethostname()}, so the times of the two do not "
            f"compare; {REMEDY}"
        )
    total, last = 0.0, dict[int, float]()
    for line in lines:
        process, seconds = line["process"], line["seconds_since_start"]
        before = last.get(process, 0.0)
        # The clock of a process starts anew where its number is used again.
        total += seconds - before if seconds >= before else seconds
        last[process] = seconds
    return total


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
