"""Pixels and cells: affine maps compose and invert, grids lie where networks mean them, resampling is interpolation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from segkd.storage.errors import GeometryError
from segkd.storage.geometry import Affine, Axis, Mapping, box_weights, flip, network_axis, resampling, resize

coordinates = st.floats(-1e3, 1e3)
affines = st.builds(Affine, st.floats(0.05, 20).map(lambda s: s) | st.floats(-20, -0.05), coordinates)


@given(affines, affines, coordinates)
def test_then_applies_one_after_the_other(first: Affine, second: Affine, x: float) -> None:
    assert first.then(second)(x) == pytest.approx(second(first(x)), abs=1e-6)


@given(affines, coordinates)
def test_inverse_leads_back(affine: Affine, x: float) -> None:
    assert affine.inverse()(affine(x)) == pytest.approx(x, abs=1e-6)


def test_an_axis_of_scale_zero_has_no_inverse() -> None:
    with pytest.raises(GeometryError, match="an axis of scale 0 has no inverse; check the sizes that it was made from"):
        Affine(0.0, 1.0).inverse()


@given(st.integers(1, 300))
def test_flipping_twice_changes_nothing(length: int) -> None:
    assert flip(length).then(flip(length)) == Affine(1.0, 0.0)
    assert flip(length)(0) == length - 1


@given(st.integers(1, 500), st.integers(1, 500))
def test_resizing_keeps_both_edges(source: int, target: int) -> None:
    to_source = resize(source, target)
    assert to_source(-0.5) == pytest.approx(-0.5)
    assert to_source(target - 0.5) == pytest.approx(source - 0.5)


@given(st.integers(2, 500), st.integers(2, 500))
def test_resizing_with_aligned_corners_keeps_the_outer_centres(source: int, target: int) -> None:
    to_source = resize(source, target, align_corners=True)
    assert to_source(0) == pytest.approx(0)
    assert to_source(target - 1) == pytest.approx(source - 1)


def test_conventions_place_cells_where_networks_mean_them() -> None:
    assert network_axis(32, 4) == Axis(8.0, 3.5, 4)
    assert network_axis(33, 5, convention="corners") == Axis(8.0, 0.0, 5)
    assert network_axis(35, 5, convention="stride", stride=8) == Axis(8.0, 0.0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: network_axis(0, 4), "an axis of 0 pixels and 4 cells is empty; both must be at least 1"),
        (
            lambda: network_axis(8, 1, convention="stride"),
            "convention 'stride' needs the stride; state it in the network's description",
        ),
        (lambda: resize(0, 4), "cannot resize an axis of 0 pixels to 4; both must be at least 1"),
    ],
)
def test_bad_sizes_are_refused(call: object, message: str) -> None:
    with pytest.raises(GeometryError, match=f"^{message}$"):
        call()  # type: ignore[operator]


@given(st.integers(1, 40), st.floats(0.5, 12), st.floats(-20, 20), st.integers(1, 200))
def test_inside_image_is_every_cell_whose_centre_lies_in_it(
    cells: int, scale: float, offset: float, pixels: int
) -> None:
    axis = Axis(scale, offset, cells)
    kept = axis.inside_image(pixels)
    centres = [axis.affine(j) for j in range(cells)]
    inside = [j for j, centre in enumerate(centres) if -0.5 + 1e-6 < centre < pixels - 0.5 - 1e-6]
    assert set(inside) <= set(kept)
    assert all(-0.5 - 1e-6 <= centres[j] <= pixels - 0.5 + 1e-6 for j in kept)


def test_a_flipped_axis_keeps_the_same_cells() -> None:
    axis = network_axis(40, 5)
    assert axis.through(flip(40)).inside_image(40) == axis.inside_image(40)


def test_a_part_lies_where_it_lay() -> None:
    mapping = Mapping(network_axis(40, 5), network_axis(64, 8))
    part = mapping.part(range(1, 4), range(2, 8))
    assert part.shape == (3, 6)
    assert part.y.affine(0) == mapping.y.affine(1)
    assert part.x.affine(5) == mapping.x.affine(7)


@pytest.mark.parametrize(("cells", "pixels"), [(1, 7), (5, 33), (45, 360), (16, 16), (7, 9)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_to_finer_pixels_it_is_bilinear_interpolation(cells: int, pixels: int, align_corners: bool) -> None:
    convention = "corners" if align_corners else "span"
    weights = resampling(Axis(1.0, 0.0, pixels), network_axis(pixels, cells, convention=convention))
    values = torch.randn(1, 1, cells, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(values, size=pixels, mode="linear", align_corners=align_corners)[0, 0]
    torch.testing.assert_close(torch.from_numpy(weights) @ values[0, 0], expected)


def test_to_cells_twice_as_coarse_it_is_the_mean_over_each_footprint() -> None:
    weights = resampling(network_axis(96, 12), network_axis(96, 48))
    # Each footprint is four source cells wide; the linear interpolant's mean over it reaches an eighth into the next.
    np.testing.assert_allclose(weights[5, 19:25], np.array([0.125, 0.875, 1, 1, 0.875, 0.125]) / 4)
    # Every source cell inside has the same say in all.
    np.testing.assert_allclose(weights.sum(0)[5:-5], 0.25)


def slow_weights(centre: float, spacing: float, cells: int) -> npt.NDArray[np.float64]:
    """The definition of box_weights: each source cell's share in the mean of the linear interpolant, by sampling it."""
    centre = min(max(centre, 0.0), cells - 1.0)
    half = max(min(min(spacing, 2 * (spacing - 1)) / 2, centre, cells - 1 - centre), 0.0)
    positions = centre + half * (2 * (np.arange(2000) + 0.5) / 2000 - 1)
    return np.stack([np.interp(positions, np.arange(cells), unit).mean() for unit in np.eye(cells)])


@given(st.floats(-3, 12), st.floats(0.1, 6), st.integers(1, 9))
def test_weights_agree_with_a_sampled_mean(centre: float, spacing: float, cells: int) -> None:
    weights = box_weights(np.array([centre]), np.float64(spacing), cells)[0]
    np.testing.assert_allclose(weights, slow_weights(centre, spacing, cells), atol=1e-5)


def test_nothing_jumps_when_the_scale_passes_one() -> None:
    centres = np.linspace(0, 9, 41)
    below, above = (box_weights(centres, np.float64(spacing), 10) for spacing in (0.9999, 1.0001))
    np.testing.assert_allclose(below, above, atol=1e-3)


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.2, 9), st.floats(-9, 30), st.booleans())
def test_rows_add_to_one_and_a_ramp_stays_a_ramp(
    targets: int, cells: int, scale: float, offset: float, flipped: bool
) -> None:
    source = network_axis(8 * cells, cells)
    target = Axis(-scale if flipped else scale, offset, targets)
    weights = resampling(target, source)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert weights.min() >= 0
    ramp = source.scale * np.arange(cells) + source.offset
    centres = target.scale * np.arange(targets) + target.offset
    # Beyond the outermost source cells the value is theirs, as bilinear interpolation clamps.
    np.testing.assert_allclose(weights @ ramp, np.clip(centres, ramp[0], ramp[-1]), atol=1e-9 * 8 * cells + 1e-9)
