"""Caching runs that something befalls: a kill, a second worker, a full disk, a read-only folder, a jumping clock.

Every run is a process of its own that does what ``segkd teacher-cache`` does. It is forked from a server that has
imported everything, so that what befalls it at a random moment befalls its work and not the imports.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
from PIL import Image

from segkd.storage.audit import verify

TEACHER = '''"""Logits are the channels, averaged over the cells of a grid of stride 4."""

import torch
from torch import nn


class Teacher(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 4.0 * nn.functional.avg_pool2d(images, 4, ceil_mode=True)
'''

RUN = """
[data]
reader = "folder"
root = "{root}"
classes = ["red", "green", "blue"]
folders = {{ train = ["a"], auxiliary = ["b"] }}

[teacher]
reference = "{root}/teacher.py:Teacher"
stride = 4

[cache]
roles = ["train", "auxiliary"]
max_kl = 1e-2
tile = 8
unit_samples = 2
batch = 2
device = "cpu"
"""


@dataclass
class Finding:
    """What one kind of fault did: how often it was tried, and everything that was not as it must be."""

    fault: str
    how: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def note(self, what: str, count: int = 1) -> None:
        """Counts an outcome that is in order."""
        self.notes[what] = self.notes.get(what, 0) + count

    def require(self, condition: bool, complaint: str) -> None:
        """Keeps the complaint unless the condition holds."""
        if not condition:
            self.failures.append(complaint)


class Place:
    """A folder with a data set of ``images`` pictures of two roles, a teacher, and the run file that caches it."""

    def __init__(self, root: Path, images: int = 12) -> None:
        self.root = root
        rng = np.random.default_rng(0)
        for number in range(images):
            # Sizes differ, so that samples differ in their tiles and units in their samples.
            size = (32 + 4 * (number % 3), 40 + 12 * (number % 2))
            coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
            for kind, picture in (
                ("images", coarse.resize(size[::-1], Image.Resampling.BICUBIC)),
                ("labels", Image.new("L", size[::-1])),
            ):
                path = root / kind / "ab"[2 * number // images] / f"{number:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
        (root / "teacher.py").write_text(TEACHER)
        self.run_file = root / "run.toml"
        self.run_file.write_text(RUN.format(root=root))

    def start(self, cache: Path, *, clock: int | None = None) -> Run:
        """Begins a caching run into ``cache``; with ``clock``, the seed of jumps, under a clock that jumps."""
        arguments = ["teacher-cache", "-q", "-c", str(self.run_file), "--set", f"cache.path={json.dumps(str(cache))}"]
        return Run(arguments, self.root / "output.txt", clock)

    @cached_property
    def whole(self) -> dict[str, bytes]:
        """The files of the cache that an undisturbed run writes."""
        status, output = self.start(self.root / "whole.zarr").end()
        if status != 0:
            raise SystemExit(f"the undisturbed run failed: {output}")
        return files_of(self.root / "whole.zarr")

    @cached_property
    def seconds(self) -> float:
        """How long an undisturbed run takes: the least of three, because other work only makes it longer."""
        assert self.whole
        times = []
        for number in range(3):
            began = time.monotonic()
            self.start(self.root / f"timed-{number}.zarr").end()
            times.append(time.monotonic() - began)
        return min(times)

    def finish(self, cache: Path, finding: Finding, when: str) -> None:
        """Lets an undisturbed run end what was begun and compares the cache with the whole one byte by byte."""
        status, output = self.start(cache).end()
        finding.require(status == 0, f"{when}: the next run ended with {status}: {output}")
        finding.failures += [f"{when}: {name}" for name in differing(files_of(cache), self.whole)]


class Run:
    """A caching run under way."""

    def __init__(self, arguments: Sequence[str], output: Path, clock: int | None) -> None:
        self.output = output
        self.output.unlink(missing_ok=True)
        self.process: ForkServerProcess = _server().Process(target=_segkd, args=(list(arguments), str(output), clock))
        self.process.start()

    def kill_after(self, seconds: float) -> bool:
        """Kills the process that long after now; False when it had ended by itself before."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def end(self) -> tuple[int | None, str]:
        """Waits for the end: exit status, and what was printed."""
        self.process.join(120)
        printed = self.output.read_text(errors="replace") if self.output.exists() else ""
        return self.process.exitcode, printed.strip()


def _server() -> multiprocessing.context.ForkServerContext:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["segkd.cli.main", "segkd.pipeline.teacher.cache", Path(__file__).stem])
    return context


