"""The perturbation is a pure function, does what its strength says and nothing at strength 0."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkd.pipeline.data.photometric import jitter

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
LUMA = np.array([0.299, 0.587, 0.114])


def perturbed(strength: float, count: int = 200, image: np.ndarray = IMAGE) -> list[np.ndarray]:
    return [jitter(image, np.random.default_rng(seed), strength) for seed in range(count)]


def test_strength_zero_changes_nothing() -> None:
    assert all((image == IMAGE).all() for image in perturbed(0.0, 5))


@given(st.integers(0, 2**32), st.floats(0.01, 3.0))
def test_it_is_a_pure_function_of_the_generator(seed: int, strength: float) -> None:
    first, second = (jitter(IMAGE, np.random.default_rng(seed), strength) for _ in range(2))
    assert first.shape == IMAGE.shape
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)


def test_change_grows_with_strength() -> None:
    change = [np.mean([np.abs(image - IMAGE.astype(float)).mean() for image in perturbed(s)]) for s in (0.1, 0.5, 1.0)]
    assert 0 < change[0] < change[1] < change[2]


def test_grey_images_stay_grey() -> None:
    grey = np.repeat(IMAGE[..., :1], 3, axis=2)
    for image in perturbed(1.0, image=grey):
        assert np.ptp(image.astype(int), axis=2).max() <= 1


def test_one_in_five_turns_grey_and_one_in_two_is_blurred() -> None:
    images = perturbed(1.0, 400)
    grey = np.mean([np.ptp(image.astype(int), axis=2).max() <= 1 for image in images])
    assert 0.13 < grey < 0.27
    # Blurring takes detail away: neighbours differ less, whatever happened to the colours.
    step = np.array([np.abs(np.diff(image @ LUMA, axis=1)).mean() / (image @ LUMA).std() for image in images])
    original = np.abs(np.diff(IMAGE @ LUMA, axis=1)).mean() / (IMAGE @ LUMA).std()
    assert 0.3 < np.mean(step < 0.9 * original) < 0.6


@pytest.mark.parametrize("colour", [(128, 128, 128), (90, 120, 60)])
def test_brightness_varies_by_forty_percent_and_hue_leaves_the_luma_alone(colour: tuple[int, int, int]) -> None:
    flat = np.full((4, 4, 3), colour, np.uint8)
    ratios = np.array([(image @ LUMA).mean() for image in perturbed(1.0, 400, flat)]) / (np.array(colour) @ LUMA)
    assert 0.59 < ratios.min() < 0.7
    assert 1.3 < ratios.max() < 1.41
