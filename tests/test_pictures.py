"""What the pictures show, read back from their pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2lab

from segkd.pipeline.data.sample import Classes
from segkd.pipeline.evaluation.pictures import (
    TILE,
    colourise,
    comparison,
    difference,
    heat,
    overlay,
    palette_table,
    sheet,
    show_sample,
)
from segkd.storage.geometry import Mapping, network_axis

CLASSES = Classes(names=("road", "sky", "tree"), palette=((128, 64, 128), (70, 130, 180), (10, 140, 30)))
LABELS = np.array([[0, 1], [2, 255]], np.uint8)
GREY = np.full((2, 2, 3), 100, np.uint8)


def colours_in(picture: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in picture.getcolors(2**24)}


def test_labels_take_their_classes_colours_and_everything_else_is_black():
    expected = [[list(CLASSES.palette[0]), list(CLASSES.palette[1])], [list(CLASSES.palette[2]), [0, 0, 0]]]
    assert colourise(LABELS, CLASSES.palette).tolist() == expected
    assert not colourise(np.array([[3, 254, 255]], np.uint8), CLASSES.palette).any()


def test_a_palette_of_256_colours_fits_and_one_of_257_does_not():
    assert palette_table(((1, 2, 3),) * 256).tolist() == [[1, 2, 3]] * 256
    with pytest.raises(ValueError):
        palette_table(((1, 2, 3),) * 257)


@pytest.mark.parametrize(("alpha", "road"), [(0.0, [100, 100, 100]), (0.5, [114, 82, 114]), (1.0, [128, 64, 128])])
def test_overlay_tints_classes_and_leaves_ignored_pixels_alone(alpha, road):
    shown = overlay(GREY, LABELS, CLASSES.palette, alpha)
    assert shown[0, 0].tolist() == road
    assert shown[1, 1].tolist() == [100, 100, 100]


def test_heat_grows_lighter_all_the_way():
    lightness = rgb2lab(heat(np.linspace(0, 2, 41)[None], 2.0))[0, :, 0]
    steps = np.diff(lightness)
    assert lightness[0] < 2
    assert lightness[-1] > 95
    assert steps.min() > 1
    assert steps.max() < 1.5 * steps.mean()


def test_heat_clips_and_a_map_of_zeros_is_black():
    shown = heat(np.array([[-1.0, 0.0, 3.0, 9.0]]), 3.0)
    assert shown[0, 0].tolist() == shown[0, 1].tolist()
    assert shown[0, 2].tolist() == shown[0, 3].tolist()
    assert (heat(np.zeros((2, 3)), 0.0) == shown[0, 0]).all()


def test_difference_marks_wrong_pixels_red_and_ignored_ones_white():
    shown, wrong = difference(GREY, LABELS, np.array([[0, 2], [2, 0]], np.uint8))
    assert wrong == pytest.approx(100 / 3)
    right, mistaken, ignored = shown[0, 0].tolist(), shown[0, 1].tolist(), shown[1, 1].tolist()
    assert right == shown[1, 0].tolist() == [135, 135, 135]
    assert mistaken[0] > 2 * max(mistaken[1:])
    assert ignored == [255, 255, 255]


def test_difference_without_a_valid_pixel_is_zero():
    assert difference(GREY, np.full((2, 2), 255, np.uint8), LABELS)[1] == 0.0


def test_sheet_places_tiles_in_columns_below_their_captions():
    red, blue = (np.full((10, 20, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200)))
    picture = np.asarray(sheet([[("one", red), ("two", blue)], [("three", blue)]]))
    is_red, is_blue = (picture == (200, 0, 0)).all(-1), (picture == (0, 0, 200)).all(-1)
    assert is_red.sum() == TILE * TILE // 2
    assert is_blue.sum() == 2 * TILE * TILE // 2
    rows, columns = np.nonzero(is_red)
    below = is_blue[rows.max() + 1 :]
    assert below[:, columns.min() : columns.max() + 1].sum() == TILE * TILE // 2
    assert (picture[: rows.min()] != 255).any(), "no caption above the first row"
    assert picture.shape == (2 * (TILE // 2 + 22 + 12) + 12, 2 * TILE + 3 * 12, 3)


def test_a_caption_wider_than_its_picture_widens_the_column():
    tall = np.zeros((400, 4, 3), np.uint8)
    narrow, wide = sheet([[("a", tall)]]), sheet([[("a much longer caption", tall)]])
    assert wide.width > narrow.width + 50


def test_a_legend_names_its_colours_on_as_many_lines_as_it_needs():
    tile = [[("a", np.zeros((9, 9, 3), np.uint8))]]
    entries = [(f"class number {i}", (i + 1, 50, 60)) for i in range(12)]
    plain, short, long = sheet(tile), sheet(tile, entries[:1]), sheet(tile, entries)
    assert plain.height < short.height < long.height
    assert plain.width == long.width
    assert {colour for _, colour in entries} <= colours_in(long)


def sample(height: int = 30, width: int = 44) -> dict[str, object]:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    labels = np.zeros((height, width), np.uint8)
    labels[:, width // 2 :] = 1
    log_probs = torch.randn(1, 3, 8, 11, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    log_probs[:, 2] = -torch.inf
    mapping = Mapping(network_axis(height, 8), network_axis(width, 11))
    return {"image_HW3": image, "labels_HW": labels, "log_probs_1Chw": log_probs, "mapping": mapping}


def test_a_sample_is_shown_whole_and_its_legend_names_only_the_classes_that_occur():
    shown = show_sample(**sample(), first_order_hw=torch.rand(8, 11), classes=CLASSES)
    assert shown.width == 3 * TILE + 4 * 12
    assert set(CLASSES.palette[:2]) <= colours_in(shown)
    assert CLASSES.palette[2] not in colours_in(shown)


def test_the_teacher_maps_stand_where_the_mapping_says():
    """A first-order map with one bright cell in the lower right shows there, and nowhere else."""
    first_order = torch.zeros(8, 11)
    first_order[7, 10] = 1.0
    shown = np.asarray(show_sample(**sample(), first_order_hw=first_order, classes=CLASSES)).astype(int)
    tile = shown[-46 - 245 : -46, -12 - TILE : -12]
    assert (tile[-10:, -10:] == heat(np.ones((1, 1)), 1.0)[0, 0]).all()
    assert (tile[:200, :300] == heat(np.zeros((1, 1)), 1.0)[0, 0]).all()


def test_labels_and_first_order_map_may_be_missing():
    known = sample() | {"labels_HW": None}
    shown = show_sample(**known, first_order_hw=None, classes=CLASSES)
    assert shown.width == 2 * TILE + 3 * 12


def test_comparison_has_a_column_a_network_and_a_second_row_where_there_are_labels():
    known = sample()
    image, labels = known["image_HW3"], known["labels_HW"]
    predictions = {"alone": np.zeros_like(labels), "distilled": labels}
    shown = comparison(image, labels, predictions, CLASSES)
    bare = comparison(image, None, predictions, CLASSES)
    assert shown.width == bare.width == 3 * TILE + 4 * 12
    assert shown.height - bare.height == round(TILE * 30 / 44) + 22 + 12
    red = (np.asarray(shown) == difference(image, labels, 1 - labels)[0][0, 0]).all(-1)
    assert not red[:, -TILE:].any(), "the perfect prediction has a wrong pixel"
