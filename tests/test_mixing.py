"""Rectangles of CutMix and what they show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkd.pipeline.data.mixing import Piece, compose, draw_rectangle
from segkd.pipeline.data.sample import Role, Sample
from segkd.pipeline.data.transforms import AugmentConfig, Crop
from segkd.storage.errors import ConfigError


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 60))
def test_a_rectangle_is_one_and_leaves_room_for_the_other_image(seed: int, height: int, width: int) -> None:
    mask = draw_rectangle(np.random.default_rng(seed), (height, width))
    assert mask.shape == (height, width)
    rows, columns = mask.any(1), mask.any(0)
    np.testing.assert_array_equal(mask, np.outer(rows, columns))
    for line in (rows, columns):
        inside = np.flatnonzero(line)
        assert len(inside) == inside[-1] - inside[0] + 1
        assert len(line) == 1 or len(inside) < len(line)
    again = draw_rectangle(np.random.default_rng(seed), (height, width))
    np.testing.assert_array_equal(mask, again)


def test_shares_are_uniform_and_every_pixel_has_its_turn() -> None:
    """CutMix with Beta(1, 1): against the quantiles of the uniform distribution."""
    rng = np.random.default_rng(0)
    masks = [draw_rectangle(rng, (100, 120)) for _ in range(4000)]
    shares = np.sort([mask.mean() for mask in masks])
    np.testing.assert_allclose(shares, (np.arange(4000) + 0.5) / 4000, atol=0.03)
    covered = np.mean(masks, axis=0)
    assert covered.min() > 0
    np.testing.assert_allclose(covered, covered[::-1], atol=0.06)
    np.testing.assert_allclose(covered, covered[:, ::-1], atol=0.06)


def test_a_picture_is_put_together_pixel_by_pixel() -> None:
    rng, config = np.random.default_rng(3), AugmentConfig(crop=(30, 40))
    rectangle = draw_rectangle(rng, config.crop)
    pieces = []
    for name, region in (("a", ~rectangle), ("b", rectangle)):
        image = rng.integers(0, 256, (rng.integers(10, 50), rng.integers(10, 50), 3)).astype(np.uint8)
        sample = Sample(id=name, role=Role.AUXILIARY, labelled=False)
        pieces.append(Piece(sample, image, Crop.draw(rng, image.shape[:2], config), region))
    picture = compose(pieces)
    alone = [piece.crop.image(piece.image) for piece in pieces]
    for row in range(30):
        for column in range(40):
            np.testing.assert_array_equal(picture[row, column], alone[int(rectangle[row, column])][row, column])


@pytest.mark.parametrize("cutmix", [-0.1, 1.5, float("nan")])
def test_a_probability_is_one(cutmix: float) -> None:
    with pytest.raises(ConfigError) as error:
        AugmentConfig(cutmix=cutmix)
    assert str(error.value) == (f"augment.cutmix is {cutmix}; a probability is between 0 (never) and 1 (always)")
