"""What moves the weights: parameter groups, the optimiser and its learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn

from segkd.pipeline.student.config import TrainConfig
from segkd.storage.errors import ConfigError

BACKBONE = "backbone"


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step ``step`` (from 0), of which there are ``config.steps``.

    A linear warm-up, whose last step has the full rate, then ``(1 - t) ** power`` with t from 0 to almost 1 (the poly
    schedule of DeepLab, Chen et al. 2017).
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / (config.steps - config.warmup)
    return float(config.learning_rate * (1.0 - done) ** config.power)


def parameter_groups(network: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """The network's trainable parameters by decay and rate, each group with ``rate``, its factor on the learning rate.

    Vectors and scalars (biases, normalisation) are not decayed. Raises ConfigError where ``backbone_rate`` has nothing
    to act on.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((BACKBONE in name.split("."), parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ConfigError("the network has no parameter that can be trained; give another reference in [student]")
    if config.backbone_rate != 1.0 and not any(in_backbone for in_backbone, _ in groups):
        raise ConfigError(
            f"train.backbone_rate is {config.backbone_rate}, but the network has no module called {BACKBONE!r}; "
            "set it to 1"
        )
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "rate": config.backbone_rate if in_backbone else 1.0,
        }
        for (in_backbone, decayed), parameters in groups.items()
    ]


def make_optimiser(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum, over :func:`parameter_groups`; the rate is that of step 0."""
    groups = parameter_groups(network, config)
    optimiser: torch.optim.Optimizer
    if config.optimiser == "adamw":
        optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.momentum, 0.999))
    else:
        optimiser = torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0
        )
    set_learning_rate(optimiser, 0, config)
    return optimiser


def set_learning_rate(optimiser: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
    """Sets every group to its rate of step ``step`` and returns the rate before the groups' factors."""
    rate = learning_rate(step, config)
    for group in optimiser.param_groups:
        group["lr"] = rate * group["rate"]
    return rate
