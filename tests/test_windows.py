"""A teacher that sees large images in windows: where these lie, how its answers in them are blended, what they cost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from segkd.pipeline.config import load
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import Role, with_role
from segkd.pipeline.evaluation.evaluate import evaluate_network
from segkd.pipeline.models.network import Grid, Preprocessing, TeacherConfig, Views
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.models.references import described_predictor
from segkd.pipeline.models.windows import starts
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.fingerprints import portable
from segkd.pipeline.teacher.trial import input_pixels
from segkd.storage.errors import CacheMismatchError, ConfigError, NetworkError, NonFiniteError
from segkd.storage.geometry import Convention

CLASSES = ("bright", "dark", "never")
STRIDE = 4
AS_IT_IS = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), multiple_of=STRIDE)
Image = npt.NDArray[np.uint8]


class Brightness(nn.Module):
    """Log odds of the red of a cell, and ``context`` times that of all it is shown; the last class is impossible."""

    def __init__(self, context: float = 0.0, convention: Convention = "span") -> None:
        super().__init__()
        self.grid, self.num_classes, self.context = Grid(stride=STRIDE, convention=convention), 3, context
        self.shown: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(tuple(images.shape))
        red = images[:, :1]
        if self.grid.convention == "span":
            cells = nn.functional.avg_pool2d(red, STRIDE)
        elif self.grid.convention == "stride":
            cells = red[:, :, ::STRIDE, ::STRIDE]
        else:
            size = [self.grid.cells(pixels) for pixels in images.shape[-2:]]
            cells = nn.functional.interpolate(red, size, mode="bilinear", align_corners=True)
        cells = 4 * cells + self.context * red.mean((2, 3), keepdim=True)
        return torch.cat([cells, torch.zeros_like(cells), torch.full_like(cells, -torch.inf)], 1)


def predictor_of(
    views: Views, *, context: float = 0.0, convention: Convention = "span", preprocessing: Preprocessing = AS_IT_IS
) -> Predictor:
    described = TeacherConfig(reference="brightness", preprocessing=preprocessing, views=views)
    return Predictor(Brightness(context, convention), described, CLASSES)


def shown(predictor: Predictor) -> list[tuple[int, ...]]:
    assert isinstance(predictor.network, Brightness)
    return predictor.network.shown


def noise(height: int, width: int) -> Image:
    return np.random.default_rng(height * width).integers(30, 226, (height, width, 3), np.uint8)


@given(
    cells=st.integers(1, 80), window=st.integers(1, 30), percent=st.integers(0, 90), stride=st.sampled_from([1, 4, 8])
)
def test_windows_cover_an_axis_and_overlap_enough(cells: int, window: int, percent: int, stride: int) -> None:
    window = min(window, cells)
    found = starts(cells * stride, window * stride, percent / 100, stride)
    assert found[0] == 0
    assert found[-1] == (cells - window) * stride
    assert all(start % stride == 0 for start in found)
    gaps = np.diff(found)
    # One cell further is always gone; with no more than the overlap asked for that may be all there is.
    widest = max(window * (100 - percent) // 100, 1) * stride
    assert all(0 < gap <= widest for gap in gaps)
    assert len(gaps) == math.ceil((cells - window) * stride / widest), "as few as that"
    assert len(gaps) < 2 or gaps.max() - gaps.min() <= stride, "evenly spread"


def test_an_overlap_that_floating_point_cannot_hold_takes_no_more_windows() -> None:
    assert len(starts(800, 80, 0.8, 8)) == 46
    assert len(starts(1600, 160, 0.9, 8)) == 91
    assert starts(40, 16, 0.5, 4) == [0, 8, 16, 24]


@given(pixels=st.integers(1, 300), window=st.integers(8, 100), percent=st.integers(0, 90))
def test_windows_of_any_size_overlap_enough(pixels: int, window: int, percent: int) -> None:
    """In whole numbers, so that no rounding excuses anything."""
    window = min(window, pixels)
    found = starts(pixels, window, percent / 100, 8)
    assert found[0] == 0
    assert found[-1] == pixels - window
    assert all(0 < 100 * gap <= max(window * (100 - percent), 800) for gap in np.diff(found))


@pytest.mark.parametrize("convention", ["span", "stride"])
@pytest.mark.parametrize("size", [(40, 56), (37, 55), (16, 90), (64, 16)])
def test_what_is_said_of_a_cell_alone_is_the_same_in_windows(convention: Convention, size: tuple[int, int]) -> None:
    images = [noise(*size), noise(*size)[::-1].copy()]
    whole, mapping = predictor_of(Views(), convention=convention).predict(images)
    predictor = predictor_of(Views(window=(16, 24)), convention=convention)
    seen, same = predictor.predict(images)
    assert same == mapping
    torch.testing.assert_close(seen.exp(), whole.exp(), atol=1e-6, rtol=0)
    assert bool((seen[:, 2] == -torch.inf).all()), "what is impossible stays so"
    assert set(shown(predictor)) == {(2, 3, 16, min(24, size[1]))}


def test_cells_between_corners_are_brought_to_those_of_the_whole() -> None:
    """Whose distances are other ones: 64 pixels hold 16 cells, 4.2 apart, windows of 24 pixels 6 that are 4.6 apart."""
    y, x = np.mgrid[:64, :80]
    image = np.repeat((20 + y + 2 * x).astype(np.uint8)[..., None], 3, 2)
    whole, _ = predictor_of(Views(), convention="corners").predict([image])
    seen, _ = predictor_of(Views(window=(24, 24)), convention="corners").predict([image])
    torch.testing.assert_close(seen.exp(), whole.exp(), atol=3e-3, rtol=0)


def slowly(image: Image, context: float) -> npt.NDArray[np.float64]:
    """Probabilities of "bright" in windows of 16x24 pixels with half of each in common, cell by cell."""
    height, width = image.shape[:2]
    red = image[..., 0] / 255
    rows, columns = range(0, height - 15, 8), range(0, width - 23, 12)
    total, weights = np.zeros((2, height // 4, width // 4))
    for top in rows:
        for left in columns:
            part = red[top : top + 16, left : left + 24]
            for i in range(4):
                for j in range(6):
                    cell = part[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean()
                    odds = math.exp(4 * cell + context * part.mean())
                    weight = math.sin(math.pi * (i + 0.5) / 4) ** 2 * math.sin(math.pi * (j + 0.5) / 6) ** 2
                    total[top // 4 + i, left // 4 + j] += weight * odds / (odds + 1)
                    weights[top // 4 + i, left // 4 + j] += weight
    probabilities: npt.NDArray[np.float64] = total / weights
    return probabilities


def test_answers_that_differ_are_blended_by_a_raised_cosine() -> None:
    image = noise(32, 60)
    image[:, 30:] //= 3
    predictor = predictor_of(Views(window=(16, 24), overlap=0.5), context=5.0)
    found, _ = predictor.predict([image])
    np.testing.assert_allclose(found[0, 0].exp().numpy(), slowly(image, 5.0), atol=1e-5)
    np.testing.assert_allclose(found.exp().sum(1).numpy(), 1, atol=1e-6)
    assert shown(predictor) == [(1, 3, 16, 24)] * 12


def test_every_view_is_seen_in_windows() -> None:
    views = Views(flip=True, scales=(0.5, 1.0), window=(16, 24), overlap=0.0)
    predictor = predictor_of(views)
    predictor.predict([noise(32, 48)])
    assert shown(predictor) == [(1, 3, 16, 24)] * (1 + 1 + 4 + 4)
    assert predictor.seen(32, 48) == [(16, 24)] * 10
    assert input_pixels(predictor, (32, 48)) == 10 * 16 * 24
    assert predictor_of(Views(window=(16, 24))).seen(15, 48) == [(16, 24)] * 3
    assert predictor_of(Views(window=(16, 24))).seen(9, 16) == [(12, 16)]


def ignoring(network: nn.Module, views: Views) -> Predictor:
    described = TeacherConfig(
        reference="brightness",
        preprocessing=AS_IT_IS,
        views=views,
        classes=CLASSES,
        class_map={"bright": "ignore"},
    )
    return Predictor(network, described, ("dark", "never"))


def test_ignored_classes_are_found_in_windows_too() -> None:
    """At one end the image shows what is ignored; what is there is what a window around it says."""
    image = np.zeros((16, 48, 3), np.uint8)
    image[:, :20] = 255
    predictor = ignoring(Brightness(context=-2.5), Views(window=(16, 16), overlap=0.5))
    # Log odds in windows of 255 alone: 4 - 2.5; where half is: 4 - 2.5 / 2, 0 - 2.5 / 2.
    assert predictor.ignored_cells(image) == 5 / 12
    assert shown(predictor) == [(1, 3, 16, 16)] * 5


class SureOfIgnored(nn.Module):
    """A network whose first class is far ahead; of the others the second has twice the probability of the third."""

    def __init__(self) -> None:
        super().__init__()
        self.grid, self.num_classes = Grid(stride=STRIDE), 3

    def forward(self, images: Tensor) -> Tensor:
        cells = nn.functional.avg_pool2d(images[:, :1], STRIDE)
        return torch.cat([150 + 0 * cells, math.log(2) + 0 * cells, 0 * cells], 1)


def test_classes_keep_their_proportion_where_an_ignored_one_has_nearly_all() -> None:
    found, _ = ignoring(SureOfIgnored(), Views(window=(16, 16))).predict([noise(32, 48)])
    torch.testing.assert_close(found[0].exp().amax((1, 2)), torch.tensor([2 / 3, 1 / 3]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[0].exp().amin((1, 2)), torch.tensor([2 / 3, 1 / 3]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("window", "multiple_of", "convention", "problem"),
    [
        ((16, 22), 4, "span", None),
        ((24, 24), 16, "corners", None),
        ((16, 3), 1, "corners", None),
        ((16, 24), 1, "stride", "needs"),
    ],
)
def test_windows_that_do_not_fit_are_refused(
    window: tuple[int, int], multiple_of: int, convention: Convention, problem: str | None
) -> None:
    with pytest.raises(NetworkError) as error:
        predictor_of(
            Views(window=window), convention=convention, preprocessing=replace(AS_IT_IS, multiple_of=multiple_of)
        )
    assert str(error.value) == (
        "teacher.views.window needs teacher.preprocessing.multiple_of to be a multiple of the stride, 4, so that "
        "windows have cells in common; it is 1"
        if problem
        else f"teacher.views.window is {list(window)}; its sides must be multiples of "
        f"teacher.preprocessing.multiple_of, {multiple_of}, and at least the stride, 4"
    )


def test_a_nan_in_a_window_is_of_its_image() -> None:
    predictor = predictor_of(Views(window=(16, 16)))
    inputs = torch.rand(2, 3, 32, 32)
    inputs[1, 0, 30, 30] = torch.nan
    with pytest.raises(NonFiniteError, match="returned NaN or \\+inf for b; check its weights"):
        predictor.infer([inputs], (32, 32), ["a", "b"])


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("window=[0, 8]", "window is [0, 8]; height and width must be at least 1"),
        ("overlap=0.95", "overlap is 0.95; it must be 0 to 0.9"),
        ("overlap=-0.1", "overlap is -0.1; it must be 0 to 0.9"),
    ],
)
def test_settings_that_mean_nothing_are_refused(run: Path, setting: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(run, [f"teacher.views.{setting}"])
    assert str(error.value).endswith(problem)


def test_descriptions_without_windows_are_what_they_were() -> None:
    """So that caches that are older than windows are still of their teacher."""
    older = portable(TeacherConfig(reference="enet", views=Views(scales=(1.0, 2.0))))
    assert older["views"] == {"flip": False, "scales": (1.0, 2.0)}
    assert "views" not in portable(TeacherConfig(reference="enet", views=Views(overlap=0.5)))
    described = portable(TeacherConfig(reference="enet", views=Views(window=(8, 8))))
    assert described["views"] == {"flip": False, "scales": (1.0,), "window": (8, 8), "overlap": 0.25}


def test_what_windows_cost_is_told_and_other_ones_are_another_teacher(run: Path) -> None:
    windows = ["teacher.views.window=[16,16]", "teacher.preprocessing.multiple_of=4"]
    config = load(run, windows)
    assert teacher_cache(config).sealed
    data = open_data(config.data)
    predictor = described_predictor(config.the_teacher(), data.classes.names, device=torch.device("cpu"))
    cost = evaluate_network(predictor, data, Role.REPORT).cost
    assert cost is not None
    assert (cost.shape, cost.passes) == ((16, 16), len(predictor.seen(*data.size(with_role(data, Role.REPORT)[0]))))
    assert cost.passes > 1
    with pytest.raises(CacheMismatchError, match="teacher"):
        teacher_cache(load(run, windows[1:]))
