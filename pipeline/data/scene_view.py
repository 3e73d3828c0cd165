"""Paints a demo scene as a camera sees it: sky, ground with shadows, and whatever stands on it, far to near.

Plan coordinates are x (to the right) and z (into the picture) in metres; u, v are image columns and rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segkd.pipeline.data.scene_materials import FloatArray, texture
from segkd.pipeline.data.scene_uprights import AMBIENT, Colour, Point, Spots, Upright

_NEAR = 0.5
_GROUND_TEXTURE = {"paving": "brick", "lawn": "grass", "gravel": "gravel"}


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Where it stands on the plan and where it looks."""

    size: tuple[int, int]
    """H, W of the image."""
    position: Point
    yaw: float
    """Radians to the right."""
    horizon: float
    """The horizon's row."""
    height: float = 1.5
    """Metres above the ground."""

    @property
    def focal(self) -> float:
        """Focal length in pixels."""
        return 1.1 * self.size[1]

    def to_view(self, point: Point) -> Point:
        """Plan -> coordinates in which the camera stands at 0 and looks along z."""
        x, z = point[0] - self.position[0], point[1] - self.position[1]
        cosine, sine = np.cos(self.yaw), np.sin(self.yaw)
        return cosine * x - sine * z, sine * x + cosine * z

    def to_plan(self, x: FloatArray, z: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The inverse of :meth:`to_view`."""
        cosine, sine = np.float32(np.cos(self.yaw)), np.float32(np.sin(self.yaw))
        return cosine * x + sine * z + self.position[0], cosine * z - sine * x + self.position[1]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What is lit how: everything that does not stand."""

    ground: Callable[[FloatArray, FloatArray], npt.NDArray[np.intp]]
    """Plan coordinates -> index into ``materials``."""
    materials: Sequence[tuple[str, Colour]]
    """Class and colour of the kinds of ground."""
    stains: Sequence[tuple[float, float, float, float]]
    """x, z, radius and darkness of spots on the ground."""
    sky: FloatArray
    """H,W,3."""
    shadow: Point
    """Where the shadow of something one metre high ends on the plan."""


class View:
    """One picture in the making: colours H,W,3, labels H,W and, per pixel, how far away it is."""

    def __init__(self, camera: Camera, surroundings: Surroundings, classes: Sequence[str]) -> None:
        height, width = camera.size
        self._camera = camera
        self._classes = classes
        self._shadow = surroundings.shadow
        self._across = ((np.arange(width) - (width - 1) / 2) / camera.focal).astype(np.float32)
        self._down = ((np.arange(height) - camera.horizon) / camera.focal).astype(np.float32)
        self._top = int(np.searchsorted(self._down, camera.height / 90))
        """First row of the ground; what is farther away than 90 m is sky."""
        self.colours = surroundings.sky.copy()
        self.labels = np.full(camera.size, classes.index("sky"), np.uint8)
        self._depth = np.full(camera.size, np.inf, np.float32)
        """Of what stands; the ground never hides anything."""
        self._paint_ground(surroundings)

    def paint(self, uprights: Sequence[Upright]) -> None:
        """Everything that stands, after the shadows that it casts on the ground."""
        for upright in uprights:
            self._cast(upright)
        self.colours[self._top :] *= (1 - (1 - AMBIENT) * self._shade)[..., None]
        for upright in sorted(uprights, key=self._distance, reverse=True):
            self._stand(upright)

    def _paint_ground(self, surroundings: Surroundings) -> None:
        depth = (self._camera.height / self._down[self._top :])[:, None]
        x, z = self._camera.to_plan(self._across * depth, depth)
        self._plan = x, z
        self._shade = np.zeros(x.shape, np.float32)
        kinds = surroundings.ground(x, z)
        # A pixel's width on the ground, between its extents along and across the line of sight.
        pixel = depth / self._camera.focal * np.sqrt(depth / self._camera.height)
        colours, labels = self.colours[self._top :], self.labels[self._top :]
        for kind, (name, tint) in enumerate(surroundings.materials):
            here = kinds == kind
            values = texture(_GROUND_TEXTURE[name])(x[here] + 500, z[here] + 500, np.broadcast_to(pixel, x.shape)[here])
            colours[here] = values[:, None] * np.asarray(tint, np.float32)
            labels[here] = self._classes.index(name)
        for stain_x, stain_z, radius, darkness in surroundings.stains:
            near = np.clip(1.5 - np.hypot(x - stain_x, z - stain_z) / radius, 0, 1)
            colours *= (1 - darkness * near)[..., None]

    def _distance(self, upright: Upright) -> float:
        return self._camera.to_view(upright.start)[1] + self._camera.to_view(upright.end)[1]

    def _cast(self, upright: Upright) -> None:
        """The shadow: where the line from a point of the ground to the sun meets the surface."""
        (ax, az), (bx, bz), (sx, sz) = upright.start, upright.end, self._shadow
        ex, ez = (bx - ax) / upright.length, (bz - az) / upright.length
        cross = ex * sz - ez * sx
        if abs(cross) < 0.05:
            return
        tips = [(px + k * sx, pz + k * sz) for px, pz in (upright.start, upright.end) for k in (0.0, upright.height)]
        rows = self._rows([self._camera.to_view(tip)[1] for tip in tips])
        x, z = self._plan[0][rows] - np.float32(ax), self._plan[1][rows] - np.float32(az)
        up = (ex * z - ez * x) / np.float32(cross)
        along = (x * sz - z * sx) / np.float32(cross)
        inside = (up >= 0) & (up <= upright.height) & (along >= 0) & (along <= upright.length)
        if inside.any():
            cover = upright.cover(Spots(along[inside], up[inside], np.full(1, 0.06)))
            self._shade[rows][inside] = np.maximum(self._shade[rows][inside], cover)

    def _rows(self, depths: Sequence[float]) -> slice:
        """The ground's rows that show a range of depths."""
        down = [self._camera.height / max(depth, _NEAR) for depth in (max(depths), min(depths))]
        first, last = np.searchsorted(self._down[self._top :], down)
        return slice(int(first), int(last) + 1)

    def _stand(self, upright: Upright) -> None:
        camera = self._camera
        (ax, az), (bx, bz) = camera.to_view(upright.start), camera.to_view(upright.end)
        # Along the line of sight of each column: a + t * (b - a) = z * (across, 1).
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (self._across * az - ax) / ((bx - ax) - self._across * (bz - az))
            depth = az + t * (bz - az)
            margin = 2 * depth / camera.focal / upright.length
            seen = np.flatnonzero((depth > _NEAR) & (t > -margin) & (t < 1 + margin))
        if not len(seen):
            return
        columns = slice(int(seen[0]), int(seen[-1]) + 1)
        depth, along = depth[columns].astype(np.float32), (t[columns] * upright.length).astype(np.float32)
        top = camera.horizon - camera.focal * (upright.height - camera.height) / depth.min()
        low = camera.horizon + camera.focal * camera.height / depth.min()
        rows = slice(max(int(top) - 1, 0), max(int(low) + 2, 0))
        up = camera.height - self._down[rows, None] * depth
        pixel = depth / camera.focal
        if not up.size:
            return
        foot = np.clip(up / pixel + 0.5, 0, 1) * (depth < self._depth[rows, columns])
        at = Spots(along, up, pixel)
        cover = upright.cover(at) * foot
        colours = upright.colour(at, self._sun(upright))
        self.colours[rows, columns] += cover[..., None] * (colours - self.colours[rows, columns])
        labelled = upright.region(at) * foot > 0.5
        self.labels[rows, columns][labelled] = self._classes.index(upright.label)
        self._depth[rows, columns][labelled] = np.broadcast_to(depth, labelled.shape)[labelled]

    def _sun(self, upright: Upright) -> FloatArray:
        """The direction to the sun in the surface's axes: along it, up, and out of it towards the camera."""
        sun = np.array([-self._shadow[0], 1.0, -self._shadow[1]]) / np.sqrt(1 + np.hypot(*self._shadow) ** 2)
        (ax, az), (bx, bz) = upright.start, upright.end
        along = np.array([bx - ax, bz - az]) / upright.length
        normal = np.array([-along[1], along[0]])
        to_camera = np.array(self._camera.position) - (ax, az)
        towards = np.sign(normal @ to_camera) * normal
        return np.array([along @ sun[[0, 2]], sun[1], towards @ sun[[0, 2]]], np.float32)
