"""An exponential moving average of a network: what is validated, kept and used in the end."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def ema_decay(step: int, decay: float) -> float:
    """The share that the average keeps at update ``step`` (from 0): ``(1 + t) / (10 + t)``, at most ``decay``.

    Without the warm-up the average would hold on to the initial weights for ``1 / (1 - decay)`` steps.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """``network`` is the average, in eval mode.

    Floating-point buffers (batch norm's running statistics) are averaged like parameters, so that they belong to the
    averaged weights; others are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        self._averaged = [pair for pair in pairs if pair[1].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[1].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the network as it is after optimiser step ``step`` (from 0)."""
        averages, sources = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, sources, 1.0 - ema_decay(step, self.decay))
        for average, source in self._copied:
            average.copy_(source)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Each parameter and buffer once, in an order that a copy of the network shares."""
    return [*network.parameters(), *network.buffers()]
