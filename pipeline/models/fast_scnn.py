"""Fast-SCNN (Poudel et al., BMVC 2019): a real-time network whose two branches share their first layers.

Shapes: images N,3,H,W; features and logits N,C,h,w.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkd.pipeline.models.layers import (
    ConvBN,
    InvertedResidual,
    Network,
    depthwise_separable,
    initialise,
    relu,
    upsample_like,
)
from segkd.pipeline.models.network import Grid

_STAGES = ((64, 2), (96, 2), (128, 1))
"""Output channels and stride of the global feature extractor's stages, three blocks each (table 1)."""

_BINS = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """Averages over 1, 2x2, 3x3 and 6x6 regions beside the features (Zhao et al., CVPR 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvBN(channels, channels // len(_BINS)) for _ in _BINS)
        self.project = ConvBN(2 * channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        pyramid = [
            upsample_like(branch(F.adaptive_avg_pool2d(features, bins)), features)
            for bins, branch in zip(_BINS, self.branches, strict=True)
        ]
        projected: Tensor = self.project(torch.cat([features, *pyramid], 1))
        return projected


class FastSCNN(Network):
    """Fast-SCNN (Poudel et al., 2019). Logits at stride 8; the global branch works at stride 32."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(Grid(stride=8), num_classes)
        self.downsample = nn.Sequential(
            ConvBN(3, 32, 3, stride=2),
            depthwise_separable(32, 48, stride=2, between=None),
            depthwise_separable(48, 64, stride=2, between=None),
        )
        blocks, in_channels = [], 64
        for channels, first_stride in _STAGES:
            for stride in (first_stride, 1, 1):
                blocks.append(InvertedResidual(in_channels, channels, expansion=6, stride=stride, activation=relu))
                in_channels = channels
        self.context = nn.Sequential(*blocks, PyramidPooling(in_channels))
        self.fuse_context = nn.Sequential(
            ConvBN(128, 128, 3, dilation=4, groups=128), ConvBN(128, 128, activation=None)
        )
        self.fuse_detail = ConvBN(64, 128, activation=None)
        self.classifier = nn.Sequential(
            depthwise_separable(128, 128, between=None),
            depthwise_separable(128, 128, between=None),
            nn.Dropout(0.1),
            nn.Conv2d(128, num_classes, 1),
        )
        initialise(self)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        detail = self.downsample(images_N3HW)
        context = self.fuse_context(upsample_like(self.context(detail), detail))
        logits: Tensor = self.classifier(F.relu(context + self.fuse_detail(detail)))
        return logits
