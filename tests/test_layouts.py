"""Published data sets in miniature: which files are found, what each is for, and what every raw label value means.

The numbers are those of the data sets' own documentation, written out by hand.
"""

from __future__ import annotations

import pickle
import re
import tomllib
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from segkd.pipeline.data.check import check
from segkd.pipeline.data.config import DataConfig, Reader
from segkd.pipeline.data.draft import draft
from segkd.pipeline.data.layouts import LAYOUTS
from segkd.pipeline.data.readers import find, open_data
from segkd.pipeline.data.sample import IGNORE, DataSource
from segkd.pipeline.settings import parse
from segkd.storage.errors import ConfigError, DataError


def image(root: Path, *names: str) -> None:
    """Images of two rows and four columns, each of its own colour."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng(list(name.encode())).integers(0, 256, 3)
        Image.fromarray(np.full((2, 4, 3), colour, np.uint8)).save(root / name)


def labels(root: Path, name: str, *values: int, palette: bool = False) -> None:
    """A label map of two like rows whose columns have these values; the last is repeated."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    row = [*values, *[values[-1]] * (4 - len(values))]
    made = Image.fromarray(np.array([row, row], np.uint8))
    if palette:
        # Colours whose brightness has nothing to do with the index.
        made = made.convert("P")
        made.putpalette([(7 * index + 3) % 256 for index in range(768)])
        made.putdata([*row, *row])
    made.save(root / name)


def lines(file: Path, *text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in text))


def reader(name: str, root: Path, **options: Any) -> DataConfig:
    return parse(DataConfig, {"reader": name, "root": str(root), **options})


def roles(source: DataSource) -> dict[str, str]:
    return {sample.id: str(sample.role) for sample in source.samples}


def row(source: DataSource, sample_id: str) -> list[int]:
    """The first row of a sample's class indices."""
    (sample,) = (sample for sample in source.samples if sample.id == sample_id)
    return source.labels(sample)[0].tolist()


def refused(config: DataConfig, message: str, *, read: str | None = None) -> None:
    """Opening the data, or reading one sample's labels, raises this."""
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        _open(config, read)


def _open(config: DataConfig, read: str | None) -> None:
    source = open_data(config)
    if read is not None:
        row(source, read)


# --- miniatures -------------------------------------------------------------------------------------------------------


def voc(root: Path) -> None:
    for stem in ("2007_000032", "2007_000033", "2008_000002", "2009_000001"):
        image(root, f"JPEGImages/{stem}.jpg")
    labels(root, "SegmentationClass/2007_000032.png", 0, 1, 20, 255, palette=True)
    labels(root, "SegmentationClass/2007_000033.png", 15, 0, palette=True)
    lines(root / "ImageSets/Segmentation/train.txt", "2007_000032")
    lines(root / "ImageSets/Segmentation/val.txt", "2007_000033")


def context(root: Path) -> None:
    image(root, *(f"JPEGImages/2008_00000{number}.jpg" for number in range(3)))
    for split, stem in (("train", "2008_000000"), ("val", "2008_000001")):
        lines(root / f"ImageSets/SegmentationContext/{split}.txt", stem)
        labels(root, f"SegmentationClassContext/{stem}.png", 0, 1, 59, 2)


def context_of_its_authors(root: Path) -> None:
    context(root)
    (root / "SegmentationClassContext").rename(root / "59_context_labels")


def context_mat(root: Path) -> None:
    image(root, *(f"JPEGImages/2008_00000{number}.jpg" for number in range(3)))
    for split, stem in (("train", "2008_000000"), ("val", "2008_000001")):
        lines(root / f"ImageSets/Main/{split}.txt", stem)
        (root / "trainval").mkdir(exist_ok=True)
        savemat(root / f"trainval/{stem}.mat", {"LabelMap": np.array([[0, 1, 2, 458]] * 2, np.uint16)})


def cityscapes(root: Path, kind: str = "labelIds", values: Sequence[int] = (7, 33, 0, 1)) -> None:
    for place in ("train/aachen/aachen", "train/bochum/bochum", "val/lindau/lindau", "test/berlin/berlin"):
        image(root, f"leftImg8bit/{place}_000000_000019_leftImg8bit.png")
        labels(root, f"gtFine/{place}_000000_000019_gtFine_{kind}.png", *values)
    image(root, "leftImg8bit/train_extra/nuremberg/nuremberg_000000_000000_leftImg8bit.png")


def ade(root: Path) -> None:
    for split, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        image(root, f"images/{split}/{stem}.jpg")
        labels(root, f"annotations/{split}/{stem}.png", 0, 1, 2, 150)


