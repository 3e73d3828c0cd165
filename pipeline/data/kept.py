"""A data set that decodes an image once, as long as there is room for it.

Shapes: images H,W,3 uint8 RGB; labels H,W uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segkd.pipeline.data.sample import Classes, DataSource, Sample

Pixels = npt.NDArray[np.uint8]


class KeptSource:
    """``source``, of which a process keeps decoded images, label maps and excluded pixels up to ``limit`` bytes.

    What was kept is kept for good: samples come in a new order every epoch, so that whatever is dropped for a new one
    is as likely to be asked for as that. A copy in another process keeps its own. Kept arrays cannot be written to.
    """

    def __init__(self, source: DataSource, limit: int) -> None:
        self._source, self._limit = source, limit
        self._room = limit
        self._kept: dict[tuple[str, str], Pixels] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptSource, (self._source, self._limit)

    @property
    def classes(self) -> Classes:
        return self._source.classes

    @property
    def samples(self) -> Sequence[Sample]:
        return self._source.samples

    def size(self, sample: Sample) -> tuple[int, int]:
        return self._source.size(sample)

    def image(self, sample: Sample) -> Pixels:
        return self._once("image", sample, self._source.image)

    def image_file(self, sample: Sample) -> Path | None:
        return self._source.image_file(sample)

    def image_digest(self, sample: Sample) -> bytes:
        return self._source.image_digest(sample)

    def labels(self, sample: Sample) -> Pixels:
        return self._once("labels", sample, self._source.labels)

    def excluded(self, sample: Sample) -> npt.NDArray[np.bool_] | None:
        excluded = self._once("excluded", sample, self._excluded)
        return excluded.view(np.bool_) if excluded.size else None

    def _excluded(self, sample: Sample) -> Pixels:
        """The source's own as bytes; nothing for None, which is remembered too."""
        excluded = self._source.excluded(sample)
        return np.empty((0, 0), np.uint8) if excluded is None else excluded.astype(np.uint8)

    def _once(self, what: str, sample: Sample, read: Callable[[Sample], Pixels]) -> Pixels:
        key = what, sample.id
        pixels = self._kept.get(key)
        if pixels is None:
            pixels = read(sample)
            if pixels.base is not None:  # a view may change, or hold on to more than its own bytes
                pixels = pixels.copy()
            if pixels.nbytes <= self._room:
                pixels.flags.writeable = False
                self._kept[key] = pixels
                self._room -= pixels.nbytes
        return pixels
