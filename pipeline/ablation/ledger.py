"""The ledger: a folder of small JSON files, one a finished run, and what a sweep has settled once for all.

It holds all that tables are made of, so it can be committed and taken up by another checkout: what is done is not done
again, wherever it was done.
"""

from __future__ import annotations

import base64
import json
import math
import os
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segkd.pipeline.ablation.identity import differences
from segkd.pipeline.evaluation.metrics import ConfusionMatrix
from segkd.pipeline.settings import parse, to_dict
from segkd.pipeline.student.checkpoint import write_atomically
from segkd.pipeline.teacher.fingerprints import content_digest
from segkd.storage.errors import ConfigError, RecordError

FORMAT = "segkd-run-record"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a network has made of each image of role report."""

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    """The sequence or scene of each."""
    classes: tuple[str, ...]
    confusions: str
    """Base64 of zlib of little-endian int32 (image, label, prediction): a confusion matrix an image."""

    @classmethod
    def of(
        cls, ids: Sequence[str], groups: Sequence[str], classes: Sequence[str], confusions: Sequence[npt.NDArray[Any]]
    ) -> Images:
        """Packs them. An image has fewer than 2^31 pixels."""
        counts = np.stack(confusions).astype("<i4")
        packed = base64.b64encode(zlib.compress(counts.tobytes(), 9)).decode()
        return cls(ids=tuple(ids), groups=tuple(groups), classes=tuple(classes), confusions=packed)

    def counts(self) -> npt.NDArray[np.int32]:
        """N,C,C: rows are labels, columns predictions."""
        size = len(self.classes)
        flat = np.frombuffer(zlib.decompress(base64.b64decode(self.confusions, validate=True)), "<i4")
        return flat.reshape(len(self.ids), size, size)

    def __post_init__(self) -> None:
        try:
            fits = len(self.groups) == len(self.counts())
        except (ValueError, zlib.error):
            fits = False
        if not fits:
            raise ConfigError("expected as many groups and confusion matrices as ids")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Images that a run has drawn, counted each time."""

    labelled: int
    auxiliary: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is left of a finished run. Scores are of the averaged network of the last step."""

    arm: str
    seed: int
    digest: str
    """SHA-256 of the identity."""
    identity: dict[str, Any]
    """See :func:`segkd.pipeline.ablation.identity.identity_of`."""
    report: dict[str, Any]
    """Scores on role report, as :meth:`segkd.pipeline.evaluation.scores.Scores.to_dict` gives them."""
    select: dict[str, Any] | None
    """Those on role select; None where there is none."""
    images: Images
    """Role report, image by image."""
    steps: int
    seen: Seen
    damaged: int
    """Samples that were learned from without the teacher's knowledge, because the cache was damaged."""
    cost: dict[str, Any]
    """Parameters, FLOPs with shape, latency; as :class:`segkd.pipeline.evaluation.evaluate.Cost` has them."""
    seconds: float
    """That training took: steps and the wait for their batches, not validation."""
    versions: dict[str, str]
    device: str
    threads: int
    curve: dict[str, float | None] = field(default_factory=dict)
    """mIoU in percent on role select by step, of the validations on the way; empty where there were none, and in
    records of before it was kept."""
    format: str = FORMAT
    version: int = VERSION


