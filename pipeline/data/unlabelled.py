"""Any folders of images as auxiliary samples beside a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from operator import attrgetter
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from segkd.pipeline.data.files import FileSource, Row
from segkd.pipeline.data.images import IMAGE_EXTENSIONS
from segkd.pipeline.data.labels import LabelMap
from segkd.pipeline.data.names import Naming, by_stem, names_under
from segkd.pipeline.data.sample import Classes, DataSource, Role, Sample
from segkd.pipeline.data.skipping import Skipped
from segkd.storage.errors import ConfigError, DataError

PREFIX = "unlabelled"
"""The first part of these samples' ids."""


class JoinedSource:
    """A data set and folders of unlabelled images. See :class:`segkd.pipeline.data.sample.DataSource`."""

    def __init__(self, source: DataSource, folders: dict[str, FileSource]) -> None:
        self._source = source
        self._folders = folders
        parts: list[DataSource] = [source, *folders.values()]
        samples = (sample for part in parts for sample in part.samples)
        self.samples: Sequence[Sample] = tuple(sorted(samples, key=attrgetter("role", "id")))

    @property
    def classes(self) -> Classes:
        return self._source.classes

    def size(self, sample: Sample) -> tuple[int, int]:
        return self._of(sample).size(sample)

    def image(self, sample: Sample) -> npt.NDArray[np.uint8]:
        return self._of(sample).image(sample)

    def image_file(self, sample: Sample) -> Path | None:
        return self._of(sample).image_file(sample)

    def image_digest(self, sample: Sample) -> bytes:
        return self._of(sample).image_digest(sample)

    def labels(self, sample: Sample) -> npt.NDArray[np.uint8]:
        return self._of(sample).labels(sample)

    def excluded(self, sample: Sample) -> npt.NDArray[np.bool_] | None:
        return self._of(sample).excluded(sample)

    def _of(self, sample: Sample) -> DataSource:
        prefix, _, rest = sample.id.partition("/")
        return self._folders[rest.split("/")[0]] if prefix == PREFIX else self._source


def with_unlabelled(source: DataSource, folders: Sequence[str], max_pixels: int, skipped: Skipped) -> JoinedSource:
    """``source`` and the images in ``folders``, at any depth, as samples of role auxiliary, but those to leave out.

    Each image's group is the folder that it lies in: frames of one clip usually lie together. Raises ConfigError for
    folders of one name or inside each other, DataError for one without images.
    """
    taken = next((sample.id for sample in source.samples if sample.id.split("/")[0] == PREFIX), None)
    if taken is not None:
        raise DataError(
            f"sample {taken!r} of the data set is called like the images of data.unlabelled; rename its first folder"
        )
    by_name: dict[str, Path] = {}
    for folder in map(Path, folders):
        other = by_name.setdefault(folder.resolve().name, folder)
        if other is not folder:
            raise ConfigError(
                f"data.unlabelled: {other} and {folder} have one name, which samples are called by; rename one of them"
            )
    for first, second in combinations(by_name.values(), 2):
        inner, outer = sorted((first, second), key=lambda folder: -len(folder.resolve().parts))
        if inner.resolve().is_relative_to(outer.resolve()):
            raise ConfigError(f"data.unlabelled: {inner} lies in {outer}, whose images are all taken; remove it")
    classes, no_labels = source.classes, LabelMap("values", {})
    return JoinedSource(
        source,
        {
            name: FileSource(folder, _rows(name, folder, skipped), classes, no_labels, max_pixels)
            for name, folder in by_name.items()
        },
    )


def _rows(name: str, folder: Path, skipped: Skipped) -> Iterator[Row]:
    naming = Naming("", IMAGE_EXTENSIONS)
    found = by_stem(names_under(folder), naming, folder)
    if not found:
        raise DataError(f"{folder}: holds no images; expected files {naming}, or correct data.unlabelled")
    files = {f"{PREFIX}/{name}/{stem}": file for stem, file in found.items()}
    for sample_id in skipped.without(files.items(), folder):
        yield sample_id, Role.AUXILIARY, str(PurePosixPath(sample_id).parent), files[sample_id], None
