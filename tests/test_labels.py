"""Label maps: what raw values and colours mean."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.labels import LabelMap, colour_key, describe
from segkd.pipeline.data.layouts.ade20k import ADE20K
from segkd.pipeline.data.layouts.camvid import SEGNET
from segkd.storage.errors import ConfigError, DataError

FILE = Path("labels/a.png")


def folder(**options: object) -> DataConfig:
    return DataConfig(reader="folder", folders={"train": (".",)}, **({"classes": ("road", "sky")} | options))


def refused(message: str, **options: object) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        describe(folder(**options))


def unmapped(label_map: LabelMap, raw: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        label_map(raw, FILE)


@settings(max_examples=60)
@given(st.data())
def test_values_are_looked_up_one_by_one(data: st.DataObject) -> None:
    depth = data.draw(st.sampled_from([np.uint8, np.uint16, np.int32]))
    indices = data.draw(
        st.dictionaries(st.integers(0, np.iinfo(depth).max % 65536), st.sampled_from([0, 1, 254, 255]), min_size=1)
    )
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    chosen = data.draw(
        st.lists(st.sampled_from(list(indices)), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    )
    raw_HW = np.array(chosen, depth).reshape(shape)
    labels_HW = LabelMap("values", indices)(raw_HW, FILE)
    assert labels_HW.dtype == np.uint8
    assert labels_HW.tolist() == [[indices[value] for value in row] for row in raw_HW.tolist()]


@settings(max_examples=60)
@given(st.data())
def test_colours_are_looked_up_one_by_one(data: st.DataObject) -> None:
    channel = st.integers(0, 255)
    by_colour = data.draw(st.dictionaries(st.tuples(channel, channel, channel), st.integers(0, 254), min_size=1))
    chosen = data.draw(st.lists(st.sampled_from(list(by_colour)), min_size=6, max_size=6))
    raw_HW3 = np.array(chosen, np.uint8).reshape(2, 3, 3)
    label_map = LabelMap("colours", {r * 65536 + g * 256 + b: index for (r, g, b), index in by_colour.items()})
    assert label_map(raw_HW3, FILE).ravel().tolist() == [by_colour[colour] for colour in chosen]


def test_without_a_map_a_value_is_its_class() -> None:
    classes, label_map = describe(folder())
    assert classes.names == ("road", "sky")
    assert label_map(np.array([[0, 1, 255]], np.uint8), FILE).tolist() == [[0, 1, 255]]
    unmapped(
        label_map,
        np.array([[0, 1], [2, 3]], np.uint8),
        "labels/a.png: row 1, column 0: value 2 is no class, expected 0-1, 255; "
        "name all classes in data.classes, or map all values of these files in [data.label_values]",
    )


def test_values_and_ranges_of_them() -> None:
    _, label_map = describe(folder(label_values={"0-6": "ignore", "7": "road", "1000": "sky"}))
    assert label_map(np.array([[3, 7, 1000]], np.uint16), FILE).tolist() == [[255, 0, 1]]
    message = 'value {} is mapped to no class; add `{} = "CLASS"` (or "ignore") to [data.label_values]'
    for value in (8, 999, 1001, 65535):
        raw = np.array([[7, 7, 7], [7, value, value]], np.uint16)
        unmapped(label_map, raw, f"labels/a.png: row 1, column 1: {message.format(value, value)}")
    unmapped(label_map, np.array([[-1]], np.int32), f"labels/a.png: row 0, column 0: {message.format(-1, -1)}")
    unmapped(label_map, np.array([[2**30]], np.int32), f"labels/a.png: row 0, column 0: {message.format(2**30, 2**30)}")


def test_colours() -> None:
    classes, label_map = describe(folder(label_colours={"#804080": "road", "70, 130,180": "sky", "0,0,0": "ignore"}))
    assert classes.palette == ((128, 64, 128), (70, 130, 180))
    raw = np.array([[[128, 64, 128], [70, 130, 180], [0, 0, 0]]], np.uint8)
    assert label_map(raw, FILE).tolist() == [[0, 1, 255]]
    raw[0, 1] = (255, 255, 254)
    unmapped(
        label_map,
        raw,
        'labels/a.png: row 0, column 1: colour #fffffe is mapped to no class; add `"#fffffe" = "CLASS"` '
        '(or "ignore") to [data.label_colours]',
    )


def test_colour_key() -> None:
    assert colour_key((0, 10, 255)) == "#000aff"


def test_camvid_knows_its_classes() -> None:
    classes, label_map = describe(DataConfig(reader="camvid"), SEGNET)
    assert classes.names[0] == "Sky"
    assert classes.names[10] == "Bicyclist"
    assert len(classes) == len(classes.palette) == len(set(classes.palette)) == 11
    assert label_map(np.arange(12, dtype=np.uint8)[None], FILE).tolist() == [[*range(11), 255]]
    unmapped(
        label_map,
        np.array([[12]], np.uint8),
        "labels/a.png: row 0, column 0: value 12 means nothing in CamVid (SegNet), expected 0-11; "
        'see that these are its official label maps, or add `12 = "CLASS"` (or "ignore") to [data.label_values]',
    )


def test_camvid_with_other_classes_has_no_void_of_its_own() -> None:
    classes, label_map = describe(DataConfig(reader="camvid", classes=tuple("abcdefghijklm")), SEGNET)
    assert len(classes) == 13
    assert label_map(np.array([[11, 255]], np.uint8), FILE).tolist() == [[11, 255]]


def test_classes_of_ones_own_need_a_meaning_where_published_values_are_no_indices() -> None:
    """Value 1 of ADE20K is its first class: by position it would silently be the second."""
    ade20k = ADE20K[0]
    with pytest.raises(ConfigError) as error:
        describe(DataConfig(reader="ade20k", classes=("wall", "rest")), ade20k)
    assert str(error.value) == (
        "data.classes names classes of your own, and nothing says what the label maps of ADE20K (ADEChallengeData2016) "
        "are in terms of them: value 1 is 'wall' there; map every value in [data.label_values], or leave data.classes "
        "out"
    )
    values = {"0": "ignore", "1": "wall", "2-150": "rest"}
    classes, _ = describe(DataConfig(reader="ade20k", classes=("wall", "rest"), label_values=values), ade20k)
    assert classes.names == ("wall", "rest")


def test_published_values_keep_their_meaning_but_for_those_that_are_given() -> None:
    config = DataConfig(reader="camvid", label_values={"11": "Road", "30-31": "ignore"})
    classes, label_map = describe(config, SEGNET)
    assert len(classes) == 11
    assert label_map(np.array([[0, 10, 11, 30, 31]], np.uint8), FILE).tolist() == [[0, 10, 3, 255, 255]]


def test_excluded_pixels_are_ignored_and_known() -> None:
    _, label_map = describe(folder(label_values={"0": "road", "1": "sky", "2": "ignore", "3-4": "exclude"}))
    raw = np.array([[0, 1, 2], [3, 4, 0]], np.uint8)
    assert label_map(raw, FILE).tolist() == [[0, 1, 255], [255, 255, 0]]
    assert label_map.excluded(raw).tolist() == [[False, False, False], [True, True, False]]
    _, label_map = describe(folder(label_colours={"#010203": "road", "#000000": "exclude"}))
    assert label_map.excluded(np.array([[[1, 2, 3], [0, 0, 0]]], np.uint8)).tolist() == [[False, True]]


def test_default_palette_is_distinct_and_never_black() -> None:
    classes, _ = describe(folder(classes=tuple(f"c{index}" for index in range(200))))
    assert len({*classes.palette, (0, 0, 0)}) == 201
    # The first colours of Pascal VOC after the background's.
    assert classes.palette[:4] == ((128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))


def test_palette_of_a_run_file() -> None:
    classes, _ = describe(folder(palette=((1, 2, 3), (4, 5, 6))))
    assert classes.palette == ((1, 2, 3), (4, 5, 6))
    refused("data.palette has 1 colours for 2 classes; give one a class", palette=((1, 2, 3),))


def test_wrong_maps() -> None:
    refused(
        "data.label_values: 3 is mapped to 'rode', which is no class; expected one of road, sky, ignore, exclude",
        label_values={"3": "rode"},
    )
    refused(
        "data.label_values: 3 is mapped twice; give every value and colour once",
        label_values={"0-6": "road", "3": "sky"},
    )
    for key in ("-1", "1.5", "seven", "6-0", "65536", "0-70000", ""):
        refused(
            f"data.label_values: {key!r} is no value; expected one of 0 to 65535 or a range such as 0-6",
            label_values={key: "road"},
        )
    for key in ("#12345", "1,2", "1,2,256", "1,2,-3", "red", ""):
        refused(
            f'data.label_colours: {key!r} is no colour; expected "#rrggbb" or "red,green,blue"',
            label_colours={key: "road"},
        )
    refused(
        "data.label_colours: 0,0,1 is mapped twice; give every value and colour once",
        label_colours={"#000001": "road", "0,0,1": "sky"},
    )


def test_a_used_map_is_small_when_pickled() -> None:
    _, label_map = describe(DataConfig(reader="camvid"), SEGNET)
    label_map(np.zeros((2, 2), np.uint8), FILE)
    copy = pickle.loads(pickle.dumps(label_map))
    assert copy == label_map
    assert len(pickle.dumps(label_map)) < 2000
