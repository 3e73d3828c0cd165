"""The checks of a teacher before it is cached: how far it agrees with itself, and mistakes that raise no error."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from segkd.pipeline.config import load
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import DataSource, Role
from segkd.pipeline.evaluation.metrics import ConfusionMatrix
from segkd.pipeline.models.network import Grid, NetworkConfig, Preprocessing, TeacherConfig, Views
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.teacher import checks
from segkd.storage.errors import NetworkError

PLAIN = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
NAMES = ("red", "green", "blue")


class Brightest(nn.Module):
    """Logits are the channels of what it is fed, averaged over cells of four pixels; too bright an input blinds it."""

    def __init__(self, roll: int = 0, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.grid, self.num_classes, self.roll, self.order = Grid(stride=4), 3, roll, list(order)

    def forward(self, images: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(images, 4, ceil_mode=True, count_include_pad=False)
        return 5.0 * means.clamp(max=1.0).roll(self.roll, 1)[:, self.order]


class Leftmost(Brightest):
    """Sees where in its input a cell lies: nothing looks the same to it in a mirror."""

    def forward(self, images: Tensor) -> Tensor:
        return (
            super().forward(images) + torch.linspace(0, 1, -(-images.shape[-1] // 4)) * torch.eye(3)[0, :, None, None]
        )


def asked(network: nn.Module, preprocessing: Preprocessing = PLAIN) -> Predictor:
    return Predictor(network, NetworkConfig(reference="mine", preprocessing=preprocessing), NAMES)


@pytest.fixture
def source(run: Path) -> DataSource:
    return open_data(load(run).data)


def noise(height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


# Self-disagreement


def test_what_looks_at_each_cell_alone_agrees_with_itself_in_a_mirror_and_in_a_part() -> None:
    found = checks.self_disagreement(asked(Brightest()), [("a", noise(32, 48)), ("b", noise(64, 32))])
    assert found["flip"] == pytest.approx(0, abs=1e-6)
    assert found["quarter crop"] == pytest.approx(0, abs=1e-6)
    assert (found["scale 2"] or 0) > 1e-4


def test_disagreement_in_a_mirror_against_a_loop_over_cells() -> None:
    image = noise(16, 24)
    predictor = asked(Leftmost())
    straight, turned = (predictor.predict([np.ascontiguousarray(view)])[0][0] for view in (image, image[:, ::-1]))
    total = 0.0
    for y in range(4):
        for x in range(6):
            p, q = straight[:, y, x].double(), turned[:, y, 5 - x].double()
            total += sum(math.exp(p[c]) * float(p[c] - q[c]) for c in range(3)) / 24
    assert total > 1e-3
    assert checks.self_disagreement(predictor, [("a", image)])["flip"] == pytest.approx(total, rel=1e-4)


def test_at_half_size_a_cell_is_compared_with_what_lies_around_it() -> None:
    """On a ramp, whose cells lie on a line at every size, interpolated log-odds fit; at the border they are held."""
    ramp = np.broadcast_to(np.arange(0, 256, 2, np.uint8)[None, :, None], (32, 128, 3)).copy()
    ramp[..., 1:] = 0
    found = checks.self_disagreement(asked(Brightest()), [("a", ramp)])
    assert (found["scale 1/2"] or 0) < 1e-4
    assert (found["scale 2"] or 0) < 1e-4
    assert found["flip"] == pytest.approx(0, abs=1e-6)


def test_a_view_that_the_network_refuses_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, logits = asked(Brightest()), Predictor.logits

    def one_size(self: Predictor, inputs: Tensor) -> Tensor:
        if inputs.shape[-2:] != (32, 32):
            raise NetworkError("another size")
        return logits(self, inputs)

    monkeypatch.setattr(Predictor, "logits", one_size)
    found = checks.self_disagreement(predictor, [("a", noise(32, 32))])
    assert found["flip"] is not None
    assert (found["scale 1/2"], found["scale 2"], found["quarter crop"]) == (None, None, None)


def test_a_class_without_probability_can_be_compared() -> None:
    class Certain(Brightest):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits.masked_fill(logits < logits.amax(1, keepdim=True), -torch.inf)

    found = checks.self_disagreement(asked(Certain()), [("a", noise(32, 32))])
    assert all(value is not None and math.isfinite(value) for value in found.values())


# Silent mistakes


def test_a_right_description_stands(source: DataSource) -> None:
    samples = checks.labelled_samples(source)
    assert {sample.role for sample in samples} == {Role.SELECT, Role.TRAIN}
    found = checks.fit(asked(Brightest()), source, samples)
    assert found.suspect is None
    assert (found.miou or 0) > 95
    assert found.samples == 4
    assert found.constant < 20
    assert found.to_dict()["suspect"] is None


@pytest.mark.parametrize(
    ("network", "preprocessing", "suspect"),
    [
        (Brightest(), replace(PLAIN, channels="BGR"), 'preprocessing: channels = "RGB"'),
        (Brightest(), replace(PLAIN, range="0-255"), 'preprocessing: range = "0-1"'),
        (
            Brightest(),
            replace(PLAIN, mean=(0.9, 0.0, 0.0)),
            "preprocessing: mean = [0.0, 0.0, 0.9], std = [1.0, 1.0, 1.0]",
        ),
        (Brightest(roll=-1), PLAIN, "classes: each of the teacher's channels is class +1 of its list"),
        (Brightest(roll=1), PLAIN, "classes: each of the teacher's channels is class -1 of its list"),
        (Brightest(order=(0, 2, 1)), PLAIN, "classes in another order: its blue is green, its green is blue"),
    ],
)
def test_a_silent_mistake_is_found(
    source: DataSource, network: nn.Module, preprocessing: Preprocessing, suspect: str
) -> None:
    class Off(Brightest):
        """Was trained with a mean of 0.9 in blue."""

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + torch.tensor([0.0, 0.0, 0.9])[:, None, None])

    off = preprocessing.mean != PLAIN.mean
    found = checks.fit(asked(Off() if off else network, preprocessing), source, checks.labelled_samples(source))
    assert found.suspect is not None
    assert found.suspect.setting == suspect
    assert (found.suspect.miou or 0) > 90
    assert found.suspect.better == 4


def test_a_teacher_that_knows_nothing_of_the_labels_is_not_called_wrongly_described(source: DataSource) -> None:
    class Stubborn(Brightest):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * 0 + 9 * torch.eye(3)[0, :, None, None]

    found = checks.fit(asked(Stubborn()), source, checks.labelled_samples(source))
    assert found.suspect is None
    assert (found.miou or 0) <= found.constant + 1e-9


def test_the_best_order_of_classes_against_all_orders() -> None:
    """By mIoU, of confusions that have no reason to be in any order."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = generator.integers(0, 30, (4, 4)) * generator.integers(0, 2, (4, 4))
        mious = {}
        for order in itertools.permutations(range(4)):
            matrix = ConfusionMatrix(4)
            matrix.counts = counts[:, order]
            # As the assignment does: a class that is nowhere adds nothing.
            mious[order] = sum(iou or 0.0 for iou in matrix.compute().iou)
        found = checks._best_order(counts)
        assert mious[tuple(found)] == pytest.approx(max(mious.values()))


