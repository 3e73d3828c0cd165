"""The places of the demo scenes and what moves there.

A place is laid out once: its ground, walls, hedges, posts, materials and light. Its scenes differ in where the camera
stands and in the animals, balls and signs that come and go. Metres throughout; x to the right, z into the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segkd.pipeline.data.scene_materials import PHOTOGRAPHS, FloatArray, smooth_noise
from segkd.pipeline.data.scene_uprights import (
    Animal,
    Ball,
    Colour,
    Fence,
    Hedge,
    Point,
    Post,
    Poster,
    Rock,
    Sign,
    Upright,
    Wall,
)
from segkd.pipeline.data.scene_view import Camera, Surroundings

Ground = Callable[[FloatArray, FloatArray], npt.NDArray[np.intp]]

# Materials share their tints, so that a colour alone does not tell a class.
_BRICKS = ((0.62, 0.34, 0.26), (0.68, 0.54, 0.38), (0.72, 0.58, 0.5), (0.52, 0.35, 0.28))
_GREENS = ((0.3, 0.44, 0.17), (0.36, 0.42, 0.2), (0.24, 0.38, 0.16), (0.46, 0.46, 0.24))
_STONES = ((0.54, 0.54, 0.53), (0.46, 0.48, 0.52), (0.64, 0.63, 0.61))
_METALS = ((0.3, 0.32, 0.33), (0.55, 0.56, 0.56), (0.22, 0.3, 0.26), (0.45, 0.38, 0.32))
_WOODS = ((0.85, 0.84, 0.8), (0.5, 0.36, 0.24), (0.36, 0.33, 0.3))
_COATS = ((0.45, 0.28, 0.16), (0.22, 0.17, 0.14), (0.75, 0.7, 0.64), (0.6, 0.42, 0.22))
_TOYS = ((0.85, 0.2, 0.15), (0.15, 0.35, 0.75), (0.9, 0.75, 0.2), (0.9, 0.9, 0.88), (0.25, 0.6, 0.35), (0.6, 0.4, 0.3))
_SKIES = ((0.42, 0.6, 0.88), (0.62, 0.7, 0.8), (0.75, 0.77, 0.78), (0.85, 0.72, 0.6))


@dataclass(frozen=True, kw_only=True)
class Place:
    """What all scenes of one group have in common."""

    ground: Ground
    materials: tuple[tuple[str, Colour], ...]
    stains: tuple[tuple[float, float, float, float], ...]
    standing: tuple[Upright, ...]
    sky: Colour
    shadow: Point


class Maker:
    """Draws the parts of a place from one generator."""

    def __init__(self, rng: np.random.Generator, *, clutter: float, deformation: float) -> None:
        self._rng = rng
        self._clutter = clutter
        self._deformation = deformation

    def place(self) -> Place:
        """A new place."""
        rng = self._rng
        sky = self._tint(_SKIES)
        direction = rng.uniform(0.35, np.pi - 0.35) + (np.pi if rng.random() < 0.35 else 0)
        reach = rng.uniform(0.5, 1.4)
        kinds = [str(kind) for kind in rng.permutation(["lawn", "paving", "gravel"])]
        tints = {"lawn": _GREENS, "paving": _BRICKS, "gravel": _STONES}
        stains = [
            (rng.uniform(-6, 6), rng.uniform(2, 12), rng.uniform(0.1, 0.7), rng.uniform(-0.25, 0.45))
            for _ in range(rng.poisson(6 * self._clutter))
        ]
        return Place(
            ground=self._ground(),
            materials=tuple((kind, self._tint(tints[kind])) for kind in kinds),
            stains=tuple(stains),
            standing=(*self._backdrop(sky), *self._middle()),
            sky=sky,
            shadow=(reach * float(np.cos(direction)), reach * float(np.sin(direction))),
        )

    def visitors(self) -> list[Upright]:
        """Animals, balls, rocks and signs of one scene."""
        rng, more = self._rng, self._clutter
        found: list[Upright] = [self._animal() for _ in range(rng.choice(3, p=[0.25, 0.5, 0.25]))]
        found += [self._ball() for _ in range(1 + rng.poisson(1.2 * more))]
        found += [self._rock() for _ in range(1 + rng.poisson(1.2 * more))]
        for _ in range(1 + rng.poisson(0.6 * more)):
            found += self._sign()
        return found

    def camera(self, size: tuple[int, int]) -> Camera:
        """A point of view of one scene."""
        rng = self._rng
        return Camera(
            size=size,
            position=(rng.uniform(-1.5, 1.5), rng.uniform(-1.0, 1.5)),
            yaw=rng.uniform(-0.2, 0.2),
            horizon=size[0] * rng.uniform(0.3, 0.46),
            height=rng.uniform(1.3, 1.8),
        )

    def surroundings(self, place: Place, camera: Camera) -> Surroundings:
        """The place as it is lit when the picture is taken; clouds move."""
        height, width = camera.size
        clouds = smooth_noise(self._rng, (5, 4), (height, width)) + 0.5 * smooth_noise(
            self._rng, (14, 9), (height, width)
        )
        share = np.clip(0.3 + 0.35 * clouds, 0, 0.9)[..., None]
        rise = np.clip(1 - np.arange(height) / max(camera.horizon, 1), 0, 1)[:, None, None]
        blue = np.asarray(place.sky) * (1.08 - 0.25 * rise)
        sky = blue + share * (np.float32(0.95) - blue)
        turn = self._rng.uniform(-0.15, 0.15)
        x, z = place.shadow
        return Surroundings(
            ground=place.ground,
            materials=place.materials,
            stains=place.stains,
            sky=sky.astype(np.float32),
            shadow=(x - turn * z, z + turn * x),
        )

    def _ground(self) -> Ground:
        """A base, a winding path and a terrace: indices 0, 1, 2."""
        rng = self._rng
        offset, slope = rng.uniform(-3, 3), rng.uniform(-0.5, 0.5)
        sway, turns, phase = rng.uniform(0, 1.2) * self._deformation, rng.uniform(0.2, 0.6), rng.uniform(0, 6)
        half = rng.uniform(0.6, 1.8)
        angle, edge = rng.uniform(-np.pi, np.pi), rng.uniform(-1, 3)
        rough = 0.12 * self._deformation

        def kinds(x: FloatArray, z: FloatArray) -> npt.NDArray[np.intp]:
            ragged = rough * (np.sin(7.1 * x + 3 * np.sin(2.3 * z)) + np.sin(5.3 * z + 2 * np.sin(3.7 * x)))
            path = np.abs(x - offset - slope * z - sway * np.sin(turns * z + phase)) + ragged < half
            terrace = np.cos(angle) * x + np.sin(angle) * (z - 6) + ragged > edge + 2
            return np.where(path, 1, np.where(terrace, 2, 0))

        return kinds

    def _backdrop(self, sky: Colour) -> list[Upright]:
        """Far trees and buildings."""
        rng = self._rng
        found: list[Upright] = []
        if rng.random() < 0.8:
            found.append(self._hedge((-50.0, 42.0), (50.0, 38.0), rng.uniform(3.5, 7)))
        for _ in range(rng.integers(1, 3)):
            centre, length, turn = rng.uniform(-7, 7), rng.uniform(5, 13), rng.uniform(-0.45, 0.45)
            found.append(self._wall((centre, rng.uniform(9, 19)), length, turn, rng.uniform(2.5, 6.5), sky))
        if rng.random() < 0.45:
            side = rng.choice([-1.0, 1.0])
            start = side * rng.uniform(3.5, 5.5), rng.uniform(3, 6)
            found.append(self._wall(start, rng.uniform(6, 14), np.pi / 2 - side * rng.uniform(-0.1, 0.3), 3.0, sky))
        return found

    def _middle(self) -> list[Upright]:
        """What stands between the camera and the backdrop for good."""
        rng = self._rng
        found: list[Upright] = [
            self._hedge(*self._segment(6, 14, 2.5, 8), rng.uniform(0.7, 2.0)) for _ in range(rng.integers(1, 3))
        ]
        for _ in range(rng.integers(1, 3)):
            start, end = self._segment(5, 10, 3, 7)
            tint, spacing = self._tint(_WOODS), rng.uniform(0.25, 0.4)
            height = rng.uniform(0.8, 1.2)
            picket = spacing * rng.uniform(0.45, 0.65)
            found.append(
                Fence(label="fence", start=start, end=end, height=height, tint=tint, spacing=spacing, picket=picket)
            )
        if rng.random() < 0.4:
            start, end = self._segment(5, 12, 2, 6)
            found.append(
                Wall(label="wall", start=start, end=end, height=rng.uniform(0.4, 0.9), tint=self._tint(_BRICKS))
            )
        return found + [self._post() for _ in range(rng.integers(1, 4))]

    def _segment(self, near: float, far: float, short: float, long: float) -> tuple[Point, Point]:
        rng = self._rng
        z = rng.uniform(near, far)
        x = rng.uniform(-0.6, 0.6) * z
        length, turn = rng.uniform(short, long) / 2, rng.uniform(-0.5, 0.5)
        along = length * float(np.cos(turn)), length * float(np.sin(turn))
        return (x - along[0], z - along[1]), (x + along[0], z + along[1])

    def _spot(self, near: float, far: float, width: float) -> tuple[Point, Point]:
        """The segment of something that faces the camera."""
        z = float(np.exp(self._rng.uniform(np.log(near), np.log(far))))
        x = self._rng.uniform(-0.5, 0.5) * z
        return (x - width / 2, z), (x + width / 2, z)

    def _wall(self, centre: Point, length: float, turn: float, height: float, sky: Colour) -> Wall:
        rng = self._rng
        x, z = 0.5 * length * float(np.cos(turn)), 0.5 * length * float(np.sin(turn))
        posters = []
        for k in range(int(length / 2)):
            if rng.random() < 0.55 * self._clutter:
                picture = str(rng.choice(list(PHOTOGRAPHS))) if rng.random() < 0.3 else None
                size = rng.uniform(0.8, 1.3)
                posters.append(
                    Poster(
                        along=2 * k + 0.3, up=rng.uniform(0.9, 1.3), width=size, height=size, picture=picture, sky=sky
                    )
                )
        start, end = (centre[0] - x, centre[1] - z), (centre[0] + x, centre[1] + z)
        return Wall(label="wall", start=start, end=end, height=height, tint=self._tint(_BRICKS), posters=tuple(posters))

    def _hedge(self, start: Point, end: Point, height: float) -> Hedge:
        length = float(np.hypot(end[0] - start[0], end[1] - start[1]))
        steps = max(int(4 * length), 8)
        noise = smooth_noise(self._rng, (1, max(steps // 8, 3)), (1, steps))[0] + 0.3 * self._rng.standard_normal(steps)
        bumps = np.clip(0.9 + 0.1 * self._deformation * noise, 0.3, 1).astype(np.float32)
        return Hedge(label="hedge", start=start, end=end, height=height, tint=self._tint(_GREENS), bumps=bumps)

    def _post(self) -> Post:
        lamp = self._rng.random() < 0.4
        globe = self._rng.uniform(0.18, 0.28) if lamp else 0.0
        start, end = self._spot(3.5, 8, 2 * globe if lamp else self._rng.uniform(0.16, 0.28))
        height = self._rng.uniform(1.2, 3.5)
        return Post(label="post", start=start, end=end, height=height, tint=self._tint(_METALS), globe=globe)

    def _sign(self) -> list[Upright]:
        rng = self._rng
        width, foot = rng.uniform(0.7, 1.2), rng.uniform(0.6, 1.6)
        start, end = self._spot(3.5, 8, width)
        picture, frame = str(rng.choice(list(PHOTOGRAPHS))), self._tint(_METALS)
        middle, z = (start[0] + end[0]) / 2, start[1]
        behind = (middle - 0.05, z + 0.02), (middle + 0.05, z + 0.02)
        return [
            Post(label="post", start=behind[0], end=behind[1], height=foot + 0.1, tint=frame),
            Sign(label="sign", start=start, end=end, height=foot + width, tint=frame, picture=picture, foot=foot),
        ]

    def _ball(self) -> Ball:
        size = self._rng.uniform(0.4, 0.8)
        start, end = self._spot(2.5, 6.5, size)
        material = str(self._rng.choice(["brick", "grass", "gravel", "fur"])) if self._rng.random() < 0.4 else None
        return Ball(label="ball", start=start, end=end, height=size, tint=self._tint(_TOYS), material=material)

    def _rock(self) -> Rock:
        width = self._rng.uniform(0.7, 1.6)
        start, end = self._spot(2.8, 7.5, width)
        noise = np.cumsum(self._rng.standard_normal(16))
        noise -= np.linspace(0, noise[-1], 16)
        outline = np.clip(0.9 + 0.06 * self._deformation * (noise - noise.mean()), 0.6, 1)
        outline[-1] = outline[0]
        height = width * self._rng.uniform(0.45, 0.8)
        return Rock(
            label="rock",
            start=start,
            end=end,
            height=height,
            tint=self._tint(_STONES),
            outline=outline.astype(np.float32),
        )

    def _animal(self) -> Animal:
        rng = self._rng
        height = rng.uniform(1.4, 2.0)
        lean = self._deformation * rng.uniform(-0.25, 0.25)
        length = height * max(1.15 + self._deformation * rng.uniform(-0.2, 0.2), 0.5)
        start, end = self._spot(3.2, 8, length + abs(lean))
        return Animal(
            label="animal",
            start=start,
            end=end,
            height=height,
            tint=self._tint(_COATS),
            mirrored=rng.random() < 0.5,
            lean=lean,
        )

    def _tint(self, colours: tuple[Colour, ...]) -> Colour:
        """One of the colours, a little off."""
        rng = self._rng
        colour = np.asarray(colours[rng.integers(len(colours))]) * rng.uniform(0.88, 1.12) * rng.uniform(0.95, 1.05, 3)
        return float(colour[0]), float(colour[1]), float(colour[2])
