"""Images that are left out by name, and the list of broken ones that ``data check`` writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from segkd.cli.main import main
from segkd.pipeline.data.check import check
from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.readers import find, open_data
from segkd.pipeline.data.sample import Role
from segkd.storage.errors import ConfigError

NAMES = ("a/0", "a/1", "a/2", "b/0")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four labelled images, and two without labels beside them."""
    for seed, name in enumerate([*(f"set/images/{name}" for name in NAMES), "clips/x", "clips/in/y"]):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)).save(path)
    for name in NAMES:
        path = tmp_path / f"set/labels/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.eye(8, 9, dtype=np.uint8)).save(path)
    return tmp_path


def config(root: Path, *lines: str) -> DataConfig:
    (root / "skip.txt").write_text("".join(f"{line}\n" for line in lines))
    return DataConfig(
        reader="folder",
        root=str(root / "set"),
        classes=("road", "sky"),
        folders={Role.TRAIN: ("a",), Role.REPORT: ("b",)},
        unlabelled=(str(root / "clips"),),
        skip=str(root / "skip.txt"),
    )


def segkd(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_images_are_named_by_id_or_file(root: Path) -> None:
    lines = ["# broken", "", "a/0", "images/a/1.png", str(root / "set/images/b/0.png"), "unlabelled/clips/x"]
    found = find(config(root, *lines))
    assert [sample.id for sample in found.source.samples] == ["unlabelled/clips/in/y", "a/2"]
    assert found.complaints == found.idle == ()
    assert (found.unused, found.skipped) == (0, 4)
    assert [sample.id for sample in open_data(config(root, str(root / "clips/in/y.png"))).samples] == [
        *("unlabelled/clips/x", "b/0", "a/0", "a/1", "a/2"),
    ]


def test_an_image_that_is_left_out_needs_no_label_map(root: Path) -> None:
    (root / "set/labels/a/1.png").unlink()
    assert [sample.id for sample in open_data(config(root, "a/1")).samples if sample.role is Role.TRAIN] == [
        "a/0",
        "a/2",
    ]


def test_a_line_that_names_nothing_is_told_and_harms_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    described = config(root, "a/0", "a/9", "images/a/8.png")
    skip = root / "skip.txt"
    message = (
        f"{skip}, line 2: there is no sample or image 'a/9' to leave out; so it is with {skip}, line 3 "
        "('images/a/8.png')"
    )
    assert len(open_data(described).samples) == 5
    assert [record.message for record in caplog.records] == [message]
    assert [str(told) for told in check(described).complaints if "to leave out" in str(told)] == [message]


def test_no_file_is_none(root: Path) -> None:
    assert len(open_data(replace(config(root, "a/0"), skip="")).samples) == 6


def test_a_list_that_cannot_be_read(root: Path) -> None:
    described = config(root)
    (root / "skip.txt").unlink()
    with pytest.raises(ConfigError) as raised:
        open_data(described)
    assert str(raised.value) == (
        f"data.skip = '{root / 'skip.txt'}' cannot be read (No such file or directory); its path is relative to the "
        "working directory"
    )


def test_what_else_is_broken_joins_the_list(root: Path) -> None:
    run, skip = root / "run.toml", root / "skip.txt"
    skip.write_text("# by hand\na/0\n")
    run.write_text(
        f"""[data]
reader = "folder"
root = {json.dumps(str(root / "set"))}
classes = ["road", "sky"]
folders = {{ train = ["a"], report = ["b"] }}
skip = {json.dumps(str(skip))}
"""
    )
    result = segkd("data", "check", "-c", run, "--list-broken", skip)
    assert f"No file is broken; {skip} stays as it is\n" in result.stdout
    assert "\n(skipped)        1\n" in result.stdout
    result = segkd("data", "check", "-c", run, "--list-broken", root / "other.txt")
    assert f"No file is broken; {root / 'other.txt'} is not written\n" in result.stdout
    assert not (root / "other.txt").exists()
    (root / "set/images/a/1.png").write_bytes(b"no image")
    (root / "set/labels/a/2.png").unlink()
    result = segkd("data", "check", "-c", run, "--list-broken", skip)
    assert result.exit_code == 1
    assert (
        f"{skip} names 1 sample more, which leaves them out; 1 more of the errors are not of broken files\n"
        in result.stdout
    )
    assert skip.read_text() == "# by hand\na/0\na/1\n"


def test_broken_images_are_listed_and_stage_1_does_without_them(run: Path, tmp_path: Path) -> None:
    broken = run.parent / "images/a/0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    list_of = tmp_path / "broken.txt"
    result = segkd("data", "check", "-c", run)
    assert result.exit_code == 1
    assert 'To do without 1 sample: --list-broken broken.txt, and skip = "broken.txt" in [data]' in result.stdout
    assert segkd("teacher-cache", "-c", run).exit_code == 1
    result = segkd("data", "check", "-c", run, "--list-broken", list_of)
    assert result.exit_code == 1
    assert f"{list_of} names 1 sample; skip = {json.dumps(str(list_of))} in [data] leaves them out" in result.stdout
    assert list_of.read_text() == "a/0\n"
    again = segkd("data", "check", "-c", run, "--list-broken", list_of)
    assert (again.exit_code, again.stderr) == (
        2,
        f"Error: {list_of} exists; name another file, or replace it with --overwrite\n",
    )
    skip = ("-s", f"data.skip={json.dumps(str(list_of))}")
    report = json.loads(segkd("data", "check", "-c", run, *skip, "--json").stdout)
    assert (report["ok"], report["broken"], report["skipped"], report["unused"]) == (True, [], 1, 0)
    # What had been written before the broken image was met is kept.
    result = segkd("teacher-cache", "-c", run, *skip, "--close")
    assert result.exit_code == 0, result.stderr
    info = json.loads(segkd("cache", "info", run.parent / "cache.zarr", "--json").stdout)
    assert sum(info["roles"].values()) == 5
    result = segkd("train-student", "-c", run, *skip, "-s", "train.labelled=1", "--output", tmp_path / "student")
    assert result.exit_code == 0, result.stderr