def coco(root: Path, maps: str = "stuffthingmaps", images: str = "images/") -> None:
    for split in ("train2017", "val2017"):
        image(root, f"{images}{split}/000000000009.jpg")
        labels(root, f"{maps}/{split}/000000000009.png", 0, 12, 181, 255)


def coco_train_ids(root: Path) -> None:
    for split in ("train2017", "val2017"):
        image(root, f"images/{split}/000000000009.jpg")
        labels(root, f"annotations/{split}/000000000009_labelTrainIds.png", 0, 11, 170, 255)


def segnet(root: Path) -> None:
    for split in ("train", "val", "test"):
        image(root, f"{split}/0001TP_006690.png")
        labels(root, f"{split}annot/0001TP_006690.png", 0, 10, 11)


CAMVID_FRAMES = {
    "0001TP_008520": "train",
    "0001TP_008550": "report",
    "0006R0_f00930": "train",
    "0016E5_07920": "train",
    "0016E5_07959": "select",
    "0016E5_08159": "select",
    "0016E5_08190": "train",
    "Seq05VD_f00000": "report",
}


def camvid(root: Path) -> None:
    (root / "LabeledApproved_full").mkdir(parents=True)
    for stem in CAMVID_FRAMES:
        image(root, f"701_StillsRaw_full/{stem}.png")
        # Void, Wall (a building), TrafficLight (a sign), SUVPickupTruck (a car)
        colours = np.array([[(0, 0, 0), (64, 192, 0), (0, 64, 64), (64, 128, 192)]] * 2, np.uint8)
        Image.fromarray(colours).save(root / f"LabeledApproved_full/{stem}_L.png")


MINIATURES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "voc2012": ("voc2012", voc),
    "pascal_context": ("pascal_context", context),
    "pascal_context, of its authors": ("pascal_context", context_of_its_authors),
    "pascal_context, MATLAB": ("pascal_context", context_mat),
    "cityscapes": ("cityscapes", cityscapes),
    "ade20k": ("ade20k", ade),
    "coco_stuff": ("coco_stuff", coco),
    "coco_stuff, train ids": ("coco_stuff", coco_train_ids),
    "camvid, SegNet": ("camvid", segnet),
    "camvid, original": ("camvid", camvid),
}


# --- all of them ------------------------------------------------------------------------------------------------------


def test_every_layout_is_a_reader_with_a_miniature() -> None:
    assert LAYOUTS.keys() == set(typing.get_args(Reader)) - {"folder", "list", "scenes"}
    assert LAYOUTS.keys() == {name for name, _ in MINIATURES.values()}


@pytest.mark.parametrize(("name", "make"), MINIATURES.values(), ids=MINIATURES)
def test_a_draft_is_a_run_file_that_checks(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / "data/set")
    text = draft(tmp_path / "data/set")
    config = parse(DataConfig, tomllib.loads(text)["data"])
    assert (config.reader, config.root, config.classes) == (name, str(tmp_path / "data/set"), ())
    report = check(config)
    assert report.ok, report.complaints
    assert {"train", "report"} <= report.samples.keys()
    if "SegNet" not in report.layout:
        # One level above, it is found as well.
        assert draft(tmp_path / "data") == text
        assert "official roles: train is" in report.table().splitlines()[0]


@pytest.mark.parametrize("layout", [layout for editions in LAYOUTS.values() for layout in editions])
def test_classes_and_meanings_fit_together(layout: Any) -> None:
    assert set(layout.classes) == set(layout.meaning.values()) - {"ignore", "exclude"}
    assert len(layout.classes) <= IGNORE
    assert all(channel in range(256) for colour in layout.classes.values() for channel in colour)
    assert all(layout.meaning[value] == "ignore" for value in layout.background)


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("voc2012", 21, ("background", (0, 0, 0)), ("tvmonitor", (0, 64, 128))),
        ("pascal_context", 59, ("aeroplane", (180, 120, 120)), ("wood", (31, 0, 255))),
        ("cityscapes", 19, ("road", (128, 64, 128)), ("bicycle", (119, 11, 32))),
        ("ade20k", 150, ("wall", (120, 120, 120)), ("flag", (92, 0, 255))),
        ("coco_stuff", 171, ("person", (128, 0, 0)), ("wood", (96, 96, 224))),
        ("camvid", 11, ("Sky", (128, 128, 128)), ("Bicyclist", (0, 128, 192))),
    ],
)
def test_classes(name: str, count: int, first: tuple[str, Any], last: tuple[str, Any]) -> None:
    for layout in LAYOUTS[name]:
        classes = list(layout.classes.items())
        assert (len(classes), classes[0], classes[-1][0]) == (count, first, last[0])
        if name != "coco_stuff":
            assert classes[-1] == last


