"""What makes a run the same run on another machine: what decides its result, and no path.

Two runs of one identity by the same code differ in rounding at most: segkd's own code, versions, device and threads
stand in their records instead.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from segkd.pipeline.ablation.arms import Arm, effective
from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.contents import Content, read_contents
from segkd.pipeline.data.sample import DataSource, Role, Sample, with_role
from segkd.pipeline.models.references import described
from segkd.pipeline.progress import SILENT, Progress
from segkd.pipeline.student.resuming import with_defaults
from segkd.pipeline.teacher.fingerprints import code_of, content_digest, content_of, portable
from segkd.storage.differences import difference, leaves

THREADS = 2
"""Threads that read label maps."""


@dataclass(frozen=True)
class Held:
    """What the samples of a data set hold, by id."""

    contents: Mapping[str, Content]
    """What the images show."""
    labels: Mapping[str, str]
    """Digest of the label map's classes and of what is excluded; of auxiliary samples none: nobody looks at theirs."""

    def digest(self, source: DataSource, role: Role) -> str:
        """SHA-256 of a role's samples: ids, which decide order and augmentation, pixels and labels."""
        lines = (
            f"{sample.id} {self.contents[sample.id].digest.hex()} {self.labels.get(sample.id, '')}\n"
            for sample in with_role(source, role)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_held(source: DataSource, progress: Progress = SILENT) -> Held:
    """Reads every label map, and every image that was never seen before. Raises DataError."""

    def read(sample: Sample) -> str:
        labels, excluded = source.labels(sample), source.excluded(sample)
        # Both are 255 in the labels, and one of them rules out the teacher's word too.
        apart = b"" if excluded is None or not excluded.any() else excluded.tobytes()
        return hashlib.sha256(f"{labels.shape}".encode() + labels.tobytes() + apart).hexdigest()

    contents = read_contents(source, source.samples, progress=progress)
    labelled = [sample for sample in source.samples if sample.role is not Role.AUXILIARY]
    digests = {}
    with progress.task("read labels", len(labelled)) as task, ThreadPoolExecutor(THREADS) as executor:
        for sample, digest in zip(labelled, executor.map(read, labelled), strict=True):
            digests[sample.id] = digest
            task.advance()
    return Held(contents, digests)


def identity_of(
    arm: Arm, run: RunConfig, source: DataSource, held: Held, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """The identity of a run of an arm, JSON-ready. ``run``: the arm's, with its seed; ``fingerprints``: its cache's."""
    student = described(run.the_student())
    roles = [Role.TRAIN, *([Role.AUXILIARY] if run.train.auxiliary else []), Role.SELECT, Role.REPORT]
    document: dict[str, Any] = {
        "distill": arm.distills,
        "settings": effective(run),
        "student": {
            **portable(student),
            "init": None if student.init is None else content_of(student.init),
            "code": content_digest(code_of(student.reference)),
        },
        "data": {
            "classes": content_digest(source.classes.names),
            **{str(role): held.digest(source, role) for role in roles if with_role(source, role)},
        },
        "cache": dict(fingerprints) if arm.distills else {},
    }
    plain: dict[str, Any] = finite(json.loads(json.dumps(document)))
    return plain


def differences(held: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two identities differ in, for people.
    Of settings that ``held`` is older than see :func:`segkd.pipeline.student.resuming.with_defaults`.
    """
    before, after = dict(leaves(held)), dict(leaves(now))
    before = with_defaults(before, after, "settings.")
    found = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        if key.startswith("data."):
            name = key.removeprefix("data.")
            found.append("the classes" if name == "classes" else f"the samples of role {name}")
        elif key.startswith("cache."):
            found.append(f"the {key.removeprefix('cache.')} of cache or teacher")
        elif key == "student.code":
            found.append("the student's code")
        else:
            found.append(difference(key.removeprefix("settings."), before.get(key), after.get(key)))
    return found


def finite(value: Any) -> Any:
    """A document as identities write it: JSON knows no infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
