"""The ramp proof: the teacher's cells, the student's cells and the crop's pixels all mean the same place.

A coordinate ramp holds at every cell the position of its centre in the original image, as a cache would keep a raw
float32 target. The same ramp on the student's grid, brought to the teacher's cells by the student's side, must agree
within 0.01 cell at every crop, scale, flip, odd size, stride, convention and border.

Shapes: N = S = 1; C = 2 ramps (y, x); h,w cells.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from segkd.pipeline.data.batch import Sources
from segkd.pipeline.data.mixing import draw_rectangle
from segkd.pipeline.data.transforms import AugmentConfig, BoolArray, Crop, Window, window_of
from segkd.pipeline.models.network import Grid, Preprocessing
from segkd.pipeline.student.alignment import align
from segkd.storage.geometry import Axis, Mapping, flip, network_axis, resize

FloatArray = npt.NDArray[np.float64]
conventions = st.sampled_from(["span", "corners", "stride"])


@st.composite
def grids(draw: st.DrawFn, height: int, width: int, strides: st.SearchStrategy[int]) -> Mapping:
    """A network's grid in an input of ``height`` x ``width`` pixels."""
    convention, stride = draw(conventions), draw(strides)
    axes = (network_axis(n, -(-n // stride), convention=convention, stride=stride) for n in (height, width))
    return Mapping(*axes)


@st.composite
def teachers(draw: st.DrawFn, height: int, width: int) -> Mapping:
    """A teacher's cells in the image's pixels, after a preprocessing resize and padding of its own."""
    inputs = [draw(st.integers(max(1, n // 2), 2 * n)) for n in (height, width)]
    padding = draw(st.integers(0, 20))
    grid = draw(grids(inputs[0] + padding, inputs[1] + padding, st.sampled_from([1, 2, 3, 4, 8, 16])))
    placed = grid.through(resize(height, inputs[0]), resize(width, inputs[1]))
    inside = placed.part(placed.y.inside_image(height), placed.x.inside_image(width))
    assume(min(inside.shape) > 0)
    return inside


@st.composite
def cases(draw: st.DrawFn) -> tuple[Crop, Mapping, Mapping]:
    """A crop, the teacher's cells in its image and the student's cells in the crop."""
    image_size = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    crop_size = draw(st.integers(1, 96)), draw(st.integers(1, 96))
    low = draw(st.floats(0.25, 2.0))
    augment = AugmentConfig(crop=crop_size, scale=(low, low * draw(st.floats(1.0, 3.0))), flip=draw(st.booleans()))
    crop = Crop.draw(np.random.default_rng(draw(st.integers(0, 2**32))), image_size, augment)
    # The student may be fed at another scale than the crop's.
    fed = Preprocessing(scale=draw(st.sampled_from([1.0, 0.5, 0.7, 2.0]))).scaled(*crop_size)
    grid = Grid(stride=draw(st.sampled_from([1, 2, 4, 8, 16, 32])), convention=draw(conventions))
    return crop, draw(teachers(*image_size)), grid.mapping_in(crop_size, fed)


def cached_ramps(teacher: Mapping) -> npt.NDArray[np.float32]:
    """2,h,w: the pixel coordinates of every cell's centre, as they were written once for the whole image."""
    y, x = (axis.scale * np.arange(axis.cells) + axis.offset for axis in (teacher.y, teacher.x))
    return np.stack(np.meshgrid(y, x, indexing="ij")).astype(np.float32)


def windowed(crop: Crop, teacher: Mapping) -> tuple[Window, FloatArray]:
    """The window and its ramps 2,h,w, cut from the cache in its own order."""
    window = window_of(crop, teacher, crop.inside())
    cut = cached_ramps(teacher)[:, window.rows.start : window.rows.stop, window.columns.start : window.columns.stop]
    return window, cut.astype(np.float64)


def cell_sizes(teacher: Mapping) -> FloatArray:
    """2,1,1: image pixels a cell."""
    return np.abs([teacher.y.scale, teacher.x.scale]).reshape(2, 1, 1)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_cached_ramps_lie_where_the_crop_places_their_cells(case: tuple[Crop, Mapping, Mapping]) -> None:
    crop, teacher, _ = case
    window, ramps = windowed(crop, teacher)
    (scale_y, offset_y), (scale_x, offset_x) = window.cell_to_crop
    y = crop.y.scale * (scale_y * np.arange(len(window.rows)) + offset_y) + crop.y.offset
    x = crop.x.scale * (scale_x * np.arange(len(window.columns)) + offset_x) + crop.x.offset
    error = np.abs(np.stack(np.meshgrid(y, x, indexing="ij")) - ramps) / cell_sizes(teacher)
    assert error.max() < 0.01


@given(cases())
@settings(max_examples=150, deadline=None)
def test_student_ramps_agree_at_the_teachers_cells(case: tuple[Crop, Mapping, Mapping]) -> None:
    crop, teacher, student = case
    window, ramps = windowed(crop, teacher)
    in_image = student.through(crop.y, crop.x)
    logits_NChw = torch.from_numpy(cached_ramps(in_image))[None]
    sources = Sources(
        crop_S=torch.tensor([0]),
        cell_to_crop_S22=torch.from_numpy(window.cell_to_crop)[None],
        counts_Shw=torch.from_numpy(window.counts)[None],
        counts_first_Shw=torch.from_numpy(window.counts_first)[None],
        codes={},
        rungs={},
    )
    aligned = align(logits_NChw, student, sources)[0].numpy()
    # Bilinear values end at the outermost student cells; between those the ramps must agree as they are.
    expected = np.stack([clamped(ramps[0], in_image.y), clamped(ramps[1], in_image.x)])
    error = np.abs(aligned - expected) / cell_sizes(teacher)
    assert error[:, window.counts].max(initial=0) < 0.01


def clamped(coordinates: FloatArray, axis: Axis) -> FloatArray:
    """Coordinates limited to the centres of the outermost cells."""
    return np.clip(coordinates, *sorted((axis.affine(0), axis.affine(axis.cells - 1))))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_ramp_pictures_agree_at_the_teachers_cells(case: tuple[Crop, Mapping, Mapping]) -> None:
    """A ramp drawn into the image itself, resampled with it and read at the cells that count, away from the border."""
    crop, teacher, _ = case
    window, ramps = windowed(crop, teacher)
    part = Mapping(Axis(*window.cell_to_crop[0], len(window.rows)), Axis(*window.cell_to_crop[1], len(window.columns)))
    for which, (pixels, axis, cells) in enumerate(
        ((crop.image_size[0], crop.y, part.y), (crop.image_size[1], crop.x, part.x))
    ):
        shape = (pixels, 1) if which == 0 else (1, pixels)
        drawn = np.broadcast_to(np.arange(pixels, dtype=np.float32).reshape(shape), crop.image_size)
        shown = np.asarray(crop.resample(Image.fromarray(np.ascontiguousarray(drawn)))).astype(np.float64)
        line = shown[:, 0] if which == 0 else shown[0]
        positions = cells.scale * np.arange(cells.cells) + cells.offset
        visible = crop.visible[which]
        found = np.interp(positions, visible, line)
        expected = ramps[0, :, 0] if which == 0 else ramps[1, 0]
        reach = 2 * (1 + abs(axis.scale))
        away = (expected > reach) & (expected < pixels - 1 - reach)
        away &= (positions >= visible.start) & (positions <= visible.stop - 1)
        # Enlarging is exact. Antialiasing dithers by up to 0.072 of a crop pixel: 0.01 cell for cells of 7.2 and more.
        tolerance = 0.01 * cell_sizes(teacher)[which].item() if abs(axis.scale) <= 1 else 0.072 * abs(axis.scale)
        np.testing.assert_allclose(found[away], expected[away], atol=tolerance)


@given(cases())
@settings(max_examples=50, deadline=None)
def test_a_mirrored_crop_holds_the_same_cells_in_the_same_order(case: tuple[Crop, Mapping, Mapping]) -> None:
    """First-order values (and all others) are those of the same cells, as written; only their positions move."""
    crop, teacher, _ = case
    width = crop.size[1]
    mirrored = Crop(crop.y, flip(width).then(crop.x), crop.size, crop.image_size)
    window, ramps = windowed(crop, teacher)
    other, other_ramps = windowed(mirrored, teacher)
    assert (window.rows, window.columns) == (other.rows, other.columns)
    np.testing.assert_array_equal(ramps, other_ramps)
    (scale, offset), (other_scale, other_offset) = window.cell_to_crop[1], other.cell_to_crop[1]
    np.testing.assert_allclose([other_scale, other_offset], [-scale, width - 1 - offset], atol=1e-7)


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[tuple[Crop, Mapping, BoolArray]], Mapping]:
    """Two crops of one size with the teacher's cells in their images and the pixels that are theirs; and the student's
    cells in the crop.
    """
    size = draw(st.integers(2, 96)), draw(st.integers(2, 96))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low = draw(st.floats(0.25, 2.0))
    augment = AugmentConfig(crop=size, scale=(low, low * draw(st.floats(1.0, 3.0))))
    rectangle = draw_rectangle(rng, size)
    pieces = []
    for region in (~rectangle, rectangle):
        image_size = draw(st.integers(1, 150)), draw(st.integers(1, 150))
        crop = Crop.draw(rng, image_size, augment)
        pieces.append((crop, draw(teachers(*image_size)), region & crop.inside()))
    return pieces, draw(grids(*size, st.sampled_from([1, 2, 4, 8, 16, 32])))


@given(mixes())
@settings(max_examples=150, deadline=None)
def test_ramps_agree_in_both_images_of_a_mix(case: tuple[list[tuple[Crop, Mapping, BoolArray]], Mapping]) -> None:
    """One crop, two sources: where a cell counts, the crop shows its own image, at the place that the cache says.

    The student's channels are the ramps of either image; a source must find its own ones.
    """
    pieces, student = case
    windows = [window_of(*piece) for piece in pieces]
    height, width = (max(window.counts.shape[axis] for window in windows) for axis in (0, 1))
    counts = np.zeros((2, height, width), bool)
    for held, window in zip(counts, windows, strict=True):
        held[: len(window.rows), : len(window.columns)] = window.counts
    in_images = [student.through(crop.y, crop.x) for crop, _, _ in pieces]
    sources = Sources(
        crop_S=torch.tensor([0, 0]),
        cell_to_crop_S22=torch.from_numpy(np.stack([window.cell_to_crop for window in windows])),
        counts_Shw=torch.from_numpy(counts),
        counts_first_Shw=torch.from_numpy(counts),
        codes={},
        rungs={},
    )
    logits_NChw = torch.from_numpy(np.concatenate([cached_ramps(in_image) for in_image in in_images]))[None]
    aligned = align(logits_NChw, student, sources).numpy()
    taken = np.zeros(pieces[0][0].size, int)
    for s, ((crop, teacher, owned), window, in_image) in enumerate(zip(pieces, windows, in_images, strict=True)):
        taken += owned
        rows, columns = window.rows, window.columns
        ramps = cached_ramps(teacher)[:, rows.start : rows.stop, columns.start : columns.stop].astype(np.float64)
        expected = np.stack([clamped(ramps[0], in_image.y), clamped(ramps[1], in_image.x)])
        error = np.abs(aligned[s, 2 * s : 2 * s + 2, : len(rows), : len(columns)] - expected) / cell_sizes(teacher)
        assert error[:, window.counts].max(initial=0) < 0.01
        for y, x in ramps[:, window.counts].T:
            # The crop pixel in which this place of the image lies; one on a pixel's border lies in either.
            at = (y - crop.y.offset) / crop.y.scale, (x - crop.x.offset) / crop.x.scale
            assert any(
                owned[row, column] for row in near(at[0], owned.shape[0]) for column in near(at[1], owned.shape[1])
            )
    assert taken.max() <= 1, "no pixel shows two images"


def near(position: float, pixels: int) -> set[int]:
    """The pixels in which a position lies, up to the rounding of float32 ramps."""
    return {min(max(int(np.floor(position + 0.5 + shift)), 0), pixels - 1) for shift in (-1e-3, 1e-3)}
