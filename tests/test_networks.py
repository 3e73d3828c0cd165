"""The built-in networks: published parameter counts, torchvision's keys, grids at every size, dilation, training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segkd.pipeline.evaluation.speed import count_flops, count_parameters
from segkd.pipeline.models.deeplab import DeepLabV2, SummedASPP, deeplab_mobilenetv1, deeplabv2_resnet101
from segkd.pipeline.models.layers import ConvBN, DilatedDepthwise, Network
from segkd.pipeline.models.mobilenet import MobileNetV1, MobileNetV2
from segkd.pipeline.models.network import SegmentationNetwork
from segkd.pipeline.models.references import BUILT_IN
from segkd.pipeline.models.resnet import RESNET50, RESNET101, ResNet
from segkd.storage.errors import NetworkError

MOBILENET_V2 = Path(__file__).parents[1] / "../shared/weights/mobilenet_v2-b0353104.pth"

SMALL: dict[str, Callable[[], Network]] = {
    "deeplabv2-resnet": lambda: DeepLabV2(ResNet((1, 1, 1, 1), 8), 3, output_stride=8, rates=(6, 12)),
    "deeplab-mobilenetv1": lambda: BUILT_IN["deeplab-mobilenetv1"](3, width=0.25),
    "deeplab-mobilenetv1-16": lambda: BUILT_IN["deeplab-mobilenetv1"](3, width=0.25, output_stride=16),
    "deeplabv3plus-mobilenetv2": lambda: BUILT_IN["deeplabv3plus-mobilenetv2"](3, width=16),
    "deeplabv3plus-mobilenetv2-8": lambda: BUILT_IN["deeplabv3plus-mobilenetv2"](3, width=16, output_stride=8),
    "fast-scnn": lambda: BUILT_IN["fast-scnn"](3),
    "enet": lambda: BUILT_IN["enet"](3),
}


@pytest.fixture(scope="module", params=SMALL)
def small(request: pytest.FixtureRequest) -> Network:
    """Each architecture at a size that is quick to run."""
    torch.manual_seed(0)
    return SMALL[request.param]().eval()


def convolution_weights(network: nn.Module) -> int:
    return sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Conv2d))


class TestParameterCounts:
    """Backbones are counted with the ImageNet classifier that they were published with."""

    def test_resnet(self) -> None:
        # torchvision's documentation of resnet50 and resnet101: num_params 25,557,032 and 44,549,160.
        classifier = 2048 * 1000 + 1000
        assert count_parameters(ResNet(RESNET50, 8)) + classifier == 25_557_032
        assert count_parameters(ResNet(RESNET101, 8)) + classifier == 44_549_160

    @pytest.mark.parametrize(
        ("width", "published"), [(1.0, 4_231_976), (0.75, 2_585_560), (0.5, 1_331_592), (0.25, 470_072)]
    )
    def test_mobilenetv1(self, width: float, published: int) -> None:
        # Howard et al. 2017: 4.2, 2.6, 1.3 and 0.5 million; exactly, Keras' trainable parameters.
        backbone = MobileNetV1(width, 8)
        assert count_parameters(backbone) + backbone.channels * 1000 + 1000 == published

    def test_mobilenetv2(self) -> None:
        # torchvision's documentation of mobilenet_v2: num_params 3,504,872, with the layer to 1280 channels.
        last = 320 * 1280 + 2 * 1280
        assert count_parameters(MobileNetV2(16)) + last + 1280 * 1000 + 1000 == 3_504_872

    def test_deeplabv2(self) -> None:
        # DeepLab v2 adds to the backbone nothing but one 3x3 convolution to logits a rate.
        network = deeplabv2_resnet101(21)
        assert count_parameters(network) == count_parameters(network.backbone) + 4 * (9 * 2048 * 21 + 21) == 44_048_532

    def test_fast_scnn(self) -> None:
        # Poudel et al. 2019: 1.11 million for 19 classes, which is the convolutions' weights.
        network = BUILT_IN["fast-scnn"](19)
        assert convolution_weights(network) == 1_114_096
        assert count_parameters(network) == 1_137_795

    def test_enet(self) -> None:
        # Paszke et al. 2016: 0.37 million; the authors' Caffe twin, with batch norm folded in: 0.36.
        assert count_parameters(BUILT_IN["enet"](19)) == 363_618
        assert count_parameters(BUILT_IN["enet"](11)) == 363_098


def test_multiply_adds_of_the_mobilenets() -> None:
    # Howard et al. 2017: 569 million at 224x224; Sandler et al. 2018: 300 million.
    assert count_flops(MobileNetV1(1.0, 32), (224, 224)) / 2 + 1024 * 1000 == pytest.approx(569e6, rel=0.002)
    last = 7 * 7 * 320 * 1280 + 1280 * 1000
    assert count_flops(MobileNetV2(32), (224, 224)) / 2 + last == pytest.approx(300e6, rel=0.005)


def batch_norm_keys(name: str) -> Iterator[str]:
    for value in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        yield f"{name}.{value}"


def test_resnet_has_torchvisions_keys() -> None:
    expected = {"conv1.weight", *batch_norm_keys("bn1")}
    for stage, count in enumerate(RESNET101, 1):
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            for layer in (1, 2, 3):
                expected |= {f"{prefix}.conv{layer}.weight", *batch_norm_keys(f"{prefix}.bn{layer}")}
        expected |= {f"layer{stage}.0.downsample.0.weight", *batch_norm_keys(f"layer{stage}.0.downsample.1")}
    with torch.device("meta"):
        assert set(ResNet(RESNET101, 8).state_dict()) == expected


@pytest.mark.skipif(not MOBILENET_V2.exists(), reason="needs torchvision's weights of MobileNetV2 in ../shared")
def test_mobilenetv2_has_torchvisions_keys() -> None:
    published = torch.load(MOBILENET_V2, weights_only=True)
    kept = {key: value.shape for key, value in published.items() if not key.startswith(("features.18.", "classifier."))}
    assert {key: value.shape for key, value in MobileNetV2(16).state_dict().items()} == kept


@torch.no_grad()
def test_every_size_gives_the_declared_cells(small: Network) -> None:
    @settings(max_examples=12, deadline=None)
    @given(st.integers(1, 75), st.integers(1, 75))
    def check(height: int, width: int) -> None:
        stride = small.grid.stride
        cells = (-(-height // stride), -(-width // stride))
        assert small(torch.zeros(2, 3, height, width)).shape == (2, 3, *cells)
        assert small.grid.mapping(height, width).shape == cells

    check()


def test_every_parameter_learns(small: Network) -> None:
    torch.manual_seed(0)
    try:
        small.train()(torch.randn(2, 3, 65, 97)).square().sum().backward()
        for name, parameter in small.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
    finally:
        small.zero_grad()
        small.eval()


@pytest.mark.parametrize("reference", BUILT_IN)
def test_built_in_networks_declare_grid_and_classes(reference: str) -> None:
    with torch.device("meta"):
        network = BUILT_IN[reference](num_classes=7)
    assert isinstance(network, SegmentationNetwork)
    assert network.num_classes == 7
    strides = {"deeplabv3plus-mobilenetv2": 4, "enet": 1}
    assert network.grid.stride == strides.get(reference, 8)
    assert network.grid.convention == "span"


@pytest.mark.parametrize(
    "build",
    [
        lambda stride: MobileNetV1(0.25, stride),
        lambda stride: nn.Sequential(MobileNetV2(stride), Last()),
        lambda stride: ResNet((1, 2, 2, 2), stride),
    ],
    ids=["mobilenetv1", "mobilenetv2", "resnet"],
)
@pytest.mark.parametrize("output_stride", [8, 16])
@torch.no_grad()
def test_dilation_computes_the_strided_networks_features_at_more_places(
    build: Callable[[int], nn.Module], output_stride: int
) -> None:
    """The same weights with strides turned into dilation agree exactly wherever the strided network has a cell."""
    torch.manual_seed(0)
    strided, dilated = build(32).eval(), build(output_stride).eval()
    for module in strided.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    dilated.load_state_dict(strided.state_dict())
    images = torch.randn(1, 3, 97, 131)
    step = 32 // output_stride
    coarse, fine = strided(images), dilated(images)
    assert coarse.std() > 1e-3
    torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-4 * float(coarse.abs().max()))


class Last(nn.Module):
    """The deeper of MobileNetV2's two features."""

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        return features[1]


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dilation=st.integers(2, 6),
    kernel=st.sampled_from([3, 5]),
    channels_last=st.booleans(),
    bias=st.booleans(),
)
def test_a_dilated_depthwise_convolution_is_torchs(
    size: tuple[int, int], dilation: int, kernel: int, channels_last: bool, bias: bool
) -> None:
    padding = dilation * (kernel - 1) // 2
    layer = DilatedDepthwise(3, 3, kernel, 1, padding, dilation, groups=3, bias=bias).double()
    features = torch.randn((2, 3, *size), dtype=torch.float64)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    wanted = [features.requires_grad_(), *layer.parameters()]

    def learned(training: bool) -> list[Tensor]:
        output = layer.train(training)(features)
        return [output, *torch.autograd.grad(output.sin().sum(), wanted)]

    for mine, torchs in zip(learned(training=True), learned(training=False), strict=True):
        torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("channels", [(1, 4), (2, 6), (1, 1)])