@pytest.mark.parametrize(("name", "make"), MINIATURES.values(), ids=MINIATURES)
def test_sources_survive_a_process(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    source = open_data(reader(name, tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.samples == source.samples
    for sample in copy.samples:
        if sample.labelled:
            assert np.array_equal(copy.labels(sample), source.labels(sample))


# --- voc2012 ----------------------------------------------------------------------------------------------------------


def test_voc_indices_are_classes_the_background_is_one_and_the_border_none(tmp_path: Path) -> None:
    voc(tmp_path)
    found = find(reader("voc2012", tmp_path))
    assert roles(found.source) == {"2007_000032": "train", "2007_000033": "report"}
    assert found.unused == 2
    assert row(found.source, "2007_000032") == [0, 1, 20, 255]
    assert row(found.source, "2007_000033") == [15, 0, 0, 0]
    assert found.told == (
        "Pascal VOC 2012; official roles: train is ImageSets/Segmentation/train.txt, "
        "report is ImageSets/Segmentation/val.txt"
    )


def test_voc_label_maps_that_were_saved_as_colours(tmp_path: Path) -> None:
    voc(tmp_path)
    file = tmp_path / "SegmentationClass/2007_000032.png"
    Image.open(file).convert("RGB").save(file)
    refused(
        reader("voc2012", tmp_path),
        f"{file}: a label map of mode RGB, expected one channel of class values; if its colours are the classes, "
        "map them in [data.label_colours]",
        read="2007_000032",
    )


@pytest.mark.parametrize("name", ["trainaug", "train_aug"])
@pytest.mark.parametrize("line", ["{}", "/JPEGImages/{}.jpg /SegmentationClassAug/{}.png"])
def test_voc_with_sbd(tmp_path: Path, line: str, name: str) -> None:
    voc(tmp_path)
    for stem in ("2007_000032", "2008_000002"):
        labels(tmp_path, f"SegmentationClassAug/{stem}.png", 5, 6)
    lists = tmp_path / "ImageSets/Segmentation"
    lines(lists / f"{name}.txt", *(line.format(stem, stem) for stem in ("2007_000032", "2008_000002")))
    source = open_data(reader("voc2012", tmp_path))
    assert roles(source) == {"2007_000032": "train", "2008_000002": "train", "2007_000033": "report"}
    # The official map of an image that both annotate.
    assert row(source, "2007_000032") == [0, 1, 20, 255]
    assert row(source, "2008_000002") == [5, 6, 6, 6]


_SBD_LISTS = "ImageSets/Segmentation/trainaug.txt", "ImageSets/Segmentation/train_aug.txt"


@pytest.mark.parametrize(
    ("there", "gone"),
    [
        ("SegmentationClassAug", " or ".join(_SBD_LISTS)),
        (_SBD_LISTS[0], "SegmentationClassAug"),
        (_SBD_LISTS[1], "SegmentationClassAug"),
    ],
)
def test_voc_with_one_half_of_sbd(tmp_path: Path, there: str, gone: str) -> None:
    """1,464 images are not taken for 10,582 in silence, because the list has another name say."""
    voc(tmp_path)
    if there in _SBD_LISTS:
        lines(tmp_path / there, "2008_000002")
    else:
        labels(tmp_path, "SegmentationClassAug/2008_000002.png", 5, 6)
    refused(
        reader("voc2012", tmp_path),
        f"{tmp_path}: {there} is there and {gone} is not, so it is unknown whether SBD's 10,582 images or the official "
        f"1,464 are to be trained on; add {gone}, remove {there}, or give all roles by data.lists",
    )


def test_voc_with_a_list_of_ones_own(tmp_path: Path) -> None:
    voc(tmp_path)
    labels(tmp_path, "SegmentationClassAug/2008_000002.png", 5, 6)
    lines(tmp_path / "mine.txt", "2008_000002", "JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png")
    lines(tmp_path / "others.txt", "/JPEGImages/2009_000001.jpg /SegmentationClassAug/2009_000001.png")
    lists = {"train": str(tmp_path / "mine.txt"), "auxiliary": str(tmp_path / "others.txt")}
    source = open_data(reader("voc2012", tmp_path, lists=lists))
    assert roles(source) == {"2008_000002": "train", "2007_000032": "train", "2009_000001": "auxiliary"}


def test_another_year_s_images_are_not_taken_for_2012_s(tmp_path: Path) -> None:
    """All years are laid out alike, and 2007 comes first."""
    for year in (2007, 2010, 2012):
        voc(tmp_path / f"VOCdevkit/VOC{year}")
    right = tmp_path / "VOCdevkit/VOC2012"
    assert parse(DataConfig, tomllib.loads(draft(tmp_path))["data"]).root == str(right)
    other = tmp_path / "VOCdevkit/VOC2007"
    told = f"{other}: its name says that it is not Pascal VOC 2012, which it is laid out as"
    refused(reader("voc2012", other), f'{told}; set data.root = "{right}", where it is')
    right.rename(tmp_path / "mine")
    refused(reader("voc2012", other), f"{told}; rename it if it is all the same")
    assert len(open_data(reader("voc2012", tmp_path / "mine")).samples) == 2


def test_what_lies_beside_is_no_other_data_set_to_read_instead(tmp_path: Path) -> None:
    ade(tmp_path / "ade")
    cityscapes(tmp_path / "cityscapes")
    for file in tmp_path.glob("cityscapes/gtFine/*/*/*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"set data\.root to the folder that holds these"):
        open_data(reader("cityscapes", tmp_path / "cityscapes"))


def test_names_with_spaces_in_lists_of_published_data(tmp_path: Path) -> None:
    segnet(tmp_path)
    for name in ("train/my clip.png", "trainannot/my clip.png"):
        (tmp_path / name).write_bytes((tmp_path / name.replace("my clip", "0001TP_006690")).read_bytes())
    lines(tmp_path / "train.txt", "train/my clip", "train/0001TP_006690.png trainannot/0001TP_006690.png")
    source = open_data(reader("camvid", tmp_path, lists={"train": str(tmp_path / "train.txt")}))
    assert roles(source) == {"train/my clip": "train", "train/0001TP_006690": "train"}
    for line in ("train/0001TP_006690 -1", "train/0001TP_006690 # not this one"):
        lines(tmp_path / "train.txt", line)
        refused(
            reader("camvid", tmp_path, lists={"train": str(tmp_path / "train.txt")}),
            f"{tmp_path}/train.txt, line 1: there is no image {line!r} under {tmp_path}",
        )


def test_official_lists_of_images_that_are_not_there(tmp_path: Path) -> None:
    voc(tmp_path)
    lines(tmp_path / "ImageSets/Segmentation/train.txt", "2007_000032", "2010_000001", "2010_000002")
    refused(
        reader("voc2012", tmp_path),
        f"{tmp_path}: 2 images of the official lists are missing, the first is '2010_000001'; complete the download, "
        "or give roles by data.lists",
    )


def test_voc_without_lists(tmp_path: Path) -> None:
    voc(tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").unlink()
    refused(
        reader("voc2012", tmp_path),
        f"{tmp_path}: no image has a role by the official split of Pascal VOC 2012 (no sample is train, for there is "
        "no ImageSets/Segmentation/train.txt, no sample is report, for there is no ImageSets/Segmentation/val.txt); "
        "give roles by data.lists or data.folders",
    )


# --- pascal_context ---------------------------------------------------------------------------------------------------


def test_context_png(tmp_path: Path) -> None:
    context(tmp_path)
    source = open_data(reader("pascal_context", tmp_path))
    assert roles(source) == {"2008_000000": "train", "2008_000001": "report"}
    assert row(source, "2008_000000") == [255, 0, 58, 1]
    source = open_data(reader("pascal_context", tmp_path, background=True))
    assert (source.classes.names[:2], len(source.classes)) == (("background", "aeroplane"), 60)
    assert source.classes.palette[:2] == ((120, 120, 120), (180, 120, 120))
    assert row(source, "2008_000000") == [0, 1, 59, 2]


def test_context_png_of_its_authors_has_an_order_of_its_own(tmp_path: Path) -> None:
    """VOC's 20 classes first: 1 and 59 are the same in both orders, so they show nothing."""
    context_of_its_authors(tmp_path)
    labels(tmp_path, "59_context_labels/2008_000000.png", 0, 2, 15, 21)
    source = open_data(reader("pascal_context", tmp_path))
    assert [source.classes.names[index] for index in row(source, "2008_000000")[1:]] == ["bicycle", "person", "bag"]
    _, authors, _ = LAYOUTS["pascal_context"]
    assert sorted(set(authors.meaning.values()) - {"ignore"}) == list(authors.classes)
    assert (authors.meaning[11], authors.meaning[28], authors.meaning[52]) == ("table", "cloth", "bedclothes")


def test_context_maps_that_were_reduced_already(tmp_path: Path) -> None:
    context(tmp_path)
    labels(tmp_path, "SegmentationClassContext/2008_000000.png", 0, 58, 255)
    file = tmp_path / "SegmentationClassContext/2008_000000.png"
    refused(
        reader("pascal_context", tmp_path),
        f"{file}: row 0, column 2: value 255 means nothing in Pascal Context (PNG), expected 0-59; see that these are "
        'its official label maps, or add `255 = "CLASS"` (or "ignore") to [data.label_values]',
        read="2008_000000",
    )


def test_context_mat_counts_from_one(tmp_path: Path) -> None:
    context_mat(tmp_path)
    # 0 is nothing, 1 an accordion, which is none of the 59, 2 an aeroplane and 458 wood.
    source = open_data(reader("pascal_context", tmp_path))
    assert roles(source) == {"2008_000000": "train", "2008_000001": "report"}
    assert row(source, "2008_000000") == [255, 255, 0, 58]
    source = open_data(reader("pascal_context", tmp_path, background=True))
    assert row(source, "2008_000000") == [255, 0, 1, 59]


@pytest.mark.parametrize(
    ("name", "number"), [("bag", 9), ("cat", 65), ("person", 284), ("pottedplant", 308), ("sky", 360), ("table", 397)]
)
def test_context_numbers_of_labels(name: str, number: int) -> None:
    assert LAYOUTS["pascal_context"][2].meaning[number] == name


def test_context_names_stand_in_the_order_of_both_lists() -> None:
    png, _, mat = LAYOUTS["pascal_context"]
    names = list(png.classes)
    assert names == sorted(names) == [mat.meaning[number] for number in range(460) if mat.meaning[number] in names]
    assert [png.meaning[value] for value in range(1, 60)] == names


def test_matlab_files_that_are_none(tmp_path: Path) -> None:
    context_mat(tmp_path)
    file = tmp_path / "trainval/2008_000000.mat"
    config = reader("pascal_context", tmp_path)
    savemat(file, {"Other": np.zeros((2, 4))})
    refused(
        config, f"{file}: holds no matrix LabelMap; expected one of Pascal Context's label maps", read="2008_000000"
    )
    savemat(file, {"LabelMap": np.full((2, 4), 0.5)})
    refused(
        config, f"{file}: LabelMap is of type float64, expected whole numbers; write it as uint16", read="2008_000000"
    )
    savemat(file, {"LabelMap": np.zeros((2, 4), np.uint16)})
    refused(
        reader("pascal_context", tmp_path, max_pixels=7),
        f"{file}: 4 x 2 pixels, more than the 7 that data.max_pixels allows; "
        "raise it if the label map is meant to be that large",
        read="2008_000000",
    )
    whole = file.read_bytes()
    for length in (0, 60, 140, len(whole) - 3):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=re.escape(str(file)) + ": .*; "):
            row(open_data(config), "2008_000000")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"reader": "voc2012"},
            "data.background means nothing to reader 'voc2012', only to 'pascal_context'; "
            "remove it or change data.reader",
        ),
        (
            {"reader": "pascal_context", "classes": ("a",)},
            "data.background adds to the reader's own classes, but data.classes gives others; keep one of them",
        ),
    ],
)
def test_background_is_an_option_of_contexts_own_classes(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        DataConfig(background=True, **options)


# --- cityscapes -------------------------------------------------------------------------------------------------------


def test_cityscapes_label_ids(tmp_path: Path) -> None:
    cityscapes(tmp_path)
    found = find(reader("cityscapes", tmp_path))
    assert roles(found.source) == {
        "train_extra/nuremberg/nuremberg_000000_000000": "auxiliary",
        "val/lindau/lindau_000000_000019": "report",
        "train/aachen/aachen_000000_000019": "train",
        "train/bochum/bochum_000000_000019": "train",
    }
    assert [sample.group for sample in found.source.samples] == ["nuremberg", "lindau", "aachen", "bochum"]
    assert (found.unused, found.complaints) == (1, ())
    assert row(found.source, "train/aachen/aachen_000000_000019") == [0, 18, 255, 255]


def test_cityscapes_train_ids_where_there_are_no_others(tmp_path: Path) -> None:
    cityscapes(tmp_path, "labelTrainIds", (0, 18, 7, 255))
    source = open_data(reader("cityscapes", tmp_path))
    sample = source.samples[-1]
    assert source.labels(sample)[0].tolist() == [0, 18, 7, 255]
    assert source.excluded(sample) is None
    cityscapes(tmp_path)
    source = open_data(reader("cityscapes", tmp_path))
    assert source.labels(sample)[0].tolist() == [0, 18, 255, 255]


def test_train_ids_under_the_name_of_label_ids(tmp_path: Path) -> None:
    cityscapes(tmp_path, "labelIds", (0, 18, 7, 255))
    file = tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    refused(
        reader("cityscapes", tmp_path),
        f"{file}: row 0, column 3: value 255 means nothing in Cityscapes, expected 0-33; see that these are its "
        'official label maps, or add `255 = "CLASS"` (or "ignore") to [data.label_values]',
        read="train/aachen/aachen_000000_000019",
    )


def test_label_ids_under_the_name_of_train_ids(tmp_path: Path) -> None:
    cityscapes(tmp_path, "labelTrainIds", (7, 23, 0, 1))
    with pytest.raises(DataError, match="row 0, column 1: value 23 means nothing in Cityscapes, expected 0-18, 255; "):
        row(open_data(reader("cityscapes", tmp_path)), "train/aachen/aachen_000000_000019")


@pytest.mark.parametrize(
    ("label_id", "train_id"),
    [(6, 255), (7, 0), (8, 1), (9, 255), (11, 2), (13, 4), (17, 5), (18, 255), (19, 6), (23, 10), (26, 13), (31, 16)],
)
def test_cityscapes_ids(label_id: int, train_id: int) -> None:
    layout = LAYOUTS["cityscapes"][0]
    name = layout.meaning[label_id]
    assert train_id == (255 if name == "ignore" else list(layout.classes).index(name))


def test_what_shows_nothing_of_the_scene_is_excluded(tmp_path: Path) -> None:
    cityscapes(tmp_path, values=(1, 2, 3, 4))
    source = open_data(reader("cityscapes", tmp_path))
    sample = source.samples[-1]
    assert source.labels(sample)[0].tolist() == [255] * 4
    assert source.excluded(sample)[0].tolist() == [True, True, True, False]


def test_coarse_maps_are_those_of_train_extra(tmp_path: Path) -> None:
    cityscapes(tmp_path)
    place = "gtCoarse/train_extra/nuremberg/nuremberg_000000_000000_gtCoarse_labelIds.png"
    labels(tmp_path, place, 8)
    labels(tmp_path, "gtCoarse/train/aachen/aachen_000000_000019_gtCoarse_labelIds.png", 8)
    labels(tmp_path, "gtCoarse/train_extra/troisdorf/troisdorf_000000_000000_gtCoarse_labelIds.png", 8)
    found = find(reader("cityscapes", tmp_path))
    assert found.complaints == ()
    assert row(found.source, "train_extra/nuremberg/nuremberg_000000_000000") == [1] * 4
    assert row(found.source, "train/aachen/aachen_000000_000019") == [0, 18, 255, 255]


def test_test_images_have_no_labels(tmp_path: Path) -> None:
    cityscapes(tmp_path)
    refused(
        reader("cityscapes", tmp_path, folders={"report": ["test"]}),
        f"{tmp_path}/leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png: no label map of its name in "
        f"{tmp_path}/gtFine (*_gtFine_labelIds.png; those of test are not public); "
        'a sample of role report needs one, one of role auxiliary does not: data.without_labels = "auxiliary" '
        "leaves it out",
    )


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5, "select": 0.5}])
def test_official_images_to_report_on_are_never_learned_from(tmp_path: Path, fractions: dict[str, float]) -> None:
    """Not for want of a label map either, though fractions make whole groups without any auxiliary."""
    voc(tmp_path)
    (tmp_path / "SegmentationClass/2007_000033.png").unlink()
    found = find(reader("voc2012", tmp_path, fractions=fractions, without_labels="auxiliary"))
    assert "2007_000033" not in roles(found.source)
    assert str(found.complaints[0]).endswith(": no label map of its name, so it is left out of role report")


