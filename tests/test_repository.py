"""Rules of the repository that a machine can see."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from segkd.cli.reference import commands

ROOT = Path(__file__).resolve().parents[1]
CODE = ("storage", "pipeline", "cli", "packaging", "examples", "benchmarks")
TEXT = {".py", ".md", ".toml", ".txt", ".in", ".sh", ".ipynb", ""}


def text_files() -> list[Path]:
    """The files that people wrote, whether or not there is a version control system to ask."""
    top = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT]
    folders = (*CODE, "tests", "docs", "configs", ".ci")
    inside = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in TEXT
    ]
    return sorted(path for path in top + inside if "__pycache__" not in path.parts)


def documentation() -> dict[Path, str]:
    return {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}


def test_every_text_file_ends_with_one_newline_and_has_no_carriage_returns() -> None:
    contents = {path: path.read_bytes() for path in text_files()}
    assert len(contents) > 50
    assert [
        path for path, data in contents.items() if data and (not data.endswith(b"\n") or data.endswith(b"\n\n"))
    ] == []
    assert [path for path, data in contents.items() if b"\r" in data] == []


@pytest.mark.parametrize(
    "forbidden", [r"weights_only\s*=\s*False", r"\bpickle\.loads?\b", r"\beval\(['\"f]", r"\bexec\("]
)
def test_nothing_that_is_read_can_run_code(forbidden: str) -> None:
    files = [path for path in text_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in CODE]
    assert [path for path in files if re.search(forbidden, path.read_text())] == []


def test_torch_load_always_says_weights_only() -> None:
    for path in (path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), f"{path}:{node.lineno}"


def test_the_readme_shows_both_stages_and_how_to_test() -> None:
    readme = (ROOT / "README.md").read_text()
    for words in ("segkd teacher-cache", "segkd train-student", "make demo", "make test", "Apache"):
        assert words in readme


@pytest.mark.parametrize("command", [path for path, _ in commands()])
def test_every_command_stands_in_the_documentation(command: str) -> None:
    assert any(command in text for text in documentation().values())


def test_links_within_the_documentation_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {link}"
        for path, text in documentation().items()
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        if not re.match(r"[a-z]+:", link) and not (path.parent / link).exists()
    ]
    assert broken == []


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n" in text
    assert "END OF TERMS AND CONDITIONS" in text
