"""Reading every file of a data set once: how much there is of what, and what is wrong with it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from segkd.pipeline.data.complaints import Complaint
from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.contamination import (
    describe_contaminated,
    describe_copy,
    describe_sample,
    describe_shared,
    find_twins,
)
from segkd.pipeline.data.contents import Content, content_of, stamp
from segkd.pipeline.data.images import is_turned
from segkd.pipeline.data.labels import LabelMap, UnmappedError
from segkd.pipeline.data.matching import is_faint
from segkd.pipeline.data.names import listing
from segkd.pipeline.data.readers import find
from segkd.pipeline.data.remembered import Memory, Stamp
from segkd.pipeline.data.sample import IGNORE, LEARNED, SCORED, DataSource, Role, Sample, with_role
from segkd.pipeline.progress import SILENT, Progress
from segkd.storage.errors import ContaminationError, DataError

_AT_ONCE = 512
"""Samples that are handed to the threads together."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What a data set holds and what is wrong with it."""

    layout: str
    """Which published data set it is and where roles come from; empty for others."""
    classes: tuple[str, ...]
    samples: dict[str, int]
    """Samples of each role."""
    labelled: dict[str, int]
    """Those of them that have a label map."""
    unused: int
    """Images without a role."""
    skipped: int
    """Images that ``data.skip`` leaves out."""
    sizes: dict[tuple[int, int], int]
    """Images of each H, W."""
    pixels: dict[str, tuple[int, ...]]
    """Pixels of each class in the label maps of each role, and last those that are ignored."""
    complaints: tuple[Complaint, ...]
    broken: tuple[str, ...] = ()
    """Ids of the samples of which a file could not be used: what ``data.skip`` leaves out."""

    @property
    def ok(self) -> bool:
        """Whether the data can be used."""
        return all(complaint.severity != "error" for complaint in self.complaints)

    def shares(self, role: str) -> dict[str, float]:
        """Percent of the pixels that count, by class; empty where no pixel does."""
        counts = self.pixels.get(role, ())[: len(self.classes)]
        total = sum(counts)
        return {name: 100 * count / total for name, count in zip(self.classes, counts, strict=True)} if total else {}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok,
            "layout": self.layout,
            "classes": list(self.classes),
            "samples": self.samples,
            "labelled": self.labelled,
            "unused": self.unused,
            "skipped": self.skipped,
            "sizes": {f"{height}x{width}": count for (height, width), count in self.sizes.items()},
            "shares": {role: self.shares(role) for role in self.pixels},
            "ignored_pixels": {role: counts[-1] for role, counts in self.pixels.items()},
            "complaints": [complaint.to_dict() for complaint in self.complaints],
            "broken": list(self.broken),
        }

    def table(self) -> str:
        """For people: roles, sizes, classes; empty where there are no samples, of which a complaint says why."""
        if not self.samples:
            return ""
        lines = [self.layout, ""] if self.layout else []
        lines += ["role       samples  labelled"]
        lines += [f"{role:<9}  {self.samples[role]:7}  {self.labelled[role]:8}" for role in self.samples]
        apart = {"(unused)": self.unused, "(skipped)": self.skipped}
        lines += [f"{name:<9}  {count:7}" for name, count in apart.items() if count]
        common = Counter(self.sizes).most_common(5)
        more = f" and {len(self.sizes) - 5} more" if len(self.sizes) > 5 else ""
        lines += ["", "height x width: " + ", ".join(f"{h} x {w} ({count})" for (h, w), count in common) + more]
        width = max(map(len, ("% of pixels", *self.classes)))
        lines += ["", f"{'% of pixels':<{width}}" + "".join(f"  {role:>9}" for role in self.pixels)]
        shares = {role: self.shares(role) for role in self.pixels}
        for name in self.classes:
            cells = (f"  {shares[role][name]:9.2f}" if shares[role] else f"  {'n/a':>9}" for role in self.pixels)
            lines.append(f"{name:<{width}}" + "".join(cells))
        return "\n".join(lines)


