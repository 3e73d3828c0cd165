"""What the built-in networks are made of.

Shapes: images N,3,H,W; features N,C,h,w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkd.pipeline.models.network import Grid
from segkd.storage.errors import NetworkError

Activation: TypeAlias = Callable[[int], nn.Module]
"""Makes the activation for a number of channels; ``nn.PReLU`` is one."""

SINGLE_VALUE = (
    "batch norm met one value a channel (a pooled 1x1 feature and a batch of 1) while training, and one value has no "
    "variance; train with at least 2 images a batch or larger crops, or call eval() on the network"
)


def relu(_channels: int) -> nn.Module:
    """ReLU, in place."""
    return nn.ReLU(inplace=True)


def relu6(_channels: int) -> nn.Module:
    """ReLU clipped at 6: the MobileNets' activation."""
    return ReLU6()


class Network(nn.Module):
    """A network with its grid declared: images N,3,H,W -> logits N,C,h,w with h = ceil(H / stride)."""

    grid: Grid
    num_classes: int

    def __init__(self, grid: Grid, num_classes: int) -> None:
        """Raise NetworkError when there is no class to tell apart."""
        super().__init__()
        if num_classes < 1:
            raise NetworkError(f"a network needs at least 1 class, got num_classes = {num_classes}; check the classes")
        self.grid = grid
        self.num_classes = num_classes


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that says what to do when a batch holds a single value a channel."""

    def forward(self, features_NChw: Tensor) -> Tensor:
        """Raise NetworkError where PyTorch would raise a bare ValueError."""
        if self.training and features_NChw.numel() == features_NChw.shape[1]:
            raise NetworkError(SINGLE_VALUE)
        return super().forward(features_NChw)


class DilatedDepthwise(nn.Conv2d):
    """A depthwise convolution of stride 1 and dilation d that keeps a map's size, learned quickly on CPUs too.

    Cells see others at distances of d alone, so it is the undilated convolution of each of a map's d x d phases: every
    d-th column of every d-th row. oneDNN has fast gradients for undilated depthwise convolutions alone.
    """

    def forward(self, features_NChw: Tensor) -> Tensor:
        """The same values and gradients either way, but for rounding in that of the weights."""
        d, (height, width) = self.dilation[0], features_NChw.shape[2:]
        # Smaller phases are mostly padding.
        if not (self.training and features_NChw.device.type == "cpu" and min(height, width) >= 3 * d):
            return super().forward(features_NChw)
        padded_NhwC = features_NChw.permute(0, 2, 3, 1)
        if height % d or width % d:
            padded_NhwC = F.pad(padded_NhwC, (0, 0, 0, -width % d, 0, -height % d))
        count, rows, columns, channels = padded_NhwC.shape
        # Channels stay last in memory, as they are while training.
        split_NddhwC = padded_NhwC.reshape(count, rows // d, d, columns // d, d, channels).permute(0, 2, 4, 1, 3, 5)
        phases_PChw = split_NddhwC.flatten(0, 2).permute(0, 3, 1, 2)
        padding = tuple(side // 2 for side in self.kernel_size)
        filtered_PChw = F.conv2d(phases_PChw, self.weight, self.bias, 1, padding, 1, self.groups)
        filtered_NddhwC = filtered_PChw.permute(0, 2, 3, 1).reshape(split_NddhwC.shape)
        joined_NhwC = filtered_NddhwC.permute(0, 3, 1, 4, 2, 5).reshape(padded_NhwC.shape)
        return joined_NhwC[:, :height, :width].contiguous().permute(0, 3, 1, 2)


class ReLU6(nn.ReLU6):
    """In place where nothing is to be learned: autograd would first copy what it clips."""

    def forward(self, features: Tensor) -> Tensor:
        return F.relu6(features, inplace=not torch.is_grad_enabled())


class ConvBN(nn.Sequential):
    """Convolution to ceil(size / stride), batch norm, activation; keys ``0`` and ``1``, as torchvision's."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: Activation | None = relu,
    ) -> None:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (dilation * (height - 1) // 2, dilation * (width - 1) // 2)
        depthwise = groups == in_channels == out_channels
        kind = DilatedDepthwise if depthwise and dilation > 1 and stride == 1 else nn.Conv2d
        convolution = kind(in_channels, out_channels, (height, width), stride, padding, dilation, groups, bias=False)
        layers: list[nn.Module] = [convolution, BatchNorm(out_channels)]
        if activation is not None:
            layers.append(activation(out_channels))
        super().__init__(*layers)


def depthwise_separable(
    in_channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: Activation = relu,
    between: Activation | None = relu,
) -> nn.Sequential:
    """3x3 depthwise then 1x1 convolution, each with batch norm; ``between`` is the activation after the first."""
    depthwise = ConvBN(
        in_channels, in_channels, 3, stride=stride, dilation=dilation, groups=in_channels, activation=between
    )
    return nn.Sequential(depthwise, ConvBN(in_channels, out_channels, activation=activation))


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al., CVPR 2018): expand, filter depthwise, project; torchvision's key names."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        stride: int = 1,
        dilation: int = 1,
        activation: Activation = relu6,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [] if expansion == 1 else [ConvBN(in_channels, hidden, activation=activation)]
        self.conv = nn.Sequential(
            *expand,
            ConvBN(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden, activation=activation),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            BatchNorm(out_channels),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.conv(features)
        return features + projected if self.residual else projected


def dilate(strides: Iterable[int], output_stride: int) -> list[tuple[int, int]]:
    """A stack of layers' strides -> (stride, dilation) of each, so that the whole stack strides by ``output_stride``.

    A stride beyond it becomes dilation of the layers that follow; the layer itself keeps the dilation of those before,
    as torchvision does it. Raises NetworkError for an output stride other than 8, 16 or 32.
    """
    if output_stride not in (8, 16, 32):
        raise NetworkError(f"output_stride = {output_stride}; expected 8, 16 or 32")
    plan, reached, dilation = [], 1, 1
    for stride in strides:
        if reached < output_stride:
            plan.append((stride, dilation))
            reached *= stride
        else:
            plan.append((1, dilation))
            dilation *= stride
    return plan


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Every layer in eval mode meanwhile, and each in its own mode again afterwards."""
    # Frozen TorchScript has no mode.
    modes = {module: module.training for module in network.modules() if hasattr(module, "training")}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def upsample_like(features: Tensor, reference: Tensor) -> Tensor:
    """Features, bilinearly brought to the height and width of ``reference``."""
    return F.interpolate(features, size=reference.shape[-2:], mode="bilinear", align_corners=False)


def initialise(network: nn.Module) -> None:
    """Kaiming (fan out) for convolutions before a batch norm, as torchvision; N(0, 0.01) for those that make logits.

    The two are told apart by the bias, which batch norm makes needless. Small logits start a softmax near uniform.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            if module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
