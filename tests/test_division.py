"""Work division: which task owns which units, and several tasks that make one cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from segkd.cli.main import main
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.division import Share, find_share
from segkd.storage.errors import ConfigError


def slurm(number: int, first: int, last: int, step: int = 1, count: int | None = None) -> dict[str, str]:
    numbers = range(first, last + 1, step)
    values = {"ID": number, "MIN": first, "MAX": last, "STEP": step, "COUNT": len(numbers) if count is None else count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@given(st.integers(1, 40), st.integers(0, 200))
def test_every_unit_has_exactly_one_owner(tasks: int, units: int) -> None:
    shares = [Share(number=number, tasks=tasks, origin="") for number in range(tasks)]
    owners = [[share.number for share in shares if share.owns(unit)] for unit in range(units)]
    assert all(len(owner) == 1 for owner in owners)
    loads = [sum(share.owns(unit) for unit in range(units)) for share in shares]
    assert max(loads) - min(loads) <= 1


@given(st.integers(0, 50), st.integers(1, 30), st.integers(1, 7))
def test_a_slurm_array_is_numbered_from_zero_whatever_its_range(first: int, tasks: int, step: int) -> None:
    last = first + (tasks - 1) * step
    found = [find_share(None, slurm(number, first, last, step)) for number in range(first, last + 1, step)]
    assert [(share.number, share.tasks) for share in found if share] == [(number, tasks) for number in range(tasks)]


def test_what_says_which_task_this_is() -> None:
    assert find_share(None, {}) is None
    assert find_share("off", slurm(3, 0, 7)) is None
    assert find_share("1/4", slurm(3, 0, 7)) == Share(number=1, tasks=4, origin="--task 1/4")
    pod = {"JOB_COMPLETION_INDEX": "2", "SEGKD_TASKS": "5"}
    assert find_share(None, pod) == Share(number=2, tasks=5, origin="JOB_COMPLETION_INDEX and SEGKD_TASKS")


def test_processes_of_torchrun_have_parts_of_a_task() -> None:
    four = [{"RANK": str(rank), "WORLD_SIZE": "4"} for rank in range(4)]
    assert find_share(None, four[3]) == Share(number=3, tasks=4, origin="torchrun's RANK and WORLD_SIZE")
    assert find_share("off", four[3]) is None
    assert find_share("1/2", {"RANK": "0", "WORLD_SIZE": "1"}) == Share(number=1, tasks=2, origin="--task 1/2")
    for tasks in ([f"{number}/3" for number in range(3)], [None] * 3):
        array = [slurm(number, 5, 7) for number in (5, 6, 7)]
        found = [find_share(task, of | process) for task, of in zip(tasks, array, strict=True) for process in four]
        assert [(share.number, share.tasks) for share in found if share] == [(number, 12) for number in range(12)]


@pytest.mark.parametrize(
    ("option", "environment", "message"),
    [
        (
            None,
            {"RANK": "last", "WORLD_SIZE": "2"},
            "RANK is 'last', expected a number; give --task I/N (--task off for all units)",
        ),
        ("3", {}, "--task '3': expected I/N with I from 0 to N-1, such as 0/8, or off"),
        ("4/4", {}, "--task 4/4: there is no task 4 of 4; expected I/N with I from 0 to N-1"),
        ("0/0", {}, "--task 0/0: there is no task 0 of 0; expected I/N with I from 0 to N-1"),
        (
            None,
            slurm(7, 3, 7, count=2),
            "the Slurm array of 2 tasks from 3 to 7 has gaps, so that a task cannot tell its part; "
            "submit a whole range (finished units are not done again), or give --task I/N",
        ),
        (
            None,
            {"SLURM_ARRAY_TASK_ID": "1"},
            "SLURM_ARRAY_TASK_MIN is None, expected a number; give --task I/N (--task off for all units)",
        ),
        (
            None,
            {"JOB_COMPLETION_INDEX": "2"},
            "JOB_COMPLETION_INDEX is set, but not how many pods the job has: set SEGKD_TASKS to its completions, "
            "or give --task I/N (--task off for all units)",
        ),
    ],
)
def test_a_task_that_cannot_be_is_refused(option: str | None, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        find_share(option, environment)
    assert str(refused.value) == message


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def in_units_of_one(run: Path, cache: str = "cache.zarr") -> RunConfig:
    path = json.dumps(str(run.parent / cache))
    return load(run, ["cache.unit_samples=1", "cache.tile=8", f"cache.path={path}"])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 1, 0, 2, 0)])
def test_any_division_makes_the_same_cache(run: Path, order: tuple[int, ...]) -> None:
    whole, divided = in_units_of_one(run, "whole.zarr"), in_units_of_one(run)
    teacher_cache(whole)
    pending = []
    for number in order:
        summary = teacher_cache(divided, share=Share(number=number, tasks=3, origin="a test"))
        pending.append(summary.pending_units)
        assert summary.task == f"task {number}/3"
        assert summary.sealed == (summary.pending_units == 0)
    # Six samples, a unit each: two for each task.
    assert sorted(set(pending), reverse=True) == [4, 2, 0]
    assert files_of(Path(divided.cache.path)) == files_of(Path(whole.cache.path))


def test_tasks_at_once_and_divided_anew(run: Path) -> None:
    whole, divided = in_units_of_one(run, "whole.zarr"), in_units_of_one(run)
    teacher_cache(whole)
    teacher_cache(divided, share=Share(number=3, tasks=4, origin="a test"))
    with ThreadPoolExecutor(3) as threads:
        # Two of them own the same units: one of the two loses each, politely.
        shares = [Share(number=number, tasks=2, origin="a test") for number in (0, 1, 1)]
        summaries = list(threads.map(lambda share: teacher_cache(divided, share=share), shares))
    assert any(summary.sealed for summary in summaries)
    assert sum(summary.written or 0 for summary in summaries) == 5
    assert files_of(Path(divided.cache.path)) == files_of(Path(whole.cache.path))


def test_a_task_of_an_array_says_what_it_did(run: Path) -> None:
    command = [sys.executable, "-m", "segkd.cli", "teacher-cache", "-c", str(run), "--set", "cache.unit_samples=1"]
    done = subprocess.run(command, env=os.environ | slurm(5, 4, 5), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "task 1/2 (Slurm's array variables): 3 of 6 pending units" in done.stderr
    assert "NOT complete; task 1/2; " in done.stdout
    assert "  3 units are pending elsewhere; whoever writes the last one finishes it\n" in done.stdout
    finished = CliRunner().invoke(main, [*command[3:], "--task", "0/2", "--json", "-q"])
    assert finished.exit_code == 0, finished.output
    summary = json.loads(finished.stdout)
    assert (summary["sealed"], summary["written"], summary["pending_units"]) == (True, 3, 0)
    assert summary["roles"] == {"auxiliary": 2, "report": 2, "train": 2}


def test_a_task_reads_no_image_of_another_task(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from segkd.pipeline.data.files import FileSource

    read: list[str] = []
    image: Callable[..., object] = FileSource.image
    monkeypatch.setattr(FileSource, "image", lambda self, sample: read.append(sample.id) or image(self, sample))
    teacher_cache(replace(in_units_of_one(run)), share=Share(number=0, tasks=3, origin="a test"))
    # The teacher's trial, where it has one, aside: the samples of its own units, each once.
    assert len(read) == len(set(read)) == 2


def test_torchrun_divides_stage_1_among_its_processes(run: Path) -> None:
    whole, divided = in_units_of_one(run, "whole.zarr"), in_units_of_one(run)
    teacher_cache(whole)
    settings = ["cache.unit_samples=1", "cache.tile=8", f"cache.path={json.dumps(divided.cache.path)}"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "segkd"]
    command = ["teacher-cache", "-c", str(run), *(word for setting in settings for word in ("--set", setting))]
    result = subprocess.run([*start, *command], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert files_of(Path(divided.cache.path)) == files_of(Path(whole.cache.path))
    assert re.findall(r"; task (\d/\d); ", result.stdout) in (["0/2", "1/2"], ["1/2", "0/2"])
    # One of the two shows how far it is.
    assert len(re.findall(r"^teacher-cache: (\d+)/\1 images", result.stderr, re.MULTILINE)) == 1
