"""What an image shows, in a few bytes: how two of them are found to be the same whatever their files are.

Shapes: images H,W,3 uint8 RGB, EXIF-upright; tones n,256 uint8.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image

from segkd.pipeline.data.remembered import Memory, Stamp, stamp_of
from segkd.pipeline.data.sample import DataSource, Sample
from segkd.pipeline.progress import SILENT, Progress

DIGEST_BYTES = 16
"""Of SHA-256: enough against accidents; nobody is kept from forging."""
GRID = 16
"""Tones along either side."""
_AT_ONCE = 256
"""Images that are handed to the threads together; what is known of them is kept before the next ones."""


@dataclass(frozen=True, slots=True)
class Content:
    """What tells an image from others."""

    digest: bytes
    """The first bytes of SHA-256 of height, width and RGB values: equal pixels, in whatever lossless format."""
    tones: bytes
    """The perceptual hash: brightness 0 to 255 of 16 x 16 overlapping parts of the image, by rows. See
    :data:`segkd.pipeline.data.matching.TOLERANCE` for how it is compared."""

    def to_bytes(self) -> bytes:
        """For :class:`Memory`."""
        return self.digest + self.tones

    @classmethod
    def from_bytes(cls, kept: bytes) -> Content:
        """What :meth:`to_bytes` has made."""
        return cls(kept[:DIGEST_BYTES], kept[DIGEST_BYTES:])


def content_of(image_HW3: npt.NDArray[np.uint8]) -> Content:
    """The content of one image."""
    height, width, _ = image_HW3.shape
    digest = hashlib.sha256(f"{height}x{width}\n".encode())
    digest.update(np.ascontiguousarray(image_HW3).data)
    return Content(digest.digest()[:DIGEST_BYTES], tones_of(Image.fromarray(image_HW3), GRID).tobytes())


def tones_of(image: Image.Image, grid: int) -> npt.NDArray[np.uint8]:
    """Luma of ``grid`` x ``grid`` parts, each weighted by a triangle twice its size.

    Parts that overlap: with hard borders, an edge of the scene that falls on one would jump to the neighbour's side as
    the image is resized.
    """
    return np.asarray(image.convert("L").resize((grid, grid), Image.Resampling.BILINEAR))


def read_contents(
    source: DataSource, samples: Sequence[Sample], *, progress: Progress = SILENT
) -> Mapping[str, Content]:
    """The content of each sample, by id. Images that were never seen before are decoded, others remembered.

    Raises DataError, naming the file, for an image that cannot be read.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, closing(Memory()) as memory:
        stamps = dict(zip((sample.id for sample in samples), pool.map(partial(stamp, source), samples), strict=True))
        kept = memory.recall(list(filter(None, stamps.values())))
        found = {name: Content.from_bytes(kept[at]) for name, at in stamps.items() if at is not None and at in kept}
        unseen = [sample for sample in samples if sample.id not in found]
        if unseen:
            with progress.task("compare images", len(samples), done=len(found)) as task:
                for start in range(0, len(unseen), _AT_ONCE):
                    part = unseen[start : start + _AT_ONCE]
                    for sample, content in zip(part, pool.map(partial(_read, source), part), strict=True):
                        found[sample.id] = content
                        task.advance()
                    new = ((stamps[sample.id], found[sample.id].to_bytes()) for sample in part)
                    memory.keep([(at, content) for at, content in new if at is not None])
    return found


def stamp(source: DataSource, sample: Sample) -> Stamp | None:
    """What tells whether the sample's file is still the one that was seen; None for a generated image."""
    file = source.image_file(sample)
    return None if file is None else stamp_of(file)


def _read(source: DataSource, sample: Sample) -> Content:
    return content_of(source.image(sample))
