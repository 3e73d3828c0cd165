"""Label leaks: labels that a teacher has learned of images whose labels nobody was to know."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.contamination import describe_sample
from segkd.pipeline.data.contents import Content
from segkd.pipeline.data.sample import DataSource, Role, Sample
from segkd.pipeline.student import checkpoint
from segkd.storage.errors import CheckpointError

logger = logging.getLogger(__name__)

HIDDEN = (Role.AUXILIARY, Role.SELECT, Role.REPORT)
"""Roles whose labels no teacher of an experiment may have learned from."""


@dataclass(frozen=True)
class LabelLeak:
    """A sample whose label the network of a checkpoint has learned from."""

    sample: Sample
    seen_as: str
    """Its id when the network was trained."""


@dataclass(frozen=True)
class LabelLeaks:
    """All of them. False where there is none."""

    checkpoint: Path
    leaks: tuple[LabelLeak, ...]

    def __bool__(self) -> bool:
        return bool(self.leaks)

    def describe(self, source: DataSource) -> str:
        """How many of which role, the first pair, what follows and what to do."""
        counts = Counter(leak.sample.role for leak in self.leaks)
        first, roles = self.leaks[0], ", ".join(f"{count:,} {role}" for role, count in counts.items())
        return (
            f"{self.checkpoint} was trained on the labels of {roles} samples of these data, the first "
            f"{describe_sample(first.sample, source)}, as {first.seen_as!r}: gains with this teacher prove nothing; "
            "train one on the samples of role train alone"
        )


def find_label_leaks(path: str | Path, source: DataSource, contents: Mapping[str, Content]) -> LabelLeaks:
    """The samples of role auxiliary, select or report whose labels the checkpoint's network has learned from.

    Images are recognised by their pixels, whatever their ids, among those of ``contents``, which
    :func:`segkd.pipeline.data.contents.read_contents` gives. What the network was distilled from or began with is not
    followed. Raises CheckpointError for a checkpoint that cannot be read, or that keeps no digests.
    """
    held = checkpoint.load(path)[0].samples.labels_of
    digests = held.pixels()
    if digests is None:
        raise CheckpointError(
            f'{path}: keeps no digests of its samples, being trained with data.compare_contents = "off"; '
            "whether it has learned labels that it should not cannot be told"
        )
    seen = dict(zip(digests, held.names(), strict=True))
    hidden = (sample for sample in source.samples if sample.role in HIDDEN and sample.id in contents)
    return LabelLeaks(
        Path(path),
        tuple(LabelLeak(sample, seen[digest]) for sample in hidden if (digest := contents[sample.id].digest) in seen),
    )


def teacher_checkpoint(run: RunConfig) -> Path | None:
    """The run's teacher, where it is a checkpoint that is here."""
    path = None if run.teacher is None else Path(run.teacher.reference)
    return path if path is not None and path.suffix == checkpoint.SUFFIX and path.is_file() else None


def warn_of_label_leaks(run: RunConfig, source: DataSource, contents: Mapping[str, Content]) -> None:
    """Says what the run's teacher, where it is a checkpoint that is here, has learned that it should not have."""
    path = teacher_checkpoint(run)
    if path is None:
        return
    try:
        leaks = find_label_leaks(path, source, contents)
    except CheckpointError as error:
        logger.warning("%s", error)
        return
    if leaks:
        logger.warning("%s", leaks.describe(source))