def check(config: DataConfig, *, progress: Progress = SILENT) -> DataReport:
    """Decodes every image and label map that ``config`` describes. Raises ConfigError, but complains of bad data."""
    try:
        found = find(config)
    except (DataError, ContaminationError) as error:
        return DataReport(
            layout="",
            classes=config.classes,
            samples={},
            labelled={},
            unused=0,
            skipped=0,
            sizes={},
            pixels={},
            complaints=(Complaint("error", str(error)),),
        )
    samples, source = found.source.samples, found.source
    names = source.classes.names
    seen = _Seen(len(source.classes))
    with progress.task("Checking", len(samples)) as task:
        for sample, finding in zip(samples, _findings(source, samples), strict=True):
            seen.add(sample, finding)
            task.advance()
    present = [role for role in Role if any(sample.role is role for sample in samples)]
    return DataReport(
        layout=found.told,
        classes=names,
        samples={role: sum(sample.role is role for sample in samples) for role in present},
        labelled={role: sum(sample.role is role and sample.labelled for sample in samples) for role in present},
        unused=found.unused,
        skipped=found.skipped,
        sizes=dict(seen.sizes),
        pixels={role: tuple(map(int, seen.pixels[role])) for role in present if role in seen.pixels},
        complaints=(
            *found.complaints,
            *found.idle,
            *seen.complaints,
            *_unmapped(found.label_map, names, seen.unmapped),
            *_turned(seen.turned, source),
            *(_in_two_roles(config, source, seen.contents) if config.compare_contents != "off" else ()),
            *_blank(samples, seen.contents, source),
            *_warnings(samples, names, seen.pixels),
        ),
        broken=tuple(seen.broken),
    )


@dataclass(frozen=True)
class _Finding:
    """What one sample's files hold, as far as they could be read."""

    size: tuple[int, int] | None = None
    content: Content | None = None
    stamp: Stamp | None = None
    """The image's file as it was read."""
    counts: npt.NDArray[np.int64] | None = None
    turned: bool = False
    """Whether it is a labelled image that EXIF turns."""
    error: str | None = None
    unmapped: frozenset[int] = frozenset()
    """Codes of the label map that mean nothing; ``error`` is of the first of them."""


class _Seen:
    """Sums over samples, in their order."""

    def __init__(self, classes: int) -> None:
        self._indices = [*range(classes), IGNORE]
        self.contents: dict[str, Content] = {}
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.pixels: dict[Role, npt.NDArray[np.int64]] = {}
        self.complaints: list[Complaint] = []
        self.broken: list[str] = []
        """Ids of the samples that these complaints are of."""
        self.unmapped: list[tuple[str, frozenset[int]]] = []
        """Of each label map with codes that mean nothing: the error of the first, and all of them."""
        self.turned: list[Sample] = []

    def add(self, sample: Sample, finding: _Finding) -> None:
        if finding.error is not None and finding.unmapped:
            self.unmapped.append((finding.error, finding.unmapped))
        elif finding.error is not None:
            self.complaints.append(Complaint("error", finding.error))
            self.broken.append(sample.id)
        if finding.size is not None:
            self.sizes[finding.size] += 1
        if finding.counts is not None:
            self.pixels[sample.role] = self.pixels.get(sample.role, 0) + finding.counts[self._indices]
        if finding.turned:
            self.turned.append(sample)
        if finding.content is not None:
            self.contents[sample.id] = finding.content


def _findings(source: DataSource, samples: Sequence[Sample]) -> Iterator[_Finding]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, closing(Memory()) as memory:
        for start in range(0, len(samples), _AT_ONCE):
            learned = []
            for finding in pool.map(partial(_inspect, source), samples[start : start + _AT_ONCE]):
                if finding.stamp is not None and finding.content is not None:
                    learned.append((finding.stamp, finding.content.to_bytes()))
                yield finding
            memory.keep(learned)


def _inspect(source: DataSource, sample: Sample) -> _Finding:
    found = _Finding(stamp=stamp(source, sample))
    try:
        image = source.image(sample)
        height, width, _ = image.shape
        found = replace(found, size=(height, width), content=content_of(image))
        if sample.labelled:
            counts = np.bincount(source.labels(sample).ravel(), minlength=IGNORE + 1)
            file = source.image_file(sample)
            found = replace(found, counts=counts, turned=file is not None and is_turned(file))
    except DataError as error:
        unmapped = error.codes if isinstance(error, UnmappedError) else frozenset()
        return replace(found, error=str(error), unmapped=unmapped)
    return found


