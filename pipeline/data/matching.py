"""Which images of two lists are the same: by their pixels, or by tones that differ no more than re-encoding makes them.

Shapes: tones n,256 uint8; n images, 256 parts of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segkd.pipeline.data.contents import GRID, Content

TOLERANCE = 0.25
"""The largest difference of two tones at which images are the same, in parts of their contrast."""
LEAST_CONTRAST = 8.0
"""Below this contrast, the standard deviation of its tones, an image says too little by them: it is compared by its
pixels alone."""
_COARSE = 4
"""Means of the tones along either side, by which most pairs are dismissed."""
_ROUNDING = 1e-3


def is_faint(content: Content) -> bool:
    """Whether an image has too little contrast to be compared by its tones."""
    return bool(np.frombuffer(content.tones, np.uint8).std(dtype=np.float32) < LEAST_CONTRAST)


@dataclass(frozen=True, slots=True)
class Likeness:
    """Two images that show the same, by their positions in the two lists."""

    first: int
    second: int
    difference: int
    """The largest difference of tones, of 255; 0 with ``exact``."""
    exact: bool
    """Whether all pixels are equal."""


def alike(first: Sequence[Content], second: Sequence[Content]) -> list[Likeness]:
    """For each image of ``first`` that is in ``second`` too the one that is most like it, in the order of ``first``."""
    place = {content.digest: index for index, content in reversed(list(enumerate(second)))}
    found = {
        index: Likeness(index, place[content.digest], 0, True)
        for index, content in enumerate(first)
        if content.digest in place
    }
    others = [index for index in range(len(first)) if index not in found]
    nearest, differences = _nearest([first[index].tones for index in others], [content.tones for content in second])
    for index, near, difference in zip(others, nearest.tolist(), differences.tolist(), strict=True):
        if near >= 0:
            found[index] = Likeness(index, near, difference, False)
    return [found[index] for index in sorted(found)]


class _Tones:
    """Tones in the order of their mean, with what dismisses most of them at once."""

    def __init__(self, tones: Sequence[bytes]) -> None:
        fine = np.frombuffer(b"".join(tones), np.uint8).reshape(-1, GRID * GRID)
        contrast = fine.std(axis=1, dtype=np.float32)
        mean = fine.mean(axis=1, dtype=np.float32)
        kept = np.flatnonzero(contrast >= LEAST_CONTRAST)
        self.order = kept[np.argsort(mean[kept], kind="stable")]
        self.fine, self.mean = fine[self.order], mean[self.order]
        self.tolerance = TOLERANCE * contrast[self.order]
        part = GRID // _COARSE
        blocks = self.fine.reshape(-1, _COARSE, part, _COARSE, part).mean(axis=(2, 4), dtype=np.float32)
        self.coarse = np.ascontiguousarray(blocks.reshape(-1, _COARSE * _COARSE).T)

    def near(self, other: _Tones, k: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int16]]:
        """The rows that are like row ``k`` of ``other``, and their differences.

        A mean of tones cannot differ by more than the tones do, so nothing is missed.
        """
        most = other.tolerance[k] + _ROUNDING
        low, high = np.searchsorted(self.mean, (other.mean[k] - most, other.mean[k] + most))
        rows = np.arange(low, high)
        for mine, theirs in zip(self.coarse, other.coarse[:, k], strict=True):
            if rows.size == 0:
                break
            rows = rows[np.abs(mine[rows] - theirs) <= most]
        differences = np.abs(self.fine[rows].astype(np.int16) - other.fine[k]).max(axis=1, initial=0)
        same = differences <= np.minimum(self.tolerance[rows], other.tolerance[k])
        return rows[same], differences[same]


def _nearest(first: Sequence[bytes], second: Sequence[bytes]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int16]]:
    """For each of ``first`` the position of the nearest like one of ``second``, -1 for none, and their difference."""
    nearest, least = np.full(len(first), -1, np.intp), np.full(len(first), 256, np.int16)
    ours, theirs = _Tones(first), _Tones(second)
    if len(ours.order) <= len(theirs.order):
        for k, index in enumerate(ours.order):
            rows, differences = theirs.near(ours, k)
            if rows.size:
                best = differences.argmin()
                nearest[index], least[index] = theirs.order[rows[best]], differences[best]
    else:
        for k, index in enumerate(theirs.order):
            rows, differences = ours.near(theirs, k)
            places = ours.order[rows]
            better = differences < least[places]
            nearest[places[better]], least[places[better]] = index, differences[better]
    return nearest, least
