"""Data sets of files: reading what a description has found."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segkd.pipeline.data import images
from segkd.pipeline.data.labels import LabelMap
from segkd.pipeline.data.sample import Classes, Role, Sample
from segkd.storage.errors import DataError

Row = tuple[str, str, str, str, str | None]
"""A sample: its id, role and group, the names of its image and (or None) of its label map."""


class FileSource:
    """A data set of files. See :class:`segkd.pipeline.data.sample.DataSource` for what the methods promise."""

    def __init__(
        self,
        root: Path,
        rows: Iterable[Row],
        classes: Classes,
        label_map: LabelMap,
        max_pixels: int = images.MAX_PIXELS,
    ) -> None:
        rows = sorted(rows, key=itemgetter(1, 0))
        roles = {role.value: role for role in Role}
        self._root = root
        self._samples = tuple(
            Sample(id=sample_id, role=roles[role], labelled=label is not None, group=group)
            for sample_id, role, group, _, label in rows
        )
        self._files = {sample_id: (image, label) for sample_id, _, _, image, label in rows}
        self._classes = classes
        self._label_map = label_map
        self._max_pixels = max_pixels

    def __reduce__(self) -> tuple[Any, ...]:
        # Rows of plain strings take a fraction of the time and bytes of samples.
        rows = [(sample.id, sample.role.value, sample.group, *self._files[sample.id]) for sample in self._samples]
        return FileSource, (self._root, rows, self._classes, self._label_map, self._max_pixels)

    @property
    def classes(self) -> Classes:
        return self._classes

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self._samples

    def image_file(self, sample: Sample) -> Path:
        """Where the image lies."""
        return self._root / self._files[sample.id][0]

    def label_file(self, sample: Sample) -> Path:
        """Where the label map lies. Raises DataError for a sample that has none."""
        name = self._files[sample.id][1]
        if name is None:
            raise DataError(f"{self.image_file(sample)}: there is no label map for it; ask for its image only")
        return self._root / name

    def size(self, sample: Sample) -> tuple[int, int]:
        return images.read_size(self.image_file(sample), self._max_pixels)

    def image(self, sample: Sample) -> npt.NDArray[np.uint8]:
        return images.read_image(self.image_file(sample), self._max_pixels)

    def image_digest(self, sample: Sample) -> bytes:
        return images.digest(self.image_file(sample))

    def labels(self, sample: Sample) -> npt.NDArray[np.uint8]:
        return self._label_map(self._raw_labels(sample), self.label_file(sample))

    def excluded(self, sample: Sample) -> npt.NDArray[np.bool_] | None:
        return self._label_map.excluded(self._raw_labels(sample)) if self._label_map.excluded_codes else None

    def _raw_labels(self, sample: Sample) -> npt.NDArray[np.integer[Any]]:
        file = self.label_file(sample)
        raw = images.read_raw_labels(file, self._label_map.kind, self._max_pixels)
        size = self.size(sample)
        if raw.shape[:2] != size:
            raise DataError(
                f"{file}: {raw.shape[0]} x {raw.shape[1]} pixels, but its image {self.image_file(sample).name} has "
                f"{size[0]} x {size[1]} (height x width); make them of one size"
            )
        return raw