def test_an_order_is_scored_on_images_that_it_was_not_chosen_by() -> None:
    """A class that one image alone shows gives no order that the others would know of."""
    usual = np.array([[90, 5, 0], [5, 20, 0], [0, 0, 0]])
    odd = np.array([[80, 0, 5], [0, 70, 0], [0, 20, 5]])
    swapped = np.array([[50, 0, 0], [0, 0, 60], [0, 60, 0]])
    names = ("road", "pole", "sign")
    (found,) = checks.reordered([usual, usual, swapped], names)
    assert (found.better, found.worse) == (0, 2)
    (found,) = checks.reordered([usual, swapped, swapped], names)
    assert found.setting == "classes in another order: its sign is pole, its pole is sign"
    assert (found.better, found.worse) == (2, 1)
    assert checks.reordered([usual, usual, odd], names) == []


def test_classes_that_few_images_show_are_found_to_be_swapped() -> None:
    """On the images where it makes no difference it counts for nothing."""
    usual = np.array([[90, 0, 0], [0, 0, 0], [0, 0, 0]])
    swapped = np.array([[50, 0, 0], [0, 2, 40], [0, 40, 1]])
    (found,) = checks.reordered([usual, usual, usual, usual, swapped, swapped], ("road", "pole", "sign"))
    fit = checks.Fit(samples=6, miou=35.0, constant=30.0, variants=(found,))
    assert fit.suspect is found


def test_every_other_preprocessing_differs_and_leads_back() -> None:
    usual = Preprocessing()
    others = checks.other_preprocessings(usual)
    assert len(others) == 4
    assert usual not in others.values()
    for other in others.values():
        assert usual in checks.other_preprocessings(other).values()
    assert len(checks.other_preprocessings(PLAIN)) == 2


# Classes that are ignored


class BlueWhenSmall(Brightest):
    """Calls blue all that it sees on a small scale."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + (images.shape[-1] < 48) * 9 * torch.eye(3)[2, :, None, None]


def test_cells_in_which_ignored_classes_have_most_of_the_probability() -> None:
    """Wherever their channels are, and however many; cells in the padding do not count, and each view does."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:, :12, 0] = image[:, 12:, 2] = 255
    images = [("image", image), ("grey", np.full((32, 48, 3), 128, np.uint8))]

    def predictor(meanings: dict[str, str], *classes: str, views: Views | None = None) -> Predictor:
        config = TeacherConfig(
            reference="mine",
            preprocessing=replace(PLAIN, pad=32),
            classes=classes,
            class_map=meanings,
            views=views or Views(),
        )
        known = dict.fromkeys(meanings.get(name, name) for name in classes)
        return Predictor(BlueWhenSmall(), config, [name for name in known if name != "ignore"])

    ignoring = predictor({"blue": "ignore"}, "red", "green", "blue")
    assert checks.ignored_cells(ignoring, images[:1]) == 0.75
    assert checks.ignored_cells(ignoring, images) == 0.375
    assert checks.ignored_cells(predictor({"void": "ignore"}, "void", "green", "void"), images[:1]) == 1
    assert checks.ignored_cells(predictor({"red": "warm", "blue": "warm"}, "red", "green", "blue"), images) == 0
    assert checks.ignored_cells(predictor({}, "red", "green", "blue"), images) == 0
    at_two_scales = predictor({"blue": "ignore"}, "red", "green", "blue", views=Views(scales=(0.5, 1.0)))
    assert checks.ignored_cells(at_two_scales, images[1:]) == 0.5
