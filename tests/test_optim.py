"""The training configuration, the learning-rate schedule and what is decayed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from segkd.pipeline.student.config import TrainConfig
from segkd.pipeline.student.optim import learning_rate, make_optimiser, parameter_groups, set_learning_rate
from segkd.storage.errors import ConfigError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.classifier = nn.Conv2d(4, 2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0, "warmup": 0}, "train.steps is 0; it must be at least 1"),
        ({"labelled": -1}, "train.labelled is -1; it must be at least 0"),
        ({"seed": 2**64}, "train.seed is 18446744073709551616; it must be less than 2^64"),
        (
            {"labelled": 0},
            "train.labelled and train.auxiliary are both 0; a batch needs samples: raise one of them",
        ),
        ({"learning_rate": 0.0}, "train.learning_rate is 0.0; it must be more than 0"),
        ({"learning_rate": math.nan}, "train.learning_rate is nan; it must be more than 0"),
        ({"weight_decay": -1.0}, "train.weight_decay is -1.0; it must be 0 or more"),
        ({"ema": 1.0}, "train.ema is 1.0; it must be at least 0 and less than 1"),
        ({"momentum": 1.0}, "train.momentum is 1.0; it must be at least 0 and less than 1"),
        ({"clip": math.inf}, "train.clip is inf; it must be 0 or more"),
        (
            {"steps": 10, "warmup": 10},
            "train.warmup is 10, train.steps 10; the warm-up must be shorter: set train.warmup",
        ),
        (
            {"class_weights": (1.0, -1.0)},
            "train.class_weights is (1.0, -1.0); every weight must be 0 or more, and not all of them 0",
        ),
        ({"checkpoint_every": 0}, "train.checkpoint_every is 0; it must be at least 1"),
    ],
)
def test_bad_configuration(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**changes)
    assert str(caught.value) == message


def test_schedule_against_a_table() -> None:
    config = TrainConfig(steps=6, warmup=2, learning_rate=1.0, power=2.0)
    rates = [learning_rate(step, config) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5625, 0.25, 0.0625])


@given(steps=st.integers(2, 300), share=st.floats(0, 0.99), power=st.floats(0.1, 3))
def test_schedule_rises_then_falls_and_stays_positive(steps: int, share: float, power: float) -> None:
    config = TrainConfig(steps=steps, warmup=int(share * (steps - 1)), learning_rate=0.1, power=power)
    rates = [learning_rate(step, config) for step in range(steps)]
    assert max(rates) == pytest.approx(0.1)
    assert rates[: config.warmup] == sorted(rates[: config.warmup])
    assert rates[config.warmup :] == sorted(rates[config.warmup :], reverse=True)
    assert min(rates) > 0


def test_vectors_are_not_decayed() -> None:
    network = Small()
    config = TrainConfig(weight_decay=0.1)
    decay = {
        parameter: group["weight_decay"] for group in parameter_groups(network, config) for parameter in group["params"]
    }
    assert {name: decay[parameter] for name, parameter in network.named_parameters()} == {
        "backbone.0.weight": 0.1,
        "backbone.0.bias": 0.0,
        "backbone.1.weight": 0.0,
        "backbone.1.bias": 0.0,
        "classifier.weight": 0.1,
        "classifier.bias": 0.0,
    }


def test_backbone_rate_and_schedule_reach_every_group() -> None:
    network = Small()
    config = TrainConfig(steps=10, warmup=4, learning_rate=0.4, backbone_rate=0.1)
    optimiser = make_optimiser(network, config)
    for step, rate in ((0, 0.1), (3, 0.4)):
        assert set_learning_rate(optimiser, step, config) == pytest.approx(rate)
        rates = {p: group["lr"] for group in optimiser.param_groups for p in group["params"]}
        assert rates[network.classifier.weight] == pytest.approx(rate)
        assert rates[network.backbone[0].weight] == pytest.approx(rate / 10)


def test_frozen_parameters_are_left_alone() -> None:
    network = Small()
    network.backbone.requires_grad_(False)
    held = {p for group in parameter_groups(network, TrainConfig()) for p in group["params"]}
    assert held == set(network.classifier.parameters())


def test_nothing_to_train_and_no_backbone() -> None:
    with pytest.raises(ConfigError, match="no parameter that can be trained"):
        make_optimiser(Small().requires_grad_(False), TrainConfig())
    with pytest.raises(ConfigError, match="no module called 'backbone'; set it to 1"):
        make_optimiser(nn.Conv2d(3, 2, 1), TrainConfig(backbone_rate=0.1))


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_one_step_against_the_formula(optimiser: Any) -> None:
    """The first step of AdamW is the sign of the gradient, that of Nesterov SGD the gradient times 1 + momentum."""
    network = nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 2.0)
    config = TrainConfig(optimiser=optimiser, learning_rate=0.1, warmup=0, weight_decay=0.5, momentum=0.9)
    update = make_optimiser(network, config)
    (3 * network(torch.ones(1, 1))).backward()
    update.step()
    expected = 2.0 * (1 - 0.1 * 0.5) - 0.1 if optimiser == "adamw" else 2.0 - 0.1 * 1.9 * (3 + 0.5 * 2.0)
    assert network.weight.item() == pytest.approx(expected, abs=1e-6)
