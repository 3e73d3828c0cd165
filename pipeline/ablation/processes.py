"""Runs side by side, a process each: one that fails does not stop the others, one signal stops them all cleanly."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

from segkd.pipeline.ablation.worker import STOPPED, Job, perform_in_process
from segkd.pipeline.progress import Progress
from segkd.pipeline.student.runtime import StopRequest

logger = logging.getLogger("segkd")

TURN = 0.5
"""Seconds between looks at whether a signal came."""


def run_jobs(jobs: Sequence[Job], *, processes: int, progress: Progress, done: int) -> dict[Job, str]:
    """Does the jobs, ``processes`` at a time, and returns why those that failed did.

    ``done``: runs that were done before. Raises KeyboardInterrupt after SIGINT or SIGTERM, once every run under way has
    saved what it has.
    """
    # Not fork: torch's threads and a GPU's context do not survive it.
    context = multiprocessing.get_context("spawn")
    waiting, failures = list(reversed(jobs)), dict[Job, str]()
    running: dict[BaseProcess, Job] = {}
    finished = 0
    with StopRequest() as stop, progress.task("ablate", done + len(jobs), unit="run", done=done) as task:
        while running or (waiting and stop.signal is None):
            while waiting and len(running) < processes and stop.signal is None:
                job = waiting.pop()
                process: BaseProcess = context.Process(
                    target=perform_in_process, args=(job, logger.getEffectiveLevel())
                )
                _start(process)
                running[process] = job
                logger.info("%s: begun; its log is %s", job, job.log)
            multiprocessing.connection.wait([process.sentinel for process in running], TURN)
            for process in [process for process in running if not process.is_alive()]:
                job = running.pop(process)
                process.join()
                if process.exitcode == 0:
                    finished += 1
                elif stop.signal is None:
                    failures[job] = _why(job, process.exitcode)
                    logger.warning("%s failed: %s", job, failures[job])
                if process.exitcode == 0 or stop.signal is None:
                    task.advance()
            if stop.signal is not None:
                _stop(list(running))
                running.clear()
    if stop.signal is not None:
        raise KeyboardInterrupt(
            f"{done + finished} of {done + len(jobs)} runs are done, those under way are saved; "
            "the same command goes on with them."
        )
    return failures


def _start(process: BaseProcess) -> None:
    """Holds a terminal's Ctrl-C, which is for the sweep, back from the new process until that has left the terminal."""
    resource_tracker.ensure_running()  # which start() would do, and let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(running: Sequence[BaseProcess]) -> None:
    """Asks every run to save and end, and waits until it has."""
    for process in running:
        process.terminate()
    for process in running:
        process.join()


def _why(job: Job, status: int | None) -> str:
    """The last line of a run's log."""
    lines = job.log.read_text(errors="replace").split("\n") if job.log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "it has said nothing")
    if status is not None and status < 0:
        last = f"it was killed by signal {-status}"
    elif status == STOPPED:
        last = "somebody else has stopped it"
    return f"{last.removeprefix('Error: ')} (log: {job.log})"
