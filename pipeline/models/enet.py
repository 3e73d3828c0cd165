"""ENet (Paszke et al., 2016): a very small encoder and decoder joined by the positions of pooled maxima.

Shapes: images N,3,H,W; features and logits N,C,h,w. An odd side is halved upwards and restored exactly.
"""

from __future__ import annotations

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from segkd.pipeline.models.layers import Activation, BatchNorm, ConvBN, Network, initialise, relu
from segkd.pipeline.models.network import Grid


def _halve(features: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 maxima and their positions, for :func:`torch.nn.functional.max_unpool2d`."""
    maxima, positions = F.max_pool2d(features, 2, ceil_mode=True, return_indices=True)
    return maxima, positions


class InitialBlock(nn.Module):
    """13 filters of stride 2 beside the maxima of the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 13, 3, 2, 1, bias=False)
        self.bn = BatchNorm(16)
        self.activation = nn.PReLU(16)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        joined = torch.cat([self.conv(images_N3HW), F.max_pool2d(images_N3HW, 2, ceil_mode=True)], 1)
        features: Tensor = self.activation(self.bn(joined))
        return features


def _middle(channels: int, dilation: int, asymmetric: bool, activation: Activation) -> nn.Sequential:
    if asymmetric:
        return nn.Sequential(
            nn.Conv2d(channels, channels, (5, 1), padding=(2, 0), bias=False),
            ConvBN(channels, channels, (1, 5), activation=activation),
        )
    return ConvBN(channels, channels, 3, dilation=dilation, activation=activation)


class Bottleneck(nn.Module):
    """Reduce to a quarter of the channels, filter, expand, add."""

    def __init__(
        self,
        channels: int,
        *,
        dilation: int = 1,
        asymmetric: bool = False,
        dropout: float = 0.1,
        activation: Activation = nn.PReLU,
    ) -> None:
        super().__init__()
        inner = channels // 4
        self.extension = nn.Sequential(
            ConvBN(channels, inner, activation=activation),
            _middle(inner, dilation, asymmetric, activation),
            ConvBN(inner, channels, activation=None),
            nn.Dropout2d(dropout),
        )
        self.activation = activation(channels)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.activation(features + self.extension(features))
        return result


class Downsampling(nn.Module):
    """Halves the sides. The main branch is max pooling, its missing channels zero."""

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float) -> None:
        super().__init__()
        inner = out_channels // 4
        self.added = out_channels - in_channels
        self.extension = nn.Sequential(
            ConvBN(in_channels, inner, 2, stride=2, activation=nn.PReLU),
            ConvBN(inner, inner, 3, activation=nn.PReLU),
            ConvBN(inner, out_channels, activation=None),
            nn.Dropout2d(dropout),
        )
        self.activation = nn.PReLU(out_channels)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        # Halved upwards: the added row and column are read where a side is odd.
        extension = self.extension(F.pad(features, (0, 1, 0, 1)))
        maxima, positions = _halve(features)
        main = F.pad(maxima, (0, 0, 0, 0, 0, self.added))
        return self.activation(main + extension), positions


class Upsampling(nn.Module):
    """Doubles the sides to those that were pooled. The main branch puts values back where the maxima had been."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        inner = out_channels // 4
        self.main = ConvBN(in_channels, out_channels, activation=None)
        self.reduce = ConvBN(in_channels, inner)
        self.enlarge = nn.ConvTranspose2d(inner, inner, 3, 2, 1, bias=False)
        self.expand = nn.Sequential(
            BatchNorm(inner), relu(inner), ConvBN(inner, out_channels, activation=None), nn.Dropout2d(0.1)
        )

    def forward(self, features: Tensor, positions: Tensor, size: Size) -> Tensor:
        main = F.max_unpool2d(self.main(features), positions, [2, 2], output_size=list(size))
        extension = self.expand(self.enlarge(self.reduce(features), output_size=size))
        return F.relu(main + extension)


def _context() -> list[nn.Module]:
    """Bottlenecks 2.1 to 2.8 of the paper's table 1, which are also 3.0 to 3.7."""
    return [
        Bottleneck(128),
        Bottleneck(128, dilation=2),
        Bottleneck(128, asymmetric=True),
        Bottleneck(128, dilation=4),
        Bottleneck(128),
        Bottleneck(128, dilation=8),
        Bottleneck(128, asymmetric=True),
        Bottleneck(128, dilation=16),
    ]


class ENet(Network):
    """ENet (Paszke et al., 2016). Logits at stride 1: the last doubling is a learned transposed convolution, so the
    native grid is the pixels.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(Grid(stride=1), num_classes)
        self.initial = InitialBlock()
        self.down1 = Downsampling(16, 64, dropout=0.01)
        self.stage1 = nn.Sequential(*(Bottleneck(64, dropout=0.01) for _ in range(4)))
        self.down2 = Downsampling(64, 128, dropout=0.1)
        self.stage2 = nn.Sequential(*_context(), *_context())
        self.up4 = Upsampling(128, 64)
        self.stage4 = nn.Sequential(*(Bottleneck(64, activation=relu) for _ in range(2)))
        self.up5 = Upsampling(64, 16)
        self.stage5 = Bottleneck(16, activation=relu)
        self.classifier = nn.ConvTranspose2d(16, num_classes, 2, 2)
        initialise(self)

    def forward(self, images_N3HW: Tensor) -> Tensor:
        half = self.initial(images_N3HW)
        quarter, positions_half = self.down1(half)
        quarter = self.stage1(quarter)
        eighth, positions_quarter = self.down2(quarter)
        eighth = self.stage2(eighth)
        features = self.stage4(self.up4(eighth, positions_quarter, quarter.shape[-2:]))
        features = self.stage5(self.up5(features, positions_half, half.shape[-2:]))
        # A 2x2 kernel of stride 2 doubles exactly; an odd side loses the row that lies outside the image.
        logits: Tensor = self.classifier(features)
        return logits[..., : images_N3HW.shape[-2], : images_N3HW.shape[-1]]
