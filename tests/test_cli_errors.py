"""Bad input, as the command line answers it: one clear message, the exit status, nothing half-written."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from segkd.cli.main import main


def segkd(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fails(status: int, message: str, *arguments: str | Path) -> None:
    """The command ends with a status, one message on standard error and nothing on standard output."""
    result = segkd(*arguments)
    assert (result.stderr, result.stdout) == (f"Error: {message}\n", "")
    assert result.exit_code == status
    assert "Traceback" not in result.output


# Run files


def test_print_config_is_a_run_file(run: Path, tmp_path: Path) -> None:
    printed = segkd("train-student", "-c", run, "-s", "train.steps=7", "--print-config").stdout
    assert "steps = 7" in printed
    again = tmp_path / "again.toml"
    again.write_text(printed)
    assert segkd("train-student", "-c", again, "--print-config").stdout == printed


def test_unknown_key(run: Path) -> None:
    run.write_text(run.read_text() + "\n[knowledge.zero_order]\ntemprature = 2\n")
    fails(
        2,
        f"{run}: knowledge.zero_order.temprature = 2: there is no such key; "
        "did you mean knowledge.zero_order.temperature?",
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
        (
            ["evaluate", "--cache", "--speed"],
            "--speed times a network, and a cache has none: leave it out, or score --teacher.",
        ),
        (
            ["evaluate", "--teacher", "--reference", "a:b"],
            "--reference names the code of a CHECKPOINT's network: name the CHECKPOINT too.",
        ),
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
    assert segkd("teacher-cache", "-c", run).exit_code == 0
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
    fails(
        1,
        f"{done.parent}/cache.zarr differs from this run in teacher.preprocessing.std ([0.229, 0.224, 0.225], "
        "now [1.0, 1.0, 1.0]); give this run another cache.path, or remove the old cache",
        *("teacher-cache", "-c", done, "-s", "teacher.preprocessing.std=[1, 1, 1]", "-q"),
    )


def test_a_role_without_samples(run: Path) -> None:
    run.write_text(run.read_text().replace('report = ["d"]', ""))
    result = segkd("evaluate", "-c", run, "--teacher")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == (
        "Error: role report (the default) has no sample; the data have train 2, auxiliary 2, select 2: --role select"
    )


# Data


def spoil(path: Path, pixels: np.ndarray[tuple[int, ...], np.dtype[Any]]) -> None:
    Image.fromarray(pixels).save(path)


def labels_with(value: int) -> np.ndarray[tuple[int, ...], np.dtype[Any]]:
    """A label map of zeros, but for one pixel."""
    labels = np.zeros((32, 40), np.uint8)
    labels[3, 7] = value
    return labels


def remove_images(root: Path) -> None:
    for path in (root / "images").rglob("*.png"):
        path.unlink()


def rename_labels(root: Path) -> None:
    for path in list((root / "labels").rglob("*.png")):
        path.rename(path.with_name(f"x{path.name}"))


def put_half_a_jpeg(root: Path) -> None:
    (root / "images" / "a" / "0.png").unlink()
    image = root / "images" / "a" / "0.jpg"
    spoil(image, np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8))
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])


def give_a_folder_two_roles(root: Path) -> None:
    run = root / "tiny.toml"
    run.write_text(run.read_text().replace('report = ["d"]', 'report = ["a"]'))


BAD_DATA: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "an empty folder": (
        remove_images,
        1,
        "ROOT/images: holds no images; expected files *{.bmp,.jpeg,.jpg,.png,.tif,.tiff,.webp}",
    ),
    "no common stems": (
        rename_labels,
        1,
        "ROOT: no image has a label map of its name; images are 'a/0', 'a/1', 'b/0', "
        "label maps 'a/x0', 'a/x1', 'b/x0'; "
        "set data.image_suffix and data.label_suffix (reader 'folder') to what differs",
    ),
    "a truncated image": (
        lambda root: (root / "images/a/0.png").write_bytes((root / "images/a/0.png").read_bytes()[:100]),
        1,
        "ROOT/images/a/0.png: cannot be read (image file is truncated); restore the file, or leave it out: "
        "segkd data check --list-broken writes a list for data.skip",
    ),
    "a truncated JPEG": (
        put_half_a_jpeg,
        1,
        "ROOT/images/a/0.jpg: cannot be read (image file is truncated); restore the file, or leave it out: "
        "segkd data check --list-broken writes a list for data.skip",
    ),
    "a 16-bit image": (
        lambda root: spoil(root / "images/a/0.png", np.zeros((32, 40), np.uint16)),
        1,
        "ROOT/images/a/0.png: an image with 16 bits a channel, expected 8-bit RGB, grey or palette; "
        "convert it, with the range of brightness that the networks are to see",
    ),
    "a transparent image": (
        lambda root: spoil(root / "images/a/0.png", np.zeros((32, 40, 4), np.uint8)),
        1,
        "ROOT/images/a/0.png: an image with transparent pixels, expected opaque ones; "
        "flatten it onto the background that the networks are to see",
    ),
    "sizes that differ": (
        lambda root: spoil(root / "labels/a/0.png", np.zeros((30, 40), np.uint8)),
        1,
        "ROOT/labels/a/0.png: 30 x 40 pixels, but its image 0.png has 32 x 40 (height x width); make them of one size",
    ),
    "a label outside the map": (
        lambda root: spoil(root / "labels/a/0.png", labels_with(9)),
        1,
        "ROOT/labels/a/0.png: row 3, column 7: value 9 is no class, expected 0-2, 255; "
        "name all classes in data.classes, or map all values of these files in [data.label_values]",
    ),
    "training on report samples": (
        give_a_folder_two_roles,
        2,
        "data.folders gives 'a' to both train and report; leave it to one of them",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(run: Path, case: str) -> None:
    make_bad, status, message = BAD_DATA[case]
    make_bad(run.parent)
    message = message.replace("ROOT", str(run.parent))
    checked = segkd("data", "check", "-c", run, "-q")
    assert checked.exit_code == 1
    assert re.search(f"Error: {re.escape(message)}(; such values in .*)?\n", checked.stdout)
    output = run.parent / "out"
    fails(
        status,
        message,
        *("train-student", "-c", run, "-q", "--no-distill", "-s", "train.auxiliary=0", "-o", output),
    )
    assert not (output / "best.safetensors").exists()


def test_training_on_what_the_cache_keeps_for_reporting(done: Path, tmp_path: Path) -> None:
    swapped = ["-s", 'data.folders.train=["d"]', "-s", 'data.folders.report=["a"]']
    fails(
        2,
        "sample d/0 has role train in the data but report in the cache, and such samples must not be learned from; "
        "correct the lists of the data",
        *("train-student", "-c", done, "-q", "-o", tmp_path / "out", *swapped),
    )
    assert not (tmp_path / "out").exists()


def test_a_batch_of_one_under_batch_norm(done: Path, tmp_path: Path) -> None:
    settings = ["student.reference=fast-scnn", "train.labelled=1", "train.auxiliary=0"]
    fails(
        2,
        "batch norm met one value a channel (a pooled 1x1 feature and a batch of 1) while training, and one value has "
        "no variance; train with at least 2 images a batch or larger crops, or call eval() on the network",
        *("train-student", "-c", done, "-q", "-o", tmp_path, *(part for text in settings for part in ("-s", text))),
    )
    assert not (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["predict", "ROOT/student/best.safetensors", "ROOT/images/d", "-o", "OUT"], "OUT/overlays/0.jpg"),
        (["cache", "show", "-c", "ROOT/tiny.toml", "a/0", "-o", "OUT"], "OUT/a-0.png"),
        (["data", "check", "ROOT", "--write", "OUT/draft.toml"], "OUT/draft.toml"),
    ],
)
def test_a_full_disk(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], place: str
) -> None:
    def half(content: object, path: Path, *_: object, **__: object) -> None:
        named = path if isinstance(content, Image.Image) else content
        assert isinstance(named, Path)
        named.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    monkeypatch.setattr(Path, "write_text", half)
    names = {"ROOT": str(done.parent), "OUT": str(tmp_path / "out")}
    for name, folder in names.items():
        arguments, place = [argument.replace(name, folder) for argument in arguments], place.replace(name, folder)
    fails(1, f"{place}: No space left on device; free some space, or name another place", *arguments, "-q")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_where_a_folder_must_stand(done: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fails(
        1,
        f"{tmp_path}/file/a-0.png: File exists; a file stands where a folder must; name another place",
        *("cache", "show", "-c", done, "a/0", "-o", tmp_path / "file"),
    )


def test_an_image_that_fails_stage_1_is_named_and_its_unit_not_committed(run: Path) -> None:
    image = run.parent / "images" / "a" / "0.png"
    image.write_bytes(image.read_bytes()[:100])
    fails(
        1,
        f"{image}: cannot be read (image file is truncated); restore the file, or leave it out: "
        "segkd data check --list-broken writes a list for data.skip",
        *("teacher-cache", "-c", run, "-q"),
    )
    unfinished = segkd("evaluate", "-c", run, "--cache", "-q")
    assert unfinished.exit_code == 1
    assert "is not finished: " in unfinished.stderr


def test_a_nan_from_the_teacher(run: Path) -> None:
    fails(
        1,
        f"{run.parent}/teacher.py:build returned NaN or +inf for b/0; check its weights and preprocessing",
        *("teacher-cache", "-c", run, "-q", "-s", "teacher.arguments={failing=true}"),
    )
    assert segkd("cache", "info", run.parent / "cache.zarr", "--json").stdout.count('"sealed": false') == 1


# Nothing is overwritten


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train-student", "-c", "RUN", "-o", "ROOT/student"],
            "ROOT/student already holds a run (run.json, metrics.jsonl, last.safetensors, best.safetensors); "
            "go on with --resume, replace it with --overwrite, or name another output folder",
        ),
        (
            ["data", "check", "ROOT", "--write", "RUN"],
            "RUN exists; name another file, or replace it with --overwrite",
        ),
        (
            ["cache", "show", "-c", "RUN", "a/0", "-o", "ROOT/shown"],
            "ROOT/shown/a-0.png exists; name another folder, or replace it with --overwrite",
        ),
        (
            ["predict", "ROOT/student/best.safetensors", "ROOT/images/d", "-o", "ROOT/predicted"],
            "ROOT/predicted/labels/1.png exists, and so do 0 more of 4 files to write; "
            "choose another folder or allow it with --overwrite",
        ),
    ],
)
def test_refusing_to_overwrite(done: Path, arguments: list[str], message: str) -> None:
    for standing in ("shown/a-0.png", "predicted/labels/1.png"):
        (done.parent / standing).parent.mkdir(parents=True, exist_ok=True)
        (done.parent / standing).touch()
    before = {path: path.read_bytes() for path in done.parent.rglob("*") if path.is_file()}
    names = {"ROOT": str(done.parent), "RUN": str(done)}
    for name, place in names.items():
        arguments = [argument.replace(name, place) for argument in arguments]
        message = message.replace(name, place)
    fails(2, message, *arguments)
    assert {path: path.read_bytes() for path in done.parent.rglob("*") if path.is_file()} == before


def test_a_sample_that_the_data_does_not_have(done: Path, tmp_path: Path) -> None:
    fails(1, "the data has no sample 'a/9'; its first is 'b/0'", *("cache", "show", "-c", done, "a/9", "-o", tmp_path))


# The demo


def test_the_demo_ends_as_its_commands_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``examples/demo.py``, after Ctrl-C: without a traceback."""

    def interrupt(_file: object, _overrides: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("segkd.pipeline.config.load", interrupt)
    monkeypatch.setattr("sys.argv", ["demo.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).parents[1] / "examples" / "demo.py"), run_name="__main__")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nInterrupted. The same command goes on with what is left.\n"