def _segkd(arguments: list[str], output: str, clock: int | None) -> None:
    """The command, in the process that it was started for."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
    if clock is not None:
        _let_the_clock_jump(clock)
    from segkd.cli.main import main

    main.main(arguments, prog_name="segkd")


def _let_the_clock_jump(seed: int) -> None:
    """Every look at the time of day finds it up to ten years off, now early, now late."""
    jumps, honest = random.Random(seed), time.time_ns

    def jumping() -> int:
        return honest() + jumps.randint(-10, 10) * 365 * 86_400 * 10**9

    time.time_ns = jumping
    time.time = lambda: jumping() / 1e9


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """What differs between two folders' files, by name."""
    lines = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    lines += [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
    return lines + [f"{name} differs" for name in sorted(found.keys() & expected) if found[name] != expected[name]]


def kills(place: Place, count: int, rng: random.Random) -> Finding:
    """SIGKILL at moments drawn evenly over an undisturbed run's time; the next run goes on with what is there.

    A run that ends before its moment ends a round: its cache is compared, and the next round begins with none.
    """
    finding = Finding("SIGKILL", "at a random moment; the finished cache against an undisturbed one, byte for byte")
    assert place.whole
    rounds = 0
    while finding.tried < count:
        cache = place.root / f"killed-{rounds}.zarr"
        if place.start(cache).kill_after(rng.uniform(0, place.seconds)):
            finding.tried += 1
            finding.note(_stage(cache))
            _expect_whole(finding, cache, f"after kill {finding.tried}")
            if finding.tried < count:
                continue
        place.finish(cache, finding, f"after kill {finding.tried}")
        rounds += 1
    finding.note("caches finished and compared", rounds)
    return finding


def _expect_whole(finding: Finding, cache: Path, when: str) -> None:
    """What is committed is whole at any moment, and nothing half-written counts."""
    if (cache / "zarr.json").exists():
        finding.failures += [f"{when}: {damage}" for damage in verify(cache, workers=1).damage]


def _stage(cache: Path) -> str:
    """Where a killed run was, from what it has left."""
    if not (cache / "zarr.json").exists():
        return "killed before there was a cache"
    if any(path.name != "attempts" for path in cache.rglob("attempts/*")):
        return "killed while it published a unit"
    return "killed between two units" if any(cache.rglob("commits/0*.json")) else "killed before the first unit"


def two_workers(place: Place, rounds: int) -> Finding:
    """Two processes begin the same cache at once, so that they contend for every unit of it."""
    finding = Finding("two workers", "the same units at once; both end with 0, byte for byte")
    for number in range(rounds):
        cache = place.root / f"shared-{number}.zarr"
        workers = [place.start(cache), place.start(cache)]
        for worker in workers:
            status, output = worker.end()
            finding.require(status == 0, f"round {number}: a worker ended with {status}: {output}")
        place.finish(cache, finding, f"round {number}")
        finding.tried += 1
    return finding


def jumping_clock(place: Place, rounds: int, rng: random.Random) -> Finding:
    """Runs under a clock that jumps by years, killed half way; then every file's times are set to random ones."""
    finding = Finding(
        "clock", "time.time jumps by up to ten years at every look, files' times are random; killed, then ended"
    )
    for number in range(rounds):
        cache = place.root / f"clock-{number}.zarr"
        place.start(cache, clock=rng.getrandbits(32)).kill_after(rng.uniform(0, place.seconds))
        for path in [*cache.rglob("*"), *place.root.glob("images/*/*")]:
            os.utime(path, (rng.randint(0, 2**32), rng.randint(0, 2**32)))
        status, output = place.start(cache, clock=rng.getrandbits(32)).end()
        finding.require(status == 0, f"round {number}: the run ended with {status}: {output}")
        place.finish(cache, finding, f"round {number}")
        finding.tried += 1
    return finding


def may_mount() -> bool:
    """Whether a small tmpfs can be mounted here: it takes Linux and the right to."""
    return sys.platform == "linux" and os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"]).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[..., bool]]:
    """A tmpfs of ``size`` bytes at ``folder``; yields a function that mounts it again with other options."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def remount(options: str) -> bool:
        command = ["mount", "-o", f"remount,{options}", str(folder)]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0

    try:
        yield remount
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(place: Place, levels: Sequence[float]) -> Finding:
    """A tmpfs with room for a part of the cache, which then grows."""
    finding = Finding("full disk", "a tmpfs with room for a part of the cache; then it grows")
    page = os.sysconf("SC_PAGE_SIZE")
    needed = sum(-(-len(content) // page) * page for content in place.whole.values())
    for level in levels:
        with small_disk(place.root / "disk", max(int(level * needed) // page, 1) * page) as remount:
            cache = place.root / "disk" / "cache.zarr"
            status, output = place.start(cache).end()
            _expect_refusal(finding, status, output, "the disk is full; free some space", f"at {level:.0%}")
            _expect_whole(finding, cache, f"at {level:.0%}")
            remount(f"size={64 * needed}")
            place.finish(cache, finding, f"at {level:.0%}")
        finding.tried += 1
    return finding


def read_only(place: Place, rounds: int, rng: random.Random) -> Finding:
    """A tmpfs that is mounted read-only again under the run, as soon after a random moment as no file is open."""
    finding = Finding("read-only folder", "its tmpfs is remounted read-only mid-run; then writable again")
    for number in range(rounds):
        with small_disk(place.root / "disk", 1 << 26) as remount:
            cache = place.root / "disk" / "cache.zarr"
            run = place.start(cache)
            run.process.join(rng.uniform(0, place.seconds))
            while run.process.is_alive() and not remount("ro"):
                pass
            status, output = run.end()
            _expect_refusal(finding, status, output, "the file system is read-only", f"round {number}")
            _expect_whole(finding, cache, f"round {number}")
            remount("rw")
            place.finish(cache, finding, f"round {number}")
        finding.tried += 1
    return finding


def _expect_refusal(finding: Finding, status: int | None, output: str, message: str, when: str) -> None:
    """A run that could not write must have said so; one that had nothing left to write may have ended well."""
    if status == 0:
        finding.note("ended before it was refused anything")
        return
    finding.note("stopped with one clear message")
    clear = status == 1 and message in output and "Traceback" not in output
    finding.require(clear, f"{when}: ended with {status}: {output}")
