"""Metrics against per-pixel loops, formulas of other people's code, and properties that must hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.metrics import contingency_table

from segkd.pipeline.evaluation.metrics import ConfusionMatrix, boundary_band
from segkd.storage.errors import ConfigError, DataError

CLASSES = 4
SHAPE = (6, 7)


def maps(values: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.uint8, SHAPE, elements=st.sampled_from(values))


LABELS = maps((0, 1, 2, 3, 255))
PREDICTIONS = maps((0, 1, 2, 3))


def counted(labels, predictions, num_classes=CLASSES) -> ConfusionMatrix:
    matrix = ConfusionMatrix(num_classes)
    matrix.update(labels, predictions)
    return matrix


def slow_measures(labels, predictions) -> dict[str, object]:
    """Sets of pixels, one class after the other."""
    valid = labels != 255
    iou, accuracy = [], []
    for c in range(CLASSES):
        truth = {(y, x) for y, x in np.ndindex(SHAPE) if valid[y, x] and labels[y, x] == c}
        guess = {(y, x) for y, x in np.ndindex(SHAPE) if valid[y, x] and predictions[y, x] == c}
        iou.append(100 * len(truth & guess) / len(truth | guess) if truth | guess else None)
        accuracy.append(100 * len(truth & guess) / len(truth) if truth else None)
    means = [np.mean([v for v in of if v is not None]) if any(valid.flat) else None for of in (iou, accuracy)]
    right = 100 * np.mean(labels[valid] == predictions[valid]) if valid.any() else None
    return {"iou": iou, "accuracy": accuracy, "miou": means[0], "macc": means[1], "aacc": right}


@given(LABELS, PREDICTIONS)
def test_measures_are_those_of_pixel_sets(labels, predictions):
    measures = counted(labels, predictions).compute()
    for name, expected in slow_measures(labels, predictions).items():
        got = getattr(measures, name)
        assert got == pytest.approx(list(expected) if isinstance(expected, list) else expected)


@given(LABELS, PREDICTIONS)
def test_counts_are_those_of_an_independent_implementation(labels, predictions):
    shown = np.minimum(labels, CLASSES)
    table = contingency_table(shown, predictions).toarray()
    expected = np.zeros((CLASSES + 1, CLASSES), np.int64)
    expected[: table.shape[0], : table.shape[1]] = table
    matrix = counted(labels, predictions)
    assert matrix.counts.dtype == np.int64
    np.testing.assert_array_equal(matrix.counts, expected[:CLASSES])


@given(LABELS, PREDICTIONS, st.permutations(range(CLASSES)))
def test_renaming_classes_permutes_their_measures_and_keeps_the_means(labels, predictions, order):
    renamed = np.full(256, 255, np.uint8)
    renamed[:CLASSES] = order
    before = counted(labels, predictions).compute()
    after = counted(renamed[labels], renamed[predictions]).compute()
    assert [after.iou[new] for new in order] == list(before.iou)
    assert [after.accuracy[new] for new in order] == list(before.accuracy)
    assert (after.miou, after.macc, after.aacc) == pytest.approx((before.miou, before.macc, before.aacc))


@given(LABELS, PREDICTIONS, st.integers(0, SHAPE[0]))
def test_splitting_and_merging_change_nothing(labels, predictions, cut):
    whole = counted(labels, predictions)
    above, below = counted(labels[:cut], predictions[:cut]), counted(labels[cut:], predictions[cut:])
    np.testing.assert_array_equal((above + below).counts, whole.counts)
    above.update(labels[cut:], predictions[cut:])
    np.testing.assert_array_equal(above.counts, whole.counts)


@given(LABELS, PREDICTIONS, PREDICTIONS)
def test_what_is_predicted_at_ignored_pixels_does_not_matter(labels, predictions, other):
    changed = np.where(labels == 255, other, predictions)
    np.testing.assert_array_equal(counted(labels, changed).counts, counted(labels, predictions).counts)


def test_tensors_and_arrays_of_any_integer_type_count_alike():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 3, SHAPE, np.uint8), rng.integers(0, 3, SHAPE, np.uint8)
    expected = counted(labels, predictions, 3).counts
    np.testing.assert_array_equal(counted(torch.tensor(labels), torch.tensor(predictions).long(), 3).counts, expected)
    np.testing.assert_array_equal(counted(labels.astype(np.int32), torch.tensor(predictions), 3).counts, expected)
    labels.flags.writeable = predictions.flags.writeable = False
    np.testing.assert_array_equal(counted(labels, predictions, 3).counts, expected)


def test_absent_classes_are_left_out_and_a_false_class_counts_as_zero():
    measures = counted(np.array([0, 0, 1, 255]), np.array([0, 2, 1, 3])).compute()
    assert measures.iou == (50.0, 100.0, 0.0, None)
    assert measures.accuracy == (50.0, 100.0, None, None)
    assert measures.miou == pytest.approx(50.0)
    assert measures.macc == pytest.approx(75.0)
    assert measures.aacc == pytest.approx(200 / 3)


def test_nothing_valid_gives_no_measure_at_all():
    measures = counted(np.full(SHAPE, 255), np.zeros(SHAPE, np.uint8)).compute()
    assert measures.iou == (None,) * CLASSES
    assert (measures.miou, measures.macc, measures.aacc) == (None, None, None)


def test_reset_forgets():
    matrix = counted(np.zeros(3, np.uint8), np.zeros(3, np.uint8))
    matrix.reset()
    assert not matrix.counts.any()


def test_255_classes_fit_beside_the_ignored_label():
    matrix = counted(np.array([254, 255], np.uint8), np.array([254, 254], np.uint8), 255)
    assert matrix.counts[254, 254] == matrix.counts.sum() == 1


@pytest.mark.parametrize("num_classes", [0, 256])
def test_an_impossible_number_of_classes_is_refused(num_classes):
    with pytest.raises(ConfigError, match=f"a confusion matrix of {num_classes} classes; expected 1 to 255"):
        ConfusionMatrix(num_classes)


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 4], [0, 0], "a label is 4; expected 0 to 3, or 255 to ignore"),
        ([0, -1], [0, 0], "a label is -1; expected 0 to 3, or 255 to ignore"),
        ([0, 0], [0, 255], "a prediction is 255; expected 0 to 3, or 255 to ignore"),
        ([0, 0], [0], r"labels of shape \(2,\) against predictions of shape \(1,\); bring the predictions to"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_counted(labels, predictions, message):
    matrix = ConfusionMatrix(CLASSES)
    with pytest.raises(DataError, match=message):
        matrix.update(np.array(labels), np.array(predictions))
    assert not matrix.counts.any()


def slow_band(labels: np.ndarray, width: int) -> np.ndarray:
    band = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(labels.shape):
        window = labels[max(y - width, 0) : y + width + 1, max(x - width, 0) : x + width + 1]
        band[y, x] = len(np.unique(window)) > 1
    return band


@given(LABELS, st.integers(1, 4))
@settings(max_examples=50)
def test_band_is_that_of_a_sliding_window(labels, width):
    np.testing.assert_array_equal(boundary_band(labels, width).numpy(), slow_band(labels, width))


@given(LABELS, st.integers(1, 4))
@settings(max_examples=50)
def test_band_is_that_of_chessboard_distance_to_the_nearest_other_label(labels, width):
    expected = np.zeros(SHAPE, bool)
    for value in np.unique(labels):
        if (labels != value).any():
            distance = ndimage.distance_transform_cdt(labels == value, metric="chessboard")
            expected |= (distance > 0) & (distance <= width)
    np.testing.assert_array_equal(boundary_band(torch.tensor(labels), width).numpy(), expected)


def test_band_of_a_straight_edge_is_three_pixels_on_either_side_and_none_at_the_image_border():
    labels = np.repeat([[0] * 10 + [1] * 10], 12, axis=0)
    band = boundary_band(labels).numpy()
    assert (band == band[0]).all()
    assert np.flatnonzero(band[0]).tolist() == [7, 8, 9, 10, 11, 12]


def test_a_line_of_ignored_pixels_is_an_edge():
    labels = np.array([[0] * 6 + [255] + [0] * 6])
    assert np.flatnonzero(boundary_band(labels).numpy()).tolist() == list(range(3, 10))
