"""Label leaks: labels that a network has learned of images whose labels nobody was to know."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from segkd.pipeline.data.contamination import describe_sample
from segkd.pipeline.data.contents import Content, read_contents
from segkd.pipeline.data.sample import DataSource, Role, Sample, with_role
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.progress import SILENT, Progress
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.seen import SampleList
from segkd.storage.errors import CheckpointError

logger = logging.getLogger(__name__)

HIDDEN = (Role.AUXILIARY, Role.SELECT, Role.REPORT)
"""Roles whose labels no network of an experiment may have learned from."""
BEFORE = "began with or was taught by"


@dataclass(frozen=True)
class LabelLeak:
    """A sample whose label the network of a checkpoint has learned from."""

    sample: Sample
    seen_as: str
    """Its id when the network was trained."""
    itself: bool
    """Whether that network is the checkpoint's own, and none before it."""


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
        others = "" if all(leak.itself for leak in self.leaks) else f", or a network that it {BEFORE},"
        return (
            f"{self.checkpoint}{others} was trained on the labels of {roles} samples of these data, the first "
            f"{describe_sample(first.sample, source)}, as {first.seen_as!r}: what it scores there, and what a student "
            "of it scores, proves nothing; take a network that has learned the labels of role train alone"
        )


def find_label_leaks(path: str | Path, source: DataSource, contents: Mapping[str, Content]) -> LabelLeaks:
    """The samples of role auxiliary, select or report whose labels the checkpoint's network has learned from.

    Images are recognised by their pixels, whatever their ids, among those of ``contents``, which
    :func:`segkd.pipeline.data.contents.read_contents` gives. Checkpoints that the network began with or was taught by
    count. Raises CheckpointError for a checkpoint that cannot be read, or that keeps no digests.
    """
    samples = checkpoint.load(path)[0].samples
    seen: dict[bytes, tuple[str, bool]] = {}
    unknown = []
    for number, held in enumerate((samples.labels_of, *samples.labels_before)):
        digests = held.pixels()
        if digests is not None:
            itself = number == 0
            seen = {digest: (name, itself) for digest, name in zip(digests, held.names(), strict=True)} | seen
        elif held.count:
            unknown.append(f"of a network that it {BEFORE}, which was" if number else "of its samples, being")
    hidden = (sample for sample in source.samples if sample.role in HIDDEN and sample.id in contents)
    leaks = [LabelLeak(sample, *seen[digest]) for sample in hidden if (digest := contents[sample.id].digest) in seen]
    if unknown and not leaks:
        raise CheckpointError(
            f'{path}: keeps no digests {unknown[0]} trained with data.compare_contents = "off"; '
            "whether it has learned labels that it should not cannot be told"
        )
    return LabelLeaks(Path(path), tuple(leaks))


def beginnings(network: NetworkConfig | None) -> Iterator[Path]:
    """The checkpoints that a network is or begins with, as far as they are here; files of weights alone are none."""
    if network is not None:
        for path in map(Path, filter(None, (network.reference, network.init))):
            if checkpoint.is_checkpoint(path):
                yield path


def labels_before(paths: Iterable[Path]) -> tuple[SampleList, ...]:
    """The samples whose labels these checkpoints have learned, or the networks before them."""
    before = [checkpoint.load(path)[0].samples for path in paths]
    return tuple(dict.fromkeys(part for samples in before for part in (samples.labels_of, *samples.labels_before)))


def look_for_label_leaks(
    paths: Iterable[Path], source: DataSource, roles: Iterable[Role], progress: Progress = SILENT
) -> None:
    """Reads what the images of these roles show, where that tells anything, and warns of what was learned of them."""
    known = list(paths)
    samples = with_role(source, *(role for role in roles if role in HIDDEN))
    if known and samples:
        warn_of_label_leaks(known, source, read_contents(source, samples, progress=progress))


def warn_of_label_leaks(paths: Iterable[Path], source: DataSource, contents: Mapping[str, Content]) -> None:
    """Says what the networks of these checkpoints have learned that they should not have."""
    for path in dict.fromkeys(paths):
        try:
            leaks = find_label_leaks(path, source, contents)
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        if leaks:
            logger.warning("%s", leaks.describe(source))
