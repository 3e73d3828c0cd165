"""Progress: lines that are few and say enough, a bar on a terminal, nothing when silent."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from segkd.pipeline.progress import LINES, SECONDS, SILENT, Progress, progress_for


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(caplog: pytest.LogCaptureFixture, *, total: int, seconds: float, done: int = 0) -> list[str]:
    """What a task writes whose units take ``seconds`` each."""
    clock = Clock()
    with caplog.at_level(logging.INFO, "segkd"), Progress("lines", clock).task("caching", total, done=done) as task:
        for count in range(done, total):
            clock.now += seconds
            task.advance(ratio=f"{count}x")
    return [record.getMessage() for record in caplog.records]


def test_a_slow_task_writes_few_lines_and_the_last_says_all(caplog: pytest.LogCaptureFixture) -> None:
    lines = lines_of(caplog, total=1000, seconds=1.0)
    assert len(lines) <= LINES + 1
    assert lines[0] == "caching: 50/1000 images, 1 images/s, 15:50 left, ratio 49x"
    assert lines[-1] == "caching: 1000/1000 images, 1 images/s, ratio 999x"


def test_a_quick_task_writes_one_line(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_of(caplog, total=100, seconds=SECONDS / 200) == ["caching: 100/100 images, 40 images/s, ratio 99x"]


def test_the_rate_is_that_of_this_run(caplog: pytest.LogCaptureFixture) -> None:
    lines = lines_of(caplog, total=100, seconds=10.0, done=90)
    assert lines[0] == "caching: 95/100 images, 0.1 images/s, 00:50 left, ratio 94x"


def test_an_empty_task_ends_without_a_rate(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_of(caplog, total=0, seconds=1.0) == ["caching: 0/0 images"]


def test_a_failing_task_does_not_claim_its_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "segkd"), pytest.raises(RuntimeError), Progress("lines").task("x", 3):
        raise RuntimeError
    assert caplog.records == []


def test_silence(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.DEBUG, "segkd"), SILENT.task("x", 1) as task:
        task.advance(note="y")
    assert (capsys.readouterr(), caplog.records) == (("", ""), [])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_unless_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert progress_for(quiet=True) == SILENT
    with progress_for(quiet=False).task("caching", 2, unit="step") as task:
        task.advance(2, ratio="35x")
    assert "caching: 100%" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
    assert "ratio=35x" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert progress_for(quiet=False).mode == "lines"
