"""Checking a data set: what is counted, what is complained of; and drafting a description that then opens."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from segkd.pipeline.data.check import DataReport, check
from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.draft import draft
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.progress import Progress
from segkd.pipeline.settings import parse
from segkd.storage.errors import ConfigError, DataError

CAMVID = Path(__file__).parents[1] / "../shared/data/camvid"


def save(file: Path, pixels: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file)


def put(root: Path, stem: str, labels: Any, *, seed: int | None = None) -> None:
    """An image of its own (or of ``seed``) and its label map."""
    shape = np.shape(labels)[:2]
    rng = np.random.default_rng(sum(stem.encode()) if seed is None else seed)
    save(root / f"images/{stem}.png", rng.integers(0, 256, (*shape, 3)))
    save(root / f"labels/{stem}.png", labels)


def folder(root: Path, **options: Any) -> DataConfig:
    options = {"classes": ("road", "sky"), "folders": {"train": ("train",), "report": ("val",)}} | options
    return DataConfig(reader="folder", root=str(root), **options)


def messages(report: DataReport, severity: str) -> list[str]:
    return [str(complaint) for complaint in report.complaints if complaint.severity == severity]


NO_SELECT = (
    "no sample has role select: the best checkpoint cannot be chosen, the last one is what training gives; "
    "give it to some in [data.fractions], lists or folders, if needed"
)


def test_counts_sizes_and_shares(tmp_path: Path) -> None:
    put(tmp_path, "train/a", [[0, 0, 1], [255, 0, 255]])
    put(tmp_path, "train/b", [[0], [1]])
    put(tmp_path, "val/c", [[1, 0, 1], [255, 0, 1]])
    put(tmp_path, "other/d", [[7]])
    report = check(folder(tmp_path))
    assert report.ok
    assert messages(report, "warning") == [NO_SELECT]
    assert report.samples == {"train": 2, "report": 1}
    assert report.sizes == {(2, 3): 2, (2, 1): 1}
    assert report.pixels == {"train": (4, 2, 2), "report": (2, 3, 1)}
    assert report.shares("report") == {"road": 40.0, "sky": 60.0}
    written = json.loads(json.dumps(report.to_dict()))
    assert written["sizes"] == {"2x3": 2, "2x1": 1}
    assert written["unused"] == 1
    assert written["ignored_pixels"] == {"train": 2, "report": 1}
    assert re.search(r"^sky +33\.33 +60\.00$", report.table(), re.MULTILINE)


def test_every_bad_file_is_named(tmp_path: Path) -> None:
    for stem in ("train/cut", "train/size", "train/value", "train/fine", "val/partner"):
        put(tmp_path, stem, np.random.default_rng(1).integers(0, 2, (24, 24)))
    cut, size, value = (
        tmp_path / f"{place}.png" for place in ("images/train/cut", "labels/train/size", "labels/train/value")
    )
    cut.write_bytes(cut.read_bytes()[:300])
    save(size, np.zeros((3, 4)))
    labels = np.zeros((24, 24))
    labels[5, 7:] = 9
    save(value, labels)
    (tmp_path / "labels/val/partner.png").unlink()
    report = check(folder(tmp_path))
    assert not report.ok
    missing, *of_files = messages(report, "error")
    assert missing == (
        f"{tmp_path}/images/val/partner.png: no label map of its name in {tmp_path}/labels; a sample of role report "
        'needs one, one of role auxiliary does not: data.without_labels = "auxiliary" leaves it out'
    )
    assert re.fullmatch(
        re.escape(f"{cut}: cannot be read (")
        + ".*"
        + re.escape("); restore the file, or leave it out: segkd data check --list-broken writes a list for data.skip"),
        of_files[0],
    )
    assert of_files[1:] == [
        f"{size}: 3 x 4 pixels, but its image size.png has 24 x 24 (height x width); make them of one size",
        f"{value}: row 5, column 7: value 9 is no class, expected 0-1, 255; "
        "name all classes in data.classes, or map all values of these files in [data.label_values]; "
        "such values in 1 label map: 9; "
        'to paste below [data] and correct: label_values = { 0 = "road", 1 = "sky", 9 = "ignore", 255 = "ignore" }',
    ]
    assert report.sizes == {(24, 24): 4}
    assert sum(report.pixels["train"]) == 24 * 24


def test_labelled_images_that_exif_turns_are_warned_of(tmp_path: Path) -> None:
    for stem in ("train/a", "train/b", "val/c"):
        put(tmp_path, stem, [[0, 1], [1, 0]])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for stem in ("train/b", "val/c"):
        file = tmp_path / f"images/{stem}.png"
        Image.open(file).save(file, exif=exif)
    report = check(folder(tmp_path))
    assert report.ok
    assert messages(report, "warning")[0] == (
        f"sample 'val/c' (report, {tmp_path}/images/val/c.png) is turned upright by its EXIF data (as is every one of "
        "2 labelled images): its label map must show it upright too, unless it has the same EXIF data"
    )


def test_values_without_a_meaning_are_one_complaint_with_a_table_that_mends_it(tmp_path: Path) -> None:
    for stem, row in (("a", [0, 11]), ("b", [9, 1]), ("c", [0, 1])):
        put(tmp_path, f"train/{stem}", [row])
    put(tmp_path, "val/d", [[0, 30]])
    (message,) = messages(check(folder(tmp_path)), "error")
    assert message.startswith(
        f"{tmp_path}/labels/val/d.png: row 0, column 1: value 30 is no class, expected 0-1, 255; "
    )
    told, _, table = message.partition("; to paste below [data] and correct: ")
    assert told.endswith("; such values in 3 label maps: 9, 11, 30")
    mended = tomllib.loads(table)["label_values"]
    assert mended == {"0": "road", "1": "sky", "9": "ignore", "11": "ignore", "30": "ignore", "255": "ignore"}
    assert check(folder(tmp_path, label_values=mended)).ok
    del mended["9"], mended["30"]
    (message,) = messages(check(folder(tmp_path, label_values=mended)), "error")
    assert message.endswith(
        "such values in 2 label maps: 9, 30; to add to [data.label_values], each on a line of its own, and correct: "
        '9 = "ignore", 30 = "ignore"'
    )


def test_colours_without_a_meaning_are_one_complaint(tmp_path: Path) -> None:
    for stem, last in (("a", (1, 2, 3)), ("b", (0, 0, 9))):
        put(tmp_path, f"train/{stem}", [[(0, 0, 0), last]])
    colours = {"#000000": "road", "#ffffff": "sky"}
    (message,) = messages(check(folder(tmp_path, label_colours=colours, folders={"train": ("train",)})), "error")
    told, _, table = message.partition("; to add to [data.label_colours], each on a line of its own, and correct: ")
    assert told.endswith("; such colours in 2 label maps: #000009, #010203")
    assert table == '"#000009" = "ignore", "#010203" = "ignore"'


def test_label_maps_of_noise_are_not_listed(tmp_path: Path) -> None:
    put(tmp_path, "train/a", [range(2, 50)])
    (message,) = messages(check(folder(tmp_path, folders={"train": ("train",)})), "error")
    assert message.endswith(" 32, 33 and 16 more: are these label maps?")


def test_what_leaves_nothing_is_a_complaint_too(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    report = check(folder(tmp_path, labels=""))
    assert not report.ok
    assert messages(report, "error") == [
        f"{tmp_path}/images: holds no images; expected files *{{.bmp,.jpeg,.jpg,.png,.tif,.tiff,.webp}}"
    ]
    assert report.table() == ""
    assert report.to_dict()["samples"] == {}


def test_a_sample_of_two_roles_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, "a", [[0]])
    for role in ("train", "report"):
        (tmp_path / f"{role}.txt").write_text("a\n")
    lists = {role: str(tmp_path / f"{role}.txt") for role in ("train", "report")}
    (message,) = messages(check(folder(tmp_path, folders={}, lists=lists)), "error")
    assert message.startswith("sample 'a' has two roles: train (")


def test_wrong_descriptions_are_raised(tmp_path: Path) -> None:
    put(tmp_path, "train/a", [[0]])
    with pytest.raises(ConfigError, match="which is no class"):
        check(folder(tmp_path, label_values={"0": "rode"}))


def test_warnings(tmp_path: Path) -> None:
    put(tmp_path, "train/s1_a", [[0, 0]])
    put(tmp_path, "train/s2_b", [[0, 0]])
    put(tmp_path, "val/s1_c", [[1, 0]])
    report = check(folder(tmp_path, group="(s[0-9])_"))
    assert report.ok
    assert messages(report, "warning") == [
        NO_SELECT,
        "never seen in the labels of role train: sky",
        "1 groups are both learned from and scored on, the first is 's1': scores are too good where their images "
        "resemble each other; split by group",
    ]


def test_progress_is_told_of_every_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "train/a", [[0]])
    put(tmp_path, "val/b", [[1]])
    with caplog.at_level("INFO", logger="segkd"):
        check(folder(tmp_path), progress=Progress("lines"))
    assert caplog.messages[-1].startswith("Checking: 2/2 images")


# --- drafts -----------------------------------------------------------------------------------------------------------


def opened(root: Path) -> tuple[DataConfig, dict[str, str]]:
    """The description that is drafted for ``root``, and the roles of the samples that it then opens."""
    config = parse(DataConfig, tomllib.loads(draft(root))["data"])
    source = open_data(config)
    for sample in source.samples:
        if sample.labelled:
            source.labels(sample)
    return config, {sample.id: str(sample.role) for sample in source.samples}


def test_draft_of_camvid(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        save(tmp_path / f"{split}/a.jpg", np.zeros((2, 12, 3)))
        save(tmp_path / f"{split}annot/a.png", [range(12)] * 2)
    config, roles = opened(tmp_path)
    assert (config.reader, config.classes) == ("camvid", ())
    assert roles == {"train/a": "train", "val/a": "select", "test/a": "report"}


def test_draft_of_its_layout_with_other_values(tmp_path: Path) -> None:
    save(tmp_path / "day/a.jpg", np.zeros((1, 3, 3)))
    save(tmp_path / "dayannot/a.png", [[0, 40, 200]])
    config, roles = opened(tmp_path)
    assert config.classes == ("class0", "class40", "class200")
    assert config.label_values == {"0": "class0", "40": "class40", "200": "class200"}
    assert roles == {"day/a": "train"}


def test_draft_of_two_folders(tmp_path: Path) -> None:
    for stem in ("training/a", "validation/b"):
        put(tmp_path, stem, [[0, 1, 3, 255]])
    config, roles = opened(tmp_path)
    assert (config.images, config.labels, config.label_values) == ("images", "labels", {})
    assert config.classes == ("class0", "class1", "class2", "class3")
    assert roles == {"training/a": "train", "validation/b": "report"}


def test_draft_of_pairs_of_folders_learns_from_the_one_to_train_on(tmp_path: Path) -> None:
    """However many images are there to score; the others are named."""
    for split, count in (("test", 3), ("train", 2), ("val", 3)):
        for number in range(count):
            save(tmp_path / f"{split}/{split}{number}.jpg", np.full((4, 4, 3), number))
            save(tmp_path / f"{split}_labels/{split}{number}_L.png", [[0, 1], [1, 0]])
    text = draft(tmp_path)
    config = parse(DataConfig, tomllib.loads(text)["data"])
    assert (config.images, config.labels, config.folders) == ("train", "train_labels", {"train": (".",)})
    for split in ("test", "val"):
        assert f"\n# Left out: 3 images of {split} with label maps in {split}_labels. To use them, bring all" in text
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "val")
    config = parse(DataConfig, tomllib.loads(draft(tmp_path))["data"])
    assert (config.images, config.folders) == ("test", {"report": (".",)})


def put_images(root: Path, *stems: str) -> None:
    for stem in stems:
        save(root / f"images/{stem}.png", np.zeros((1, 2, 3)))


def test_draft_of_images_of_which_some_have_label_maps(tmp_path: Path) -> None:
    for stem in ("train/a", "val/d", "val/e"):
        put(tmp_path, stem, [[0, 1]])
    put_images(tmp_path, "train/b", "train/c", "val/f")
    config, roles = opened(tmp_path)
    assert config.without_labels == "auxiliary"
    assert roles == {
        **dict.fromkeys(("val/d", "val/e"), "report"),
        **dict.fromkeys(("train/b", "train/c"), "auxiliary"),
        "train/a": "train",
    }
    assert "\n# Images without a label map of their name, beside others that have one: 3. without" in draft(tmp_path)


def test_draft_of_folders_without_label_maps(tmp_path: Path) -> None:
    """Those to test on are nobody's to learn from; others are auxiliary."""
    for stem in ("train/a", "val/b"):
        put(tmp_path, stem, [[0, 1]])
    put_images(tmp_path, "test/c", "unlabelled/d", "web/deeper/e")
    config, roles = opened(tmp_path)
    assert config.without_labels == "refuse"
    assert roles == {
        "train/a": "train",
        "val/b": "report",
        "unlabelled/d": "auxiliary",
        "web/deeper/e": "auxiliary",
    }
    assert "\n# Not used: test, where no image has a label map.\n" in draft(tmp_path)


