"""``segkd ablate``: from a run file to arms x seeds, what of them is done, and their table."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segkd.pipeline.ablation.arms import Arm, resolve_arms
from segkd.pipeline.ablation.gains import Records, gains, rows
from segkd.pipeline.ablation.ledger import Ledger, RunRecord
from segkd.pipeline.ablation.longer import circumstances, has_longer, measure_longer, stated_longer
from segkd.pipeline.ablation.opened import Opened
from segkd.pipeline.ablation.processes import run_jobs
from segkd.pipeline.ablation.stamps import check_labels, check_roles
from segkd.pipeline.ablation.table import Results
from segkd.pipeline.ablation.worker import Job
from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.sample import Role, with_role
from segkd.pipeline.progress import SILENT, Progress
from segkd.pipeline.student.checkpoint import write_atomically
from segkd.pipeline.teacher.division import Share
from segkd.storage.differences import differing
from segkd.storage.errors import ConfigError
from segkd.storage.locks import locked

logger = logging.getLogger("segkd")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep's runs, and which of them are done."""

    run: RunConfig
    output: Path
    arms: Mapping[str, Arm]
    jobs: tuple[Job, ...]
    """All runs: every arm with the first seed, then with the second."""
    groups: tuple[str, ...]
    """The sequence or scene of each image of role report, as the run file groups them now."""
    records: Records
    """Of those that are done."""
    stamps: tuple[str, ...]
    """What every table must say."""
    unmeasured: bool
    """Whether "alone-longer" is left out because its length is measured when the sweep begins."""

    def state(self, job: Job) -> str:
        """``done``, ``begun`` or ``pending``."""
        if job.seed in self.records.get(job.arm, {}):
            return "done"
        return "begun" if (job.folder / "last.safetensors").exists() else "pending"

    def listing(self) -> dict[str, Any]:
        """The runs, for ``--print-plan``."""
        return {
            "arms": {
                arm.name: {"set": list(arm.settings), "unmatched": list(arm.unmatched)} for arm in self.arms.values()
            },
            "runs": [
                {"number": number, "arm": job.arm, "seed": job.seed, "state": self.state(job)}
                for number, job in self._numbered()
            ],
            "unmeasured": ["alone-longer"] if self.unmeasured else [],
        }

    def lines(self) -> list[str]:
        """The same for people."""
        lines = []
        for arm in self.arms.values():
            settings = " ".join(f"--set {shlex.quote(text)}" for text in arm.settings)
            lines.append(f"{arm.name}: {settings or 'the run file as it is'}")
            lines += [f"  not at matched compute: {what}" for what in arm.unmatched]
        if self.unmeasured:
            lines.append("alone-longer: how much longer is measured when the sweep begins; then runs are numbered")
        lines += [f"{'' if number is None else number:4}  {self.state(job):8}{job}" for number, job in self._numbered()]
        done = sum(self.state(job) == "done" for job in self.jobs)
        return [*lines, f"{done} of {len(self.jobs)} runs are done"]

    def _numbered(self) -> Iterator[tuple[int | None, Job]]:
        """The runs with the numbers by which tasks share them; without, while a run of each seed is still to come."""
        for number, job in enumerate(self.jobs):
            yield None if self.unmeasured else number, job