# --- ade20k -----------------------------------------------------------------------------------------------------------


def test_ade_reduces_zero(tmp_path: Path) -> None:
    ade(tmp_path)
    source = open_data(reader("ade20k", tmp_path))
    assert roles(source) == {"validation/ADE_val_00000001": "report", "training/ADE_train_00000001": "train"}
    assert row(source, "training/ADE_train_00000001") == [255, 0, 1, 149]


def test_ade_maps_that_were_reduced_already(tmp_path: Path) -> None:
    ade(tmp_path)
    labels(tmp_path, "annotations/training/ADE_train_00000001.png", 255, 0, 1)
    file = tmp_path / "annotations/training/ADE_train_00000001.png"
    refused(
        reader("ade20k", tmp_path),
        f"{file}: row 0, column 0: value 255 means nothing in ADE20K (ADEChallengeData2016), expected 0-150; "
        "see that these are its official label maps, "
        'or add `255 = "CLASS"` (or "ignore") to [data.label_values]',
        read="training/ADE_train_00000001",
    )


# --- coco_stuff -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maps", "images"), [("stuffthingmaps", "images/"), ("annotations", "images/"), ("stuffthingmaps_trainval2017", "")]
)
def test_coco(tmp_path: Path, maps: str, images: str) -> None:
    coco(tmp_path, maps, images)
    labels(tmp_path, f"{maps}/train2017/000000000009_labelTrainIds.png", 0)
    found = find(reader("coco_stuff", tmp_path))
    assert roles(found.source) == {"val2017/000000000009": "report", "train2017/000000000009": "train"}
    assert found.complaints == ()
    assert row(found.source, "train2017/000000000009") == [0, 11, 170, 255]


