"""How far a long task is: a bar on a terminal, a few log lines without one, nothing when asked to be quiet."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tqdm import tqdm

LINES = 20
"""A task without a terminal writes at most this many lines, and one at its end."""
SECONDS = 5.0
"""At least this much time lies between two of them."""

logger = logging.getLogger("segkd")


class Task(Protocol):
    """A task under way."""

    def advance(self, count: int = 1, **notes: str) -> None:
        """``count`` more are done; ``notes`` (such as ``ratio="35x"``) stand behind the rate until replaced."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where tasks report to. The default, :data:`SILENT`, is what a library call without a wish gets."""

    mode: Literal["bar", "lines", "silent"] = "silent"
    clock: Callable[[], float] = time.monotonic

    @contextmanager
    def task(self, title: str, total: int, *, unit: str = "image", done: int = 0) -> Iterator[Task]:
        """Reports on ``total`` units of work, of which ``done`` were finished before."""
        if self.mode == "bar":
            with tqdm(
                total=total, desc=title, unit=f" {unit}s", initial=done, file=sys.stderr, dynamic_ncols=True, leave=None
            ) as bar:
                yield _Bar(bar)
        elif self.mode == "lines":
            lines = _Lines(title, total, unit, done, self.clock)
            yield lines
            lines.close()
        else:
            yield _Nothing()


SILENT = Progress()


def progress_for(*, quiet: bool) -> Progress:
    """What suits standard error: a terminal gets bars."""
    if quiet:
        return SILENT
    return Progress("bar" if sys.stderr.isatty() else "lines")


class _Nothing:
    def advance(self, count: int = 1, **notes: str) -> None:
        pass


class _Bar:
    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def advance(self, count: int = 1, **notes: str) -> None:
        if notes:
            self._bar.set_postfix(notes, refresh=False)
        self._bar.update(count)


class _Lines:
    def __init__(self, title: str, total: int, unit: str, done: int, clock: Callable[[], float]) -> None:
        self._title, self._total, self._unit, self._clock = title, total, unit, clock
        self._first = self._done = self._written = done
        self._began = self._last = clock()
        self._notes: dict[str, str] = {}

    def advance(self, count: int = 1, **notes: str) -> None:
        self._done += count
        self._notes.update(notes)
        due = self._done - self._written >= self._total / LINES
        if due and self._clock() - self._last >= SECONDS and self._done < self._total:
            self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        self._last, self._written = self._clock(), self._done
        elapsed = self._last - self._began
        rate = (self._done - self._first) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self._done}/{self._total} {self._unit}s"]
        if rate:
            parts.append(f"{rate:.3g} {self._unit}s/s")
        if rate and self._done < self._total:
            parts.append(f"{tqdm.format_interval((self._total - self._done) / rate)} left")
        parts += [f"{name} {value}" for name, value in self._notes.items()]
        logger.info("%s: %s", self._title, ", ".join(parts))
