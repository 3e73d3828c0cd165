"""The student at the teacher's cells. Shapes: N crops, C classes, S sources, h, w cells."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.data.batch import Sources
from segkd.pipeline.models.network import Grid
from segkd.pipeline.student.alignment import align
from segkd.storage.geometry import Axis, Mapping, resampling


def sources(crops: list[int], cell_to_crop: list[list[tuple[float, float]]], size: tuple[int, int]) -> Sources:
    counts = torch.ones((len(crops), *size), dtype=torch.bool)
    affine = torch.tensor(cell_to_crop, dtype=torch.float64).reshape(len(crops), 2, 2)
    return Sources(
        crop_S=torch.tensor(crops, dtype=torch.int64),
        cell_to_crop_S22=affine,
        counts_Shw=counts,
        counts_first_Shw=counts,
        codes={},
        rungs={},
    )


def random_logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def reference(logits_NChw: Tensor, student: Mapping, given: Sources) -> npt.NDArray[np.float64]:
    """Source by source and cell by cell, with the weights that geometry states for one axis in one image."""
    count, height, width = given.counts_Shw.shape
    logits = logits_NChw.double().numpy()
    result = np.zeros((count, logits.shape[1], height, width))
    for s, (axis_y, axis_x) in enumerate(given.cell_to_crop_S22.tolist()):
        weights_y = resampling(Axis(*axis_y, height), student.y)
        weights_x = resampling(Axis(*axis_x, width), student.x)
        crop = logits[int(given.crop_S[s])]
        for j, i in np.ndindex(height, width):
            result[s, :, j, i] = (crop * np.outer(weights_y[j], weights_x[i])).sum((1, 2))
    return result


@pytest.mark.parametrize("student", [Grid(stride=4), Grid(stride=11), Grid(stride=8, convention="corners")])
def test_equals_the_reference(student: Grid) -> None:
    mapping = student.mapping(33, 42)
    logits = random_logits(3, 5, *mapping.shape)
    # Flipped, scaled by odd ratios, beyond the crop on all sides; two sources of one crop; coarser and finer cells.
    given = sources(
        [2, 0, 0],
        [[(7.3, -2.0), (-6.1, 40.0)], [(2.2, 5.5), (3.9, -7.0)], [(-12.0, 30.0), (19.0, 3.0)]],
        (6, 8),
    )
    np.testing.assert_allclose(align(logits, mapping, given).numpy(), reference(logits, mapping, given), atol=1e-5)


def ramp_error(scale: float, stride: int) -> float:
    """Crop coordinates put through the student's side: how far, in cells, from where each cell is."""
    student = Grid(stride=stride).mapping(97, 113)
    places = [torch.arange(axis.cells) * axis.scale + axis.offset for axis in (student.y, student.x)]
    ramps = torch.stack(torch.meshgrid(*places, indexing="ij"))[None]
    cell_to_crop = [(scale, 40.2), (-scale, 57.7)]
    aligned = align(ramps, student, sources([0], [cell_to_crop], (4, 5)))[0]
    expected_y = torch.arange(4)[:, None] * scale + 40.2
    expected_x = torch.arange(5)[None, :] * -scale + 57.7
    borders = [(axis.offset, axis.affine(axis.cells - 1)) for axis in (student.y, student.x)]
    error_y = (aligned[0] - expected_y.clamp(*borders[0])).abs().max()
    error_x = (aligned[1] - expected_x.clamp(*borders[1])).abs().max()
    return max(error_y.item(), error_x.item()) / scale


@pytest.mark.parametrize("stride", [4, 8, 21])
@pytest.mark.parametrize("scale", [0.7, 4.5, 7.9, 10.0, 16.0])
def test_coordinates_arrive_at_the_cells_that_have_them(scale: float, stride: int) -> None:
    assert ramp_error(scale, stride) < 1e-4


def test_the_same_grid_is_left_alone() -> None:
    mapping = Grid(stride=8).mapping(64, 80)
    logits = random_logits(2, 3, 8, 10)
    affine = [(mapping.y.scale, mapping.y.offset), (mapping.x.scale, mapping.x.offset)]
    torch.testing.assert_close(align(logits, mapping, sources([0, 1], [affine, affine], (8, 10))), logits)


def test_a_coarser_student_is_interpolated() -> None:
    logits = random_logits(1, 3, 8, 8)
    given = sources([0], [[(4.0, 1.5), (4.0, 1.5)]], (16, 16))
    aligned = align(logits, Grid(stride=8).mapping(64, 64), given)
    torch.testing.assert_close(aligned, F.interpolate(logits, scale_factor=2, mode="bilinear"))


@pytest.mark.parametrize("scale", [4.5, 6.0, 9.6, 16.0])
def test_every_cell_of_a_finer_student_learns(scale: float) -> None:
    logits = random_logits(1, 1, 12, 12).requires_grad_()
    cells = round(48 / scale)
    cell_to_crop = [(scale, (scale - 1) / 2), (-scale, 47 - (scale - 1) / 2)]
    aligned = align(logits, Grid(stride=4).mapping(48, 48), sources([0], [cell_to_crop], (cells, cells)))
    (gradient,) = torch.autograd.grad(aligned.sum(), logits)
    assert (gradient > 0.01).all()
    torch.testing.assert_close(gradient.sum(), torch.tensor(float(cells**2)))


def test_the_gradient_is_the_transpose() -> None:
    logits = random_logits(2, 3, 4, 5).requires_grad_()
    given = sources([1, 0, 1], [[(3.1, -4.0), (-9.0, 20.0)]] * 3, (4, 6))
    upstream = torch.randn((3, 3, 4, 6), generator=torch.Generator().manual_seed(1))
    student = Grid(stride=6).mapping(24, 30)
    (gradient,) = torch.autograd.grad(align(logits, student, given), logits, upstream)
    other = random_logits(2, 3, 4, 5) + 1
    assert math.isclose((gradient * other).sum(), (upstream * align(other, student, given)).sum(), rel_tol=1e-4)


@pytest.mark.parametrize(("crops", "size"), [([], (3, 4)), ([0, 1], (0, 4)), ([0], (3, 0)), ([], (0, 0))])
def test_empty_windows(crops: list[int], size: tuple[int, int]) -> None:
    logits = random_logits(2, 5, 4, 4).requires_grad_()
    given = sources(crops, [[(4.0, 0.0), (4.0, 0.0)] for _ in crops], size)
    aligned = align(logits, Grid(stride=8).mapping(32, 32), given)
    assert aligned.shape == (len(crops), 5, *size)
    (gradient,) = torch.autograd.grad(aligned.sum(), logits)
    assert torch.count_nonzero(gradient) == 0


def test_half_precision_logits_are_aligned_in_float32() -> None:
    logits = random_logits(1, 3, 4, 4).half()
    given = sources([0], [[(5.0, 1.0), (5.0, 1.0)]], (3, 3))
    student = Grid(stride=8).mapping(32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aligned = align(logits, student, given)
    assert aligned.dtype == torch.float32
    assert torch.equal(aligned, align(logits.float(), student, given))
