"""The built-in data set: gardens and yards that are painted on the spot, with nothing to download.

Made so that context counts: walls and paving are of the same bricks, hedges and lawns of the same grass, rocks and
gravel of the same stones, and of two equal pictures or spheres one is a sign or a ball, the other a part of the wall or
the post that it hangs on.

Shapes: images H,W,3 uint8 RGB; labels H,W uint8.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from segkd.pipeline.data.sample import Classes, Role, Sample
from segkd.pipeline.data.scene_materials import FloatArray
from segkd.pipeline.data.scene_places import Maker, Place
from segkd.pipeline.data.scene_view import View
from segkd.storage.errors import ConfigError, DataError
from segkd.storage.table import DIGEST_BYTES

Picture = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]

CLASSES = Classes(
    names=("sky", "wall", "paving", "lawn", "hedge", "gravel", "rock", "fence", "post", "sign", "ball", "animal"),
    palette=(
        (120, 180, 235),
        (190, 80, 60),
        (230, 155, 125),
        (150, 205, 90),
        (45, 125, 65),
        (215, 200, 165),
        (120, 115, 115),
        (250, 215, 85),
        (60, 65, 95),
        (235, 90, 170),
        (135, 80, 200),
        (110, 70, 35),
    ),
)


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """How many scenes there are and how hard they are."""

    size: tuple[int, int] = (128, 160)
    """Height and width of every image."""
    train: int = 48
    """Scenes of role train."""
    auxiliary: int = 192
    """Scenes of role auxiliary."""
    select: int = 32
    """Scenes of role select."""
    report: int = 64
    """Scenes of role report."""
    per_place: int = 2
    """Scenes that show the same place: a group. No place is seen in two roles."""
    noise: float = 4.0
    """Standard deviation of the sensor's noise, in steps of 255."""
    blur: float = 0.6
    """Largest radius of the lens's blur in pixels."""
    clutter: float = 0.6
    """How many stains, posters, windows and visitors there are; 0 leaves the least."""
    deformation: float = 1.0
    """How ragged outlines are; 0 makes them even."""
    seed: int = 0
    """Another seed paints another data set."""

    def __post_init__(self) -> None:
        if min(self.size) < 32:
            raise ConfigError(f"data.scenes.size is {list(self.size)}; both sides must be at least 32 pixels")
        for name, low in (("train", 0), ("auxiliary", 0), ("select", 0), ("report", 0), ("per_place", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"data.scenes.{name} is {getattr(self, name)}; it must be at least {low}")
        for name in ("noise", "blur", "clutter", "deformation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"data.scenes.{name} is {getattr(self, name)}; it must be 0 or more")


class SceneSource:
    """The scenes of a :class:`SceneConfig` as a data set. Each is painted when first asked for, once a process."""

    classes = CLASSES

    def __init__(self, config: SceneConfig) -> None:
        self.config = config
        self.samples: Sequence[Sample] = tuple(
            Sample(
                id=f"{role}/{number:04d}",
                role=role,
                # Auxiliary scenes have labels too, for scores; training never reads them.
                labelled=True,
                group=f"{role}-place-{number // config.per_place:03d}",
            )
            for role in sorted(Role)
            for number in range(getattr(config, role))
        )

    def size(self, sample: Sample) -> tuple[int, int]:
        """H, W, the same for all."""
        self._number(sample)
        return self.config.size

    def image(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """H,W,3. Raises DataError for a sample of another source."""
        return _paint(self.config, sample.role, self._number(sample))[0].copy()

    def image_file(self, sample: Sample) -> None:
        """There is none."""

    def image_digest(self, sample: Sample) -> bytes:
        """What a cache keeps of the SHA-256 of the pixels."""
        return hashlib.sha256(self.image(sample).tobytes()).digest()[:DIGEST_BYTES]

    def labels(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """H,W class indices; every pixel has one."""
        return _paint(self.config, sample.role, self._number(sample))[1].copy()

    def _number(self, sample: Sample) -> int:
        prefix, _, number = sample.id.partition("/")
        if prefix != sample.role or not number.isdecimal() or int(number) >= getattr(self.config, sample.role):
            raise DataError(f"there is no built-in scene {sample.id!r}; the cache or list is of other data")
        return int(number)


@lru_cache(maxsize=64)
def _place(config: SceneConfig, role: Role, number: int) -> Place:
    rng = np.random.default_rng([config.seed, list(Role).index(role), number])
    return Maker(rng, clutter=config.clutter, deformation=config.deformation).place()


@lru_cache(maxsize=1024)
def _paint(config: SceneConfig, role: Role, number: int) -> Picture:
    """Image and labels: a pure function of its arguments."""
    place = _place(config, role, number // config.per_place)
    rng = np.random.default_rng([config.seed, list(Role).index(role), number, 1])
    maker = Maker(rng, clutter=config.clutter, deformation=config.deformation)
    camera = maker.camera(config.size)
    view = View(camera, maker.surroundings(place, camera), CLASSES.names)
    view.paint([*place.standing, *maker.visitors()])
    return _expose(view.colours, config, rng), view.labels


def _expose(colours: FloatArray, config: SceneConfig, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """What a small camera makes of a view: exposure, a colour cast, vignetting, blur and noise."""
    height, width = config.size
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    gain = rng.uniform(1.0, 1.4) * rng.uniform(0.95, 1.05, 3) * (1 - 0.12 * (x**2 + y**2))[..., None]
    tones = 255 * np.clip(colours * gain, 0, 1) ** 0.85
    lens = ImageFilter.GaussianBlur(config.blur * rng.uniform(0.4, 1.0))
    seen = np.asarray(Image.fromarray(tones.astype(np.uint8)).filter(lens), np.float32)
    noisy = seen + config.noise * rng.standard_normal(seen.shape, np.float32)
    return np.clip(noisy.round(), 0, 255).astype(np.uint8)