@pytest.mark.parametrize(
    ("value", "index", "name"),
    [
        (10, 10, "fire hydrant"),
        (12, 11, "stop sign"),
        (24, 23, "giraffe"),
        (26, 24, "backpack"),
        (89, 79, "toothbrush"),
        (91, 80, "banner"),
        (156, 145, "sky-other"),
        (181, 170, "wood"),
    ],
)
def test_coco_ids_have_gaps(value: int, index: int, name: str) -> None:
    layout, _ = LAYOUTS["coco_stuff"]
    assert layout.meaning[value] == name == list(layout.classes)[index]


def test_coco_maps_of_two_kinds_in_two_folders(tmp_path: Path) -> None:
    coco(tmp_path, "annotations")
    for split in ("train2017", "val2017"):
        labels(tmp_path, f"stuffthingmaps/{split}/000000000009_labelTrainIds.png", 0)
    assert row(open_data(reader("coco_stuff", tmp_path)), "train2017/000000000009") == [0, 11, 170, 255]


def test_coco_train_ids_have_none(tmp_path: Path) -> None:
    coco_train_ids(tmp_path)
    source = open_data(reader("coco_stuff", tmp_path))
    assert roles(source) == {"train2017/000000000009": "train", "val2017/000000000009": "report"}
    assert row(source, "train2017/000000000009") == [0, 11, 170, 255]
    by_ids, by_train_ids = LAYOUTS["coco_stuff"]
    assert by_ids.classes == by_train_ids.classes
    assert (by_train_ids.meaning[11], by_train_ids.meaning[170]) == ("stop sign", "wood")


