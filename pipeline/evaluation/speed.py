"""What a network costs: parameters, operations, time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segkd.pipeline.models.layers import evaluating
from segkd.storage.errors import ConfigError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of a forward pass, with all that it depends on."""

    p50_ms: float
    """Milliseconds a batch: the median of the runs."""
    p95_ms: float
    """Milliseconds a batch that 95 % of the runs stayed within."""
    shape: tuple[int, int]
    """Height and width of the input."""
    batch: int
    threads: int
    dtype: str
    device: str
    warmup: int
    """Passes before those that are timed."""
    runs: int
    """Passes that are timed."""


def count_parameters(network: nn.Module) -> int:
    """Learnable numbers; one that several layers share counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_flops(network: nn.Module, shape: tuple[int, int]) -> int:
    """Floating-point operations of one image of ``shape`` (height, width): 2 a multiply-accumulate.

    Convolutions and matrix products count; what costs little beside them (normalisation, activation, interpolation)
    does not, as is customary.
    """
    images = torch.zeros(1, 3, *shape, device=_device(network))
    with evaluating(network), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(images)
    return int(counter.get_total_flops())


def latency(
    network: nn.Module,
    shape: tuple[int, int],
    *,
    batch: int = 1,
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
    warmup: int = 3,
    runs: int = 20,
) -> Latency:
    """Time of a forward pass on the network's own device, from images ``batch``,3,*``shape`` to logits there.

    ``threads``: of the CPU; none keeps PyTorch's number. ``dtype``: float32, or a half precision by autocast. Mode and
    threads are as before afterwards. Raises ConfigError for counts below 1 and another dtype.
    """
    counts = {"height": shape[0], "width": shape[1], "batch": batch, "runs": runs, "threads": threads or 1}
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"latency: {name} = {count}; expected at least 1")
    if dtype not in _DTYPES:
        raise ConfigError(f"latency: dtype = {dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    device = _device(network)
    images = torch.randn(batch, 3, *shape, device=device)
    half = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    seconds = []
    with evaluating(network), _threads(threads), torch.inference_mode(), half:
        used = torch.get_num_threads()
        for _ in range(warmup + runs):
            synchronise(device)
            start = time.perf_counter()
            network(images)
            synchronise(device)
            seconds.append(time.perf_counter() - start)
    p50, p95 = np.percentile(seconds[warmup:], (50, 95)) * 1000
    return Latency(
        p50_ms=float(p50),
        p95_ms=float(p95),
        shape=shape,
        batch=batch,
        threads=used,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        warmup=warmup,
        runs=runs,
    )


def _device(network: nn.Module) -> torch.device:
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all that it was given: a clock is of no use before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
