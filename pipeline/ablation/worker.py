"""One run of a sweep: training, scores, the record; by itself in a process of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segkd.pipeline.ablation.ledger import Images, Ledger, RunRecord, Seen
from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import DataSource, Role, Sample, with_role
from segkd.pipeline.device import find_device
from segkd.pipeline.evaluation.evaluate import Cost, checkpoint_predictor, evaluate_network
from segkd.pipeline.evaluation.metrics import ConfusionMatrix
from segkd.pipeline.evaluation.scores import Scores
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.models.references import BUILT_IN
from segkd.pipeline.processes import take_device
from segkd.pipeline.progress import Progress
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.folder import RunFolder
from segkd.pipeline.student.runtime import torch_settings
from segkd.pipeline.student.train import train
from segkd.pipeline.teacher.fingerprints import content_digest
from segkd.storage.errors import RecordError, SegkdError
from segkd.storage.locks import locked

STOPPED = 130
"""Exit status of a run that was asked to stop, and has saved what it had."""

logger = logging.getLogger("segkd")


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A run to do."""

    arm: str
    seed: int
    run: RunConfig
    distill: bool
    identity: dict[str, Any]
    folder: Path
    """Of its checkpoints; its log stands beside it."""
    ledger: Path

    @property
    def log(self) -> Path:
        """What it says while it is at work."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def perform(job: Job) -> RunRecord:
    """Trains, or goes on with training, scores and records; what is recorded is only read.

    Raises RecordError where another process is at it, and what training and evaluation raise.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(job.folder, alone=True):
            record = Ledger(job.ledger).load(job.arm, job.seed, job.identity)
            if record is None:
                # For the log: a run's own process has no terminal.
                summary = train(job.run, job.folder, distill=job.distill, resume=True, progress=Progress("lines"))
                with torch_settings(job.run.train):
                    record = _record(job, damaged=len(summary["damaged"]))
                Ledger(job.ledger).save(record)
    except BlockingIOError:
        raise RecordError(
            f"{job.folder}: another process is at this run; leave it to that one, or stop it and go on here"
        ) from None
    logger.info("%s: mIoU %s on role report", job, record.report["miou"])
    return record


def perform_in_process(job: Job, verbosity: int) -> None:
    """The process of one run: what it says goes to the job's log. It ends with 0, 1 or :data:`STOPPED`."""
    # A terminal's Ctrl-C is for the sweep, which asks its runs to stop, once. Until here it was held back.
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    job.log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.setLevel(verbosity)
    try:
        take_device("train.device", job.run.train.device)
        perform(job)
    except KeyboardInterrupt as stopped:
        print(f"Stopped: {stopped}", file=sys.stderr)
        sys.exit(STOPPED)
    except SegkdError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def _record(job: Job, *, damaged: int) -> RunRecord:
    """What a run that is trained comes to."""
    run, folder = job.run, RunFolder(job.folder, tensorboard=False)
    source = open_data(run.data)
    reference = checkpoint.load(folder.last)[0].network.reference
    predictor, _ = checkpoint_predictor(
        folder.last,
        source.classes,
        # What is not built in, the run file has named itself.
        reference=None if reference in BUILT_IN else reference,
        device=find_device(run.train.device),
    )
    report, images, cost = _on_report(predictor, source)
    select = evaluate_network(predictor, source, Role.SELECT).scores if with_role(source, Role.SELECT) else None
    document = json.loads(folder.run.read_text())
    return RunRecord(
        arm=job.arm,
        seed=job.seed,
        digest=content_digest(job.identity),
        identity=job.identity,
        report=report.to_dict(),
        select=None if select is None else select.to_dict(),
        images=images,
        steps=run.train.steps,
        seen=Seen(labelled=run.train.steps * run.train.labelled, auxiliary=run.train.steps * run.train.auxiliary),
        damaged=damaged,
        cost=json.loads(json.dumps(asdict(cost))),
        seconds=training_seconds(folder, run.train.labelled + run.train.auxiliary),
        versions=document["versions"],
        device=document["device"],
        threads=document["threads"],
        curve={str(line["step"]): line["select"]["miou"] for line in folder.records() if "select" in line},
    )


def _on_report(predictor: Predictor, source: DataSource) -> tuple[Scores, Images, Cost]:
    scored: list[tuple[Sample, ConfusionMatrix]] = []
    found = evaluate_network(
        predictor,
        source,
        Role.REPORT,
        speed=True,
        on_sample=lambda sample, confusion: scored.append((sample, confusion)),
    )
    assert found.cost is not None, "a network has a cost"
    images = Images.of(
        [sample.id for sample, _ in scored],
        [sample.group for sample, _ in scored],
        source.classes.names,
        [confusion.counts for _, confusion in scored],
    )
    return found.scores, images, found.cost


def training_seconds(folder: RunFolder, images: int) -> float:
    """The time of all steps by the rates that the run has logged, which outlive an interruption."""
    seconds, last = 0.0, 0
    for line in folder.records():
        if "images_per_second" in line:
            seconds += (line["step"] - last) * images / line["images_per_second"]
            last = line["step"]
    return seconds