def test_coco_maps_without_gaps(tmp_path: Path) -> None:
    coco(tmp_path)
    labels(tmp_path, "stuffthingmaps/train2017/000000000009.png", 0, 11)
    with pytest.raises(
        DataError, match="row 0, column 1: value 11 means nothing in COCO-Stuff 164k, expected 0-10, 12-24"
    ):
        row(open_data(reader("coco_stuff", tmp_path)), "train2017/000000000009")


# --- camvid -----------------------------------------------------------------------------------------------------------


def test_original_camvid(tmp_path: Path) -> None:
    camvid(tmp_path)
    source = open_data(reader("camvid", tmp_path))
    assert roles(source) == CAMVID_FRAMES
    assert {sample.group for sample in source.samples} == {"0001TP", "0006R0", "0016E5", "Seq05VD"}
    assert row(source, "0001TP_008520") == [255, 1, 6, 8]


def test_original_camvid_has_32_colours() -> None:
    original = LAYOUTS["camvid"][1]
    assert len(original.meaning) == 32
    assert [name for code, name in original.meaning.items() if code == 0x8000C0] == ["Road"]  # LaneMkgsDriv


def test_original_camvid_with_a_frame_of_another(tmp_path: Path) -> None:
    camvid(tmp_path)
    image(tmp_path, "701_StillsRaw_full/holiday.png")
    refused(
        reader("camvid", tmp_path),
        f"{tmp_path}/701_StillsRaw_full: 'holiday' is no frame of CamVid's, expected names such as 0001TP_006690; "
        "take it out, or describe the data by reader 'folder'",
    )


