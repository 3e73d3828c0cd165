"""``segkd ablate``: from a run file to arms x seeds, what of them is done, and their table."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segkd.pipeline.ablation.arms import Arm, resolve_arms
from segkd.pipeline.ablation.gains import Records, gains, rows
from segkd.pipeline.ablation.identity import Held, identity_of, read_held
from segkd.pipeline.ablation.ledger import Ledger, RunRecord
from segkd.pipeline.ablation.longer import circumstances, has_longer, measure_longer, stated_longer
from segkd.pipeline.ablation.processes import run_jobs
from segkd.pipeline.ablation.table import Results
from segkd.pipeline.ablation.worker import Job
from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.contamination import Twins, find_twins, require_apart
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import SCORED, DataSource, Role, with_role
from segkd.pipeline.progress import SILENT, Progress
from segkd.pipeline.settings import to_dict
from segkd.pipeline.student.checkpoint import write_atomically
from segkd.pipeline.student.leaks import beginnings, find_label_leaks
from segkd.pipeline.student.live import open_live_teacher
from segkd.pipeline.teacher.division import Share
from segkd.pipeline.teacher.named import require_named_teacher
from segkd.storage.differences import difference, differing
from segkd.storage.errors import CheckpointError, ConfigError, ContaminationError, DataError
from segkd.storage.locks import locked
from segkd.storage.reader import CacheReader
from segkd.storage.spec import CacheSpec

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
    opened = _Opened(progress)
    source, _ = opened.data(run)
    stated = resolve_arms(run, run.ablate.longer or None).values()
    stamps = (*_check_roles(run, stated, opened), *_check_labels(stated, opened))
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


class _Opened:
    """Data sets and caches of a sweep, each opened once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._data: dict[str, tuple[DataSource, Held]] = {}
        self._fingerprints: dict[str, Mapping[str, str]] = {}

    def data(self, run: RunConfig) -> tuple[DataSource, Held]:
        """The run's data set and what its samples hold."""
        key = json.dumps(to_dict(run.data), sort_keys=True)
        if key not in self._data:
            source = open_data(run.data)
            self._data[key] = source, read_held(source, self._progress)
        return self._data[key]

    def marked(self, arm: Arm, base: RunConfig) -> Arm:
        """The arm, with what its samples have otherwise than the run file's among what is not matched.

        Raises ConfigError for an arm that reports on other samples.
        """
        drawn = [Role.TRAIN, *([Role.AUXILIARY] if arm.run.train.auxiliary else [])]
        (before, held_before), (after, held_after) = self.data(base), self.data(arm.run)
        others = [
            role for role in (*drawn, Role.REPORT) if held_before.digest(before, role) != held_after.digest(after, role)
        ]
        if Role.REPORT in others:
            raise ConfigError(
                f"arm {arm.name} reports on other samples than the run file, so nothing compares with it; "
                "leave role report as it is"
            )
        marks = (
            difference(f"samples of role {role}", len(with_role(before, role)), len(with_role(after, role)))
            for role in others
        )
        return replace(arm, unmatched=(*arm.unmatched, *marks))

    def identity(self, arm: Arm, run: RunConfig) -> dict[str, Any]:
        """Of a run of the arm."""
        source, held = self.data(run)
        fingerprints = self._teacher(run, source) if arm.distills else {}
        return identity_of(arm, run, source, held, fingerprints)

    def _teacher(self, run: RunConfig, source: DataSource) -> Mapping[str, str]:
        """Fingerprints of what the run is taught by: its cache, or the teacher itself."""
        cached = run.train.teacher_view == "cache"
        key = run.cache.path if cached else json.dumps([to_dict(run.the_teacher()), run.cache.precision])
        if key not in self._fingerprints:
            opened = _cache_of(run) if cached else open_live_teacher(run, source.classes, ())
            self._fingerprints[key] = opened.fingerprints
        return self._fingerprints[key]


def _cache_of(run: RunConfig) -> CacheSpec:
    cache = CacheReader(run.cache.path)
    require_named_teacher(cache.spec, run.teacher, cache.path)
    return cache.spec


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


def _check_roles(run: RunConfig, arms: Collection[Arm], opened: _Opened) -> Iterator[str]:
    """What tables must say of the roles, of the run file's data and of arms' own, and of which arms.

    Raises DataError without samples to report on, ContaminationError.
    """
    source, held = opened.data(run)
    if not with_role(source, Role.REPORT):
        raise DataError("the data have no sample of role report, so there is nothing to compare arms on; give it some")
    found: dict[tuple[int, bool], Twins] = {}
    of: dict[str, list[str]] = {}
    for arm in arms:
        source, held = opened.data(arm.run)
        drawn = arm.run.train.auxiliary > 0
        if (id(source), drawn) not in found:
            roles = (*SCORED, Role.TRAIN, *([Role.AUXILIARY] if drawn else []))
            found[id(source), drawn] = find_twins(with_role(source, *roles), held.contents)
        twins = found[id(source), drawn]
        for stamp in (_stamp_of_learned(twins, arm.run, source), _stamp_of_shared(twins, run, source)):
            if stamp is not None:
                of.setdefault(stamp, []).append(arm.name)
    for stamp, named in of.items():
        yield stamp if len(named) == len(arms) else f"{', '.join(named)}: {stamp}"


def _stamp_of_learned(twins: Twins, run: RunConfig, source: DataSource) -> str | None:
    """What is learned from and scored on. Raises ContaminationError where that is refused."""
    found = twins.contaminated
    if found and run.data.compare_contents == "refuse":
        require_apart(twins, source, "refuse")
    scored = len(with_role(source, *SCORED))
    return (
        f"{len(found)} of {scored} images of roles select and report are learned from: their scores are too good."
        if found
        else None
    )


def _stamp_of_shared(twins: Twins, run: RunConfig, source: DataSource) -> str | None:
    """What is selected on and reported on."""
    shared = twins.shared
    if shared and not run.ablate.allow_shared_select:
        first = shared[0]
        raise ContaminationError(
            f"role select and role report share {len(shared)} images, the first {first.other.id!r} and "
            f"{first.sample.id!r}: what is chosen on report is no result on report; remove them from one of the roles, "
            "or set ablate.allow_shared_select = true, and every table will say so"
        )
    report = len(with_role(source, Role.REPORT))
    return (
        f"Role select and role report share {len(shared)} of {report} images: "
        "what was chosen was chosen on what is reported."
        if shared
        else None
    )


def _check_labels(arms: Iterable[Arm], opened: _Opened) -> tuple[str, ...]:
    """What tables must say of the labels that networks have seen before the sweep.

    Raises ContaminationError where a teacher, or what a student begins with, has learned a label that it must not know.
    """
    unknown: dict[str, None] = {}
    checked = set()
    for arm in arms:
        source, held = opened.data(arm.run)
        teacher = list(beginnings(arm.run.teacher if arm.distills else None))
        if arm.distills and not teacher:
            named = "that wrote the cache" if arm.run.teacher is None else arm.run.teacher.reference
            unknown[f"the teacher {named} is no checkpoint that is here"] = None
        for path in (*teacher, *beginnings(arm.run.the_student())):
            if (path, id(source)) in checked:
                continue
            checked.add((path, id(source)))
            try:
                leaks = find_label_leaks(path, source, held.contents)
            except CheckpointError as error:
                unknown[str(error)] = None
                continue
            if leaks:
                raise ContaminationError(leaks.describe(source))
    return tuple(f"Which labels were learned before is not known: {why}." for why in unknown)
