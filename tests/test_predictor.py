"""A network as a function from images to log-probabilities: where its cells lie, what its classes mean."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from segkd.pipeline.models.network import Grid, NetworkConfig, Preprocessing
from segkd.pipeline.models.predictor import Predictor, class_groups
from segkd.pipeline.models.preprocessing import normalise, placement, prepare
from segkd.pipeline.resample import pixel_tiles, to_pixels
from segkd.storage.errors import ConfigError, NetworkError, NonFiniteError
from segkd.storage.geometry import Axis, network_axis
from segkd.storage.geometry import Mapping as GridMapping

CLASSES = ("sky", "road", "car")


class Pooled(nn.Module):
    """A network whose logits are the mean colour of each cell, edge cells padded by 0."""

    def __init__(self, stride: int = 8, channels: int = 3) -> None:
        super().__init__()
        self.grid = Grid(stride=stride)
        self.num_classes = channels
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        stride = self.grid.stride
        padded = F.pad(images, (0, -width % stride, 0, -height % stride))
        return F.avg_pool2d(padded, stride)[:, torch.arange(self.channels) % 3]


def config(**fields: object) -> NetworkConfig:
    return NetworkConfig(reference="pooled", **fields)  # type: ignore[arg-type]


def image(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_input_is_normalised_in_the_networks_own_order_and_range() -> None:
    pixels = torch.tensor([10.0, 20.0, 250.0])[:, None, None].expand(3, 2, 2)
    rgb = normalise(pixels, Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 2.0)))
    torch.testing.assert_close(
        rgb[:, 0, 0], torch.tensor([(10 / 255 - 0.1) / 0.5, (20 / 255 - 0.2) / 0.5, (250 / 255 - 0.3) / 2])
    )
    bgr = normalise(pixels, Preprocessing(mean=(1.0, 2.0, 3.0), std=(1, 1, 1), range="0-255", channels="BGR"))
    torch.testing.assert_close(bgr[:, 1, 1], torch.tensor([249.0, 18.0, 7.0]))


@pytest.mark.parametrize("pad", ["mean", "edge"])
def test_padding_reaches_the_multiple_and_holds_what_was_asked(pad: str) -> None:
    preprocessing = Preprocessing(multiple_of=32, pad=pad)  # type: ignore[arg-type]
    made = prepare(image(), preprocessing)
    assert made.shape == (3, 64, 64)
    plain = prepare(image(), Preprocessing())
    assert torch.equal(made[:, :40, :56], plain)
    corner = made[:, 63, 63]
    assert torch.equal(corner, torch.zeros(3) if pad == "mean" else plain[:, -1, -1])


@example(2, 2, None, 0.5, 32)  # a single pixel
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([None, (32, 48), (91, 17)]),
    st.sampled_from([1.0, 0.5, 1.7]),
    st.sampled_from([1, 8, 32]),
)
def test_placement_says_the_size_and_where_the_corners_lie(
    height: int, width: int, resize: tuple[int, int] | None, scale: float, multiple: int
) -> None:
    preprocessing = Preprocessing(resize=resize, scale=1.0 if resize else scale, multiple_of=multiple)
    size, y, x = placement(height, width, preprocessing)
    assert tuple(prepare(image(height, width), preprocessing).shape[1:]) == size
    scaled = resize or (max(1, round(height * scale)), max(1, round(width * scale)))
    assert (y(-0.5), x(-0.5)) == pytest.approx((-0.5, -0.5))
    assert (y(scaled[0] - 0.5), x(scaled[1] - 0.5)) == pytest.approx((height - 0.5, width - 0.5))


def test_resize_and_scale_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^resize is \[32, 48\] and scale 0\.5; keep one of them$"):
        Preprocessing(resize=(32, 48), scale=0.5)
    with pytest.raises(ConfigError, match=r"^scale is 0\.0; it must be a finite number above 0 \(1 keeps the size\)$"):
        Preprocessing(scale=0.0)


def test_only_cells_whose_centres_lie_in_the_image_are_kept() -> None:
    predictor = Predictor(Pooled(), config(preprocessing=Preprocessing(multiple_of=32)), CLASSES)
    log_probs, mapping = predictor.predict([image(43, 57)])
    # 64x64 pixels after padding, 8x8 cells with centres at 3.5, 11.5, ...: rows up to 43.5 > 42.5 are out.
    assert mapping.shape == (5, 7) == tuple(log_probs.shape[-2:])
    assert (mapping.y, mapping.x) == (Axis(8.0, 3.5, 5), Axis(8.0, 3.5, 7))
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(1, 5, 7))


def test_a_resized_input_lies_in_the_pixels_of_the_original() -> None:
    predictor = Predictor(Pooled(), config(preprocessing=Preprocessing(resize=(80, 112))), CLASSES)
    mapping = predictor.mapping(40, 56)
    assert mapping.y.scale == 4.0
    assert mapping.y.offset == pytest.approx(1.5)


def test_pixels_agree_with_interpolate_for_a_grid_that_spans_the_image() -> None:
    predictor = Predictor(Pooled(), config(), CLASSES)
    log_probs, mapping = predictor.predict([image(40, 56), image(40, 56, 1)])
    expected = F.interpolate(log_probs, size=(40, 56), mode="bilinear", align_corners=False)
    torch.testing.assert_close(to_pixels(log_probs, mapping, 40, 56), expected)
    whole = torch.zeros(2, 3, 40, 56)
    for rows, columns, tile in pixel_tiles(log_probs, mapping, 40, 56):
        whole[:, :, rows, columns] = tile
    torch.testing.assert_close(whole, expected)


def test_classes_merge_many_to_one_as_probabilities_add() -> None:
    described = config(classes=("cloud", "road", "car", "bus"), class_map={"cloud": "sky", "bus": "car"})
    predictor = Predictor(Pooled(channels=4), described, CLASSES)
    merged, _ = predictor.predict([image()])
    alone = config(classes=("cloud", "road", "car", "bus"))
    single, _ = Predictor(Pooled(channels=4), alone, alone.classes or ()).predict([image()])
    p = single.exp()
    torch.testing.assert_close(merged.exp(), torch.stack([p[:, 0], p[:, 1], p[:, 2] + p[:, 3]], 1))


def test_an_ignored_class_takes_its_share_with_it() -> None:
    described = config(classes=("sky", "road", "car", "void"), class_map={"void": "ignore"})
    merged, _ = Predictor(Pooled(channels=4), described, CLASSES).predict([image()])
    three, _ = Predictor(Pooled(), config(), CLASSES).predict([image()])
    torch.testing.assert_close(merged, three)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"classes": ("sky", "road", "car", "dog")},
            "the network's class 'dog' means 'dog', which is not a class of the data; "
            "add 'dog' to its class_map, as one of ('sky', 'road', 'car') or \"ignore\"",
        ),
        (
            {"classes": ("sky", "road", "car", "dog"), "class_map": {"dog": "ignored"}},
            "the network's class 'dog' means 'ignored', which is not a class of the data; "
            "correct 'dog' in its class_map, as one of ('sky', 'road', 'car') or \"ignore\"",
        ),
        (
            {"classes": ("sky", "road")},
            "no class of the network means 'car'; add one to its class_map, or leave it out",
        ),
        (
            {"class_map": {"dog": "car"}},
            "class_map names 'dog', which the network does not have; its classes: ('sky', 'road', 'car')",
        ),
    ],
)
def test_a_class_without_a_meaning_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(NetworkError, match=f"^{re.escape(message)}$"):
        class_groups(config(**fields), CLASSES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"std": (0.2, 0.0, 0.2)}, "mean is .* and std .0.2, 0.0, 0.2.; std must be above 0, both finite"),
        ({"mean": (0.2, float("nan"), 0.2)}, "mean is .0.2, nan, 0.2. and std .*; std must be above 0, both finite"),
        ({"multiple_of": 0}, "multiple_of is 0 and resize None; all must be at least 1"),
        ({"resize": (0, 3)}, r"multiple_of is 1 and resize \(0, 3\); all must be at least 1"),
    ],
)
def test_preprocessing_that_cannot_be_done_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Preprocessing(**fields)  # type: ignore[arg-type]


def test_the_same_classes_in_another_order_are_put_in_order() -> None:
    assert class_groups(config(classes=("car", "sky", "road")), CLASSES) == [[1], [2], [0]]
    assert class_groups(config(classes=CLASSES), CLASSES) is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_name_the_image(bad: float) -> None:
    class Broken(Pooled):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            logits[1, 0, 2, 2] = bad
            return logits

    predictor = Predictor(Broken(), config(), CLASSES)
    message = r"^pooled returned NaN or \+inf for b.png; check its weights and preprocessing$"
    with pytest.raises(NonFiniteError, match=message):
        predictor.predict([image(), image()], names=["a.png", "b.png"])


def test_minus_infinity_is_legal() -> None:
    class Certain(Pooled):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            logits[:, 1] = -torch.inf
            return logits

    log_probs, mapping = Predictor(Certain(), config(), CLASSES).predict([image()])
    assert torch.isneginf(log_probs[:, 1]).all()
    for _, _, tile in pixel_tiles(log_probs, mapping, 40, 56):
        assert tile.isfinite().all()


def test_a_cell_in_which_no_class_is_left_names_the_image() -> None:
    class Void(Pooled):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            logits[1, :3, 2, 2] = -torch.inf
            return logits

    described = config(classes=("sky", "road", "car", "void"), class_map={"void": "ignore"})
    predictor = Predictor(Void(channels=4), described, CLASSES)
    message = "^pooled gives probability 0 to every class of the data in a cell of b.png; take its logits rather than"
    with pytest.raises(NonFiniteError, match=message):
        predictor.predict([image(), image()], names=["a.png", "b.png"])


def test_a_pixel_at_a_cells_centre_takes_nothing_of_a_neighbours_minus_infinity() -> None:
    log_probs = torch.tensor([[0.9, 0.0], [0.1, 1.0]]).log()[None, :, None].repeat(1, 1, 6, 3)
    # Cells of 7 pixels: the centres of cells are those of pixels 3, 10, 17 ...
    mapping = GridMapping(network_axis(42, 6), network_axis(42, 6))
    pixels = torch.zeros(1, 2, 42, 42)
    for rows, columns, tile in pixel_tiles(log_probs, mapping, 42, 42):
        pixels[..., rows, columns] = tile
    torch.testing.assert_close(pixels[..., 3::7, 3::7].softmax(1), log_probs.softmax(1))


def test_another_number_of_classes_is_refused() -> None:
    message = re.escape(
        "pooled returned 4 classes, its description has 3; "
        "state the network's own classes in its order (classes = [...])"
    )
    with pytest.raises(NetworkError, match=f"^{message}$"):
        Predictor(Pooled(channels=4), config(), CLASSES).predict([image()])


def test_a_wrong_stride_is_refused() -> None:
    network = Pooled()
    predictor = Predictor(network, config(), CLASSES)
    network.forward = lambda images: torch.zeros(len(images), 3, 10, 14)  # type: ignore[method-assign]
    message = (
        "pooled returned 10x14 cells for an input of 40x56 pixels; stride 8 means 5x7; correct the network's stride"
    )
    with pytest.raises(NetworkError, match=f"^{message}$"):
        predictor.predict([image()])
