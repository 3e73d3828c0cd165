"""The tables of a sweep from its records alone: neither data nor cache nor teacher have to be here.

Settings and student are compared with the run file. What only files can tell (samples, teacher, coding, what a student
begins with) is compared among the records, and the tables say which teacher they are of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from segkd.pipeline.ablation.arms import Arm, effective, resolve_arms
from segkd.pipeline.ablation.gains import Records, gains, rows
from segkd.pipeline.ablation.identity import differences, finite
from segkd.pipeline.ablation.ledger import Ledger, RunRecord
from segkd.pipeline.ablation.longer import has_longer, stated_longer
from segkd.pipeline.ablation.table import Results
from segkd.pipeline.config import RunConfig
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.models.references import BUILT_IN
from segkd.pipeline.settings import to_dict
from segkd.pipeline.teacher.fingerprints import code_of, content_digest
from segkd.pipeline.teacher.named import described_leaves, is_file_of
from segkd.storage.differences import difference, leaves
from segkd.storage.errors import RecordError


def recorded(run: RunConfig, ledger: Ledger) -> Results:
    """The tables of what a ledger has of the run file's arms and seeds.

    Raises ConfigError for arms that the run file cannot make, and RecordError where there is no record, for one of
    another run, and for two that do not belong together.
    """
    longer = stated_longer(run, ledger)
    arms = resolve_arms(run, longer)
    records: dict[str, dict[int, RunRecord]] = {}
    missing = ["alone-longer, whose length is not settled"] if longer is None and has_longer(run) else []
    for seed in run.ablate.seeds:
        for arm in arms.values():
            record = ledger.read(arm.name, seed)
            if record is None:
                missing.append(f"{arm.name}, seed {seed}")
                continue
            _require_of_arm(ledger.path(arm.name, seed), record, arm, seed)
            records.setdefault(arm.name, {})[seed] = record
    if not records:
        raise RecordError(f"{ledger.folder} has no record of the run file's arms and seeds; check ablate.ledger")
    _require_together(ledger, arms, records)
    marked = {name: _marked(arm, run, arms, records) for name, arm in arms.items()}
    return Results(
        rows=tuple(rows(marked, records, run.ablate)),
        gains=tuple(gains(marked, records, run.ablate)),
        records=tuple(record for of_arm in records.values() for record in of_arm.values()),
        config=run.ablate,
        stamps=tuple(_stamps(run, arms, records)),
        failures={},
        missing=tuple(missing),
    )


def _require_of_arm(path: Path, record: RunRecord, arm: Arm, seed: int) -> None:
    """Raises RecordError for a record of a run with other settings, or of another student."""
    seeded = replace(arm.run, train=replace(arm.run.train, seed=seed))
    held = {name: record.identity[name] for name in ("distill", "settings")}
    now = {"distill": arm.distills, "settings": effective(seeded)}
    different = differences(held, finite(json.loads(json.dumps(now))))
    different += _of_student(arm.run.the_student(), record.identity["student"])
    if different:
        raise RecordError(
            f"{path} is the record of a run that differs in {', '.join(different)}; "
            "name the ledger of this run file in ablate.ledger"
        )


def _of_student(student: NetworkConfig, kept: Mapping[str, Any]) -> Iterator[str]:
    """In what a run file's student differs from a record's, as far as can be told without its files."""
    held = dict(leaves({name: value for name, value in kept.items() if name != "code"}))
    now = finite(described_leaves(student))
    # A module or a checkpoint may say of itself what a run file leaves at its default.
    defaults = {} if student.reference in BUILT_IN else described_leaves(NetworkConfig(reference=""))
    defaults.pop("init", None)
    for key in sorted(held.keys() | now.keys()):
        before, after = held.get(key), now.get(key)
        left_out = key in defaults and after == defaults[key]
        if before != after and not left_out and not is_file_of(after, before):
            yield difference(f"student.{key}", before, after)


def _require_together(ledger: Ledger, arms: Mapping[str, Arm], records: Records) -> None:
    """Raises RecordError for two records that should be of the same files and are not, or that are of one run."""
    first: dict[str, tuple[Path, Any]] = {}
    runs: dict[str, Path] = {}
    for name, by_seed in records.items():
        for seed, record in by_seed.items():
            path = ledger.path(name, seed)
            other = runs.setdefault(record.digest, path)
            if other != path:
                raise RecordError(f"{path} and {other} are of one and the same run; restore them, or remove one")
            for what, held in _shared(arms[name], record):
                before, known = first.setdefault(what, (path, held))
                if known != held:
                    raise RecordError(
                        f"{path} and {before} are of runs that differ in {', '.join(differences(known, held))}, so "
                        "nothing is to be compared; keep a ledger for each"
                    )


def _shared(arm: Arm, record: RunRecord) -> Iterator[tuple[str, dict[str, Any]]]:
    """What of a record's identity another record must have alike, by what decides whether it must."""
    tables = to_dict(arm.run)
    data, cache = record.identity["data"], record.identity["cache"]
    groups = content_digest(record.images.groups)[:12]
    scored = {name: data.get(name) for name in ("classes", "report")}
    yield "scored", {"data": scored, "groups of role report": groups}
    for role in ("train", "auxiliary", "select"):
        if role in data:
            yield json.dumps([role, tables["data"]], sort_keys=True), {"data": {role: data[role]}}
    yield json.dumps(["student", tables["student"]], sort_keys=True), {"student": record.identity["student"]}
    if arm.distills:
        # Without a description of the teacher, each cache has its own.
        named = tables["teacher"] or tables["cache"]["path"]
        teacher = {name: digest for name, digest in cache.items() if name != "coding"}
        yield json.dumps(["teacher", named, tables["cache"]["precision"]], sort_keys=True), {"cache": teacher}
        if arm.run.train.teacher_view == "cache":
            yield json.dumps(["coding", tables["cache"]], sort_keys=True), {"cache": {"coding": cache.get("coding")}}


