"""The Makefile's own logic, with a stand-in for Python that notes what it is asked to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("Makefile", "pyproject.toml", "constraints.txt", "packaging/install.sh", "packaging/segkd/__init__.py")

OUTER = ("MAKE", "MFLAGS", "ARGS", "CONFIG", "VENV")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

STAND_IN = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
    -V | --version) echo "Python $VERSION" ;;
    *version_info*) exit "$TOO_OLD" ;;
    *ensurepip*) exit "$NO_VENV" ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install"*) exit "$INSTALL_FAILS" ;;
esac
"""


class Checkout:
    """A copy of what the Makefile reads, and a stand-in called ``fake-python``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
            os.utime(folder / name, (1_000_000_000, 1_000_000_000))
        self.python = folder / "fake-python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def make(self, *arguments: str, **behaviour: str) -> subprocess.CompletedProcess[str]:
        # What an outer `make test ARGS=...` hands down must not reach this one.
        quiet = {name: value for name, value in os.environ.items() if not name.startswith(OUTER)}
        defaults = {"VERSION": "3.12.1", "TOO_OLD": "0", "NO_VENV": "0", "INSTALL_FAILS": "0"}
        environment = quiet | defaults | behaviour | {"LOG": str(self.folder / "log"), "PYTHON": str(self.python)}
        command = ["make", *arguments]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def installations(self) -> int:
        return (self.folder / "log").read_text().count("-m pip install")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_it_installs_once_and_again_when_what_is_installed_changes(checkout: Checkout) -> None:
    for _ in range(2):
        assert checkout.make("setup").returncode == 0
        assert checkout.installations() == 1
    for count, name in enumerate(("pyproject.toml", "constraints.txt"), start=2):
        (checkout.folder / name).touch()
        os.utime(checkout.folder / ".venv/.installed", (1_100_000_000, 1_100_000_000))
        assert checkout.make("setup").returncode == 0
        assert checkout.installations() == count
        os.utime(checkout.folder / name, (1_000_000_000, 1_000_000_000))
    assert (checkout.folder / "log").read_text().count("-m venv") == 1


def test_a_failed_installation_is_tried_again(checkout: Checkout) -> None:
    assert checkout.make("setup", INSTALL_FAILS="1").returncode != 0
    assert checkout.make("setup").returncode == 0
    assert checkout.installations() == 2


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (
            {"TOO_OLD": "1", "VERSION": "3.10.4"},
            "is Python 3.10.4, but Python 3.11, 3.12 or 3.13 is needed; name one: make",
        ),
        (
            {"NO_VENV": "1"},
            "cannot make virtual environments; install its venv module (Debian and Ubuntu: python3-venv)",
        ),
    ],
)
def test_an_unfit_python_is_named(checkout: Checkout, behaviour: dict[str, str], message: str) -> None:
    done = checkout.make("setup", **behaviour)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (checkout.folder / ".venv").exists()


def test_a_missing_python_is_named(checkout: Checkout) -> None:
    done = checkout.make("setup", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "there is no 'no-such-python' here; install Python 3.11, 3.12 or 3.13, or say where it is" in done.stderr


def test_another_python_than_the_environment_has_is_refused(checkout: Checkout) -> None:
    assert checkout.make("setup").returncode == 0
    (checkout.folder / ".venv/bin/python").write_text("#!/bin/sh\necho Python 3.11.7\n")
    done = checkout.make("setup")
    assert done.returncode != 0
    assert ".venv has Python 3.11.7, not" in done.stderr


def test_the_stages_ask_for_a_run_file(checkout: Checkout) -> None:
    done = checkout.make("teacher-cache")
    assert done.returncode != 0
    assert "which run file? For instance: make teacher-cache CONFIG=" in done.stderr
    shown = checkout.make("-n", "train-student", "CONFIG=a.toml", "ARGS=--set train.steps=5")
    assert ".venv/bin/segkd train-student --config 'a.toml' --set train.steps=5" in shown.stdout


def test_help_is_the_default_and_names_every_target(checkout: Checkout) -> None:
    shown = checkout.make().stdout
    for target in ("demo", "teacher-cache", "train-student", "test", "check", "bench", "clean"):
        assert f"\n  {target} " in shown


def test_install_and_pyproject_agree_on_the_versions_of_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "packaging/install.sh").read_text()
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in project["classifiers"]
