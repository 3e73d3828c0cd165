"""DeepLab v2 (Chen et al., TPAMI 2018) and v3+ (Chen et al., ECCV 2018).

Shapes: images N,3,H,W; features and logits N,C,h,w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segkd.pipeline.models.layers import ConvBN, Network, depthwise_separable, initialise, upsample_like
from segkd.pipeline.models.mobilenet import MobileNetV1, MobileNetV2
from segkd.pipeline.models.network import Grid
from segkd.pipeline.models.resnet import RESNET101, ResNet
from segkd.storage.errors import NetworkError


class SummedASPP(nn.Module):
    """Atrous spatial pyramid pooling of DeepLab v2: one 3x3 convolution to logits a rate, summed.

    A single rate of 12 is DeepLab's large field of view (DeepLab-LargeFOV).
    """

    def __init__(self, in_channels: int, num_classes: int, rates: Sequence[int]) -> None:
        super().__init__()
        if not rates or min(rates) < 1:
            raise NetworkError(f"rates = {list(rates)}; expected at least one dilation rate of 1 or more")
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate) for rate in rates
        )

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.branches[0](features)
        for branch in self.branches[1:]:
            logits = logits + branch(features)
        return logits


class DeepLabV2(Network):
    """A dilated backbone and summed ASPP; logits at the backbone's output stride."""

    def __init__(
        self, backbone: ResNet | MobileNetV1, num_classes: int, *, output_stride: int, rates: Sequence[int]
    ) -> None:
        super().__init__(Grid(stride=output_stride), num_classes)
        self.backbone = backbone
        self.head = SummedASPP(backbone.channels, num_classes, rates)
        initialise(self)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images_N3HW))
        return logits


def deeplabv2_resnet101(
    num_classes: int, *, output_stride: int = 8, rates: Sequence[int] = (6, 12, 18, 24)
) -> DeepLabV2:
    """DeepLab v2 on ResNet-101 with the pyramid that its authors call ASPP-L: the paper's teacher."""
    backbone = ResNet(RESNET101, output_stride)
    return DeepLabV2(backbone, num_classes, output_stride=output_stride, rates=rates)


def deeplab_mobilenetv1(
    num_classes: int, *, width: float = 1.0, output_stride: int = 8, rates: Sequence[int] = (12,)
) -> DeepLabV2:
    """DeepLab on MobileNetV1: the paper's student. ``width`` multiplies the backbone's channels."""
    backbone = MobileNetV1(width, output_stride)
    return DeepLabV2(backbone, num_classes, output_stride=output_stride, rates=rates)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling of DeepLab v3, with separable convolutions and image pooling."""

    def __init__(self, in_channels: int, width: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [ConvBN(in_channels, width), *(depthwise_separable(in_channels, width, dilation=rate) for rate in rates)]
        )
        self.pool = ConvBN(in_channels, width)
        self.project = nn.Sequential(ConvBN(width * (len(rates) + 2), width), nn.Dropout(0.1))

    def forward(self, features: Tensor) -> Tensor:
        pooled = self.pool(features.mean((2, 3), keepdim=True)).expand(-1, -1, *features.shape[2:])
        pyramid = [branch(features) for branch in self.branches]
        projected: Tensor = self.project(torch.cat([*pyramid, pooled], 1))
        return projected


class DeepLabV3Plus(Network):
    """ASPP at the encoder's output stride, and a decoder that refines it at stride 4; logits at stride 4."""

    def __init__(self, backbone: MobileNetV2, num_classes: int, *, width: int, rates: Sequence[int]) -> None:
        super().__init__(Grid(stride=4), num_classes)
        self.backbone = backbone
        self.aspp = ASPP(backbone.channels, width, rates)
        self.low = ConvBN(backbone.low_channels, 48)
        self.head = nn.Sequential(
            depthwise_separable(width + 48, width),
            depthwise_separable(width, width),
            nn.Conv2d(width, num_classes, 1),
        )
        initialise(self)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        low, deep = self.backbone(images_N3HW)
        low = self.low(low)
        context = upsample_like(self.aspp(deep), low)
        logits: Tensor = self.head(torch.cat([context, low], 1))
        return logits


def deeplabv3plus_mobilenetv2(num_classes: int, *, width: int = 256, output_stride: int = 16) -> DeepLabV3Plus:
    """DeepLab v3+ on MobileNetV2. ``width``: channels of pyramid and decoder; ``output_stride``: the encoder's.

    The rates keep their reach in pixels: 6, 12, 18 at output stride 16, twice that at 8, half at 32.
    """
    if width < 1:
        raise NetworkError(f"deeplabv3plus-mobilenetv2: width = {width}; expected a number of channels, 256 as a rule")
    backbone = MobileNetV2(output_stride)
    rates = tuple(rate * 16 // output_stride for rate in (6, 12, 18))
    return DeepLabV3Plus(backbone, num_classes, width=width, rates=rates)
