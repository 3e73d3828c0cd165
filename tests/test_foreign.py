"""Networks from elsewhere: their grid, their output, and what they are held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segkd.pipeline.models.foreign import ForeignNetwork
from segkd.pipeline.models.network import Grid, NetworkConfig, Preprocessing
from segkd.storage.errors import NetworkError


def foreign(network: nn.Module, num_classes: int = 2, **settings: Any) -> ForeignNetwork:
    return ForeignNetwork(network, NetworkConfig(reference="net", **settings), num_classes)


class Returns(nn.Module):
    """A 1x1 convolution to two channels whose result is packed by ``pack``."""

    def __init__(self, pack: Any, stride: int = 1) -> None:
        super().__init__()
        self.pack = pack
        self.conv = nn.Conv2d(3, 2, 1, stride)

    def forward(self, images: Tensor) -> Any:
        return self.pack(self.conv(images))


class Holder:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class TestGrid:
    @pytest.mark.parametrize("stride", [1, 2, 3, 4, 8, 16, 32])
    def test_the_stride_of_a_network_that_declares_none_is_inferred(self, stride: int) -> None:
        assert foreign(nn.Conv2d(3, 2, 1, stride)).grid == Grid(stride=stride)

    def test_align_corners_makes_the_convention(self) -> None:
        assert foreign(nn.Conv2d(3, 2, 1, 4), align_corners=True).grid == Grid(stride=4, convention="corners")
        assert foreign(nn.Conv2d(3, 2, 1, 4), align_corners=True, stride=4).grid.convention == "corners"

    def test_a_declared_grid_is_kept_and_not_contradicted(self) -> None:
        network = nn.Conv2d(3, 2, 1, 4)
        network.grid = Grid(stride=4, convention="stride")  # type: ignore[assignment]
        assert foreign(network).grid.convention == "stride"
        with pytest.raises(NetworkError, match="declares stride 4, its description says stride = 8"):
            foreign(network, stride=8)

    def test_inference_leaves_the_network_as_it_was(self) -> None:
        network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2).eval())
        before = {name: value.clone() for name, value in network.state_dict().items()}
        assert foreign(network).training
        assert [module.training for module in network] == [True, True, False]
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    def test_the_size_comes_from_the_preprocessing(self) -> None:
        seen: list[torch.Size] = []
        network = Returns(lambda logits: seen.append(logits.shape) or logits)
        foreign(network, preprocessing=Preprocessing(resize=(50, 70), multiple_of=32))
        assert seen == [(1, 2, 64, 96)]

    def test_cells_that_no_stride_explains_are_refused(self) -> None:
        with pytest.raises(NetworkError, match="254x254 cells for 256x256 pixels, which is not ceil"):
            foreign(nn.Conv2d(3, 2, 3))
        with pytest.raises(NetworkError, match="128x256 cells for 256x256 pixels"):
            foreign(nn.Conv2d(3, 2, 1, (2, 1)))

    def test_a_network_that_fails_says_what_it_was_asked(self) -> None:
        with pytest.raises(NetworkError, match=r"failed on a black image of 256x256 .* state stride") as raised:
            foreign(nn.Conv2d(4, 2, 1))
        assert isinstance(raised.value.__cause__, RuntimeError)

    def test_a_network_that_fails_on_a_size_says_which(self) -> None:
        network = foreign(Returns(lambda logits: logits + nn.functional.max_pool2d(logits, 2).repeat(1, 1, 2, 2)))
        message = (
            r"^net failed on images of shape \(1, 3, 5, 6\) \(RuntimeError: The size .*\); set preprocessing\.mult"
        )
        with pytest.raises(NetworkError, match=message) as raised:
            network(torch.zeros(1, 3, 5, 6))
        assert isinstance(raised.value.__cause__, RuntimeError)

    def test_a_device_without_memory_is_no_fault_of_the_network(self) -> None:
        def full(_: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            foreign(Returns(full), stride=1)(torch.zeros(1, 3, 4, 6))

    def test_a_wrong_stride_shows_on_the_first_pass(self) -> None:
        network = foreign(nn.Conv2d(3, 2, 1, 4), stride=8)
        with pytest.raises(
            NetworkError, match="net returned 4x5 cells for an input of 16x20 pixels; stride 8 means 2x3"
        ):
            network(torch.zeros(1, 3, 16, 20))

    def test_a_network_that_rounds_down_shows_on_an_odd_size(self) -> None:
        network = foreign(nn.Conv2d(3, 2, 2, 2))
        assert network(torch.zeros(1, 3, 6, 6)).shape[2:] == (3, 3)
        with pytest.raises(NetworkError, match=r"set preprocessing\.multiple_of"):
            network(torch.zeros(1, 3, 7, 6))


class TestOutput:
    @pytest.mark.parametrize(
        ("pack", "output"),
        [
            (lambda logits: {"aux": logits.sum(), "out": logits}, "out"),
            (lambda logits: (logits.sum(), logits), 1),
            (lambda logits: [logits], 0),
            (Holder, "logits"),
        ],
        ids=["dict", "tuple", "list", "object"],
    )
    def test_the_logits_are_picked(self, pack: Any, output: str | int) -> None:
        network = Returns(pack)
        images = torch.randn(1, 3, 4, 6)
        assert torch.equal(foreign(network, output=output)(images), network.conv(images))

    @pytest.mark.parametrize(
        ("pack", "output", "message"),
        [
            (
                lambda x: {"out": x},
                None,
                r"a mapping with keys \['out'\], and no output is chosen; set output to the key",
            ),
            (lambda x: {"out": x}, "logits", "output = 'logits' is no tensor of it; set output to the key"),
            (lambda x: (x, x), None, "a tuple of 2, and no output is chosen; set output to the position"),
            (lambda x: (x, None), 1, "output = 1 is no tensor of it"),
            (lambda x: (x, x), "out", "output = 'out' is no tensor of it"),
            (Holder, None, "an object of type Holder, and no output is chosen; set output to the attribute"),
            (lambda x: x, 0, "a tensor, and output = 0 is no tensor of it; remove output"),
            (lambda x: x.argmax(1), None, r"shape \(1, 4, 6\), expected \(1, classes, height, width\)"),
            (lambda x: x[0], None, r"shape \(2, 4, 6\), expected \(1, classes"),
        ],
    )
    def test_mistakes_are_named_with_the_key_to_set(self, pack: Any, output: str | int | None, message: str) -> None:
        network = foreign(Returns(pack), output=output, stride=1)
        with pytest.raises(NetworkError, match=message):
            network(torch.zeros(1, 3, 4, 6))

    def test_another_number_of_classes_is_refused(self) -> None:
        network = foreign(nn.Conv2d(3, 2, 1), num_classes=5)
        with pytest.raises(NetworkError, match=r"net returned 2 classes, expected 5; state its own classes"):
            network(torch.zeros(1, 3, 4, 6))

    def test_probabilities_become_their_logarithm(self) -> None:
        network = foreign(Returns(lambda logits: logits.softmax(1)), produces="probabilities")
        images = torch.randn(2, 3, 4, 6)
        expected = network.network.conv(images).log_softmax(1)
        torch.testing.assert_close(network(images), expected)

    def test_a_probability_of_zero_becomes_minus_infinity_and_a_nan_stays(self) -> None:
        values = torch.tensor([1.0, 0.0, float("nan"), 0.5, 0.0, 1.0, 0.5, 0.5]).reshape(1, 2, 2, 2)
        network = foreign(Returns(lambda _: values), produces="probabilities", stride=1)
        with np.errstate(divide="ignore"):
            expected = torch.from_numpy(np.log(values.numpy()))
        torch.testing.assert_close(network(torch.zeros(1, 3, 2, 2)), expected, equal_nan=True)
        assert network(torch.zeros(1, 3, 2, 2))[0, 0, 0, 1] == -torch.inf

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_a_network_of_another_precision_is_fed_its_own(self, dtype: torch.dtype) -> None:
        network = foreign(nn.Conv2d(3, 2, 1).to(dtype))
        images = torch.randn(1, 3, 4, 6)
        assert torch.equal(network(images), network.network(images.to(dtype)))

    def test_probabilities_that_are_called_logits_are_refused(self) -> None:
        images = torch.rand(1, 3, 4, 4)
        message = (
            "returned values that add up to 1 over the classes, and none below 0: probabilities, not logits; "
            'set produces = "probabilities"'
        )
        with pytest.raises(NetworkError, match=message):
            foreign(Returns(lambda logits: logits.softmax(1)), stride=1)(images)
        for logits in (lambda logits: logits, lambda logits: logits.log_softmax(1), lambda logits: 0 * logits):
            foreign(Returns(logits), stride=1)(images)

    def test_half_precision_probabilities_are_read(self) -> None:
        values = torch.tensor([0.9995, 0.0005]).reshape(1, 2, 1, 1).bfloat16()
        result = foreign(Returns(lambda _: values), produces="probabilities", stride=1)(torch.zeros(1, 3, 1, 1))
        assert result.dtype == torch.float32

    @pytest.mark.parametrize("change", [lambda x: 5 * x, torch.sigmoid, lambda x: x.softmax(1) / 2])
    def test_what_are_no_probabilities_is_refused(self, change: Any) -> None:
        network = foreign(Returns(change), produces="probabilities", stride=1)
        with pytest.raises(NetworkError, match=r'add up to .* over the classes; set produces = "logits"'):
            network(torch.randn(1, 3, 4, 6))

    def test_a_pooled_value_under_batch_norm_is_explained(self) -> None:
        network = foreign(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)), stride=8)
        with pytest.raises(NetworkError, match="train with at least 2 images a batch"):
            network.train()(torch.zeros(1, 3, 8, 8))
        assert network.eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 2, 1, 1)
