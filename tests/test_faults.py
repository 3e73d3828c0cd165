"""What ``benchmarks/faults.py`` tries at length, tried briefly: whatever befalls a cache, nothing is lost."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, fault_runs: ModuleType) -> Any:
    """A small data set with a teacher, and what an undisturbed run of it writes."""
    return fault_runs.Place(tmp_path_factory.mktemp("faults"), images=8)


@pytest.fixture
def mounts(fault_runs: ModuleType) -> None:
    if not fault_runs.may_mount():
        pytest.skip("mounting a tmpfs is not permitted here")


def test_killed_at_random_moments(place: Any, fault_runs: ModuleType) -> None:
    finding = fault_runs.kills(place, 4, random.Random(0))
    assert (finding.tried, finding.failures) == (4, [])


def test_two_workers_at_once(place: Any, fault_runs: ModuleType) -> None:
    assert fault_runs.two_workers(place, 2).failures == []


def test_two_workers_whose_bytes_differ(made: ModuleType, tmp_path: Path) -> None:
    finding = made.two_outcomes(tmp_path, 2)
    assert finding.tried == 2 * len(made.plan_of(made.FIRST).units)
    assert finding.failures == []


def test_a_clock_that_jumps(place: Any, fault_runs: ModuleType) -> None:
    assert fault_runs.jumping_clock(place, 2, random.Random(1)).failures == []


@pytest.mark.usefixtures("mounts")
def test_a_disk_that_fills(place: Any, fault_runs: ModuleType) -> None:
    finding = fault_runs.full_disk(place, (0.1, 0.5, 0.8))
    assert finding.failures == []
    assert finding.notes == {"stopped with one clear message": 3}


@pytest.mark.usefixtures("mounts")
def test_a_folder_that_turns_read_only(place: Any, fault_runs: ModuleType) -> None:
    assert fault_runs.read_only(place, 3, random.Random(2)).failures == []


def test_changed_and_missing_bytes(made: ModuleType, tmp_path: Path) -> None:
    flips, cuts = made.damages(tmp_path, 80, 30, random.Random(3))
    assert (flips.tried, flips.failures) == (80, [])
    assert (cuts.tried, cuts.failures) == (30, [])
