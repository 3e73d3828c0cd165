"""The arrows of docs/design.md, cli -> pipeline -> storage, proved from the imports of every file."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

REACH = {"storage": {"storage"}, "pipeline": {"pipeline", "storage"}, "cli": {"cli", "pipeline", "storage"}}
"""Which rooms a room may import from."""

CLOSED = {"storage": {"torch", "torchvision", "click"}, "pipeline": {"click"}, "cli": set[str]()}
"""Which third-party packages never enter a room."""

GROUPS = {"segkd.cli", "segkd.cli.__main__", "segkd.cli.main", "segkd.cli.reference"}
"""The modules of the command line that gather the commands or describe them; they alone import them."""

SHARED = {"segkd.cli.options"}
"""The modules of the command line that commands may import; whatever else is there is a command."""


@dataclass(frozen=True)
class Import:
    """``source`` imports ``target``, by statement or by ``import_module`` with a literal name."""

    source: str
    target: str
    line: int
    deferred: bool
    """Inside a function: it does not run when ``source`` is imported."""


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the three rooms under ``root``, by its installed name."""
    paths = [path for room in REACH for path in sorted((root / room).rglob("*.py"))]
    names = (".".join(("segkd", *path.relative_to(root).with_suffix("").parts)) for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def named_targets(node: ast.AST, known: Mapping[str, Path]) -> list[str]:
    """The modules that one node of a syntax tree imports; a name imported from a package may itself be a module."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(level=0, module=str(module), names=names):
            submodules = [f"{module}.{alias.name}" for alias in names if f"{module}.{alias.name}" in known]
            return [*submodules, *([] if len(submodules) == len(names) else [module])]
        case ast.ImportFrom():
            return ["(relative)"]
        case ast.Call(
            func=ast.Attribute(attr=function) | ast.Name(id=function), args=[ast.Constant(value=str(name)), *_]
        ):
            return [name] if function in ("import_module", "__import__") else []
    return []


def imports_of(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[Import]:
    def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
        for target in named_targets(node, known):
            yield Import(name, target, getattr(node, "lineno", 0), deferred)
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), False)


def fault(found: Import) -> str | None:
    """What is wrong with an import, or None."""
    room, target = found.source.split(".")[1], found.target.split(".")
    if found.target == "(relative)":
        return "imports are absolute"
    if target[0] != "segkd":
        if target[0] in REACH:
            return f"{target[0]} installs as segkd.{target[0]}"
        return f"{target[0]} never enters {room}" if target[0] in CLOSED[room] else None
    if len(target) > 1 and target[1] in REACH and target[1] not in REACH[room]:
        return f"{room} may import from {', '.join(sorted(REACH[room]))} only"
    if room == "cli" and target[1:2] == ["cli"] and found.source not in GROUPS and found.target not in SHARED:
        return "a command imports no other part of the command line than the shared options"
    return None


def faults_of(root: Path) -> list[str]:
    """One line for each import that breaks a rule, and one if imports that run at import time form a cycle."""
    known = modules_of(root)
    found = [item for name, path in known.items() for item in imports_of(name, path, known)]
    lines = [f"{item.source}:{item.line} imports {item.target}: {what}" for item in found if (what := fault(item))]
    graph: dict[str, set[str]] = {name: set() for name in known}
    for item in found:
        if item.target in known and not item.deferred:
            graph[item.source].add(item.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        lines.append("cycle: " + " -> ".join(reversed(error.args[1])))
    return lines


def test_the_arrows_hold() -> None:
    known = modules_of(ROOT)
    assert {"segkd.storage.errors", "segkd.pipeline.resample", "segkd.cli.main", *GROUPS, *SHARED} <= set(known)
    assert faults_of(ROOT) == []


PLANTED = [
    (
        "storage/a.py",
        "from segkd.pipeline.b import x",
        "segkd.storage.a:1 imports segkd.pipeline.b: storage may import",
    ),
    (
        "storage/a.py",
        "def f():\n    import segkd.pipeline",
        "segkd.storage.a:2 imports segkd.pipeline: storage may import",
    ),
    ("pipeline/a.py", "from segkd import cli", "segkd.pipeline.a:1 imports segkd.cli: pipeline may import"),
    ("storage/a.py", "import torch.nn as nn", "segkd.storage.a:1 imports torch.nn: torch never enters storage"),
    ("storage/a.py", "from click import echo", "segkd.storage.a:1 imports click: click never enters storage"),
    ("pipeline/deep/a.py", "import click", "segkd.pipeline.deep.a:1 imports click: click never enters pipeline"),
    ("storage/a.py", "import_module('torch')", "segkd.storage.a:1 imports torch: torch never enters storage"),
    ("storage/a.py", "importlib.import_module('segkd.cli')", "segkd.storage.a:1 imports segkd.cli: storage may import"),
    (
        "pipeline/a.py",
        "import storage.errors",
        "segkd.pipeline.a:1 imports storage.errors: storage installs as segkd.storage",
    ),
    ("pipeline/a.py", "from . import b", "segkd.pipeline.a:1 imports (relative): imports are absolute"),
    ("cli/a.py", "from segkd.cli.b import b", "segkd.cli.a:1 imports segkd.cli.b: a command imports no other part"),
    ("cli/a.py", "from segkd.cli import b", "segkd.cli.a:1 imports segkd.cli.b: a command imports no other part"),
    ("cli/options.py", "from segkd.cli.b import b", "segkd.cli.options:1 imports segkd.cli.b: a command imports no"),
    ("storage/b.py", "import segkd.storage.b", "cycle: segkd.storage.b -> segkd.storage.b"),
]


@pytest.mark.parametrize(("file", "code", "complaint"), PLANTED, ids=[f"{row[0]}: {row[1]}" for row in PLANTED])
def test_the_checker_finds_planted_faults(tmp_path: Path, file: str, code: str, complaint: str) -> None:
    plant(tmp_path, {"cli/__init__.py": "", "cli/b.py": "", "storage/b.py": "", "pipeline/b.py": "", file: code})
    (found,) = faults_of(tmp_path)
    assert found.startswith(complaint)


def test_the_checker_finds_a_long_cycle_but_not_a_deferred_one(tmp_path: Path) -> None:
    ring = {f"pipeline/{a}.py": f"import segkd.pipeline.{b}" for a, b in ("ab", "bc", "ca")}
    plant(tmp_path / "ring", ring)
    (found,) = faults_of(tmp_path / "ring")
    assert found.startswith("cycle: ")
    assert all(f"segkd.pipeline.{name}" in found for name in "abc")
    plant(tmp_path / "open", ring | {"pipeline/c.py": "def f():\n    import segkd.pipeline.a"})
    assert faults_of(tmp_path / "open") == []


def test_the_checker_lets_good_imports_pass(tmp_path: Path) -> None:
    good = {
        "storage/a.py": "import numpy, zarr\nfrom segkd.storage.b import x",
        "storage/b.py": "",
        "pipeline/a.py": "import torch\nfrom segkd import __version__\nfrom segkd.storage import a, b",
        "cli/options.py": "import click\nfrom segkd.pipeline.a import x",
        "cli/run.py": "from segkd.cli.options import y\nimport click",
        "cli/main.py": "from segkd.cli.run import run",
    }
    plant(tmp_path, good)
    assert faults_of(tmp_path) == []


def plant(root: Path, files: Mapping[str, str]) -> None:
    for name, code in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)


def test_storage_loads_neither_torch_nor_click_at_run_time(tmp_path: Path) -> None:
    """What the syntax cannot show: an import by way of a dependency."""
    names = [name for name in modules_of(ROOT) if name.startswith("segkd.storage")]
    loaded = f"sorted({CLOSED['storage']} & set(sys.modules))"
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint({loaded})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
