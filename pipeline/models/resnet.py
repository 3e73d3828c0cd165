"""ResNet with bottleneck blocks (He et al., CVPR 2016), dilated to an output stride; torchvision's key names.

Shapes: images N,3,H,W; features N,C,h,w.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from segkd.pipeline.models.layers import BatchNorm, ConvBN, dilate

RESNET50 = (3, 4, 6, 3)
RESNET101 = (3, 4, 23, 3)

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as torchvision's), 1x1, and a shortcut that is projected where the shape changes."""

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = width * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = BatchNorm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = BatchNorm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == out_channels
        self.downsample = None if same else ConvBN(in_channels, out_channels, stride=stride, activation=None)

    def forward(self, features: Tensor) -> Tensor:
        shortcut = features if self.downsample is None else self.downsample(features)
        features = self.relu(self.bn1(self.conv1(features)))
        features = self.relu(self.bn2(self.conv2(features)))
        result: Tensor = self.relu(self.bn3(self.conv3(features)) + shortcut)
        return result


class ResNet(nn.Module):
    """The four stages' last features: images -> N,2048,h,w with h = ceil(H / output_stride)."""

    channels = 512 * _EXPANSION

    def __init__(self, blocks: Sequence[int], output_stride: int) -> None:
        """``blocks`` counts those of each stage: :data:`RESNET101`."""
        super().__init__()
        strides = [2, 2]
        for stage, count in enumerate(blocks):
            strides += [1 if stage == 0 else 2] + [1] * (count - 1)
        plan = dilate(strides, output_stride)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = BatchNorm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, first = 64, 2
        stages = []
        for stage, count in enumerate(blocks):
            width, layers = 64 * 2**stage, []
            for stride, dilation in plan[first : first + count]:
                layers.append(Bottleneck(channels, width, stride, dilation))
                channels = width * _EXPANSION
            stages.append(nn.Sequential(*layers))
            first += count
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

    def forward(self, images_N3HW: Tensor) -> Tensor:
        features = self.maxpool(self.relu(self.bn1(self.conv1(images_N3HW))))
        features = self.layer2(self.layer1(features))
        result: Tensor = self.layer4(self.layer3(features))
        return result
