"""What all tests share."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the checkout itself on the path, where a top-level `storage` would be found; users have none.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

# How long an example takes is a fact about the machine, not about the code.
settings.register_profile("segkd", deadline=None)
settings.load_profile("segkd")


@pytest.fixture(scope="session", autouse=True)
def own_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of images: neither what the user has there, nor anything left to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def make_run() -> Callable[[Path], Path]:
    """Fills a folder with tests/tiny's run file, its teacher and its data; returns the run file."""

    def make(root: Path) -> Path:
        """Images of three colours whose labels are the brightest channel, two in each of four folders."""
        generator = np.random.default_rng(0)
        for folder in "abcd":
            for number in range(2):
                labels = generator.integers(0, 3, (4, 5)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
                image = (60 + 160 * np.eye(3)[labels]).astype(np.uint8)
                for kind, pixels in (("images", image), ("labels", labels)):
                    path = root / kind / folder / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
        tiny = ROOT / "tests" / "tiny"
        shutil.copy(tiny / "teacher.py", root)
        run = root / "tiny.toml"
        run.write_text((tiny / "run.toml").read_text().replace("ROOT", str(root)))
        return run

    return make


@pytest.fixture
def run(tmp_path: Path, make_run: Callable[[Path], Path]) -> Path:
    """A run file of two tiny stages with its data, and nothing done."""
    return make_run(tmp_path)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[[Path], Path]) -> Path:
    """A run file whose cache is written and whose student is trained, in the folder ``student`` beside it."""
    from segkd.cli.main import main

    run = make_run(tmp_path_factory.mktemp("tiny"))
    for command, options in (("teacher-cache", []), ("train-student", ["-o", str(run.parent / "student")])):
        result = CliRunner().invoke(main, [command, "-c", str(run), "-q", *options])
        assert result.exit_code == 0, result.output
    return run


@pytest.fixture(scope="session")
def made() -> ModuleType:
    """``benchmarks/fault_bytes.py``: caches of made-up samples, and damage to them."""
    return _benchmark("fault_bytes")


@pytest.fixture(scope="session")
def fault_runs() -> ModuleType:
    """``benchmarks/fault_runs.py``: caching runs that something befalls."""
    return _benchmark("fault_runs")


@pytest.fixture(scope="session")
def published() -> ModuleType:
    """``benchmarks/published.py``: the tables of pages that come out of what is committed."""
    return _benchmark("published")


@pytest.fixture(scope="session")
def curves() -> ModuleType:
    """``benchmarks/curves.py``: how the arms of a sweep learn."""
    return _benchmark("curves")


@pytest.fixture(scope="session")
def where() -> ModuleType:
    """``benchmarks/where.py``: a gain by classes and by parts of role report."""
    return _benchmark("where")


def _benchmark(name: str) -> ModuleType:
    # As when one of them is run: they are scripts beside each other, not a package.
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