class Ledger:
    """The records of a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.plan = self.folder / "plan.json"

    def path(self, arm: str, seed: int) -> Path:
        """Where the record of a run stands."""
        return self.folder / f"{arm}.seed-{seed}.json"

    def runs(self) -> list[tuple[str, int]]:
        """Arm and seed of every record, in this order."""
        names = (path.stem.rpartition(".seed-") for path in self.folder.glob("*.seed-*.json"))
        return sorted((arm, int(seed)) for arm, _, seed in names)

    def load(self, arm: str, seed: int, identity: dict[str, Any]) -> RunRecord | None:
        """The record of a run; None where it is not done. Raises RecordError for a record of another run."""
        record = self.read(arm, seed)
        if record is not None and (different := differences(record.identity, identity)):
            raise RecordError(
                f"{self.path(arm, seed)} is the record of a run that differs in {', '.join(different)}; "
                "name another folder in ablate.ledger, or remove the record to run it again"
            )
        return record

    def read(self, arm: str, seed: int) -> RunRecord | None:
        """What stands where the record of a run would; None where nothing does. Raises RecordError for no record, and
        for one that was changed."""
        path = self.path(arm, seed)
        if not path.exists():
            return None
        record = parse(RunRecord, _read(path), place=str(path))
        if (record.format, record.version) != (FORMAT, VERSION):
            raise RecordError(
                f"{path}: {record.format} {record.version}, and this segkd reads {FORMAT} {VERSION}; "
                "use the segkd that wrote it, or remove it to run it again"
            )
        if (record.arm, record.seed) != (arm, seed) or not _is_whole(record):
            raise RecordError(
                f"{path}: not the record of {arm}, seed {seed}, that its name promises; "
                "restore it, or remove it to run it again"
            )
        if record.digest != content_digest(record.identity):
            raise RecordError(
                f"{path}: its digest is not that of its identity, so the file was changed; "
                "restore it, or remove it to run it again"
            )
        if not _adds_up(record):
            raise RecordError(
                f"{path}: its scores on role report are not those of its confusion matrices, so the file was changed; "
                "restore it, or remove it to run it again"
            )
        return record

    def save(self, record: RunRecord) -> None:
        """Writes a record, whole or not at all. Raises CheckpointError for a disk that is full or read-only."""
        text = json.dumps(to_dict(record), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path(record.arm, record.seed), f"{text}\n".encode())

    def settled(self) -> dict[str, Any] | None:
        """What the sweep has settled; None before. Raises RecordError."""
        return self._settled() if self.plan.exists() else None

    def settle(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Settles it, unless another task was first: then what that one has settled. It is never changed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Tasks on several machines may have one number.
        written = self.folder / f".plan.{uuid.uuid4().hex}.json"
        write_atomically(written, (json.dumps(plan, indent=1) + "\n").encode())
        try:
            os.link(written, self.plan)
        except FileExistsError:
            return self._settled()
        finally:
            written.unlink()
        return plan

    def _settled(self) -> dict[str, Any]:
        plan = _read(self.plan)
        longer = plan.get("longer")
        if not (isinstance(longer, int | float) and 1 <= longer < math.inf and isinstance(plan.get("of"), dict)):
            raise RecordError(f"{self.plan}: not what a sweep has settled; restore it, or remove it to measure anew")
        return plan


def _is_whole(record: RunRecord) -> bool:
    """Whether all is there that tables are made of."""
    tables = {"settings", "student", "data", "cache"}
    try:
        height, width = record.cost["shape"]
        figures = [record.cost["parameters"], record.cost["flops"], record.cost["latency"]["p50_ms"], height, width]
        scores = [record.report[name] for name in ("miou", "macc", "aacc", "boundary_miou")]
        scores += [] if record.select is None else [record.select["miou"]]
    except (KeyError, TypeError, ValueError):
        return False
    return (
        all(isinstance(record.identity.get(name), dict) for name in tables)
        and isinstance(record.identity.get("distill"), bool)
        and all(isinstance(figure, int | float) for figure in figures)
        and all(score is None or isinstance(score, int | float) for score in scores)
    )


def _adds_up(record: RunRecord) -> bool:
    """Whether the scores that a confusion matrix gives are those of the images' matrices."""
    total = ConfusionMatrix(len(record.images.classes))
    total.counts += record.images.counts().sum(0)
    counted = total.compute()
    scores = {"miou": counted.miou, "macc": counted.macc, "aacc": counted.aacc}
    return all(_equal(score, record.report.get(name)) for name, score in scores.items())


def _equal(counted: float | None, told: Any) -> bool:
    """Up to rounding, which depends on the order in which a processor adds."""
    if counted is None or told is None:
        return counted is told
    return math.isclose(counted, told, abs_tol=1e-9)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON in UTF-8"
        raise RecordError(f"{path}: cannot be read: {reason}; restore it, or remove it to run it again") from None
    if not isinstance(document, dict):
        raise RecordError(f"{path}: not a JSON object; restore it, or remove it to run it again")
    return document
