"""Freed memory is kept: counted in page faults, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from segkd.pipeline import memory

COUNT = """
import resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    b"x" * (48 << 20)
before = faults()
for _ in range(20):
    b"x" * (48 << 20)
print(faults() - before)
"""
"""Fills 20 blocks after each other, each freed before the next, of a size that glibc always asks the system for."""
KEEP = "from segkd.pipeline.memory import keep_freed_memory\nkeep_freed_memory()\n"
IN_A_CHILD = KEEP + f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {COUNT!r}], check=True)"

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="it is glibc that gives freed memory back at once"
)


def faults_of(program: str, **environment: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.fixture(scope="module")
def given_back() -> int:
    """Faults where nothing is done about them."""
    return faults_of(COUNT)


def test_a_block_that_was_freed_serves_again(given_back: int) -> None:
    assert faults_of(KEEP + COUNT) < given_back / 10


def test_processes_that_are_started_keep_theirs_too(given_back: int) -> None:
    assert faults_of(IN_A_CHILD) < given_back / 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_MAX_", "65536"),
        ("MALLOC_MMAP_THRESHOLD_", "1000000"),
        ("MALLOC_TRIM_THRESHOLD_", "1000000"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1000000"),
    ],
)
def test_what_the_environment_says_stays(given_back: int, name: str, value: str) -> None:
    assert faults_of(KEEP + COUNT, **{name: value}) > given_back / 2


@pytest.mark.parametrize(("platform", "library"), [("linux", object()), ("darwin", None)])
def test_other_systems_and_c_libraries_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, platform: str, library: object
) -> None:
    """A C library without mallopt, as musl is; on another system none is even looked for."""
    for name in memory._FOR_CHILDREN:  # which an earlier command in this process may have set
        monkeypatch.delenv(name, raising=False)

    def load(_: object) -> object:
        assert library is not None, "the C library of another system was opened"
        return library

    monkeypatch.setattr(memory.ctypes, "CDLL", load)
    monkeypatch.setattr(memory.sys, "platform", platform)
    before = dict(os.environ)
    memory.keep_freed_memory()
    assert dict(os.environ) == before


def test_the_command_line_keeps_it(given_back: int) -> None:
    imports = "from click.testing import CliRunner\nfrom segkd.cli.main import main\n"
    run = imports + "CliRunner().invoke(main, ['data', '-h'])\n"
    assert faults_of(run + COUNT) < given_back / 10
