"""What a data set is to the rest of the project.

Shapes: images H,W,3 uint8 RGB, EXIF-upright; labels H,W uint8 class indices, 255 = ignore.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

IGNORE = 255
"""The label of a pixel that no loss and no score counts."""


class Role(StrEnum):
    """What a sample may be used for."""

    TRAIN = "train"
    """Its labels may be learned from."""
    AUXILIARY = "auxiliary"
    """Only its image may be learned from; no network of an experiment may have seen its label."""
    SELECT = "select"
    """For choosing checkpoints, weights and schedules."""
    REPORT = "report"
    """Read once per finished configuration, for the figures that are reported."""


LEARNED = (Role.TRAIN, Role.AUXILIARY)
"""What networks may learn from."""
SCORED = (Role.SELECT, Role.REPORT)
"""What they must not have learned from."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Class names in index order and the colour of each."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image, with or without a label map. ``id`` is stable: it does not depend on order, place or machine."""

    id: str
    role: Role
    labelled: bool
    """Whether a label map exists (and the role allows its use by scores: auxiliary samples may have one too)."""
    group: str = ""
    """The sequence or scene that the image belongs to; splits never cut through one."""


class DataSource(Protocol):
    """A described data set. Picklable and cheap to pickle: workers get a copy."""

    @property
    def classes(self) -> Classes: ...

    @property
    def samples(self) -> Sequence[Sample]:
        """All samples, sorted by (role, id)."""
        ...

    def size(self, sample: Sample) -> tuple[int, int]:
        """H, W of the EXIF-upright image, from its header alone. Raises DataError."""
        ...

    def image(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """H,W,3 RGB. Raises DataError naming the file."""
        ...

    def image_file(self, sample: Sample) -> Path | None:
        """Where the image lies; None for one that is generated."""
        ...

    def image_digest(self, sample: Sample) -> bytes:
        """The first 16 bytes of the SHA-256 of the image file's bytes, or of the pixels where there is no file."""
        ...

    def labels(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """H,W class indices, 255 = ignore. Raises DataError naming the file, and the first pixel of a bad value."""
        ...


def with_role(source: DataSource, *roles: Role) -> tuple[Sample, ...]:
    """The samples of the given roles, in the source's order."""
    return tuple(sample for sample in source.samples if sample.role in roles)
