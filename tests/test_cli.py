"""The commands, as they are typed: both stages on tiny data, results, exit statuses, messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from segkd import __version__
from segkd.cli.main import main


def segkd(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def result_of(*arguments: str | Path) -> dict[str, object]:
    """The JSON that a command prints; it must end well."""
    result = segkd(*arguments, "--json", "-q")
    assert result.exit_code == 0, result.output
    loaded: dict[str, object] = json.loads(result.stdout)
    return loaded


# What is asked without data


def test_version_and_help() -> None:
    assert segkd("--version").stdout == f"segkd, version {__version__}\n"
    for arguments in ([], ["data"], ["cache"]):
        assert "Commands:" in segkd(*arguments, "--help").stdout


def test_asking_for_help_does_not_wait_for_torch() -> None:
    code = "import sys, segkd.cli.main; print([name for name in ('torch', 'zarr', 'pydantic') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_module_is_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "segkd.cli", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"segkd, version {__version__}\n"


# The spine


def test_the_cache_is_written_once(run: Path) -> None:
    first, second = (result_of("teacher-cache", "-c", run) for _ in range(2))
    assert first["written"] == 6
    assert first["roles"] == {"train": 2, "auxiliary": 2, "report": 2}
    assert first["sealed"]
    assert second["written"] == 0
    assert "complete" in segkd("teacher-cache", "-c", run).stdout


def test_cache_info(done: Path) -> None:
    info = result_of("cache", "info", done.parent / "cache.zarr")
    assert info["roles"] == {"train": 2, "auxiliary": 2, "report": 2}
    spec = info["spec"]
    assert isinstance(spec, dict)
    assert spec["classes"] == ["red", "green", "blue"]
    text = segkd("cache", "info", done.parent / "cache.zarr").stdout
    assert "classes: red, green, blue" in text
    assert "kl_cells" in text


def test_cache_show(done: Path, tmp_path: Path) -> None:
    shown = result_of("cache", "show", "-c", done, "a/0", "d/1", "-o", tmp_path)
    assert shown["pictures"] == [str(tmp_path / "a-0.png"), str(tmp_path / "d-1.png")]
    with Image.open(tmp_path / "a-0.png") as picture:
        assert min(picture.size) > 100
    assert segkd("cache", "show", "-c", done, "a/0", "-o", tmp_path, "--overwrite").exit_code == 0


def test_training_writes(done: Path) -> None:
    student = done.parent / "student"
    assert {"best.safetensors", "last.safetensors", "metrics.jsonl", "run.json"} == {p.name for p in student.iterdir()}


def test_resuming_a_finished_run_does_nothing(done: Path) -> None:
    summary = result_of("train-student", "-c", done, "-o", done.parent / "student", "--resume")
    assert (summary["steps"], summary["steps_done_before"]) == (2, 2)


def test_training_without_a_teacher(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = segkd("train-student", "-c", run, "--no-distill", "-s", "train.auxiliary=0")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("runs/tiny: 2 steps, best at step ")
    assert (tmp_path / "runs" / "tiny" / "best.safetensors").exists()


def test_training_from_given_weights_says_which_it_took(run: Path, done: Path, tmp_path: Path) -> None:
    plain = ("train-student", "-c", run, "--no-distill", "-s", "train.auxiliary=0", "-o", tmp_path / "out")
    weights = done.parent / "student" / "last.safetensors"
    result = segkd(*plain, "--init", weights)
    assert result.exit_code == 0, result.output
    assert f"{weights}: " in result.stderr
    assert " took " in result.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["configuration"]["student"]["init"] == str(weights)
    absent = segkd(*plain, "--overwrite", "--init", tmp_path / "none.pth")
    assert absent.exit_code == 2
    assert str(tmp_path / "none.pth") in absent.stderr


def test_evaluating_teacher_cache_and_student(done: Path) -> None:
    best = done.parent / "student" / "best.safetensors"
    miou = {}
    for subject in ("--teacher", "--cache", "--student"):
        evaluation = result_of("evaluate", "-c", done, subject)
        assert evaluation["role"] == "report"
        scores = evaluation["scores"]
        assert isinstance(scores, dict)
        miou[subject] = scores["miou"]
    # Labels change between cells only, where the teacher is torn; everywhere else it is right.
    assert miou["--teacher"] > 95
    assert miou["--cache"] == pytest.approx(miou["--teacher"], abs=1)
    assert miou["--student"] < 90
    alone, described = result_of("evaluate", best), result_of("evaluate", best, "-c", done)
    assert alone == described
    cost = alone["cost"]
    assert isinstance(cost, dict)
    assert cost["shape"] == [32, 40]
    assert cost["parameters"] > 1e5
    assert cost["latency"] is None


def test_evaluation_in_words(done: Path) -> None:
    best = done.parent / "student" / "best.safetensors"
    text = segkd("evaluate", best, "--role", "select", "--speed", "--device", "cpu", "-q").stdout
    assert "mean" in text
    assert "M parameters, " in text
    assert "GFLOPs at 32x40; " in text
    assert "a batch of 1 at 32x40 on cpu" in text


def test_predicting_a_folder(done: Path, tmp_path: Path) -> None:
    images = done.parent / "images" / "d"
    best = done.parent / "student" / "best.safetensors"
    assert result_of("predict", best, images, "-o", tmp_path) == {"written": 2, "skipped": {}}
    with Image.open(tmp_path / "labels" / "0.png") as labels:
        assert labels.size == (40, 32)
    assert segkd("predict", best, images, "-o", tmp_path, "--overwrite", "-q").stdout.startswith("2 images labelled in")


# Data


def test_data_check_counts(run: Path) -> None:
    report = result_of("data", "check", "-c", run)
    assert report["samples"] == {"train": 2, "auxiliary": 2, "select": 2, "report": 2}
    assert report["sizes"] == {"32x40": 8}


def test_data_check_drafts(run: Path, tmp_path: Path) -> None:
    drafted = tmp_path / "draft.toml"
    result = segkd("data", "check", run.parent, "--write", drafted, "-q")
    assert result.exit_code == 0, result.output
    assert segkd("data", "check", "-c", drafted, "-q").stdout == result.stdout


# How things end


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("segkd.pipeline.teacher.cache.teacher_cache", interrupt)


@pytest.mark.usefixtures("interrupted")
def test_an_interruption_says_how_to_go_on(run: Path) -> None:
    result = segkd("teacher-cache", "-c", run)
    assert result.exit_code == 130
    assert result.stderr == "Interrupted. Finished units are kept; the same command goes on with the others.\n"


def test_tracebacks_are_for_who_asks(tmp_path: Path) -> None:
    for flags, traceback in (["-v"], False), (["-v", "-v"], True), (["-vv"], True), (["-vv", "-q"], False):
        result = segkd("cache", "info", tmp_path, *flags)
        assert result.exit_code == 1
        assert ("Traceback" in result.stderr) == traceback
        assert result.stderr.splitlines()[-1].startswith("Error: there is no cache at ")


def test_what_the_system_refuses_is_an_error_with_its_place(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/full/cache")

    monkeypatch.setattr("segkd.pipeline.teacher.cache.teacher_cache", refuse)
    result = segkd("teacher-cache", "-c", run)
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: /full/cache: No space left on device; free some space, or name another place\n",
    )


def test_logs_and_progress_go_to_standard_error(run: Path) -> None:
    loud, quiet = segkd("teacher-cache", "-c", run), segkd("teacher-cache", "-c", run, "-q")
    assert "teacher-cache: 6/6 images" in loud.stderr
    assert "teacher-cache: 6/6" not in loud.stdout
    assert quiet.stderr == ""


def test_samples_are_listed_with_role_id_group_and_file(run: Path) -> None:
    root = run.parent
    grouped = ("-c", run, "-s", "data.group='^[a-z]'")
    listed = segkd("data", "list", *grouped).stdout.splitlines()
    assert len(listed) == 8
    assert [line for line in listed if line.startswith("select")] == [
        f"select\tc/{number}\tc\t{root}/images/c/{number}.png" for number in range(2)
    ]
    assert segkd("data", "list", *grouped, "--role", "select").stdout.splitlines() == [
        line for line in listed if line.startswith("select")
    ]
    assert result_of("data", "list", *grouped, "--role", "report")["samples"] == [
        {"role": "report", "id": f"d/{number}", "group": "d", "image": f"{root}/images/d/{number}.png"}
        for number in range(2)
    ]
