"""CutMix (Yun et al., ICCV 2019) of auxiliary images: a rectangle of one crop is put into another.

Shapes: crops of H,W pixels; regions are masks H,W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segkd.pipeline.data.sample import Sample
from segkd.pipeline.data.transforms import BoolArray, Crop


@dataclass(frozen=True)
class Piece:
    """The part of a crop that shows one image."""

    sample: Sample
    image: npt.NDArray[np.uint8]
    """The whole image, H,W,3."""
    crop: Crop
    region: BoolArray
    """The crop pixels that belong to the image, padding beside it included. Those of a crop's pieces share no pixel."""

    @property
    def owned(self) -> BoolArray:
        """The crop pixels that show the image."""
        return self.region & self.crop.inside()


def draw_rectangle(rng: np.random.Generator, size: tuple[int, int]) -> BoolArray:
    """A random rectangle of a crop of ``size`` (H, W) as a mask, wholly inside it and of its aspect.

    Its share of the area is uniform on (0, 1), CutMix's Beta(1, 1), up to whole pixels: of each side at least one, and
    at least one less than the crop has, so that both images are seen.
    """
    side = math.sqrt(rng.random())
    height, width = (min(max(round(side * pixels), 1), max(pixels - 1, 1)) for pixels in size)
    top, left = (int(rng.integers(spare, endpoint=True)) for spare in (size[0] - height, size[1] - width))
    mask = np.zeros(size, np.bool_)
    mask[top : top + height, left : left + width] = True
    return mask


def compose(pieces: Sequence[Piece]) -> npt.NDArray[np.uint8]:
    """The picture H,W,3 of a crop: each piece where its region is."""
    picture = pieces[0].crop.image(pieces[0].image)
    for piece in pieces[1:]:
        picture[piece.region] = piece.crop.image(piece.image)[piece.region]
    return picture
