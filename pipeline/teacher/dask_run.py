"""Stage 1 on Dask workers: each opens the run and the teacher once, and then writes the units that it is given.

What travels is the run's description and numbers of units; a worker answers with one small row a unit. Codes go from
the worker to the cache. So a unit may run twice, on two workers or on one that was thought lost: whoever is first
commits it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from distributed import Client, Future, KilledWorker, LocalCluster, Worker, WorkerPlugin, wait

from segkd.pipeline.config import RunConfig
from segkd.pipeline.teacher.increments import find_work
from segkd.pipeline.teacher.loop import Stage1
from segkd.pipeline.teacher.opened import open_run
from segkd.storage.errors import CacheError, ConfigError
from segkd.storage.generation import generations_of, read_spec
from segkd.storage.layout import Unit
from segkd.storage.writer import CacheWriter

CONNECTING = 10.0
"""Seconds until a scheduler has to answer."""
UNITS_PER_THREAD = 2
"""Units in flight per thread of a worker: one is worked on, the next one waits there."""
RETRIES = 2
"""How often a unit is tried again whose worker raised an error."""
PATIENCE = 60.0
"""Seconds without any worker after which a run gives up."""
LOOK = 1.0
"""Seconds between two looks at how many workers there are."""


class OnUnit(Protocol):
    """Hears of a finished unit: its bytes (None: another worker was first) and who has done it."""

    def __call__(self, unit: Unit, size: int | None, **worker: Any) -> None: ...


def write_units(where: str, run: RunConfig, generation: int, units: Sequence[Unit], on_unit: OnUnit) -> None:
    """Writes the units of a cache's generation on the workers of ``local:N`` or of a scheduler's address.

    The generation has begun. Raises ConfigError for another ``where``, CacheError where there is no scheduler or no
    worker for :data:`PATIENCE` seconds, or a unit cost several workers their lives, and whatever a worker raised.
    """
    with _connected(where) as client:
        task = _Task(run=run, generation=generation, folder=str(Path.cwd()), token=uuid.uuid4().hex)
        waiting = list(reversed(units))
        running: dict[Future[Any], Unit] = {}
        seen = time.monotonic()
        try:
            while waiting or running:
                threads = sum(client.nthreads().values()) if client.status == "running" else 0
                seen = time.monotonic() if threads else seen
                if client.status != "running" or time.monotonic() - seen > PATIENCE:
                    raise _lost(where, client.status)
                while waiting and len(running) < UNITS_PER_THREAD * threads:
                    unit = waiting.pop()
                    key = f"segkd-{task.token}-{unit.number}"
                    running[client.submit(write_unit, task, unit.number, key=key, pure=False, retries=RETRIES)] = unit
                for future in _finished(running):
                    unit = running.pop(future)
                    on_unit(unit, **_row(future, unit))
        finally:
            with contextlib.suppress(OSError, TimeoutError):
                client.cancel(list(running))


class _LeavesCtrlC(WorkerPlugin):
    """A terminal sends Ctrl-C to local workers, too; it is the run's, which ends them."""

    def setup(self, worker: Worker) -> None:  # noqa: ARG002  # Dask's signature
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _connected(where: str) -> Iterator[Client]:
    local = re.fullmatch(r"local:([1-9]\d*)", where)
    if local:
        with (
            LocalCluster(
                n_workers=int(local[1]), threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
            ) as cluster,
            Client(cluster) as client,
        ):
            client.register_plugin(_LeavesCtrlC())
            yield client
        return
    if "://" not in where:
        raise ConfigError(f"--dask {where!r}: expected local:N, or a scheduler's address such as tcp://host:8786")
    try:
        client = Client(where, timeout=CONNECTING)
    except (OSError, ValueError) as error:
        raise CacheError(
            f"no Dask scheduler answers at {where} ({error}); start one with `dask scheduler`, or use --dask local:N"
        ) from None
    with client:
        yield client


def _finished(running: dict[Future[Any], Unit]) -> list[Future[Any]]:
    """Those that are done, after a wait of at most a moment for the first one."""
    if not running:
        time.sleep(LOOK)
        return []
    with contextlib.suppress(TimeoutError):
        wait(list(running), timeout=LOOK, return_when="FIRST_COMPLETED")
    return [future for future in running if future.done()]


def _row(future: Future[Any], unit: Unit) -> dict[str, Any]:
    try:
        row: dict[str, Any] = future.result()
    except KilledWorker as error:
        raise CacheError(
            f"unit {unit.number} was on several Dask workers that died, the last one {error.last_worker.address}: "
            "is there memory enough for it? A smaller cache.batch takes less; the same command goes on"
        ) from None
    return row


def _lost(where: str, status: str) -> CacheError:
    if status != "running":
        return CacheError(f"the Dask scheduler at {where} is gone; start it again: the same command goes on")
    return CacheError(
        f"no Dask worker at {where} for {PATIENCE:.0f} s; start some with `dask worker {where}`: "
        "the same command goes on"
    )


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a worker is told."""

    run: RunConfig
    generation: int
    folder: str
    """Where the run's relative paths begin."""
    token: str
    """Of this run, so that a worker which serves several opens each once."""


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What a worker keeps between two units."""

    stage: Stage1
    writer: CacheWriter


_kept: dict[str, _Opened] = {}
_opening = threading.Lock()


def write_unit(task: _Task, number: int) -> dict[str, Any]:
    """On a worker: computes and commits a unit; a row of its bytes and of who did it."""
    began = time.monotonic()
    row: dict[str, Any] = {"size": None, "host": socket.gethostname(), "process": os.getpid()}
    with _opening:
        if task.token not in _kept:
            _kept.clear()
            opened = _open(task)
            if opened is None:
                return row
            _kept[task.token] = opened
        opened = _kept[task.token]
    stage, writer = opened.stage, opened.writer
    unit = stage.plan.units[number]
    if not writer.publisher.recover(number):

        def note(_: Unit, size: int | None) -> None:
            row["size"] = size

        stage.run(writer, [unit], note)
    did = {"device": str(stage.predictor.device), "threads": torch.get_num_threads()}
    return {**row, **did, "seconds": time.monotonic() - began}


def _open(task: _Task) -> _Opened | None:
    """The run on this worker; None when the generation was finished by others meanwhile."""
    try:
        os.chdir(task.folder)
    except OSError as error:
        raise ConfigError(
            f"{socket.gethostname()}: the folder {task.folder} cannot be entered ({error.strerror}); Dask workers "
            "need the data, the teacher and the cache at the same paths as the run"
        ) from None
    root = Path(task.run.cache.path)
    if root.exists() and generations_of(root, read_spec(root))[task.generation].sealed:
        return None
    opened = open_run(task.run)
    work = find_work(opened)
    if work is None or work.generation != task.generation:
        raise CacheError(
            f"{socket.gethostname()} sees another list of samples than the run that gave it work; "
            "Dask workers need the same data at the same paths"
        )
    return _Opened(stage=opened.stage(work.plan), writer=work.writer(opened))
