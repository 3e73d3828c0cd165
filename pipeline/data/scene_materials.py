"""What the demo scenes are made of: photographs and textures that scikit-image carries in its wheel.

Lengths are in metres of the scene. Colours are linear factors, 1 = full white; textures have mean 1.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

FloatArray = npt.NDArray[np.floating[Any]]

_SIDE = 256
TILE_METRES = {"brick": 2.6, "grass": 1.8, "gravel": 2.2, "fur": 0.8}
"""Side of the photographed square, as it appears in the scenes."""
PHOTOGRAPHS = {
    "astronaut": (130, 0, 340, 210),
    "camera": (80, 50, 400, 370),
    "chelsea": (60, 0, 340, 280),
    "coffee": (100, 0, 500, 400),
    "coins": (0, 0, 300, 300),
    "rocket": (220, 40, 520, 340),
}
"""Pictures that signs and posters show: the box of the photograph that is used."""


class Texture:
    """A seamless texture with its mip levels, in one flat array so that each pixel can choose its own level."""

    def __init__(self, tile: FloatArray, metres: float) -> None:
        level = np.block([[tile, tile[:, ::-1]], [tile[::-1], tile[::-1, ::-1]]])
        levels = []
        while len(level) >= 2:
            levels.append(level)
            level = level.reshape(len(level) // 2, 2, -1, 2).mean(axis=(1, 3))
        self._sizes = np.array([len(level) for level in levels])
        self._starts = np.concatenate([[0], np.cumsum(self._sizes**2)])
        self._values = np.concatenate([level.ravel() for level in levels]).astype(np.float32)
        self._metres = 2 * metres

    def __call__(self, x: FloatArray, y: FloatArray, pixel: FloatArray) -> FloatArray:
        """Values at ``x``, ``y`` (metres) for pixels ``pixel`` metres wide; the three broadcast."""
        texel = self._metres / self._sizes[0]
        level = np.log2(np.maximum(pixel / texel, 1.0)).round().astype(np.intp).clip(0, len(self._sizes) - 1)
        size = self._sizes[level]
        row, column = (
            (y / self._metres * size).astype(np.intp) % size,
            (x / self._metres * size).astype(np.intp) % size,
        )
        values: FloatArray = self._values[self._starts[level] + row * size + column]
        return values


@lru_cache
def texture(name: str) -> Texture:
    """One of :data:`TILE_METRES`, evenly lit."""
    picture = _bundled("chelsea").crop((150, 10, 260, 120)) if name == "fur" else _bundled(name)
    if name == "brick":
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    tile = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    light = tile.resize((4, 4), Image.Resampling.BOX).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    values = np.asarray(tile, np.float32) / np.maximum(np.asarray(light, np.float32), 1)
    return Texture(values / values.mean(), TILE_METRES[name])


@lru_cache
def photograph(name: str, side: int) -> FloatArray:
    """side,side,3: one of :data:`PHOTOGRAPHS`, row 0 at the top."""
    picture = _bundled(name).convert("RGB").crop(PHOTOGRAPHS[name])
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX), np.float32) / 255


@lru_cache
def silhouette(side: int) -> FloatArray:
    """side,side: how much of each cell the animal covers, row 0 at the top."""
    mask = 1 - np.asarray(_bundled("horse").convert("L"), np.float32) / 255
    rows, columns = np.nonzero(mask > 0.5)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    cut = Image.fromarray(mask).crop(box).resize((side, side), Image.Resampling.BOX)
    return np.asarray(cut)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], size: tuple[int, int]) -> FloatArray:
    """Noise of standard deviation about 1 on ``size``, smooth between ``shape`` random values."""
    coarse = Image.fromarray(rng.standard_normal(shape).astype(np.float32))
    return np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _bundled(name: str) -> Image.Image:
    """A picture from the installed package; nothing is ever downloaded."""
    folder = resources.files("skimage") / "data"
    path = next(folder / f"{name}{suffix}" for suffix in (".png", ".jpg") if (folder / f"{name}{suffix}").is_file())
    with path.open("rb") as file:
        picture = Image.open(file)
        picture.load()
    return picture
