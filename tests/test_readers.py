"""Readers: which files are samples, what each may be used for, and what is refused."""

from __future__ import annotations

import math
import os
import pickle
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.names import names_under
from segkd.pipeline.data.readers import find, open_data
from segkd.pipeline.data.sample import DataSource, Role, with_role
from segkd.pipeline.data.scenes import SceneConfig
from segkd.pipeline.settings import parse, to_toml
from segkd.storage.errors import ConfigError, ContaminationError, DataError

CAMVID = Path(__file__).parents[1] / "../shared/data/camvid"
SIZE = (4, 6)


def put(root: Path, *names: str, values: int | tuple[int, ...] = 0, size: tuple[int, int] = SIZE) -> None:
    """Images (a colour) or label maps (a value), by their folder's name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if isinstance(values, int) else "RGB", size[::-1], values).save(root / name)


def put_pairs(root: Path, *stems: str, images: str = "images", labels: str = "labels") -> None:
    put(root, *(f"{images}/{stem}.jpg" for stem in stems), values=(9, 9, 9))
    put(root, *(f"{labels}/{stem}.png" for stem in stems))


def write(file: Path, *lines: str) -> str:
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def folder(root: Path, **options: Any) -> DataConfig:
    if not options.keys() & {"lists", "folders", "fractions"}:
        options["folders"] = {"train": (".",)}
    return DataConfig(reader="folder", root=str(root), **({"classes": ("road", "sky")} | options))


def roles(source: DataSource) -> dict[str, str]:
    return {sample.id: str(sample.role) for sample in source.samples}


def refused(config: DataConfig, message: str, kind: type[Exception] = DataError) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        open_data(config)


# --- folder -----------------------------------------------------------------------------------------------------------


def test_folder_matches_by_stem_and_keeps_nested_names(tmp_path: Path) -> None:
    put_pairs(tmp_path, "b/x", "a", "b/c.d/y")
    put(tmp_path, "images/.hidden.png", "images/notes.gif")
    source = open_data(folder(tmp_path))
    assert [sample.id for sample in source.samples] == ["a", "b/c.d/y", "b/x"]
    sample = source.samples[2]
    assert (sample.role, sample.labelled, sample.group) == (Role.TRAIN, True, "")
    assert source.size(sample) == SIZE
    assert source.image(sample).shape == (*SIZE, 3)
    assert source.labels(sample).tolist() == np.zeros(SIZE, int).tolist()
    assert len(source.image_digest(sample)) == 16


def test_folder_with_suffixes_takes_only_its_own_files(tmp_path: Path) -> None:
    put(tmp_path, "left/aachen/f1_left.png", "left/aachen/f2_left.png", "left/aachen/f1_right.png", values=(1, 2, 3))
    put(tmp_path, "fine/aachen/f1_fine_ids.png", "fine/aachen/f2_fine_ids.png", "fine/aachen/f1_fine_colour.png")
    config = folder(tmp_path, images="left", labels="fine", image_suffix="_left", label_suffix="_fine_ids")
    assert roles(open_data(config)) == {"aachen/f1": "train", "aachen/f2": "train"}


@pytest.mark.parametrize(
    ("image", "label", "suffixes"),
    [
        ("{}.jpg", "{}.png", {}),
        ("{}.png", "{}_mask.png", {"label_suffix": "_mask"}),
        ("{}_image.png", "{}_mask.png", {"image_suffix": "_image", "label_suffix": "_mask"}),
        ("{}.tif", "{}.png", {"label_suffix": ".png"}),
    ],
)
def test_one_folder_of_both(tmp_path: Path, image: str, label: str, suffixes: Mapping[str, str]) -> None:
    for stem in ("a", "b"):
        put(tmp_path, image.format(stem), values=(1, 2, 3))
        put(tmp_path, label.format(stem))
    source = open_data(folder(tmp_path, images=".", labels=".", **suffixes))
    assert roles(source) == {"a": "train", "b": "train"}
    assert all(sample.labelled for sample in source.samples)


def test_labels_below_the_images_are_no_images(tmp_path: Path) -> None:
    put(tmp_path, "a.png", values=(1, 2, 3))
    put(tmp_path, "masks/a.png")
    assert roles(open_data(folder(tmp_path, images=".", labels="masks"))) == {"a": "train"}


def test_images_alone_may_be_auxiliary(tmp_path: Path) -> None:
    put(tmp_path, "images/a.png", values=(1, 2, 3))
    source = open_data(folder(tmp_path, labels="", folders={"auxiliary": (".",)}))
    assert [(sample.role, sample.labelled) for sample in source.samples] == [(Role.AUXILIARY, False)]
    with pytest.raises(
        DataError,
        match=f"^{re.escape(str(tmp_path))}/images/a.png: there is no label map for it; ask for its image only$",
    ):
        source.labels(source.samples[0])


def test_auxiliary_samples_may_have_labels(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a")
    put(tmp_path, "images/b.png", values=(1, 2, 3))
    source = open_data(folder(tmp_path, folders={"auxiliary": (".",)}))
    assert [sample.labelled for sample in source.samples] == [True, False]
    assert source.labels(source.samples[0]).shape == SIZE


def test_roles_by_folders_the_innermost_decides(tmp_path: Path) -> None:
    put_pairs(tmp_path, "train/a", "train/more/b", "val/c", "other/d")
    config = folder(tmp_path, folders={"train": ("train/",), "auxiliary": ("train/more",), "report": ("val",)})
    found = find(config)
    assert roles(found.source) == {"train/a": "train", "train/more/b": "auxiliary", "val/c": "report"}
    assert found.unused == 1
    assert [sample.role for sample in found.source.samples] == [Role.AUXILIARY, Role.REPORT, Role.TRAIN]
    refused(folder(tmp_path, folders={"train": ("trian",)}), "data.folders.train names 'trian', which holds no images")
    refused(
        folder(tmp_path, folders={"train": ("val",), "report": ("val/",)}),
        "data.folders gives 'val/' to both train and report; leave it to one of them",
        ContaminationError,
    )


def test_roles_by_group_never_cut_one(tmp_path: Path) -> None:
    stems = [f"s{group}/f{frame}" for group in range(40) for frame in range(3)]
    put_pairs(tmp_path, *stems)
    fractions = {"train": 0.5, "select": 0.25, "report": 0.25}
    source = open_data(folder(tmp_path, fractions=fractions, group="^(s[0-9]+)/"))
    by_group: dict[str, set[Role]] = {}
    for sample in source.samples:
        assert sample.group == sample.id.split("/")[0]
        by_group.setdefault(sample.group, set()).add(sample.role)
    assert all(len(of) == 1 for of in by_group.values())
    counts = {role: len(with_role(source, role)) / 3 for role in Role}
    assert 12 <= counts[Role.TRAIN] <= 28
    assert min(counts[Role.SELECT], counts[Role.REPORT]) >= 3
    before = roles(source)
    put_pairs(tmp_path, "s40/f0", "s0/f9")
    after = roles(open_data(folder(tmp_path, fractions=fractions, group="^(s[0-9]+)/")))
    assert {sample_id: after[sample_id] for sample_id in before} == before
    assert after["s0/f9"] == before["s0/f0"]


def test_a_group_for_every_sample(tmp_path: Path) -> None:
    put_pairs(tmp_path, "s1/a", "b")
    refused(
        folder(tmp_path, group="^(s[0-9]+)/"),
        "data.group = '^(s[0-9]+)/' finds no group in sample 'b'; make it match every id",
    )


def test_order_does_not_depend_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_pairs(tmp_path, "b", "a", "d/c")
    expected = open_data(folder(tmp_path)).samples

    class Reversed:
        def __init__(self, entries: Any) -> None:
            self._entries = entries

        def __enter__(self) -> Iterable[os.DirEntry[str]]:
            return sorted(self._entries, key=lambda entry: entry.name, reverse=True)

        def __exit__(self, *_: object) -> None:
            self._entries.close()

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Reversed(scandir(path)))
    assert open_data(folder(tmp_path)).samples == expected


def test_opening_asks_nothing_of_single_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_pairs(tmp_path, *(f"d/{index}" for index in range(20)))
    asked: list[str] = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: asked.append(path.name) or stat(path, **options))
    assert len(open_data(folder(tmp_path)).samples) == 20
    assert not [name for name in asked if name.endswith((".jpg", ".png"))]


def test_a_source_is_a_small_pickle(tmp_path: Path) -> None:
    put_pairs(tmp_path, *(f"frame_{index:04d}" for index in range(100)))
    source = open_data(folder(tmp_path))
    pickled = pickle.dumps(source)
    copy = pickle.loads(pickled)
    assert copy.samples == source.samples
    assert copy.classes == source.classes
    assert (copy.image(copy.samples[3]) == source.image(source.samples[3])).all()
    assert len(pickled) < 100 * 150


# --- folder, bad input ------------------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path: Path) -> None:
    refused(
        folder(tmp_path),
        f"{tmp_path}/images: cannot be listed (No such file or directory); check the folders of [data]",
    )


def test_a_relative_root_is_looked_for_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        folder(Path("absent")),
        "absent/images: cannot be listed (No such file or directory); check the folders of [data]; "
        f"paths in a run file are relative to the folder you run from, {tmp_path}",
    )


def test_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    refused(
        folder(tmp_path, image_suffix="_left"),
        f"{tmp_path}/images: holds no images; expected files *_left{{.bmp,.jpeg,.jpg,.png,.tif,.tiff,.webp}}",
    )
    put(tmp_path, "images/a.png", values=(1, 2, 3))
    refused(
        folder(tmp_path),
        f"{tmp_path}/labels: holds no label maps; expected files *{{.bmp,.png,.tif,.tiff}}, "
        "or data.labels = '' for none",
    )
    refused(
        folder(tmp_path, label_suffix="_ids.png"),
        f"{tmp_path}/labels: holds no label maps; expected files *_ids.png, or data.labels = '' for none",
    )


def test_no_common_stems(tmp_path: Path) -> None:
    put(tmp_path, *(f"images/{stem}.png" for stem in "abcd"), values=(1, 2, 3))
    put(tmp_path, *(f"labels/{stem}_L.png" for stem in "abcd"))
    refused(
        folder(tmp_path),
        f"{tmp_path}: no image has a label map of its name; images are 'a', 'b', 'c', label maps 'a_L', 'b_L', 'c_L'; "
        "set data.image_suffix and data.label_suffix (reader 'folder') to what differs",
    )


def test_missing_partners(tmp_path: Path) -> None:
    put_pairs(tmp_path, "train/a", "val/b")
    put(tmp_path, *(f"images/{stem}.png" for stem in ("train/c", "train/d", "val/e")), values=(1, 2, 3))
    put(tmp_path, "labels/train/f.png")
    config = folder(tmp_path, folders={"train": ["train"], "report": ["val"]})
    missing = f"no label map of its name in {tmp_path}/labels; a sample of role"
    remedy = 'needs one, one of role auxiliary does not: data.without_labels = "auxiliary"'
    refused(
        config,
        f"{tmp_path}/images/val/e.png: {missing} report {remedy} leaves it out (and 1 more: run `segkd data check`)",
    )
    complaints = find(config).complaints
    assert [(complaint.severity, str(complaint)) for complaint in complaints] == [
        ("warning", f"{tmp_path}/labels/train/f.png: a label map without an image; it is not used"),
        ("error", f"{tmp_path}/images/val/e.png: {missing} report {remedy} leaves it out"),
        (
            "error",
            f"{tmp_path}/images/train/c.png: {missing} train {remedy} makes it one; "
            f"so it is with {tmp_path}/images/train/d.png",
        ),
    ]
    assert [complaint.others for complaint in complaints] == [(), (), (f"{tmp_path}/images/train/d.png",)]


def test_of_many_files_with_one_fault_some_are_named_and_all_are_kept(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a")
    put(tmp_path, *(f"images/b{number}.png" for number in range(9)), values=(1, 2, 3))
    (complaint,) = find(folder(tmp_path)).complaints
    assert str(complaint).endswith("b3.png, " + f"{tmp_path}/images/b4.png, {tmp_path}/images/b5.png and 3 more")
    assert complaint.to_dict()["others"] == [f"{tmp_path}/images/b{number}.png" for number in range(1, 9)]


def test_images_without_a_label_map_may_be_auxiliary(tmp_path: Path) -> None:
    put_pairs(tmp_path, "train/a", "val/b")
    put(tmp_path, "images/train/c.png", "images/val/d.png", values=(1, 2, 3))
    found = find(folder(tmp_path, without_labels="auxiliary", folders={"train": ["train"], "report": ["val"]}))
    assert {sample.id: (sample.role, sample.labelled) for sample in found.source.samples} == {
        "train/a": ("train", True),
        "val/b": ("report", True),
        "train/c": ("auxiliary", False),
    }
    assert found.unused == 1
    assert [(complaint.severity, str(complaint)) for complaint in found.complaints] == [
        ("warning", f"{tmp_path}/images/val/d.png: no label map of its name, so it is left out of role report")
    ]


def test_a_group_without_label_maps_is_auxiliary_whatever_fraction_it_falls_in(tmp_path: Path) -> None:
    """A frame without labels beside labelled ones that are scored on is not."""
    labelled = [f"{clip}/1" for clip in "abcdefgh"]
    put_pairs(tmp_path, *labelled)
    put(tmp_path, *(f"images/{clip}/2.png" for clip in "abcdefghijklmnop"), values=(1, 2, 3))
    options = {"fractions": {"train": 0.5, "report": 0.5}, "group": "^[a-p]", "folders": {}}
    found = find(folder(tmp_path, without_labels="auxiliary", **options))
    roles = {sample.id: str(sample.role) for sample in found.source.samples}
    assert {roles[sample_id] for sample_id in labelled} == {"train", "report"}
    for clip in "abcdefgh":
        assert roles.get(f"{clip}/2") == ("auxiliary" if roles[f"{clip}/1"] == "train" else None)
    assert {roles.get(f"{clip}/2") for clip in "ijklmnop"} == {"auxiliary"}
    assert found.unused == sum(role != "train" for sample_id, role in roles.items() if sample_id in labelled)


def test_lists_say_themselves_which_samples_are_auxiliary(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.without_labels means nothing beside data\.lists, which name auxiliary"
    ):
        folder(tmp_path, without_labels="auxiliary", folders={}, lists={"train": "train.txt"})


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a", os.fsdecode(b"caf\xe9"))
    refused(
        folder(tmp_path),
        f"{tmp_path}/images: the name 'caf\\udce9.jpg' is not UTF-8, so that no list or cache can hold it; rename it",
    )


def test_two_files_of_one_name(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a")
    put(tmp_path, "images/a.png", values=(1, 2, 3))
    refused(
        folder(tmp_path),
        f"{tmp_path}/images: a.jpg and a.png have one name; remove one of them, or give a suffix with the "
        "extension that counts",
    )
    assert roles(open_data(folder(tmp_path, image_suffix=".jpg"))) == {"a": "train"}


def test_sizes_that_differ(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a")
    put(tmp_path, "labels/a.png", size=(6, 4))
    source = open_data(folder(tmp_path))
    message = (
        f"{tmp_path}/labels/a.png: 6 x 4 pixels, but its image a.jpg has 4 x 6 (height x width); make them of one size"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        source.labels(source.samples[0])


def test_folders_that_link_to_each_other_come_to_an_end(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a/b")
    (tmp_path / "images/a/again").symlink_to(tmp_path / "images", target_is_directory=True)
    with pytest.raises(DataError, match="cannot be listed"):
        list(names_under(tmp_path / "images"))


# --- lists ------------------------------------------------------------------------------------------------------------


def test_roles_by_lists(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a", "b", "c/d", "e")
    lists = {
        "train": write(tmp_path / "train.txt", "\ufeff# learned from", "a", "", "  ./c/d  "),
        "report": write(tmp_path / "report.txt", "b.jpg"),
    }
    found = find(folder(tmp_path, lists=lists))
    assert roles(found.source) == {"a": "train", "c/d": "train", "b": "report"}
    assert (found.unused, found.complaints) == (1, ())


def test_a_sample_of_two_roles(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a", "b")
    auxiliary = write(tmp_path / "auxiliary.txt", "a", "b")
    for role in ("select", "report", "train"):
        other = write(tmp_path / f"{role}.txt", "# held out", "b.jpg")
        refused(
            folder(tmp_path, lists={"auxiliary": auxiliary, role: other}),
            f"sample 'b' has two roles: auxiliary ({auxiliary}, line 2) and {role} ({other}, line 2); "
            "remove it from one of the lists",
            ContaminationError,
        )


def test_a_sample_named_twice(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a")
    file = write(tmp_path / "train.txt", "a", "a.jpg")
    refused(
        folder(tmp_path, lists={"train": file}),
        f"sample 'a' is named twice: {file}, line 1 and {file}, line 2; remove one of the lines",
    )


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "b/../../a"])
def test_names_never_leave_their_folder(tmp_path: Path, name: str) -> None:
    put_pairs(tmp_path, "a")
    file = write(tmp_path / "train.txt", name)
    message = f"{file}, line 1: {name!r} leaves the folder of the data; expected a name below data.root"
    refused(folder(tmp_path, lists={"train": file}), message)
    refused(listed(tmp_path, train=file), message)
    file = write(tmp_path / "train.txt", f"images/a.jpg\t{name}")
    refused(listed(tmp_path, train=file), message)


def test_names_that_are_not_there(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a")
    file = write(tmp_path / "train.txt", "a", "b", "c")
    refused(
        folder(tmp_path, lists={"train": file}),
        f"{file}, line 2: there is no image 'b' under {tmp_path}; so it is with {file}, line 3 ('c')",
    )


def test_lists_that_cannot_be_used(tmp_path: Path) -> None:
    put_pairs(tmp_path, "a")
    empty = write(tmp_path / "empty.txt", "# nothing", "")
    refused(folder(tmp_path, lists={"train": empty}), f"{empty}: names no sample; fill it, or remove data.lists.train")
    absent = str(tmp_path / "absent.txt")
    refused(
        folder(tmp_path, lists={"train": absent}),
        f"data.lists.train = {absent!r} cannot be read (No such file or directory); "
        "its path is relative to the working directory",
        ConfigError,
    )
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    refused(
        folder(tmp_path, lists={"train": str(tmp_path / "binary.txt")}),
        f"data.lists.train = {str(tmp_path / 'binary.txt')!r} cannot be read (not UTF-8 text); "
        "its path is relative to the working directory",
        ConfigError,
    )


# --- list -------------------------------------------------------------------------------------------------------------


def listed(root: Path, **lists: str) -> DataConfig:
    return DataConfig(reader="list", root=str(root), classes=("road", "sky"), lists=lists)


def test_pairs(tmp_path: Path) -> None:
    put(tmp_path, "x/a.jpg", "x/b, c.jpg", "y/d.jpg", values=(1, 2, 3))
    put(tmp_path, "z/one.png", "z/two.png")
    train = write(tmp_path / "train.txt", "x/a.jpg, z/one.png", "x/b, c.jpg\tz/two.png")
    auxiliary = write(tmp_path / "auxiliary.txt", "# images only", "y/d.jpg")
    source = open_data(listed(tmp_path, train=train, auxiliary=auxiliary))
    assert roles(source) == {"y/d": "auxiliary", "x/a": "train", "x/b, c": "train"}
    assert [sample.labelled for sample in source.samples] == [False, True, True]
    assert source.labels(source.samples[1]).shape == SIZE


def test_pairs_that_cannot_be_used(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "a.png", values=(1, 2, 3))
    file = tmp_path / "train.txt"
    expected = "expected an image and at most one label map, with a tab between them where names hold commas"
    for line in ("a.jpg,b.png,c.png", ",b.png"):
        refused(listed(tmp_path, train=write(file, line)), f"{file}, line 1: {line!r}; {expected}")
    lines = write(file, "a.jpg,x/b.png", "c.jpg", "a.jpg a.png", "d.jpg,e.png", "b.jpg b.png")
    assert [str(complaint) for complaint in find(listed(tmp_path, train=lines)).complaints] == [
        f"{file}, line 1: there is no file {tmp_path}/x/b.png; so it is with {file}, line 2 ({tmp_path}/c.jpg), "
        f"{file}, line 4 ({tmp_path}/d.jpg), {file}, line 4 ({tmp_path}/e.png)",
        f"{file}, line 3: there is no file {tmp_path}/a.jpg a.png; put a tab or a comma between image and label map; "
        f"so it is with {file}, line 5 ({tmp_path}/b.jpg b.png)",
    ]
    refused(
        listed(tmp_path, train=write(file, "a.jpg a.png")),
        f"{file}, line 1: there is no file {tmp_path}/a.jpg a.png; put a tab or a comma between image and label map",
    )
    refused(
        listed(tmp_path, train=write(file, "a.jpg")),
        f"{tmp_path}/a.jpg: no label map of its name in its line of the list; a sample of role train needs one, "
        "one of role auxiliary does not",
    )
    refused(
        listed(tmp_path, train=write(file, "a.jpg,a.png", "./a.png,a.png")),
        f"sample 'a' is named twice: {file}, line 1 and {file}, line 2; remove one of the lines",
    )


# --- camvid -----------------------------------------------------------------------------------------------------------


def put_camvid(root: Path, *ids: str) -> None:
    for sample_id in ids:
        split, stem = sample_id.split("/")
        put_pairs(root, stem, images=split, labels=f"{split}annot")


def test_camvid_by_its_splits(tmp_path: Path) -> None:
    put_camvid(tmp_path, "train/0001TP_1", "train/0001TP_2", "val/0016E5_1")
    source = open_data(DataConfig(reader="camvid", root=str(tmp_path)))
    assert roles(source) == {"val/0016E5_1": "report", "train/0001TP_1": "train", "train/0001TP_2": "train"}
    assert [sample.group for sample in source.samples] == ["0016E5", "0001TP", "0001TP"]
    put_camvid(tmp_path, "test/Seq05VD_1")
    source = open_data(DataConfig(reader="camvid", root=str(tmp_path)))
    assert with_role(source, Role.SELECT)[0].id == "val/0016E5_1"
    assert with_role(source, Role.REPORT)[0].id == "test/Seq05VD_1"


def test_camvid_without_its_splits(tmp_path: Path) -> None:
    put_camvid(tmp_path, "day/a")
    refused(
        DataConfig(reader="camvid", root=str(tmp_path)),
        f"{tmp_path}: no image has a role by the official split of CamVid (SegNet) (train is train, report is val, for "
        "there is no test); give roles by data.lists or data.folders",
    )
    source = open_data(DataConfig(reader="camvid", root=str(tmp_path), folders={Role.TRAIN: ("day",)}))
    assert roles(source) == {"day/a": "train"}
    refused(
        DataConfig(reader="camvid", root=str(tmp_path / "dayannot")),
        f"{tmp_path}/dayannot: is not laid out as reader 'camvid' needs it; looked for ?*annot: found none of it; "
        "or for 701_StillsRaw_full and LabeledApproved_full: found none of it; "
        f'set data.root = "{tmp_path}", where it is',
    )


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid does not lie beside the checkout")
def test_real_camvid() -> None:
    lists = {
        Role(role): str(CAMVID / f"lists/{name}.txt")
        for role, name in (
            ("train", "labelled"),
            ("auxiliary", "auxiliary"),
            ("select", "select"),
            ("report", "report"),
        )
    }
    source = open_data(DataConfig(reader="camvid", root=str(CAMVID), lists=lists))
    assert [len(with_role(source, Role(role))) for role in lists] == [110, 197, 60, 101]
    sample = with_role(source, Role.TRAIN)[0]
    assert sample.id == "train/0001TP_006690"
    assert source.size(sample) == (360, 480)
    assert source.image(sample).shape == (360, 480, 3)
    assert set(np.unique(source.labels(sample))) <= {*range(11), 255}


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_scenes_need_no_files() -> None:
    scenes = SceneConfig(size=(32, 32), train=1, auxiliary=0, select=0, report=2)
    source = open_data(DataConfig(reader="scenes", scenes=scenes))
    assert [sample.role for sample in source.samples] == [Role.REPORT, Role.REPORT, Role.TRAIN]
    assert source.image(source.samples[0]).shape == (32, 32, 3)


# --- the description --------------------------------------------------------------------------------------------------


def test_every_description_survives_a_run_file(tmp_path: Path) -> None:
    config = folder(
        tmp_path,
        folders={"train": ("a", "b"), "report": (".",)},
        palette=((1, 2, 3), (4, 5, 6)),
        label_values={"0-6": "ignore", "7": "road"},
        group="^(.*)_",
    )
    assert parse(DataConfig, tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"reader": "camvid", "images": "left"},
            "data.images means nothing to reader 'camvid', only to 'folder'; remove it or change data.reader",
        ),
        (
            {"reader": "scenes", "root": "x"},
            "data.root means nothing to reader 'scenes', only to 'ade20k' or 'camvid' or 'cityscapes' or "
            "'coco_stuff' or 'pascal_context' or 'voc2012' or 'folder' or 'list'; "
            "remove it or change data.reader",
        ),
        (
            {"lists": {"train": "a"}, "folders": {"train": (".",)}},
            "data.lists and data.folders both give roles; keep one of them",
        ),
        (
            {},
            "data.lists, data.folders and data.fractions are all missing, so no image has a role; "
            'add one of them: folders.train = ["."] gives all images to training',
        ),
        (
            {"reader": "list"},
            "data.lists is missing, reader 'list' needs it; give a file a role: train = \"train.txt\"",
        ),
        (
            {"fractions": {"train": 0.5, "report": 0.4}, "group": ".*"},
            "data.fractions add up to 0.9, expected 1",
        ),
        (
            {"fractions": {"train": 1.5, "report": -0.5}, "group": ".*"},
            "data.fractions has report = -0.5; leave out the roles that get no image",
        ),
        (
            {"fractions": {"train": 1.0, "select": 0.0, "report": math.nan}, "group": ".*"},
            "data.fractions has select = 0, report = nan; leave out the roles that get no image",
        ),
        (
            {"fractions": {"train": 1.0}},
            "data.fractions need data.group, so that no sequence is cut by a split; "
            "group = '.*' makes every image a group of its own",
        ),
        (
            {"folders": {"train": (".",)}, "group": "("},
            "data.group = '(' is not a regular expression: missing ), unterminated subpattern at position 0",
        ),
        (
            {"folders": {"train": (".",)}, "classes": ()},
            "data.classes is missing; name the classes in index order",
        ),
        (
            {"folders": {"train": (".",)}, "classes": ("a", "b", "a")},
            "data.classes holds 'a' twice; name every class once",
        ),
        (
            {"folders": {"train": (".",)}, "classes": ("a", "ignore")},
            "data.classes holds 'ignore', which is no class; remove it, label values may map to it",
        ),
        (
            {"folders": {"train": (".",)}, "classes": tuple(map(str, range(256)))},
            "data.classes has 256 names; label maps have room for 255",
        ),
        (
            {"folders": {"train": (".",)}, "label_values": {"0": "a"}, "label_colours": {"0,0,0": "a"}},
            "data.label_values and data.label_colours are both given; keep the one that fits the files",
        ),
        (
            {"folders": {"train": (".",)}, "palette": ((0, 0, 256),)},
            "data.palette has a channel outside 0 to 255; give [red, green, blue] a class",
        ),
        (
            {"folders": {"train": (".",)}, "max_pixels": 0},
            "data.max_pixels is 0; it must be at least 1",
        ),
    ],
)
def test_descriptions_that_make_no_sense(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        DataConfig(**({"reader": "folder", "classes": ("a",)} if "reader" not in options else {}) | options)
