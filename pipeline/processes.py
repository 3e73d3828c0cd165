"""Several processes, as torchrun starts them.

Those that train one student together, each with a share of every batch, have torch.distributed's default process group
in common. Without one there is one process, and everything here is what it is for one. Stage 1 and sweeps are divided
into tasks (:mod:`segkd.pipeline.teacher.division`) and need no group.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from segkd.pipeline.device import find_device
from segkd.storage.errors import ConfigError, ProcessError

ARRIVAL = timedelta(minutes=10)
"""In which all of them must have started."""
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


def started(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun has started beside each other, by the environment: 1 without it."""
    return int(environment.get("WORLD_SIZE") or "1") if environment.get("RANK") else 1


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, this process is one of those that torchrun has started; where it has started one or none, it is alone.

    Each takes its :func:`take_device`. Raises ConfigError also where nothing says how processes find each other, and
    ProcessError where they do not.
    """
    if started() == 1:
        yield
        return
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, as torchrun sets them, but not {' and '.join(absent)}; start with torchrun, "
            "or unset them all to train in one process"
        )
    take_device("train.device", device)
    # Torch imports it at the first step otherwise, and then holds the group in the defaults of its functions: threads
    # of it outlive the group, and now and then abort the process at its end.
    import torch.distributed.nn.functional

    with _telling():
        store, rank, among = next(rendezvous("env://", timeout=ARRIVAL))
        store.set(f"segkd/{rank}", "here")
        store.wait([f"segkd/{other}" for other in range(among)], ARRIVAL)
        torch.distributed.init_process_group(store=store, rank=rank, world_size=among, timeout=PATIENCE)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def take_device(setting: str, name: str) -> None:
    """Of several processes each takes the GPU of its number on its machine, for devices without a number.

    ``setting``: where ``name`` stands. Raises ConfigError.
    """
    if started() == 1:
        return
    local, device = int(os.environ.get("LOCAL_RANK", "0")), find_device(name)
    if device.index is not None:
        raise ConfigError(
            f'{setting} is "{name}", which several processes cannot share; set it to "auto", and each takes the GPU '
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
    given = [tensor.detach() for tensor in tensors]
    if not _together() or not given:
        return
    # As bytes: of any type, and in one message.
    parts = [tensor.contiguous().flatten().view(torch.uint8) for tensor in given]
    told = torch.cat(parts)
    with _telling():
        torch.distributed.broadcast(told, 0)
    if not leads():
        for tensor, part in zip(given, torch.split(told, [len(part) for part in parts]), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))


def everyones(value: T) -> list[T]:
    """The value that each process gives, by rank. It travels by pickle, between processes of one run."""
    if not _together():
        return [value]
    values: list[T | None] = [None] * count()
    with _telling():
        torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # each was filled in


def require_alike(state: Mapping[str, str]) -> None:
    """Raises ConfigError in every process, naming what differs, where they do not all give the same."""
    differing = sorted({name for other in everyones(dict(state)) for name in state if other[name] != state[name]})
    if any_of_them(bool(differing)):
        names = sorted({name for part in everyones(differing) for name in part})
        raise ConfigError(
            f"the processes of this run differ in {' and '.join(names)}; give all of them the same run file, and paths "
            "that lead to the same files on every machine"
        )


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
    """What torch.distributed raises, in words: mostly it is the second to fail, and another process says why."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} cannot reach the others "
            f"({str(error).splitlines()[0][:200]}); one of them that has ended has said why: put that right, and go on "
            "with --resume"
        ) from error
