"""Everything that stands in a demo scene: walls, hedges, fences, posts, signs, balls, rocks, animals.

All are one thing to the painter: a flat, upright surface over a segment of the ground, with an outline and a colour.

Shapes: coverage h,w; colours h,w,3.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from segkd.pipeline.data.scene_materials import FloatArray, photograph, silhouette, texture

Colour = tuple[float, float, float]
Point = tuple[float, float]
AMBIENT = 0.62
"""Light that reaches what the sun does not."""


@dataclass(frozen=True)
class Spots:
    """Points of a surface; the arrays broadcast to h,w."""

    along: FloatArray
    """Metres from the segment's start."""
    up: FloatArray
    """Metres above the ground."""
    pixel: FloatArray
    """Width of an image pixel there, in metres."""


@dataclass(frozen=True, kw_only=True)
class Upright:
    """A surface from ``start`` to ``end`` (x, z in metres on the ground) that is at most ``height`` metres high."""

    label: str
    """Name of its class."""
    start: Point
    end: Point
    height: float
    tint: Colour = (1.0, 1.0, 1.0)

    @property
    def length(self) -> float:
        """Metres along the ground."""
        return float(np.hypot(self.end[0] - self.start[0], self.end[1] - self.start[1]))

    def cover(self, at: Spots) -> FloatArray:
        """How much of each pixel it covers, 0 to 1."""
        return (
            _edge(at.along, at.pixel) * _edge(self.length - at.along, at.pixel) * _edge(self.height - at.up, at.pixel)
        )

    def region(self, at: Spots) -> FloatArray:
        """The same for its label, where that is filled although one can look through."""
        return self.cover(at)

    def colour(self, at: Spots, sun: FloatArray) -> FloatArray:
        """Its colour; ``sun`` points to the sun, in the surface's own axes (along, up, towards the viewer)."""
        shape = np.broadcast_shapes(at.along.shape, at.up.shape)
        return np.broadcast_to(_tinted(np.full(shape, _lit(sun), np.float32), self.tint), (*shape, 3))


@dataclass(frozen=True, kw_only=True)
class Poster:
    """A picture on a wall: it is wall to whoever labels. Without a picture it is a window that shows the sky."""

    along: float
    up: float
    width: float
    height: float
    picture: str | None
    sky: Colour


@dataclass(frozen=True, kw_only=True)
class Wall(Upright):
    """Bricks, upright."""

    posters: tuple[Poster, ...] = ()

    def colour(self, at: Spots, sun: FloatArray) -> FloatArray:
        bricks = texture("brick")(at.along + 50, at.up + 50, at.pixel)
        foot = 1 - 0.25 * np.exp(-np.maximum(at.up, 0) / 0.3)
        colours = _tinted(bricks * foot * _lit(sun), self.tint)
        for poster in self.posters:
            x, y = (at.along - poster.along) / poster.width, (at.up - poster.up) / poster.height
            inside = (x > 0) & (x < 1) & (y > 0) & (y < 1)
            if inside.any():
                x, y = np.broadcast_arrays(x, y)
                colours[inside] = _poster(poster, x[inside], y[inside]) * _lit(sun)
        return colours


@dataclass(frozen=True, kw_only=True)
class Hedge(Upright):
    """Grass, upright, with a ragged top."""

    bumps: FloatArray = field(compare=False)
    """Share of the height that it reaches, at even steps along it."""

    def cover(self, at: Spots) -> FloatArray:
        position = np.clip(at.along / self.length, 0, 1)
        rounded = np.clip(1 - np.abs(2 * position - 1) ** 12, 0, 1) ** 0.5
        top = self.height * rounded * np.interp(position, np.linspace(0, 1, len(self.bumps)), self.bumps)
        return _edge(top - at.up, at.pixel)

    def colour(self, at: Spots, sun: FloatArray) -> FloatArray:
        leaves = texture("grass")(at.along + 50, at.up + 50, at.pixel) ** 1.3
        return _tinted(leaves * (0.6 + 0.4 * np.clip(at.up / self.height, 0, 1)) * _lit(sun), self.tint)


@dataclass(frozen=True, kw_only=True)
class Fence(Upright):
    """Pickets and two rails; the label fills the gaps, as in street scenes."""

    spacing: float
    """Metres from picket to picket."""
    picket: float
    """Width of a picket."""

    def cover(self, at: Spots) -> FloatArray:
        across = np.abs((at.along / self.spacing) % 1 - 0.5) * self.spacing
        pickets = _edge(self.picket / 2 - across, at.pixel)
        rails = [_edge(0.05 - np.abs(at.up - share * self.height), at.pixel) for share in (0.3, 0.8)]
        return np.maximum(pickets, np.maximum(*rails)) * self.region(at)

    def region(self, at: Spots) -> FloatArray:
        return super().cover(at)


@dataclass(frozen=True, kw_only=True)
class Post(Upright):
    """A thin cylinder, perhaps with a glowing globe on top, which is then part of the post."""

    globe: float = 0.0
    """Radius of the globe, 0 for none."""

    def cover(self, at: Spots) -> FloatArray:
        radius = 0.07 if self.globe else self.length / 2
        shaft = _edge(radius - np.abs(at.along - self.length / 2), at.pixel)
        shaft = shaft * _edge(self.height - self.globe - at.up, at.pixel)
        return np.maximum(shaft, _edge(self.globe - self._from_globe(at), at.pixel)) if self.globe else shaft

    def colour(self, at: Spots, sun: FloatArray) -> FloatArray:
        colours = super().colour(at, sun).copy()
        if self.globe:
            distance = self._from_globe(at)
            inside = distance < self.globe + 0.02
            x, y = np.broadcast_arrays(at.along - self.length / 2, at.up - (self.height - self.globe))
            shade = _sphere(x[inside] / self.globe, y[inside] / self.globe, sun)
            colours[inside] = shade[:, None] * np.array([0.95, 0.93, 0.85], np.float32)
        return colours

    def _from_globe(self, at: Spots) -> FloatArray:
        distance: FloatArray = np.hypot(at.along - self.length / 2, at.up - (self.height - self.globe))
        return distance


