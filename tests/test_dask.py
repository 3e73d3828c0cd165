"""Stage 1 on real Dask clusters of this machine: local ones, and a scheduler and its worker as processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from segkd.cli.main import main
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.teacher import dask_run
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.division import Share
from segkd.storage.errors import CacheError, ConfigError, NonFiniteError

UNITS = 6


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def in_units_of_one(run: Path, cache: str = "cache.zarr") -> RunConfig:
    path = json.dumps(str(run.parent / cache))
    return load(run, ["cache.unit_samples=1", "cache.tile=8", 'cache.device="cpu"', f"cache.path={path}"])


def log_of(run: RunConfig) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(f"{run.cache.path}.log").read_text().splitlines()]


def slow_down(run: Path, seconds: float) -> None:
    """The teacher waits a moment at each batch, and notes which process it is."""
    teacher = run.parent / "teacher.py"
    source = teacher.read_text().replace(
        "        return self.gain",
        f"        with open({str(run.parent / 'processes')!r}, 'a') as file:\n"
        "            file.write(f'{os.getpid()}\\n')\n"
        f"        time.sleep({seconds})\n        return self.gain",
    )
    teacher.write_text(source.replace("import torch\n", "import os\nimport time\n\nimport torch\n", 1))


def processes(run: Path) -> list[int]:
    path = run.parent / "processes"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def whole(run: Path) -> dict[str, bytes]:
    """The files of an undisturbed cache, written without Dask."""
    described = in_units_of_one(run, "whole.zarr")
    teacher_cache(described)
    return files_of(Path(described.cache.path))


def test_a_worker_that_is_killed_costs_its_unit_only(run: Path) -> None:
    slow_down(run, 0.4)
    undisturbed = in_units_of_one(run, "whole.zarr")
    teacher_cache(undisturbed)
    (run.parent / "processes").unlink()
    described = in_units_of_one(run)
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            for process in {*processes(run)} - {os.getpid()}:
                # A worker at its second image has the first one in the cache.
                if processes(run).count(process) >= 2:
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
                    break
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    summary = teacher_cache(described, dask="local:2")
    killer.join(timeout=10)
    assert len(killed) == 1
    # A unit that the killed worker had committed, but not yet answered for, counts as another worker's.
    assert (summary.sealed, summary.written) in {(True, UNITS), (True, UNITS - 1)}
    assert files_of(Path(described.cache.path)) == files_of(Path(undisturbed.cache.path))
    log = log_of(described)
    assert sorted(int(str(line["unit"])) for line in log) == list(range(UNITS))
    # What it had committed is not computed again. Whether it had answered for it, and whether the one that takes its
    # place comes in time to do anything, is a matter of luck; another worker has done the rest.
    assert len(processes(run)) in {UNITS, UNITS + 1}
    assert {*processes(run)} > {*killed}
    assert os.getpid() not in {*processes(run), *(line["process"] for line in log)}


@contextmanager
def cluster(folder: Path, *, workers: int) -> Iterator[str]:
    """A scheduler and its workers as processes of their own; the scheduler's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    options = ["--no-dashboard"]
    started = [subprocess.Popen([*dask, "--host", "127.0.0.1", "--port", str(port), *options], cwd=folder, **QUIET)]
    for _ in range(workers):
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny"]
        started.append(subprocess.Popen([*worker, *options], cwd=folder, **QUIET))
    try:
        yield address
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}}


def test_any_scheduler_will_do(run: Path, whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The worker starts elsewhere, and serves two runs one after the other, each with a task's part."""
    described = in_units_of_one(run)
    with cluster(tmp_path_factory.mktemp("elsewhere"), workers=1) as address:
        first = teacher_cache(described, dask=address, share=Share(number=0, tasks=2, origin="a test"))
        assert (first.written, first.pending_units, first.sealed) == (3, 3, False)
        command = ["teacher-cache", "-c", str(run), "--dask", address, "-q", "--json"]
        for setting in ("unit_samples=1", "tile=8", 'device="cpu"'):
            command += ["--set", f"cache.{setting}"]
        done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["written"] == 3
    assert files_of(Path(described.cache.path)) == whole


def test_without_scheduler_or_worker_there_is_a_clear_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = in_units_of_one(run)
    with pytest.raises(ConfigError, match=r"^--dask 'two': expected local:N, or a scheduler's address such as tcp://"):
        teacher_cache(described, dask="two")
    monkeypatch.setattr(dask_run, "CONNECTING", 1.0)
    message = (
        r"^no Dask scheduler answers at tcp://127\.0\.0\.1:9 \(.*\); start one with `dask scheduler`, or use --dask"
    )
    with pytest.raises(CacheError, match=message):
        teacher_cache(described, dask="tcp://127.0.0.1:9")
    monkeypatch.setattr(dask_run, "PATIENCE", 0.5)
    with cluster(run.parent, workers=0) as address:
        message = (
            f"no Dask worker at {address} for 0 s; start some with `dask worker {address}`: the same command goes on"
        )
        monkeypatch.setattr(dask_run, "CONNECTING", 20.0)
        with pytest.raises(CacheError, match=f"^{re.escape(message)}$"):
            teacher_cache(described, dask=address)


def test_what_a_worker_raises_arrives(run: Path) -> None:
    """The driver's teacher is asked about its grid with other pixels than those of the images."""
    teacher = run.parent / "teacher.py"
    teacher.write_text(
        teacher.read_text().replace(
            "return self.gain *", "return (self.gain if images.std() < 0.1 else float('nan')) *"
        )
    )
    with pytest.raises(NonFiniteError):
        teacher_cache(in_units_of_one(run), dask="local:1")


def test_a_help_page_does_not_wait_for_dask() -> None:
    code = (
        "import sys; from segkd.cli.main import main; import segkd.cli.teacher_cache; assert 'dask' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", f"{code} and 'distributed' not in sys.modules"], check=True)
