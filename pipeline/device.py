"""The device that a network runs on."""

from __future__ import annotations

import torch

from segkd.storage.errors import ConfigError


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises ConfigError for one that is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f'device is {name!r}; it must be "auto", "cpu", "cuda" or such as "cuda:1"') from None
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count() if accelerator and accelerator.type == device.type else 0
    if (device.index or 0) >= count:
        raise ConfigError(
            f'device is {name!r}, but torch sees {count} devices of that type; use "auto" or "cpu", '
            "or install a torch built for it"
        )
    return device