def test_draft_names_folders_of_images_beside(tmp_path: Path) -> None:
    put(tmp_path, "a", [[0, 1]])
    for name in ("clips/day/b.png", "web/c.jpg"):
        save(tmp_path / name, np.zeros((4, 4, 3)))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/read.me").write_text("")
    told = f'\n# Images without label maps lie in other folders, too. As auxiliary ones: unlabelled = ["{tmp_path}'
    assert f'{told}/clips", "{tmp_path}/web"]\n[data]\n' in draft(tmp_path)
    assert opened(tmp_path)[1] == {"a": "train"}


def test_draft_takes_no_picture_of_labels_for_an_image(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        save(tmp_path / f"{stem}.jpg", np.full((4, 4, 3), ord(stem)))
        save(tmp_path / f"labels/{stem}.png", [[0, 1], [1, 0]])
        save(tmp_path / f"labels_colour/{stem}_c.png", np.zeros((2, 2, 3)))
    config = parse(DataConfig, tomllib.loads(draft(tmp_path))["data"])
    assert (config.images, config.labels, config.without_labels) == (".", "labels", "refuse")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/labels_colour/a_c.png: no label map of its name")):
        open_data(config)


def test_draft_does_not_say_that_images_have_no_label_map_while_some_are_left_over(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / f"images/f{number}.png", np.full((4, 4, 3), number))
        save(tmp_path / f"labels/f{number}_{'gt' if number < 4 else 'mask'}.png", [[0, 1], [1, 0]])
    config = parse(DataConfig, tomllib.loads(draft(tmp_path))["data"])
    assert (config.label_suffix, config.without_labels) == ("_gt", "refuse")


def test_draft_of_grey_images(tmp_path: Path) -> None:
    save(tmp_path / "xray/a.png", [[7, 90]])
    save(tmp_path / "masks/a.png", [[0, 255]])
    config, _ = opened(tmp_path)
    assert (config.images, config.labels) == ("xray", "masks")
    assert config.label_values == {"0": "class0", "255": "class1"}


def test_draft_of_cityscapes_names(tmp_path: Path) -> None:
    for stem in ("train/aachen/aachen_000000_000019", "train/bonn/bonn_000001_000019", "val/ulm/ulm_000000_000019"):
        save(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png", np.zeros((2, 2, 3)))
        for kind in ("color", "instanceIds", "labelIds"):
            save(tmp_path / f"gtFine/{stem}_gtFine_{kind}.png", np.zeros((2, 2, 3) if kind == "color" else (2, 2)))
    config, roles = opened(tmp_path)
    assert (config.reader, config.root) == ("cityscapes", str(tmp_path))
    assert list(roles) == [
        "val/ulm/ulm_000000_000019",
        "train/aachen/aachen_000000_000019",
        "train/bonn/bonn_000001_000019",
    ]


def test_draft_of_colours(tmp_path: Path) -> None:
    put(tmp_path, "a", [[[0, 0, 0], [128, 64, 128]]])
    config, _ = opened(tmp_path)
    assert config.label_colours == {"#000000": "class0", "#804080": "class1"}


def test_draft_of_deep_values(tmp_path: Path) -> None:
    save(tmp_path / "images/a.jpg", np.zeros((1, 2, 3)))
    (tmp_path / "labels").mkdir()
    Image.fromarray(np.array([[1000, 7000]], np.uint16)).save(tmp_path / "labels/a.png")
    config, _ = opened(tmp_path)
    assert config.label_values == {"1000": "class1000", "7000": "class7000"}


@pytest.mark.parametrize("names", [("{}.jpg", "{}.png"), ("{}.png", "{}_mask.png"), ("{}.jpg", "{}-gt.png")])
def test_draft_of_one_folder(tmp_path: Path, names: tuple[str, str]) -> None:
    for stem in ("one", "two_1", "two_10"):
        save(tmp_path / names[0].format(stem), np.zeros((2, 2, 3)))
        save(tmp_path / names[1].format(stem), [[0, 1], [1, 0]])
    config, roles = opened(tmp_path)
    assert (config.images, config.labels) == (".", ".")
    assert roles == {"one": "train", "two_1": "train", "two_10": "train"}


def test_draft_of_images_alone(tmp_path: Path) -> None:
    for index in range(12):
        save(tmp_path / f"clip/frame_{index}.png", np.zeros((2, 2, 3)))
    config, roles = opened(tmp_path)
    assert config.labels == ""
    assert roles == {f"clip/frame_{index}": "auxiliary" for index in range(12)}


def test_draft_one_level_too_high(tmp_path: Path) -> None:
    """Label maps would be drafted as images to learn from."""
    place = "one folder of images and one of label maps, such as"
    bring = f"name that folder, or bring them into {place} {tmp_path}/images/a and {tmp_path}/labels/a"
    save(tmp_path / "extra/b.png", np.zeros((2, 2, 3)))
    for count, told in enumerate(("a", "a and {0}/b", "a and {0}/b and 1 more")):
        put(tmp_path / "abc"[count], f"x{count}", [[0, 1]])
        with pytest.raises(DataError) as caught:
            draft(tmp_path)
        beside = f"label maps lie a level deeper, beside the images of {tmp_path}/{told.format(tmp_path)}"
        assert str(caught.value) == f"{tmp_path}: {beside}; {bring}"
    assert 'labels = "labels"' in draft(tmp_path / "a")


def test_draft_of_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=f"^{re.escape(str(tmp_path))}: holds no images; expected .bmp, .jpeg, .*files$"
    ):
        draft(tmp_path)
    put(tmp_path, "a", np.random.default_rng(0).integers(0, 256, (20, 20, 3)))
    file = tmp_path / "labels/a.png"
    message = (
        f"{file}: more than 256 colours by this label map, which classes cannot be; "
        "make label maps without smoothing, in a format that loses nothing"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        draft(tmp_path)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid does not lie beside the checkout")
def test_draft_of_real_camvid() -> None:
    config = parse(DataConfig, tomllib.loads(draft(CAMVID))["data"])
    assert config.reader == "camvid"
    assert len(open_data(config).samples) == 468


def test_scored_images_whose_copies_may_be_missed(tmp_path: Path) -> None:
    put(tmp_path, "train/a", np.zeros((32, 32)))
    save(tmp_path / "labels/val/fog.png", np.zeros((32, 32)))
    save(tmp_path / "images/val/fog.png", np.linspace(120, 130, 32 * 32 * 3).reshape(32, 32, 3))
    expected = (
        f"sample 'val/fog' (report, {tmp_path}/images/val/fog.png) has hardly any contrast: copies of it are found "
        "where all pixels are equal, not where they are re-encoded or scaled"
    )
    assert expected in messages(check(folder(tmp_path)), "warning")
    assert expected not in messages(check(folder(tmp_path, compare_contents="off")), "warning")
    for name in ("mist", "haze"):
        save(tmp_path / f"labels/val/{name}.png", np.zeros((32, 32)))
        save(tmp_path / f"images/val/{name}.png", np.full((32, 32, 3), len(name) * ord(name[0]) % 256))
    assert any(
        "has hardly any contrast, and so have 'val/haze', 'val/mist': copies" in warning
        for warning in messages(check(folder(tmp_path)), "warning")
    )


def test_images_that_show_nothing(tmp_path: Path) -> None:
    """As one of Cityscapes' train_extra does, which is black."""
    put(tmp_path, "val/a", np.zeros((32, 32)))
    put(tmp_path, "train/a", np.zeros((32, 32)))
    save(tmp_path / "images/train/black.png", np.zeros((32, 32, 3)))
    save(tmp_path / "labels/train/black.png", np.zeros((32, 32)))
    expected = (
        f"sample 'train/black' (train, {tmp_path}/images/train/black.png) shows hardly anything but one tone: see that "
        "the file is whole, or leave it out."
    )
    assert expected in messages(check(folder(tmp_path)), "warning")
    for number in range(21):
        save(tmp_path / f"labels/val/white{number}.png", np.zeros((32, 32)))
        save(tmp_path / f"images/val/white{number}.png", np.full((32, 32, 3), 255))
    (found,) = (text for text in messages(check(folder(tmp_path)), "warning") if "one tone" in text)
    assert found.startswith("sample 'val/white0' (report, ")
    assert "leave it out. So do 'val/white1', 'val/white10', " in found
    assert found.endswith(" and 1 more")
