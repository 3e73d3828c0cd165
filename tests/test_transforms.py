"""Crops agree with their affine maps, and windows with a slow cell-by-cell reference."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segkd.pipeline.data.transforms import PADDING, AugmentConfig, Crop, Window, window_of
from segkd.storage.errors import ConfigError
from segkd.storage.geometry import Affine, Mapping, network_axis

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def crops(draw: st.DrawFn) -> Crop:
    low = draw(st.floats(0.2, 2.5))
    config = AugmentConfig(crop=draw(sizes), scale=(low, low * draw(st.floats(1.0, 2.0))), flip=draw(st.booleans()))
    return Crop.draw(np.random.default_rng(draw(st.integers(0, 2**32))), draw(sizes), config)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Crop, Mapping, npt.NDArray[np.bool_], Window]:
    crop = draw(crops())
    axes = []
    for pixels in crop.image_size:
        stride = draw(st.integers(1, 9))
        axis = network_axis(
            pixels, -(-pixels // stride), convention=draw(st.sampled_from(["span", "stride"])), stride=stride
        )
        axes.append(axis.part(axis.inside_image(pixels)))
    mapping = Mapping(*axes)
    owned = crop.inside()
    if draw(st.booleans()):
        owned[: draw(st.integers(0, 40)), draw(st.integers(0, 40)) :] = False
    return crop, mapping, owned, window_of(crop, mapping, owned)


def slow_counts(crop: Crop, mapping: Mapping, owned: npt.NDArray[np.bool_]) -> dict[tuple[int, int], bool]:
    """Every cell whose centre lies in the smallest rectangle of the crop that holds all owned pixels -> whether its
    nearest crop pixel is owned.
    """
    found: dict[tuple[int, int], bool] = {}
    if not owned.any():
        return found
    (top, bottom), (left, right) = (
        (line.argmax(), len(line) - line[::-1].argmax()) for line in (owned.any(1), owned.any(0))
    )
    for row in range(mapping.y.cells):
        for column in range(mapping.x.cells):
            y = (mapping.y.affine(row) - crop.y.offset) / crop.y.scale
            x = (mapping.x.affine(column) - crop.x.offset) / crop.x.scale
            if top - 0.5 - 1e-7 <= y <= bottom - 0.5 + 1e-7 and left - 0.5 - 1e-7 <= x <= right - 0.5 + 1e-7:
                pixel = (
                    min(max(math.floor(y + 0.5), 0), crop.size[0] - 1),
                    min(max(math.floor(x + 0.5), 0), crop.size[1] - 1),
                )
                found[row, column] = bool(owned[pixel])
    return found


@given(windows())
@settings(max_examples=200, deadline=None)
def test_windows_hold_exactly_the_cells_among_the_owned_pixels(
    case: tuple[Crop, Mapping, npt.NDArray[np.bool_], Window],
) -> None:
    crop, mapping, owned, window = case
    expected = slow_counts(crop, mapping, owned)
    cells = {(row, column) for row in window.rows for column in window.columns}
    if expected:
        assert cells == expected.keys()
    else:
        assert 1 <= len(cells) <= max(mapping.shape)
    for i, row in enumerate(window.rows):
        for j, column in enumerate(window.columns):
            counts = expected.get((row, column), False)
            # A centre on the border of two pixels belongs to either.
            y, x = (
                (mapping.y.affine(row) - crop.y.offset) / crop.y.scale,
                (mapping.x.affine(column) - crop.x.offset) / crop.x.scale,
            )
            if all(abs(v % 1 - 0.5) > 1e-6 for v in (y, x)):
                assert window.counts[i, j] == counts
            assert window.cell_to_crop[0] @ (i, 1) == pytest.approx(y, abs=1e-6)
            assert window.cell_to_crop[1] @ (j, 1) == pytest.approx(x, abs=1e-6)


@given(windows())
@settings(max_examples=100, deadline=None)
def test_first_order_cells_count_with_all_their_neighbours(
    case: tuple[Crop, Mapping, npt.NDArray[np.bool_], Window],
) -> None:
    _, mapping, _, window = case
    counted = {
        (row, column)
        for i, row in enumerate(window.rows)
        for j, column in enumerate(window.columns)
        if window.counts[i, j]
    }
    for i, row in enumerate(window.rows):
        for j, column in enumerate(window.columns):
            block = [(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            exists = [(y, x) for y, x in block if 0 <= y < mapping.y.cells and 0 <= x < mapping.x.cells]
            assert window.counts_first[i, j] == all(cell in counted for cell in exists)


@given(crops())
@settings(max_examples=200, deadline=None)
def test_labels_equal_a_look_up_pixel_by_pixel(crop: Crop) -> None:
    labels = np.random.default_rng(0).integers(0, 200, crop.image_size).astype(np.uint8)
    cropped, inside = crop.labels(labels), crop.inside()
    for i in range(crop.size[0]):
        for j in range(crop.size[1]):
            y, x = math.floor(crop.y(i) + 0.5), math.floor(crop.x(j) + 0.5)
            in_image = 0 <= y < crop.image_size[0] and 0 <= x < crop.image_size[1]
            assert inside[i, j] == in_image
            assert cropped[i, j] == (labels[y, x] if in_image else 255)


@given(crops())
@settings(max_examples=200, deadline=None)
def test_ramp_images_show_the_coordinates_that_the_maps_state(crop: Crop) -> None:
    rows, columns = crop.visible
    height, width = crop.image_size
    for axis, visible, ramp in (
        (crop.y, rows, np.tile(np.arange(height, dtype=np.float32)[:, None], (1, width))),
        (crop.x, columns, np.tile(np.arange(width, dtype=np.float32), (height, 1))),
    ):
        shown = np.asarray(crop.resample(Image.fromarray(ramp)))
        assert shown.shape == (len(rows), len(columns))
        found = shown[:, 0] if axis is crop.y else shown[0]
        expected = np.array([axis(i) for i in visible])
        reach = 1 + max(1.0, abs(axis.scale))
        interior = (expected > reach) & (expected < ramp.shape[0 if axis is crop.y else 1] - 1 - reach)
        # An antialiasing triangle sampled at whole pixels is off by up to 0.0718 crop pixels (at a ratio of
        # 1.185) where it shrinks: the largest first moment of its weights over all ratios and phases.
        tolerance = 0.01 if abs(axis.scale) <= 1 else 0.072 * abs(axis.scale)
        np.testing.assert_allclose(found[interior], expected[interior], atol=tolerance)


def test_image_is_the_resampled_part_on_padding() -> None:
    config = AugmentConfig(crop=(30, 20), scale=(0.5, 0.5), flip=False)
    crop = Crop.draw(np.random.default_rng(3), (20, 60), config)
    image = np.random.default_rng(0).integers(0, 255, (20, 60, 3)).astype(np.uint8)
    cropped, inside = crop.image(image), crop.inside()
    assert cropped.shape == (30, 20, 3)
    assert inside.sum() == 10 * 20
    assert (cropped[~inside] == PADDING).all()
    np.testing.assert_array_equal(cropped[inside].reshape(10, 20, 3), np.asarray(crop.resample(Image.fromarray(image))))


def test_identity_and_mirror_are_exact() -> None:
    image = np.random.default_rng(0).integers(0, 255, (7, 9, 3)).astype(np.uint8)
    plain = Crop(Affine(), Affine(), (7, 9), (7, 9))
    mirrored = Crop(Affine(), Affine(-1.0, 8.0), (7, 9), (7, 9))
    np.testing.assert_array_equal(plain.image(image), image)
    np.testing.assert_array_equal(mirrored.image(image), image[:, ::-1])
    np.testing.assert_array_equal(mirrored.labels(image[..., 0]), image[:, ::-1, 0])


@given(crops())
@settings(max_examples=100, deadline=None)
def test_the_realised_ratio_of_sizes_counts(crop: Crop) -> None:
    for axis, pixels in ((crop.y, crop.image_size[0]), (crop.x, crop.image_size[1])):
        scaled = pixels / abs(axis.scale)
        assert scaled == pytest.approx(round(scaled), abs=1e-9)
        # The image's borders fall between crop pixels.
        assert (axis.inverse()(-0.5) % 1) == pytest.approx(0.5, abs=1e-6)


def test_draws_cover_scales_flips_and_positions() -> None:
    config = AugmentConfig(crop=(16, 16), scale=(0.5, 2.0))
    rng = np.random.default_rng(0)
    drawn = [Crop.draw(rng, (32, 32), config) for _ in range(400)]
    factors = np.array([1 / crop.y.scale for crop in drawn])
    assert factors.min() >= 0.5
    assert factors.max() <= 2.0
    assert 0.4 < (factors < 1).mean() < 0.6, "log-uniform: half of the draws shrink"
    assert 0.4 < np.mean([crop.x.scale < 0 for crop in drawn]) < 0.6
    tops = np.array([crop.y(-0.5) + 0.5 for crop in drawn])
    bottoms = np.array([crop.y(15.5) + 0.5 for crop in drawn])
    assert tops.min() == 0
    assert bottoms.max() == 32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop": (0, 5)}, "augment.crop is [0, 5]; both sides must be at least 1 pixel"),
        ({"scale": (2.0, 1.0)}, "augment.scale is [2.0, 1.0]; give [low, high] with 0 < low <= high"),
        ({"scale": (0.5, math.inf)}, "augment.scale is [0.5, inf]; give [low, high] with 0 < low <= high"),
        ({"photometric": -1.0}, "augment.photometric is -1.0; it must be 0 (none) or more"),
        ({"auxiliary_photometric": math.nan}, "augment.auxiliary_photometric is nan; it must be 0 (none) or more"),
    ],
)
def test_bad_augmentation_says_what_to_give(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        AugmentConfig(**wrong)  # type: ignore[arg-type]
    assert str(error.value) == message