def _marked(arm: Arm, run: RunConfig, arms: Mapping[str, Arm], records: Records) -> Arm:
    """The arm, with other samples than the run file's, or such as may be others, among what is not matched."""
    base: dict[str, str] = {}
    for name, by_seed in records.items():
        if arms[name].run.data == run.data:
            for record in by_seed.values():
                base |= record.identity["data"]
    own = {
        role: held for record in records.get(arm.name, {}).values() for role, held in record.identity["data"].items()
    }
    others = [
        f"samples of role {role}" for role in ("train", "auxiliary") if role in own and own[role] != base.get(role)
    ]
    return replace(arm, unmatched=(*arm.unmatched, *others))


def _stamps(run: RunConfig, arms: Mapping[str, Arm], records: Records) -> Iterator[str]:
    """What the tables must say."""
    teachers: dict[str, None] = {}
    other = False
    for name, by_seed in records.items():
        for record in by_seed.values() if arms[name].distills else ():
            cache = record.identity["cache"]
            teachers[str(cache.get("weights"))[:12]] = None
            teacher = arms[name].run.teacher
            code = "" if teacher is None else code_of(teacher.reference)
            # Without a digest the file is not here, or there is none.
            other |= " sha256:" in code and content_digest(code) != cache.get("code")
    of = f", the teacher's weights {' and '.join(teachers)}" if teachers else ""
    yield (
        f"From records alone: samples, teacher and coding are the records' own{of}; whether roles share images, and "
        "which labels were learned before, was not looked at."
    )
    if other:
        yield "The run file's teacher is another one than that of the records."
    policy = run.data.compare_contents
    if policy != "refuse":
        yield f'The run file lets images be scored that are learned from: data.compare_contents = "{policy}".'
    if run.ablate.allow_shared_select:
        yield "The run file allows that roles select and report share images."
