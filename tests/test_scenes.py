"""The built-in scenes: the same everywhere, labelled as painted, and without anything shared between roles."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from segkd.pipeline.data import scene_materials
from segkd.pipeline.data.sample import Role, Sample, with_role
from segkd.pipeline.data.scene_materials import PHOTOGRAPHS, TILE_METRES, Texture, photograph, silhouette, texture
from segkd.pipeline.data.scene_uprights import Ball, Post, Spots, Upright
from segkd.pipeline.data.scene_view import Camera, Surroundings, View
from segkd.pipeline.data.scenes import CLASSES, SceneConfig, SceneSource
from segkd.storage.errors import ConfigError, DataError

SMALL = SceneConfig(size=(64, 80), train=6, auxiliary=6, select=2, report=4, per_place=3)
SOURCE = SceneSource(SMALL)


def digests(config: SceneConfig) -> list[bytes]:
    source = SceneSource(config)
    return [source.image_digest(sample) for sample in source.samples]


def test_samples_roles_and_groups() -> None:
    assert [sample.id for sample in with_role(SOURCE, Role.TRAIN)] == [f"train/{k:04d}" for k in range(6)]
    assert list(SOURCE.samples) == sorted(SOURCE.samples, key=lambda sample: (sample.role, sample.id))
    groups = {role: {sample.group for sample in with_role(SOURCE, role)} for role in Role}
    assert [len(groups[role]) for role in (Role.TRAIN, Role.AUXILIARY, Role.SELECT, Role.REPORT)] == [2, 2, 1, 2]
    assert len(set.union(*groups.values())) == 7, "no place is seen in two roles"


def test_images_and_labels_fit_together() -> None:
    for sample in SOURCE.samples:
        image, labels = SOURCE.image(sample), SOURCE.labels(sample)
        assert image.shape == (64, 80, 3)
        assert labels.shape == SOURCE.size(sample) == (64, 80)
        assert image.dtype == labels.dtype == np.uint8
        assert labels.max() < len(CLASSES)
        assert image.std() > 10, "something is to be seen"


def test_every_class_occurs_in_every_role() -> None:
    source = SceneSource(SceneConfig(train=12, auxiliary=12, select=12, report=12, size=(64, 80), per_place=2))
    for role in Role:
        seen = {int(label) for sample in with_role(source, role) for label in np.unique(source.labels(sample))}
        assert seen == set(range(len(CLASSES)))


def test_scenes_are_the_same_in_another_process() -> None:
    program = (
        "from segkd.pipeline.data.scenes import SceneConfig, SceneSource\n"
        f"source = SceneSource({SMALL!r})\n"
        "print(*(source.image_digest(sample).hex() for sample in source.samples))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    assert printed.split() == [digest.hex() for digest in digests(SMALL)]


def test_a_scene_does_not_depend_on_how_many_there_are() -> None:
    more = SceneSource(replace(SMALL, train=9, report=8))
    for sample in SOURCE.samples:
        np.testing.assert_array_equal(SOURCE.image(sample), more.image(sample))


def test_scenes_differ_by_number_role_and_seed() -> None:
    found = digests(SMALL) + digests(replace(SMALL, seed=1))
    assert len(set(found)) == len(found)


def test_what_is_returned_belongs_to_the_caller() -> None:
    sample = SOURCE.samples[0]
    SOURCE.image(sample)[:] = 0
    SOURCE.labels(sample)[:] = 77
    assert SOURCE.image(sample).any()
    assert SOURCE.labels(sample).max() < len(CLASSES)


def test_the_source_is_cheap_to_pickle() -> None:
    SOURCE.image(SOURCE.samples[0])
    data = pickle.dumps(SOURCE)
    assert len(data) < 200 * len(SOURCE.samples)
    assert list(pickle.loads(data).samples) == list(SOURCE.samples)


@pytest.mark.parametrize("knob", ["noise", "blur", "clutter", "deformation"])
def test_difficulty_knobs_change_the_picture(knob: str) -> None:
    assert digests(replace(SMALL, **{knob: 0.0})) != digests(SMALL)


def test_a_post_is_painted_where_it_is_labelled() -> None:
    camera = Camera(size=(60, 80), position=(0.0, 0.0), yaw=0.0, horizon=20.2)
    view = View(camera, surroundings(), CLASSES.names)
    post = Post(label="post", start=(-0.2, 4.0), end=(0.2, 4.0), height=1.0, tint=(1.0, 0.0, 0.0))
    view.paint([post])
    rows, columns = np.nonzero(view.labels == CLASSES.names.index("post"))
    # 0.2 m * f / z = 4.4 pixels to either side of the centre; 0.5 to 1.5 m below the camera: rows 31.2 to 53.2.
    assert (columns.min(), columns.max()) == (36, 43)
    assert (rows.min(), rows.max()) == (32, 53)
    inner = view.colours[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()]
    assert np.ptp(inner.reshape(-1, 3), axis=0).max() < 1e-6
    assert inner[0, 0, 0] > 0.5
    assert inner[0, 0, 1] == 0


def surroundings(shadow: tuple[float, float] = (0.0, 1.0)) -> Surroundings:
    return Surroundings(
        ground=lambda x, z: np.zeros(np.broadcast_shapes(x.shape, z.shape), np.intp),
        materials=(("lawn", (0.3, 0.5, 0.2)),),
        stains=(),
        sky=np.full((60, 80, 3), 0.7, np.float32),
        shadow=shadow,
    )


def test_near_things_hide_far_ones_whatever_their_order() -> None:
    camera = Camera(size=(60, 80), position=(0.0, 0.0), yaw=0.0, horizon=20.0)
    near = Ball(label="ball", start=(-0.3, 4.0), end=(0.3, 4.0), height=0.6, material=None)
    far = Upright(label="wall", start=(-3.0, 8.0), end=(3.0, 8.0), height=2.0)
    labels = []
    for order in ([near, far], [far, near]):
        view = View(camera, surroundings(), CLASSES.names)
        view.paint(order)
        labels.append(view.labels)
    np.testing.assert_array_equal(*labels)
    ball = labels[0] == CLASSES.names.index("ball")
    # A disc of 0.6 m at 4 m.
    assert ball.sum() == pytest.approx(math.pi * (0.3 * 88 / 4) ** 2, rel=0.1)


def test_shadows_fall_where_the_sun_says() -> None:
    camera = Camera(size=(60, 80), position=(0.0, 0.0), yaw=0.0, horizon=20.0, height=1.0)
    bright, dark = (View(camera, surroundings(shadow=(0.3, -1.0)), CLASSES.names) for _ in range(2))
    bright.paint([])
    dark.paint([Upright(label="wall", start=(-0.5, 4.0), end=(0.5, 4.0), height=1.0)])
    shaded = dark.colours.sum(axis=2) < 0.8 * bright.colours.sum(axis=2)
    rows, columns = np.nonzero(dark.labels == CLASSES.names.index("lawn"))
    z = 88.0 / (rows - 20)
    x = (columns - 39.5) * z / 88
    # The shadow is the parallelogram from the foot at z = 4 to 1 m nearer and 0.3 m to the right.
    inside = np.minimum(np.minimum(z - 3, 4 - z), 0.5 - np.abs(x - 0.3 * (4 - z)))
    clear = np.abs(inside) > 0.1
    np.testing.assert_array_equal(shaded[rows, columns][clear], (inside > 0)[clear])
    assert (inside > 0.1).sum() > 50


def test_outlines_stay_inside_their_segment_and_height() -> None:
    along, up = np.meshgrid(np.linspace(-0.5, 1.5, 81), np.linspace(-0.5, 1.5, 81))
    ball = Ball(label="ball", start=(0.0, 4.0), end=(1.0, 4.0), height=1.0, material=None)
    cover = ball.cover(Spots(along, up, np.full(1, 0.01)))
    outside = (along < -0.01) | (along > 1.01) | (up > 1.01)
    assert not cover[outside].any()
    assert cover.sum() * 0.025**2 == pytest.approx(math.pi / 4, abs=0.01)


@pytest.mark.parametrize("name", TILE_METRES)
def test_textures_keep_their_mean_at_every_distance(name: str) -> None:
    x, y = np.meshgrid(np.arange(0, 8, 0.05), np.arange(0, 8, 0.05))
    for pixel in (0.001, 0.03, 0.5, 100.0):
        assert texture(name)(x, y, np.full(1, pixel)).mean() == pytest.approx(1, abs=0.05)


def test_textures_have_no_seam() -> None:
    ramp = Texture(np.tile(np.arange(1.0, 257.0), (256, 1)), 1.0)
    x = np.arange(0, 6, 1 / 256)
    assert np.abs(np.diff(ramp(x, np.zeros(1), np.full(1, 1e-3)))).max() <= 1


def test_only_bundled_pictures_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files inside the installed package, opened as files: nothing that could start a download is asked."""
    opened = []
    original = scene_materials._bundled
    monkeypatch.setattr(scene_materials, "_bundled", lambda name: opened.append(name) or original(name))
    for function in (texture, photograph, silhouette):
        function.cache_clear()
    for name in TILE_METRES:
        texture(name)
    for name in PHOTOGRAPHS:
        assert photograph(name, 32).shape == (32, 32, 3)
    assert silhouette(32).shape == (32, 32)
    assert set(opened) == {"brick", "grass", "gravel", "chelsea", "horse", *PHOTOGRAPHS}


def test_a_sample_of_other_data_is_refused() -> None:
    for name in ("train/0099", "0001TP_006690", "train/x"):
        with pytest.raises(DataError) as error:
            SOURCE.image(Sample(id=name, role=Role.TRAIN, labelled=True))
        assert str(error.value) == f"there is no built-in scene {name!r}; the cache or list is of other data"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (16, 64)}, "data.scenes.size is [16, 64]; both sides must be at least 32 pixels"),
        ({"train": -1}, "data.scenes.train is -1; it must be at least 0"),
        ({"per_place": 0}, "data.scenes.per_place is 0; it must be at least 1"),
        ({"noise": math.nan}, "data.scenes.noise is nan; it must be 0 or more"),
        ({"clutter": -0.5}, "data.scenes.clutter is -0.5; it must be 0 or more"),
    ],
)
def test_bad_settings_say_what_to_give(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SceneConfig(**wrong)
    assert str(error.value) == message
