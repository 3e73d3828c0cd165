"""MobileNetV1 and V2 as backbones, dilated to an output stride.

Shapes: images N,3,H,W; features N,C,h,w.
"""

from __future__ import annotations

from torch import Tensor, nn

from segkd.pipeline.models.layers import ConvBN, InvertedResidual, depthwise_separable, dilate, relu6
from segkd.storage.errors import NetworkError

_V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Output channels at width 1 and stride of each block (Howard et al., 2017, table 1)."""

_V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, output channels, blocks and stride of each stage (Sandler et al., CVPR 2018, table 2)."""


class MobileNetV1(nn.Module):
    """Images -> N,channels,h,w with h = ceil(H / output_stride) and channels = 1024 * width."""

    def __init__(self, width: float, output_stride: int) -> None:
        """``width`` multiplies the channels of every layer. Raises NetworkError unless it is positive."""
        super().__init__()
        if not width > 0:
            raise NetworkError(f"width = {width}; expected a positive multiplier of the channels, such as 0.25 or 1.0")
        plan = dilate([2, *(stride for _, stride in _V1_BLOCKS)], output_stride)
        self.channels = max(int(32 * width), 8)
        self.features = nn.Sequential(ConvBN(3, self.channels, 3, stride=2, activation=relu6))
        for (channels, _), (stride, dilation) in zip(_V1_BLOCKS, plan[1:], strict=True):
            wide = max(int(channels * width), 8)
            self.features.append(
                depthwise_separable(
                    self.channels, wide, stride=stride, dilation=dilation, activation=relu6, between=relu6
                )
            )
            self.channels = wide

    def forward(self, images_N3HW: Tensor) -> Tensor:
        features: Tensor = self.features(images_N3HW)
        return features


class MobileNetV2(nn.Module):
    """Images -> features at stride 4 (24 channels) and at ``output_stride`` (320 channels).

    Keys are torchvision's ``features.*``, without the last 1x1 convolution to 1280 channels and the classifier.
    """

    channels = 320
    low_channels = 24

    def __init__(self, output_stride: int) -> None:
        super().__init__()
        blocks = [
            (expansion, channels, stride if block == 0 else 1)
            for expansion, channels, count, stride in _V2_STAGES
            for block in range(count)
        ]
        plan = dilate([2, *(stride for _, _, stride in blocks)], output_stride)
        in_channels = 32
        self.features = nn.Sequential(ConvBN(3, in_channels, 3, stride=2, activation=relu6))
        for (expansion, channels, _), (stride, dilation) in zip(blocks, plan[1:], strict=True):
            self.features.append(
                InvertedResidual(in_channels, channels, expansion=expansion, stride=stride, dilation=dilation)
            )
            in_channels = channels

    def forward(self, images_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        low: Tensor = self.features[:4](images_N3HW)
        deep: Tensor = self.features[4:](low)
        return low, deep