# --- roles ------------------------------------------------------------------------------------------------------------


def test_fractions_divide_the_training_part(tmp_path: Path) -> None:
    cityscapes(tmp_path)
    for number in range(60):
        place = f"train/city{number}/city{number}_000000_000019"
        image(tmp_path, f"leftImg8bit/{place}_leftImg8bit.png")
        labels(tmp_path, f"gtFine/{place}_gtFine_labelIds.png", 7)
    found = find(reader("cityscapes", tmp_path, fractions={"train": 0.5, "select": 0.5}))
    given = roles(found.source)
    assert {role for sample, role in given.items() if sample.startswith("train/")} == {"train", "select"}
    assert given["val/lindau/lindau_000000_000019"] == "report"
    assert given["train_extra/nuremberg/nuremberg_000000_000000"] == "auxiliary"
    assert found.told.endswith("; data.fractions divide the training part")


def test_fractions_give_no_second_report() -> None:
    message = (
        "data.fractions.report is given, but fractions divide the training part of 'ade20k', "
        "which reports on the official validation images; leave report out"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        DataConfig(reader="ade20k", fractions={"train": 0.5, "report": 0.5})


def test_lists_may_name_files(tmp_path: Path) -> None:
    cityscapes(tmp_path)
    stem = "train/aachen/aachen_000000_000019"
    lines(tmp_path / "train.txt", stem)
    lines(tmp_path / "select.txt", "leftImg8bit/train/bochum/bochum_000000_000019_leftImg8bit.png")
    lists = {role: str(tmp_path / f"{role}.txt") for role in ("train", "select")}
    found = find(reader("cityscapes", tmp_path, lists=lists))
    assert roles(found.source) == {"train/bochum/bochum_000000_000019": "select", stem: "train"}
    assert found.told == "Cityscapes; roles by data.lists"


# --- wrong roots ------------------------------------------------------------------------------------------------------

NEEDS = "is not laid out as reader '{}' needs it; looked for {}"
VOC = NEEDS.format(
    "voc2012",
    "JPEGImages and SegmentationClass and ImageSets/Segmentation: found none of it",
)


def test_a_root_too_high(tmp_path: Path) -> None:
    voc(tmp_path / "VOCdevkit/VOC2012")
    right = tmp_path / "VOCdevkit/VOC2012"
    refused(reader("voc2012", tmp_path), f'{tmp_path}: {VOC}; set data.root = "{right}", where it is')


def test_a_root_too_deep(tmp_path: Path) -> None:
    voc(tmp_path)
    root = tmp_path / "JPEGImages"
    refused(reader("voc2012", root), f'{root}: {VOC}; set data.root = "{tmp_path}", where it is')


def test_a_root_of_another_data_set(tmp_path: Path) -> None:
    ade(tmp_path / "sets/ade")
    title = "ADE20K (ADEChallengeData2016)"
    root = tmp_path / "sets/ade"
    refused(reader("voc2012", root), f'{root}: {VOC}; {root} is laid out as {title}: set data.reader = "ade20k"')
    refused(
        reader("voc2012", tmp_path),
        f'{tmp_path}: {VOC}; {root} is laid out as {title}: set data.reader = "ade20k" and data.root = "{root}"',
    )


def test_a_root_of_nothing(tmp_path: Path) -> None:
    refused(
        reader("voc2012", tmp_path),
        f"{tmp_path}: {VOC}; set data.root to the folder that holds these, "
        'or describe your own folders with data.reader = "folder"',
    )
    absent = tmp_path / "absent"
    refused(reader("voc2012", absent), f"{absent}: there is no such folder; correct data.root")


def test_a_download_without_its_labels(tmp_path: Path) -> None:
    cityscapes(tmp_path)
    for file in tmp_path.glob("gtFine/*/*/*.png"):
        file.rename(file.with_name(file.name.replace("labelIds", "color")))
    with pytest.raises(
        DataError, match=r"looked for leftImg8bit/\*/\* and .*: found all but gtFine/\*/\*/\*_gtFine_labelIds"
    ):
        open_data(reader("cityscapes", tmp_path))


def test_check_complains_of_a_wrong_root(tmp_path: Path) -> None:
    voc(tmp_path / "VOC2012")
    report = check(reader("voc2012", tmp_path))
    assert not report.ok
    assert [complaint.message for complaint in report.complaints] == [
        f'{tmp_path}: {VOC}; set data.root = "{tmp_path}/VOC2012", where it is'
    ]


def test_the_docs_name_all_classes_in_their_order() -> None:
    text = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text(encoding="utf-8")
    section = " ".join(text.partition("## Class names, in channel order")[2].partition("\n## ")[0].split())
    for name, editions in LAYOUTS.items():
        for layout in editions:
            assert f"- **`{name}`** ({len(layout.classes)}): {', '.join(layout.classes)}." in section
