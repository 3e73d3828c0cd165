"""The tables of a sweep from its records alone: neither data nor cache nor teacher have to be here.

What a run's identity says of files is compared among the records, and the rest with the run file.
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
from segkd.pipeline.ablation.table import Results
from segkd.pipeline.config import RunConfig
from segkd.pipeline.settings import to_dict
from segkd.storage.errors import RecordError

STAMP = "From records alone: whether roles share images, and which labels were learned before, was not looked at again."


def recorded(run: RunConfig, ledger: Ledger) -> Results:
    """The tables of what a ledger has of the run file's arms and seeds.

    Raises ConfigError for arms that the run file cannot make, and RecordError where there is no record, for one of
    another run, and for two that do not belong together.
    """
    settled = ledger.settled()
    arms = resolve_arms(run, run.ablate.longer or (float(settled["longer"]) if settled else None))
    records: dict[str, dict[int, RunRecord]] = {}
    missing = []
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
    arms = {name: _marked(arm, run, arms, records) for name, arm in arms.items()}
    return Results(
        rows=tuple(rows(arms, records, run.ablate)),
        gains=tuple(gains(arms, records, run.ablate)),
        records=tuple(record for of_arm in records.values() for record in of_arm.values()),
        config=run.ablate,
        stamps=(STAMP,),
        failures={},
        missing=tuple(missing),
    )


def _require_of_arm(path: Path, record: RunRecord, arm: Arm, seed: int) -> None:
    """Raises RecordError for a record of a run with other settings, or of another student."""
    seeded = replace(arm.run, train=replace(arm.run.train, seed=seed))
    student = to_dict(arm.run.the_student())
    named = ("reference", "arguments")
    # Files are known by their content, which may not be here.
    kept = {
        name: value if " sha256:" not in json.dumps(value) else student[name]
        for name, value in record.identity["student"].items()
        if name in named
    }
    held = {"distill": record.identity["distill"], "settings": record.identity["settings"], "student": kept}
    now = {
        "distill": arm.distills,
        "settings": finite(effective(seeded)),
        "student": {
            "reference": student["reference"].replace("\\", "/").rsplit("/", 1)[-1],
            "arguments": student["arguments"],
        },
    }
    if different := differences(held, json.loads(json.dumps(now))):
        raise RecordError(
            f"{path} is the record of a run that differs in {', '.join(different)}; "
            "name the ledger of this run file in ablate.ledger"
        )


def _require_together(ledger: Ledger, arms: Mapping[str, Arm], records: Records) -> None:
    """Raises RecordError for two records that should be of the same files and are not."""
    first: dict[str, tuple[Path, Any]] = {}
    for name, by_seed in records.items():
        for seed, record in by_seed.items():
            path = ledger.path(name, seed)
            for what, held in _shared(arms[name], record):
                before, known = first.setdefault(what, (path, held))
                if known != held:
                    raise RecordError(
                        f"{path} and {before} are of runs that differ in {', '.join(differences(known, held))}, so "
                        "nothing is to be compared; keep a ledger for each"
                    )


def _shared(arm: Arm, record: RunRecord) -> Iterator[tuple[str, dict[str, Any]]]:
    """What of a record's identity another record must have alike, by what decides whether it must."""
    data, cache = record.identity["data"], record.identity["cache"]
    yield "scored", {"data": {name: data.get(name) for name in ("classes", "select", "report")}}
    for role in ("train", "auxiliary"):
        if role in data:
            yield json.dumps([role, to_dict(arm.run.data)], sort_keys=True), {"data": {role: data[role]}}
    if arm.distills:
        teacher = {name: digest for name, digest in cache.items() if name != "coding"}
        yield json.dumps(["teacher", to_dict(arm.run)["teacher"]], sort_keys=True), {"cache": teacher}
        if arm.run.train.teacher_view == "cache":
            yield f"coding {arm.run.cache.path}", {"cache": {"coding": cache["coding"]}}


def _marked(arm: Arm, run: RunConfig, arms: Mapping[str, Arm], records: Records) -> Arm:
    """The arm, with other samples than the run file's among what is not matched."""
    base: dict[str, str] = {}
    for name, by_seed in records.items():
        if arms[name].run.data == run.data:
            for record in by_seed.values():
                base |= record.identity["data"]
    own = {
        role: digest
        for record in records.get(arm.name, {}).values()
        for role, digest in record.identity["data"].items()
    }
    others = [role for role in ("train", "auxiliary") if role in own and own[role] != base.get(role, own[role])]
    return replace(arm, unmatched=(*arm.unmatched, *(f"samples of role {role}" for role in others)))
