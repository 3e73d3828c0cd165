"""The package installs whole: sdist -> wheel -> import of every module, with the checkout out of sight."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("storage", "pipeline", "cli")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES: list[str] = PROJECT["project"]["dependencies"]

IMPORT_ALL = """
import importlib, json, pkgutil, segkd
names = ["segkd"] + [m.name for m in pkgutil.walk_packages(segkd.__path__, "segkd.") if not m.name.endswith("__main__")]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""


def module_names() -> set[str]:
    """Every module of the checkout, by the name it is to have when installed."""
    files = {
        ("segkd", room, *path.relative_to(ROOT / room).with_suffix("").parts)
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    return {"segkd"} | {".".join(parts).removesuffix(".__init__") for parts in files}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of ``command`` run in ``cwd``; what it printed becomes the test's message if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist, from a copy: setuptools leaves traces where it builds."""
    source = tmp_path_factory.mktemp("source") / "segkd"
    untracked = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=untracked)
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, cwd=source)
    (sdist,) = output.glob("*.tar.gz")
    (wheel,) = output.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel in it."""
    target = tmp_path_factory.mktemp("installed")
    pip = ("pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(sys.executable, "-m", *pip, "--target", target, distributions[1], cwd=target)
    return target


def run_installed(installed: Path, *command: str | Path) -> str:
    """Run Python so that it sees the wheel and the dependencies, but no editable install and no current folder.

    ``-S`` skips the ``.pth`` files through which an editable install would lend the wheel a module that it lacks.
    """
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return run(sys.executable, "-S", "-P", *command, cwd=installed, PYTHONPATH=path)


def test_every_module_imports_from_the_wheel(installed: Path) -> None:
    files: dict[str, str] = json.loads(run_installed(installed, "-c", IMPORT_ALL))
    assert set(files) == {name for name in module_names() if not name.endswith("__main__")}
    outside = {name: file for name, file in files.items() if not Path(file).is_relative_to(installed)}
    assert outside == {}


@pytest.mark.parametrize("command", [("-m", "segkd.cli"), ("bin/segkd",)], ids=["module", "script"])
def test_the_command_works_from_the_wheel(installed: Path, command: tuple[str, ...]) -> None:
    assert run_installed(installed, *command, "--help").startswith("Usage: segkd")
    version = importlib.metadata.version("segkd")
    assert version in run_installed(installed, *command, "--version")


def test_the_wheel_holds_the_package_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    stray = {name for name in names if not name.startswith("segkd/") and ".dist-info/" not in name}
    assert stray == set()
    assert "segkd/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not any("test" in Path(name).name for name in names)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "Makefile", "constraints.txt", "packaging/install.sh", "tests/test_packaging.py"} <= inside


def test_every_subpackage_is_listed() -> None:
    packages = {
        ".".join(("segkd", *path.parent.relative_to(ROOT).parts))
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert {"segkd"} | packages == set(PROJECT["tool"]["setuptools"]["packages"])
    with_code = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {folder for folder in with_code if not (folder / "__init__.py").exists()} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_no_top_level_module_is_called_like_a_room(room: str, tmp_path: Path) -> None:
    assert importlib.util.find_spec(room) is None
    assert importlib.util.find_spec(f"segkd.{room}") is not None
    lookup = f"import importlib.util; print(importlib.util.find_spec({room!r}))"
    assert run(sys.executable, "-c", lookup, cwd=tmp_path) == "None\n"


def imported(path: Path) -> set[str]:
    """The top-level modules that a file names in its import statements, wherever they stand."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.partition(".")[0] for name in plain | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}


def test_every_third_party_import_is_a_declared_dependency() -> None:
    """An import is traced to the distribution that brings it: a dependency's dependency must not pass for ours."""
    extras = PROJECT["project"]["optional-dependencies"]
    declared = {
        canonicalize_name(Requirement(text).name)
        for text in [
            *DEPENDENCIES,
            *(text for extra in ("dense", "onnx", "tensorboard") for text in extras[extra]),
        ]
    }
    providers = importlib.metadata.packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)} imports {module}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for module in imported(path) - sys.stdlib_module_names - {"segkd"}
        if not {canonicalize_name(name) for name in providers.get(module, [module])} & declared
    }
    assert undeclared == set()


def test_the_constraints_pin_everything_that_gets_installed() -> None:
    """Walks the installed dependencies of segkd[dev]; whatever is met must have exactly one version for this Python."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    assert [pin for pin in pins if not re.fullmatch(r"==[\w.]+", str(pin.specifier))] == []
    pinned = [canonicalize_name(pin.name) for pin in pins]
    assert len(pinned) == len(set(pinned))
    installed = {canonicalize_name(found.name): found.version for found in importlib.metadata.distributions()}
    if others := [str(pin) for pin in pins if installed.get(canonicalize_name(pin.name), "0") not in pin.specifier]:
        pytest.skip(f"installed without the constraints: {', '.join(others)}")

    met: set[str] = set()
    queue = [Requirement("segkd[dev]")]
    while queue:
        requirement = queue.pop()
        if str(requirement) in met or requirement.name.startswith(("nvidia-", "cuda-", "triton")):
            continue  # torch itself pins what its CUDA builds bring along
        met.add(str(requirement))
        needs = [Requirement(text) for text in importlib.metadata.requires(requirement.name) or []]
        extras = requirement.extras or {""}
        queue += [n for n in needs if n.marker is None or any(n.marker.evaluate({"extra": extra}) for extra in extras)]
    assert {canonicalize_name(Requirement(text).name) for text in met} - {"segkd"} <= set(pinned)
