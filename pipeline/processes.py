"""The processes that train one student together, as torchrun starts them: each a share of every batch, one network.

What they share is torch.distributed's default process group. Without one there is one process, and everything here is
what it is for one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from segkd.pipeline.device import find_device
from segkd.storage.errors import ConfigError, ProcessError

PATIENCE = timedelta(hours=12)
"""For the slowest of them, which may read a data set for the first time; a process that dies is noticed at once."""

T = TypeVar("T")


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def count() -> int:
    """How many there are."""
    return torch.distributed.get_world_size() if _together() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return torch.distributed.get_rank() if _together() else 0


def leads() -> bool:
    """Whether this is the one that writes and tells."""
    return rank() == 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, this process is one of those that torchrun has started; where it has started one or none, it is alone.

    On ``device`` "auto" or "cuda" each takes the GPU of its number on its machine. Raises ConfigError for more
    processes than GPUs, and for a device that only one could have; ProcessError where they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    _take_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    with _telling():
        torch.distributed.init_process_group(timeout=PATIENCE)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _take_device(name: str, local: int) -> None:
    """Makes this process's GPU the one that devices without a number mean."""
    device = find_device(name)
    if device.index is not None:
        raise ConfigError(
            f'train.device is "{name}", which several processes cannot share; set it to "auto", and each takes the GPU '
            "of its number"
        )
    if device.type == "cpu":
        return
    if local >= torch.accelerator.device_count():
        raise ConfigError(
            f"process {local} of this machine finds {torch.accelerator.device_count()} devices of type {device.type}; "
            "give torchrun a --nproc-per-node of at most that"
        )
    torch.accelerator.set_device_index(local)


def total(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if _together():
        with _telling():
            torch.distributed.all_reduce(values)
    return values


def take_over(tensors: Iterable[Tensor]) -> None:
    """Gives each tensor the values that it has in the process that leads."""
    if _together():
        with _telling():
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), 0)


def everyones(value: T) -> list[T]:
    """The value that each process gives, by rank. It travels by pickle, between processes of one run."""
    if not _together():
        return [value]
    values: list[T | None] = [None] * count()
    with _telling():
        torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # each was filled in


def any_of_them(wish: bool) -> bool:
    """Whether ``wish`` is true in any process: all of them get the same answer."""
    return bool(total(torch.tensor(int(wish)))) if _together() else wish


def wait() -> None:
    """Until all of them are here."""
    total(torch.zeros(()))


@contextmanager
def one_a_machine_first() -> Iterator[None]:
    """Inside, the first process of each machine goes before the others, which then find what it has left on disk."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        wait()
    yield
    if first:
        wait()


@contextmanager
def _telling() -> Iterator[None]:
    """What torch.distributed raises, in words: it is the second to fail, and another process says why."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} cannot reach the others, one of which "
            f"may have ended and said why ({str(error).splitlines()[0][:200]}); put that right, and go on with --resume"
        ) from error
