"""What surrounds a training run: torch's settings and the wish to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from segkd.pipeline import processes
from segkd.pipeline.student.config import TrainConfig


@contextmanager
def torch_settings(config: TrainConfig) -> Iterator[None]:
    """Threads and determinism as the configuration says, and as before afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads this when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def leave_signals_to_parent(apart: bool, _worker: int) -> None:
    """For processes that a run starts: a terminal or a scheduler signals them too, and they must outlive the step.

    A second SIGTERM ends them, as the parent may have to. ``apart``: they leave the parent's process group, which
    torchrun signals beside what the scheduler does.
    """
    if apart:
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request that is looked at between steps; a second one acts as usual.

    One of several processes leaves all that follow aside, too: torchrun sends one as well as the terminal, waits, and
    kills those that stay. Signals are caught inside ``with`` only, and only in the main thread, as Python demands.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._patient = processes.count() > 1
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            caught = (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._catch) for number in caught}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what Python calls handlers with
        self.signal = signal.Signals(number)
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned
        self._before = {}
