"""A cached teacher as something to score and to look at.

Shapes: images H,W,3; log-probabilities 1,C,h,w on the teacher's grid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from segkd.pipeline.data.sample import DataSource, Sample
from segkd.pipeline.evaluation.pictures import show_sample
from segkd.pipeline.output import replacing
from segkd.storage.errors import CacheMismatchError, DataError, OutputExistsError
from segkd.storage.geometry import Mapping
from segkd.storage.reader import CacheReader
from segkd.storage.table import Entry


class CachedTeacher:
    """What a cache keeps of its teacher, for the samples of a data set.

    Raises CacheMismatchError for data of other classes, and for a cache without soft targets.
    """

    def __init__(self, cache: CacheReader, source: DataSource) -> None:
        if cache.spec.classes != source.classes.names:
            raise CacheMismatchError(
                f"{cache.path} is over the classes {', '.join(cache.spec.classes)}, the data has "
                f"{', '.join(source.classes.names)}; name these data's cache, or write one with segkd teacher-cache"
            )
        if "soft" not in cache.spec.targets:
            raise CacheMismatchError(
                f"{cache.path} keeps {', '.join(cache.spec.targets)}, but no soft targets; "
                'write one with "soft" in cache.targets'
            )
        self._cache, self._source = cache, source

    def predict(self, sample: Sample, image: npt.NDArray[np.uint8]) -> tuple[Tensor, Mapping]:  # noqa: ARG002  # Predict
        """The kept log-probabilities, and where their cells lie in the image.

        Raises CacheMismatchError for a sample that the cache does not hold, or of which it has seen another image.
        """
        entry = self._entry(sample)
        return torch.from_numpy(self._cache.values(entry, "soft"))[None], entry.mapping

    def picture(self, sample: Sample) -> Image.Image:
        """A sample and its targets, see :func:`segkd.pipeline.evaluation.pictures.show_sample`."""
        image = self._source.image(sample)
        log_probs_1Chw, mapping = self.predict(sample, image)
        first_order = None
        if "first_order" in self._cache.spec.targets:
            first_order = torch.from_numpy(self._cache.values(self._entry(sample), "first_order"))[0]
        labels = self._source.labels(sample) if sample.labelled else None
        return show_sample(image, labels, log_probs_1Chw, mapping, first_order, self._source.classes)

    def _entry(self, sample: Sample) -> Entry:
        entry = self._cache.entry(sample.id)
        if entry.image_digest != self._source.image_digest(sample):
            raise CacheMismatchError(
                f"sample {sample.id!r} is not the image that {self._cache.path} was written from; "
                "restore the image, or write the cache again with segkd teacher-cache"
            )
        return entry


def draw_samples(
    cache: CacheReader, source: DataSource, ids: Sequence[str], folder: str | Path, *, overwrite: bool = False
) -> list[Path]:
    """Writes a picture of each sample's targets, ``folder/<id>.png`` with "-" for what is no good file name.

    Raises DataError for an unknown id, OutputExistsError where a picture stands; before anything is written.
    """
    teacher = CachedTeacher(cache, source)
    known = {sample.id: sample for sample in source.samples}
    unknown = [id_ for id_ in ids if id_ not in known]
    if unknown:
        raise DataError(f"the data has no sample {unknown[0]!r}; its first is {source.samples[0].id!r}")
    # An id given twice is one picture; two ids of one file name are not.
    ids = list(dict.fromkeys(ids))
    places = {id_: Path(folder) / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', id_)}.png" for id_ in ids}
    if len(set(places.values())) < len(places):
        shared = next(path for path in places.values() if list(places.values()).count(path) > 1)
        both = ", ".join(repr(id_) for id_, path in places.items() if path == shared)
        raise OutputExistsError(f"the samples {both} would both be drawn to {shared}; draw them into different folders")
    standing = [path for path in places.values() if path.exists()]
    if standing and not overwrite:
        raise OutputExistsError(f"{standing[0]} exists; name another folder, or replace it with --overwrite")
    for id_, path in places.items():
        picture = teacher.picture(known[id_])
        with replacing(path) as partial:
            picture.save(partial)
    return list(places.values())