def plan_sweep(run: RunConfig, output: str | Path, *, measure: bool = True, progress: Progress = SILENT) -> Sweep:
    """The runs of a sweep. With ``measure``, what is settled once a sweep is settled if it is not yet.

    Raises ConfigError for arms that the run file cannot make, ContaminationError where roles share images that must
    not, RecordError for a record of another run, and what opening data and caches raises.
    """
    output = Path(output)
    ledger = Ledger(run.ablate.ledger or output / "ledger")
    opened = Opened(progress)
    source, _ = opened.data(run)
    stated = resolve_arms(run, run.ablate.longer or None).values()
    stamps = (*check_roles(run, stated, opened), *check_labels(stated, opened))
    longer = _longer(run, ledger, measure)
    arms = {name: opened.marked(arm, run) for name, arm in resolve_arms(run, longer).items()}
    for arm in arms.values():
        if arm.like is not None and arm.like not in arms:
            logger.warning(
                "arm %s is compared with nothing: %s, which it is like, is not in ablate.ladder", arm.name, arm.like
            )
    groups = tuple(sample.group for sample in with_role(source, Role.REPORT))
    jobs = []
    for seed in run.ablate.seeds:
        for arm in arms.values():
            seeded = replace(arm.run, train=replace(arm.run.train, seed=seed))
            jobs.append(
                Job(
                    arm=arm.name,
                    seed=seed,
                    run=seeded,
                    distill=arm.distills,
                    identity=opened.identity(arm, seeded),
                    folder=output / arm.name / f"seed-{seed}",
                    ledger=ledger.folder,
                )
            )
    return Sweep(
        run=run,
        output=output,
        arms=arms,
        jobs=tuple(jobs),
        groups=groups,
        records=_records(jobs, groups),
        stamps=stamps,
        unmeasured=longer is None and has_longer(run),
    )


def ablate(sweep: Sweep, *, processes: int = 1, share: Share | None = None, progress: Progress = SILENT) -> Results:
    """Does what of a sweep is not done, or this task's share of it, and compares all that is done by then.

    Writes ``table.md`` and ``results.json`` into the output folder. Raises KeyboardInterrupt with how to go on.
    """
    mine = [job for number, job in enumerate(sweep.jobs) if share is None or share.owns(number)]
    left = [job for job in mine if sweep.state(job) != "done"]
    if share is not None:
        logger.info("%s (%s): %d of %d runs, %d to do", share, share.origin, len(mine), len(sweep.jobs), len(left))
    try:
        failures = run_jobs(left, processes=processes, progress=progress, done=len(mine) - len(left))
    except KeyboardInterrupt:
        _compare(sweep, {})
        raise
    return _compare(sweep, failures)


def _compare(sweep: Sweep, failures: Mapping[Job, str]) -> Results:
    """Writes the tables of all that is done, by whatever task; of tasks that end together, one after the other."""
    sweep.output.mkdir(parents=True, exist_ok=True)
    with locked(sweep.output, alone=True, wait=True):
        now = replace(sweep, records=_records(sweep.jobs, sweep.groups))
        results = Results(
            rows=tuple(rows(now.arms, now.records, now.run.ablate)),
            gains=tuple(gains(now.arms, now.records, now.run.ablate)),
            records=tuple(record for of_arm in now.records.values() for record in of_arm.values()),
            config=now.run.ablate,
            stamps=now.stamps,
            failures={str(job): why for job, why in failures.items()},
            missing=tuple(str(job) for job in now.jobs if now.state(job) != "done"),
        )
        write_atomically(sweep.output / "results.json", (json.dumps(results.to_dict(), indent=1) + "\n").encode())
        write_atomically(sweep.output / "table.md", (results.markdown() + "\n").encode())
    return results


def _records(jobs: Sequence[Job], groups: tuple[str, ...]) -> Records:
    """What the ledger has of these runs. Raises RecordError for a record of another run.

    How images are grouped decides no result and is in no identity, but it decides an interval: today's ``groups``
    count.
    """
    records: dict[str, dict[int, RunRecord]] = {}
    for job in jobs:
        record = Ledger(job.ledger).load(job.arm, job.seed, job.identity)
        if record is not None:
            images = replace(record.images, groups=groups)
            records.setdefault(job.arm, {})[job.seed] = replace(record, images=images)
    return records


def _longer(run: RunConfig, ledger: Ledger, measure: bool) -> float | None:
    """The factor of "alone-longer": as set, or as settled, or as it is measured now; None without any."""
    if not has_longer(run):
        return None
    stated, settled = stated_longer(run, ledger), ledger.settled()
    if run.ablate.longer:
        return stated
    if settled is not None and (others := differing(settled["of"], circumstances(run))):
        raise ConfigError(
            f"{ledger.plan} has the length of alone-longer for another run, which differs in {', '.join(others)}; "
            "name another folder in ablate.ledger, remove the file to measure anew, or set ablate.longer"
        )
    if settled is None and measure:
        settled = ledger.settle(measure_longer(run))
    return None if settled is None else float(settled["longer"])
