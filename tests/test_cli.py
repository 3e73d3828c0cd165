"""The commands, as they are typed: both stages on tiny data, results, exit statuses, messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from segkd import __version__
from segkd.cli.main import main

TEACHER = '''
import torch
from torch import nn

class Teacher(nn.Module):
    """The brightest of three channels, on a grid of stride 4."""

    def forward(self, images):
        return 4 * nn.functional.avg_pool2d(images, 4, ceil_mode=True)

def build():
    return Teacher()
'''

RUN = """
[data]
reader = "folder"
root = "{root}"
classes = ["red", "green", "blue"]

[data.folders]
train = ["a"]
auxiliary = ["b"]
select = ["c"]
report = ["d"]

[teacher]
reference = "{root}/teacher.py:build"
stride = 4

[cache]
path = "{root}/cache.zarr"

[student]
reference = "enet"

[augment]
crop = [32, 32]

[train]
steps = 2
labelled = 2
auxiliary = 1
warmup = 1
validate_every = 1
device = "cpu"
"""


def make_data(root: Path) -> Path:
    """Images of three colours whose labels are the brightest channel, in four folders; returns the run file."""
    generator = np.random.default_rng(0)
    for folder in "abcd":
        for number in range(2):
            labels = generator.integers(0, 3, (4, 5)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            image = (60 + 160 * np.eye(3)[labels]).astype(np.uint8)
            for kind, pixels in (("images", image), ("labels", labels)):
                path = root / kind / folder / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    (root / "teacher.py").write_text(TEACHER)
    run = root / "tiny.toml"
    run.write_text(RUN.format(root=root))
    return run


def segkd(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def result_of(*arguments: str | Path) -> dict[str, object]:
    """The JSON that a command prints; it must end well."""
    result = segkd(*arguments, "--json", "-q")
    assert result.exit_code == 0, result.output
    loaded: dict[str, object] = json.loads(result.stdout)
    return loaded


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose cache is written and whose student is trained, in a folder with both."""
    run = make_data(tmp_path_factory.mktemp("tiny"))
    for command in ("teacher-cache", "train-student"):
        options = ["--output", str(run.parent / "student")] if command == "train-student" else []
        result = segkd(command, "-c", run, *options, "-q")
        assert result.exit_code == 0, result.output
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run file with data, and nothing done."""
    return make_data(tmp_path)


def fails(status: int, message: str, *arguments: str | Path) -> None:
    """The command ends with a status, one message on standard error and nothing on standard output."""
    result = segkd(*arguments)
    assert (result.stderr, result.stdout) == (f"Error: {message}\n", "")
    assert result.exit_code == status
    assert "Traceback" not in result.output


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
    fails(
        2,
        f"{tmp_path}/a-0.png exists; name another folder, or replace it with --overwrite",
        *("cache", "show", "-c", done, "a/0", "-o", tmp_path),
    )
    assert segkd("cache", "show", "-c", done, "a/0", "-o", tmp_path, "--overwrite").exit_code == 0
    fails(1, "the data has no sample 'a/9'; its first is 'b/0'", *("cache", "show", "-c", done, "a/9", "-o", tmp_path))


def test_training_writes_and_refuses_to_overwrite(done: Path) -> None:
    student = done.parent / "student"
    assert {"best.safetensors", "last.safetensors", "metrics.jsonl", "run.json"} == {p.name for p in student.iterdir()}
    result = segkd("train-student", "-c", done, "-o", student)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {student} already holds a run (")
    assert "--overwrite" in result.stderr


def test_resuming_a_finished_run_does_nothing(done: Path) -> None:
    summary = result_of("train-student", "-c", done, "-o", done.parent / "student", "--resume")
    assert (summary["steps"], summary["steps_done_before"]) == (2, 2)


def test_training_without_a_teacher(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = segkd("train-student", "-c", run, "--no-distill", "-s", "train.auxiliary=0")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("runs/tiny: 2 steps, best at step ")
    assert (tmp_path / "runs" / "tiny" / "best.safetensors").exists()


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
    result = segkd("predict", best, images, "-o", tmp_path)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert segkd("predict", best, images, "-o", tmp_path, "--overwrite", "-q").stdout.startswith("2 images labelled in")


# Data


def test_data_check_counts(run: Path) -> None:
    report = result_of("data", "check", "-c", run)
    assert report["samples"] == {"train": 2, "auxiliary": 2, "select": 2, "report": 2}
    assert report["sizes"] == {"32x40": 8}


def test_data_check_complains(run: Path) -> None:
    labels = run.parent / "labels" / "a" / "0.png"
    Image.fromarray(np.full((32, 40), 7, np.uint8)).save(labels)
    result = segkd("data", "check", "-c", run, "-q")
    assert result.exit_code == 1
    assert f"error: {labels}: " in result.stdout


def test_data_check_drafts(run: Path, tmp_path: Path) -> None:
    drafted = tmp_path / "draft.toml"
    result = segkd("data", "check", run.parent, "--write", drafted, "-q")
    assert result.exit_code == 0, result.output
    assert segkd("data", "check", "-c", drafted, "-q").stdout == result.stdout
    fails(
        2,
        f"{drafted} exists; name another file, or replace it with --overwrite",
        *("data", "check", run.parent, "--write", drafted),
    )


# Run files


def test_print_config_is_a_run_file(run: Path, tmp_path: Path) -> None:
    printed = segkd("train-student", "-c", run, "-s", "train.steps=7", "--print-config").stdout
    assert "steps = 7" in printed
    again = tmp_path / "again.toml"
    again.write_text(printed)
    assert segkd("train-student", "-c", again, "--print-config").stdout == printed


def test_unknown_key(run: Path) -> None:
    run.write_text(run.read_text() + "\n[loss]\ntemprature = 2\n")
    fails(
        2,
        f"{run}: loss.temprature = 2: there is no such key; did you mean loss.temperature?",
        *("teacher-cache", "-c", run),
    )


def test_several_problems_of_file_and_command_line(run: Path) -> None:
    run.write_text(run.read_text().replace("steps = 2", 'steps = "2"'))
    fails(
        2,
        f'{run}: train.steps = "2": expected a valid integer\n'
        "--set train.lablled=3: train.lablled = 3: there is no such key; did you mean train.labelled?",
        *("train-student", "-c", run, "-s", "train.lablled=3"),
    )


def test_missing_and_broken_run_files(tmp_path: Path) -> None:
    absent, broken = tmp_path / "absent.toml", tmp_path / "broken.toml"
    fails(2, f"{absent}: there is no such file; name an existing run file (.toml)", "teacher-cache", "-c", absent)
    broken.write_text("[data\n")
    fails(
        2,
        f"{broken}: not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 6)",
        *("teacher-cache", "-c", broken),
    )


def test_a_run_file_without_data(tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    fails(2, f"{empty}: data: is missing and has no default", "teacher-cache", "-c", empty)


@pytest.mark.parametrize(("table", "command"), [("teacher", "teacher-cache"), ("student", "train-student")])
def test_a_table_that_a_command_needs(run: Path, table: str, command: str, tmp_path: Path) -> None:
    reference = {"teacher": f'reference = "{run.parent}/teacher.py:build"\nstride = 4', "student": 'reference = "enet"'}
    run.write_text(run.read_text().replace(f"[{table}]\n{reference[table]}\n", ""))
    options = ["-o", tmp_path / "out"] if command == "train-student" else []
    fails(
        2,
        f"the run has no {table}: expected a table [{table}] with the network's reference; "
        f"add it to the run file, or give --set {table}.reference=NAME",
        *(command, "-c", run, *options),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teacher-cache"], "Missing option '-c' / '--config': the run file that says what to work on."),
        (["evaluate"], "Name one thing to score: CHECKPOINT, --teacher, --student or --cache."),
        (
            ["evaluate", "x.safetensors", "--cache"],
            "Name one thing to score: CHECKPOINT, --teacher, --student or --cache.",
        ),
        (["evaluate", "--cache"], "Missing option '-c' / '--config': the run file that describes the cache."),
        (["data", "check"], "Give either the run file (--config), or a FOLDER and where to --write its description."),
        (
            ["data", "check", "x"],
            "Give either the run file (--config), or a FOLDER and where to --write its description.",
        ),
        (["teach"], "No such command 'teach'."),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = segkd(*arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"Error: {message}")


# Things that are not so


def test_things_that_are_not_there(run: Path, tmp_path: Path) -> None:
    cache, checkpoint = tmp_path / "cache.zarr", tmp_path / "x.safetensors"
    fails(1, f"there is no cache at {cache}; write one with segkd teacher-cache", "cache", "info", cache)
    fails(
        1,
        f"{checkpoint}: there is no such file; name a checkpoint that train-student wrote",
        *("evaluate", checkpoint, "-c", run),
    )


def test_a_cache_of_other_images(run: Path) -> None:
    result_of("teacher-cache", "-c", run)
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(run.parent / "images" / "d" / "0.png")
    fails(
        1,
        f"sample 'd/0' is not the image that {run.parent}/cache.zarr was written from; "
        "restore the image, or write the cache again with segkd teacher-cache",
        *("evaluate", "-c", run, "--cache", "-q"),
    )


def test_a_cache_of_other_classes(done: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(done.read_text().replace('"blue"', '"azure"'))
    fails(
        1,
        f"{done.parent}/cache.zarr is over the classes red, green, blue, the data has red, green, azure; "
        "name these data's cache, or write one with segkd teacher-cache",
        *("evaluate", "-c", other, "--cache", "-q"),
    )


def test_a_cache_of_another_teacher(done: Path) -> None:
    result = segkd("teacher-cache", "-c", done, "-s", "teacher.preprocessing.std=[1, 1, 1]", "-q")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {done.parent}/cache.zarr was written with another preprocessing")


def test_a_role_without_samples(run: Path) -> None:
    run.write_text(run.read_text().replace('report = ["d"]', ""))
    result = segkd("evaluate", "-c", run, "--teacher")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("Error: there is no sample to score; ")


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
    fails(1, "/full/cache: No space left on device", "teacher-cache", "-c", run)


def test_logs_and_progress_go_to_standard_error(run: Path) -> None:
    loud, quiet = segkd("teacher-cache", "-c", run), segkd("teacher-cache", "-c", run, "-q")
    assert "teacher-cache: 6/6 images" in loud.stderr
    assert "teacher-cache: 6/6" not in loud.stdout
    assert quiet.stderr == ""