def _in_two_roles(config: DataConfig, source: DataSource, contents: dict[str, Content]) -> Iterator[Complaint]:
    """Every image of select or report that is learned from, and what else has two roles."""
    twins = find_twins(source.samples, contents)
    severity: Literal["error", "warning"] = "error" if config.compare_contents == "refuse" else "warning"
    for twin in twins.contaminated:
        yield Complaint(severity, describe_contaminated(twin, source))
    for twin in twins.shared:
        yield Complaint("warning", describe_shared(twin, source))
    for twin in twins.copies:
        yield Complaint("warning", describe_copy(twin, source))
    faint = [sample for sample in with_role(source, *SCORED) if sample.id in contents and is_faint(contents[sample.id])]
    if faint:
        more = f", and so have {_named(faint[1:])}" if len(faint) > 1 else ""
        yield Complaint(
            "warning",
            f"{describe_sample(faint[0], source)} has hardly any contrast{more}: "
            "copies of it are found where all pixels are equal, not where they are re-encoded or scaled",
        )


def _named(samples: Sequence[Sample]) -> str:
    return listing([repr(sample.id) for sample in samples])


def _blank(samples: Sequence[Sample], contents: Mapping[str, Content], source: DataSource) -> Iterator[Complaint]:
    """Images of one tone: broken files are often black, and a teacher has an opinion of them, too."""
    found = [sample for sample in samples if sample.id in contents and len(set(contents[sample.id].tones)) == 1]
    if found:
        more = f" So do {_named(found[1:])}" if len(found) > 1 else ""
        yield Complaint(
            "warning",
            f"{describe_sample(found[0], source)} shows hardly anything but one tone: see that the file is whole, or "
            f"leave it out.{more}",
        )


def _turned(found: Sequence[Sample], source: DataSource) -> Iterator[Complaint]:
    """By 180 degrees, or mirrored, an image has the size of a label map that was not turned."""
    if found:
        more = f" (as is every one of {len(found):,} labelled images)" if len(found) > 1 else ""
        yield Complaint(
            "warning",
            f"{describe_sample(found[0], source)} is turned upright by its EXIF data{more}: its label map must show it "
            "upright too, unless it has the same EXIF data",
        )


def _unmapped(
    label_map: LabelMap | None, names: tuple[str, ...], found: list[tuple[str, frozenset[int]]]
) -> Iterator[Complaint]:
    """One complaint of all label maps with values that mean nothing: it is one mistake."""
    if found and label_map is not None:
        told = label_map.told(frozenset().union(*(codes for _, codes in found)), names)
        maps = f"{len(found):,} label maps" if len(found) > 1 else "1 label map"
        yield Complaint("error", f"{found[0][0]}; such {label_map.kind} in {maps}: {told}")


def _warnings(
    samples: Iterable[Sample], names: tuple[str, ...], pixels: dict[Role, npt.NDArray[np.int64]]
) -> Iterator[Complaint]:
    """What may be meant, but seldom is."""
    consequences = {
        Role.TRAIN: "no network can be trained on labels",
        Role.SELECT: "the best checkpoint cannot be chosen, the last one is what training gives",
        Role.REPORT: "there is nothing to report scores on",
    }
    roles = {sample.role for sample in samples}
    for role, consequence in consequences.items():
        if role not in roles:
            remedy = "give it to some in [data.fractions], lists or folders, if needed"
            yield Complaint("warning", f"no sample has role {role}: {consequence}; {remedy}")
    for role in (Role.TRAIN, *SCORED):
        absent = [name for name, count in zip(names, pixels.get(role, ()), strict=False) if count == 0]
        if absent:
            yield Complaint("warning", f"never seen in the labels of role {role}: {', '.join(absent)}")
    by_group: dict[str, set[Role]] = {}
    for sample in samples:
        by_group.setdefault(sample.group, set()).add(sample.role)
    cut = sorted(group for group, of in by_group.items() if group and of & {*LEARNED} and of & {*SCORED})
    if cut:
        yield Complaint(
            "warning",
            f"{len(cut)} groups are both learned from and scored on, the first is {cut[0]!r}: "
            "scores are too good where their images resemble each other; split by group",
        )
