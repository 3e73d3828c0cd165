"""Folders of images that join a data set as auxiliary samples."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from segkd.cli.main import main
from segkd.pipeline.data.check import check
from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import DataSource, Role
from segkd.pipeline.data.scenes import SceneConfig
from segkd.storage.errors import ConfigError, DataError
from segkd.storage.reader import CacheReader


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng(list(name.encode())).integers(0, 256, 3)
        Image.fromarray(np.full((2, 3, 3), colour, np.uint8)).save(root / name)


def data(root: Path, *unlabelled: str | Path, first: str = "a") -> DataConfig:
    put(root, f"set/images/{first}.png")
    (root / "set/labels" / first).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ones((2, 3), np.uint8)).save(root / f"set/labels/{first}.png")
    return DataConfig(
        reader="folder",
        root=str(root / "set"),
        classes=("road", "sky"),
        folders={Role.TRAIN: (".",)},
        unlabelled=tuple(map(str, unlabelled)),
    )


def refused(config: DataConfig, message: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        open_data(config)


def ids(source: DataSource) -> list[tuple[str, str]]:
    return [(str(sample.role), sample.id) for sample in source.samples]


def test_nested_names_are_kept_and_labels_are_not_looked_for(tmp_path: Path) -> None:
    put(tmp_path, "clips/day/one/0001.jpg", "clips/day/0001.png", "clips/b.jpg", "clips/.hidden/c.jpg", "web/b.jpg")
    (tmp_path / "clips/notes.txt").write_text("no image")
    source = open_data(data(tmp_path, tmp_path / "clips", tmp_path / "web"))
    assert ids(source) == [
        ("auxiliary", "unlabelled/clips/b"),
        ("auxiliary", "unlabelled/clips/day/0001"),
        ("auxiliary", "unlabelled/clips/day/one/0001"),
        ("auxiliary", "unlabelled/web/b"),
        ("train", "a"),
    ]
    assert [sample.labelled for sample in source.samples] == [False] * 4 + [True]
    assert [sample.group for sample in source.samples[:3]] == [
        "unlabelled/clips",
        "unlabelled/clips/day",
        "unlabelled/clips/day/one",
    ]
    assert source.classes.names == ("road", "sky")


def test_every_sample_is_read_from_its_own_place(tmp_path: Path) -> None:
    put(tmp_path, "clips/a.png", "web/a.png")
    source = pickle.loads(pickle.dumps(open_data(data(tmp_path, tmp_path / "clips", tmp_path / "web"))))
    for sample, file in zip(source.samples, ("clips/a.png", "web/a.png", "set/images/a.png"), strict=True):
        assert np.array_equal(source.image(sample), np.asarray(Image.open(tmp_path / file)))
        assert source.size(sample) == (2, 3)
        assert source.image_file(sample) == tmp_path / file
        assert source.excluded(sample) is None if sample.labelled else not sample.labelled
    assert len({source.image_digest(sample) for sample in source.samples}) == 3
    assert source.labels(source.samples[-1]).tolist() == [[1] * 3] * 2
    with pytest.raises(DataError, match=r"clips/a\.png: there is no label map for it; ask for its image only"):
        source.labels(source.samples[0])


def test_relative_folders_are_those_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "clips/a.png")
    monkeypatch.chdir(tmp_path / "clips")
    for folder in (".", "../clips/"):
        assert ids(open_data(data(tmp_path, folder)))[0] == ("auxiliary", "unlabelled/clips/a")


def test_beside_built_in_scenes_and_lists(tmp_path: Path) -> None:
    put(tmp_path, "clips/a.png", "x.png")
    (tmp_path / "train.txt").write_text("x.png,set/labels/a.png\n")
    data(tmp_path)
    unlabelled = (str(tmp_path / "clips"),)
    scenes = SceneConfig(size=(32, 32), train=1, auxiliary=0, select=0, report=0)
    for config in (
        DataConfig(reader="scenes", scenes=scenes, unlabelled=unlabelled),
        DataConfig(
            reader="list",
            root=str(tmp_path),
            classes=("road", "sky"),
            lists={Role.TRAIN: str(tmp_path / "train.txt")},
            unlabelled=unlabelled,
        ),
    ):
        source = open_data(config)
        assert ids(source)[0] == ("auxiliary", "unlabelled/clips/a")
        assert source.image(source.samples[0]).shape == (2, 3, 3)
        assert source.labels(source.samples[1]).shape == source.size(source.samples[1])


def test_check_counts_them(tmp_path: Path) -> None:
    put(tmp_path, "clips/a.png", "clips/b.png")
    (tmp_path / "clips/b.png").write_bytes(b"no image")
    report = check(data(tmp_path, tmp_path / "clips"))
    assert (report.samples, report.labelled) == ({"train": 1, "auxiliary": 2}, {"train": 1, "auxiliary": 0})
    assert [complaint.message for complaint in report.complaints if complaint.severity == "error"] == [
        f"{tmp_path}/clips/b.png: cannot be read (not an image of a known format); "
        "restore the file, or leave it out: segkd data check --list-broken writes a list for data.skip"
    ]


def test_both_stages_take_them(run: Path) -> None:
    put(run.parent, "clips/day/a.png", "clips/b.png")
    for name in ("day/a", "b"):
        file = run.parent / f"clips/{name}.png"
        Image.open(file).resize((40, 32)).save(file)
    added = ["--set", f'data.unlabelled=["{run.parent}/clips"]', "--set", "train.auxiliary=4"]
    for command, options in (("teacher-cache", []), ("train-student", ["-o", str(run.parent / "student")])):
        result = CliRunner().invoke(main, [command, "-c", str(run), "-q", *added, *options])
        assert result.exit_code == 0, result.output
    cache = CacheReader(run.parent / "cache.zarr")
    assert cache.entry("unlabelled/clips/day/a").role == "auxiliary"


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    put(tmp_path, "one/clips/a.png", "two/clips/a.png")
    (tmp_path / "empty").mkdir()
    one, two = tmp_path / "one/clips", tmp_path / "two/clips"
    refused(
        data(tmp_path, one, two),
        f"data.unlabelled: {one} and {two} have one name, which samples are called by; rename one of them",
        ConfigError,
    )
    refused(
        data(tmp_path, tmp_path / "one", one),
        f"data.unlabelled: {one} lies in {tmp_path / 'one'}, whose images are all taken; remove it",
        ConfigError,
    )
    refused(
        data(tmp_path, tmp_path / "empty"),
        f"{tmp_path}/empty: holds no images; expected files *{{.bmp,.jpeg,.jpg,.png,.tif,.tiff,.webp}}, "
        "or correct data.unlabelled",
        DataError,
    )
    refused(
        data(tmp_path, tmp_path / "absent"),
        f"{tmp_path}/absent: cannot be listed (No such file or directory); check the folders of [data]",
        DataError,
    )
    refused(
        data(tmp_path, one, first="unlabelled/a"),
        "sample 'unlabelled/a' of the data set is called like the images of data.unlabelled; rename its first folder",
        DataError,
    )
