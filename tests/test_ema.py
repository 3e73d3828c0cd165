"""The averaged network against a recurrence written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segkd.pipeline.student.ema import Ema, ema_decay


def test_decay_warms_up() -> None:
    assert [ema_decay(step, 0.5) for step in (0, 1, 8, 100)] == pytest.approx([0.1, 2 / 11, 0.5, 0.5])


def test_average_of_weights_and_buffers() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    ema = Ema(network, 0.9)
    expected = {name: value.double().clone() for name, value in network.state_dict().items()}
    for step in range(12):
        network(torch.randn(4, 1, 3, 3))  # Moves batch norm's running statistics.
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    averaged = ema.network.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(averaged[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    assert averaged["1.num_batches_tracked"].item() == 12


def test_average_is_for_use_only() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout()).train()
    ema = Ema(network, 0.9)
    assert not any(module.training for module in ema.network.modules())
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_tied_weights_are_averaged_once() -> None:
    network = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    network[1].weight = network[0].weight
    ema = Ema(network, 0.9)
    start = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight.add_(1.0)
    ema.update(0)
    torch.testing.assert_close(ema.network[0].weight, start + 0.9)
    assert ema.network[0].weight is ema.network[1].weight