def test_channels_that_multiply_are_torchs_own(channels: tuple[int, int]) -> None:
    features = torch.randn(2, channels[0], 16, 16)
    layer = ConvBN(*channels, 3, dilation=2, groups=channels[0]).train()
    assert layer(features).shape == (2, channels[1], 16, 16)


def test_dilated_backbones_use_it() -> None:
    network = deeplab_mobilenetv1(3, width=0.25)
    assert [layer.dilation[0] for layer in network.modules() if isinstance(layer, DilatedDepthwise)] == [2] * 6 + [4]


@torch.no_grad()
def test_summed_aspp_is_the_sum_over_rates() -> None:
    head = SummedASPP(5, 2, (1, 3)).double()
    features = torch.randn(1, 5, 9, 11, dtype=torch.float64)
    expected = torch.zeros(2, 9, 11, dtype=torch.float64)
    for rate, branch in zip((1, 3), head.branches, strict=True):
        assert isinstance(branch, nn.Conv2d)
        padded = nn.functional.pad(features, (rate,) * 4)[0]
        for y in range(3):
            for x in range(3):
                window = padded[:, y * rate : y * rate + 9, x * rate : x * rate + 11]
                expected += torch.einsum("oc,chw->ohw", branch.weight[:, :, y, x], window)
        assert branch.bias is not None
        expected += branch.bias[:, None, None]
    torch.testing.assert_close(head(features)[0], expected)


