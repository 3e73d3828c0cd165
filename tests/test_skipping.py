"""Images that are left out by name, and the list of broken ones that ``data check`` writes."""

from __future__ import annotations

import json
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
    assert found.complaints == ()
    assert found.unused == 3
    assert [sample.id for sample in open_data(config(root, str(root / "clips/in/y.png"))).samples] == [
        *("unlabelled/clips/x", "b/0", "a/0", "a/1", "a/2"),
    ]


def test_an_image_that_is_left_out_needs_no_label_map(root: Path) -> None:
    (root / "set/labels/a/1.png").unlink()
    assert [sample.id for sample in open_data(config(root, "a/1")).samples if sample.role is Role.TRAIN] == [
        "a/0",
        "a/2",
    ]


def test_a_line_that_names_nothing_is_told_and_harms_nothing(root: Path) -> None:
    described = config(root, "a/0", "a/9", "images/a/8.png")
    assert len(open_data(described).samples) == 5
    skip = root / "skip.txt"
    (told,) = (str(complaint) for complaint in check(described).complaints if "to leave out" in str(complaint))
    assert told == (
        f"{skip}, line 2: there is no sample or image 'a/9' to leave out; so it is with {skip}, line 3 "
        "('images/a/8.png')"
    )


def test_a_list_that_cannot_be_read(root: Path) -> None:
    described = config(root)
    (root / "skip.txt").unlink()
    with pytest.raises(ConfigError) as raised:
        open_data(described)
    assert str(raised.value) == (
        f"data.skip = '{root / 'skip.txt'}' cannot be read (No such file or directory); its path is relative to the "
        "working directory"
    )


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
    assert (report["ok"], report["broken"], report["unused"]) == (True, [], 1)
    # What had been written before the broken image was met is kept.
    result = segkd("teacher-cache", "-c", run, *skip, "--close")
    assert result.exit_code == 0, result.stderr
    info = json.loads(segkd("cache", "info", run.parent / "cache.zarr", "--json").stdout)
    assert sum(info["roles"].values()) == 5
    assert segkd("train-student", "-c", run, *skip, "-s", "train.labelled=1").exit_code == 0