@dataclass(frozen=True, kw_only=True)
class Sign(Upright):
    """A panel that shows a picture, on legs that a post of its own draws."""

    picture: str
    foot: float
    """Height of the panel's lower edge."""

    def cover(self, at: Spots) -> FloatArray:
        return super().cover(at) * _edge(at.up - self.foot, at.pixel)

    def colour(self, at: Spots, sun: FloatArray) -> FloatArray:
        x, y = np.broadcast_arrays(at.along / self.length, (at.up - self.foot) / (self.height - self.foot))
        frame = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) < 0.06
        colours = _look_up(photograph(self.picture, 32), x, y)
        panel: FloatArray = np.where(frame[..., None], np.asarray(self.tint, np.float32), colours) * _lit(sun)
        return panel


@dataclass(frozen=True, kw_only=True)
class Ball(Upright):
    """A sphere on the ground, plain or of some texture."""

    material: str | None

    def cover(self, at: Spots) -> FloatArray:
        radius = self.height / 2
        return _edge(radius - np.hypot(at.along - radius, at.up - radius), at.pixel)

    def colour(self, at: Spots, sun: FloatArray) -> FloatArray:
        radius = self.height / 2
        shade = _sphere((at.along - radius) / radius, (at.up - radius) / radius, sun)
        if self.material:
            shade = shade * texture(self.material)(at.along + 50, at.up + 50, at.pixel)
        return _tinted(shade, self.tint)


@dataclass(frozen=True, kw_only=True)
class Rock(Upright):
    """Gravel in one piece: a lump with an uneven outline."""

    outline: FloatArray = field(compare=False)
    """Share of the radius that it reaches, at even angles."""

    def cover(self, at: Spots) -> FloatArray:
        x, y = self._place(at)
        angle = np.arctan2(y, x) / (2 * np.pi) % 1
        radius = np.interp(angle, np.linspace(0, 1, len(self.outline)), self.outline)
        return _edge((radius - np.hypot(x, y)) * self.length / 2, at.pixel)

    def colour(self, at: Spots, sun: FloatArray) -> FloatArray:
        stones = texture("gravel")(at.along + 50, at.up + 50, at.pixel)
        return _tinted(stones * _sphere(*self._place(at), sun), self.tint)

    def _place(self, at: Spots) -> tuple[FloatArray, FloatArray]:
        return 2 * at.along / self.length - 1, (at.up - 0.25 * self.height) / (0.75 * self.height)


@dataclass(frozen=True, kw_only=True)
class Animal(Upright):
    """A horse, standing this way or that."""

    mirrored: bool
    lean: float
    """Metres that its head is to the right of where it would be if its legs were straight."""

    def cover(self, at: Spots) -> FloatArray:
        y = at.up / self.height
        x = (at.along + min(self.lean, 0) - self.lean * y) / (self.length - abs(self.lean))
        inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
        # The mask of about the pixel's size, so that thin legs are not lost.
        side = int(np.clip(self.height / float(np.min(at.pixel)), 8, 256))
        return np.where(inside, _look_up(silhouette(side), 1 - x if self.mirrored else x, y), 0).astype(np.float32)

    def colour(self, at: Spots, sun: FloatArray) -> FloatArray:
        fur = texture("fur")(at.along + 50, at.up + 50, at.pixel)
        return _tinted(fur * (0.55 + 0.45 * np.clip(at.up / self.height, 0, 1)) * _lit(sun), self.tint)


def _edge(distance: FloatArray, pixel: FloatArray) -> FloatArray:
    """Coverage of a pixel whose centre lies ``distance`` metres inside an outline."""
    coverage: FloatArray = np.clip(distance / pixel + 0.5, 0, 1)
    return coverage


def _lit(sun: FloatArray) -> float:
    return AMBIENT + (1 - AMBIENT) * max(float(sun[2]), 0.0)


def _sphere(x: FloatArray, y: FloatArray, sun: FloatArray) -> FloatArray:
    """Brightness of a ball at ``x``, ``y`` in units of its radius."""
    towards = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    facing = x * sun[0] + y * sun[1] + towards * sun[2]
    shade: FloatArray = (0.4 + 0.75 * np.clip(facing, 0, 1) + 0.5 * np.clip(facing, 0, 1) ** 16).astype(np.float32)
    return shade


def _tinted(values: FloatArray, tint: Colour) -> FloatArray:
    tinted: FloatArray = values[..., None] * np.asarray(tint, np.float32)
    return tinted


def _look_up(picture: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
    """The picture's value at ``x`` (to the right) and ``y`` (upwards), both 0 to 1."""
    rows, columns = picture.shape[:2]
    row = np.clip(((1 - y) * rows).astype(np.intp), 0, rows - 1)
    found: FloatArray = picture[row, np.clip((x * columns).astype(np.intp), 0, columns - 1)]
    return found


def _poster(poster: Poster, x: FloatArray, y: FloatArray) -> FloatArray:
    """Colours n,3 at ``x``, ``y``, both 0 to 1."""
    if poster.picture is not None:
        return _look_up(photograph(poster.picture, 32), x, y)
    frame = (np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) < 0.1) | (np.abs(x - 0.5) < 0.05)
    glass = (0.7 + 0.4 * y)[:, None] * np.asarray(poster.sky, np.float32)
    window: FloatArray = np.where(frame[:, None], np.float32(0.85), glass)
    return window