def test_untrained_logits_are_near_uniform() -> None:
    torch.manual_seed(0)
    for build in SMALL.values():
        log_probs = build().train()(torch.randn(2, 3, 64, 64)).log_softmax(1)
        assert (-log_probs.mean()).item() == pytest.approx(torch.tensor(3.0).log().item(), abs=0.3)


@pytest.mark.parametrize("reference", ["deeplabv3plus-mobilenetv2", "fast-scnn"])
def test_a_pooled_value_under_batch_norm_is_refused_with_the_remedy(reference: str) -> None:
    network = BUILT_IN[reference](3).train()
    with pytest.raises(NetworkError, match=r"one value a channel .* batch of 1.*train with at least 2 images a batch"):
        network(torch.zeros(1, 3, 64, 64))
    assert network(torch.zeros(2, 3, 64, 64)).isfinite().all()
    assert network.eval()(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_a_crop_of_one_cell_is_refused_with_the_remedy() -> None:
    network = deeplab_mobilenetv1(3, width=0.25).train()
    with pytest.raises(NetworkError, match="at least 2 images a batch or larger crops"):
        network(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: deeplab_mobilenetv1(3, output_stride=7), "output_stride = 7; expected 8, 16 or 32"),
        (lambda: deeplabv2_resnet101(3, output_stride=4), "output_stride = 4; expected 8, 16 or 32"),
        (lambda: deeplab_mobilenetv1(3, width=0), "width = 0; expected a positive multiplier of the channels"),
        (lambda: deeplab_mobilenetv1(3, rates=()), r"rates = \[\]; expected at least one dilation rate of 1 or more"),
        (lambda: deeplab_mobilenetv1(3, rates=(6, 0)), r"rates = \[6, 0\]; expected"),
        (
            lambda: BUILT_IN["deeplabv3plus-mobilenetv2"](3, width=0),
            "deeplabv3plus-mobilenetv2: width = 0; expected a number of channels, 256 as a rule",
        ),
        (lambda: BUILT_IN["enet"](0), "at least 1 class, got num_classes = 0"),
    ],
)
def test_impossible_arguments_are_refused(build: Callable[[], Network], message: str) -> None:
    with torch.device("meta"), pytest.raises(NetworkError, match=message):
        build()
