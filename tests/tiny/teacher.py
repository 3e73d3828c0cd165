"""A teacher of a user's own for tests/tiny/run.toml: the brightest of three channels, on a grid of stride 4."""

import torch
from torch import nn


class Teacher(nn.Module):
    """Logits are the channels themselves."""

    def __init__(self, failing: bool) -> None:
        super().__init__()
        self.gain = float("nan") if failing else 4.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.gain * nn.functional.avg_pool2d(images, 4, ceil_mode=True)


def build(failing: bool = False) -> Teacher:
    """``failing``: with NaN for logits."""
    return Teacher(failing)
