"""Scoring against torch's own interpolation, its memory bound, and what it refuses."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from segkd.pipeline import resample
from segkd.pipeline.data.sample import Classes, Role, Sample
from segkd.pipeline.evaluation.metrics import BAND_PIXELS, ConfusionMatrix, boundary_band
from segkd.pipeline.evaluation.pixels import confidence_map, label_map
from segkd.pipeline.evaluation.scores import Scores, score
from segkd.storage.errors import DataError, NetworkError, NonFiniteError
from segkd.storage.geometry import Axis, Mapping, network_axis

SHARED = Path(__file__).parents[2] / "shared"
SIZES = ((24, 33), (31, 20), (8, 8))


def spanning(height: int, width: int, h: int, w: int) -> Mapping:
    return Mapping(network_axis(height, h), network_axis(width, w))


class Source:
    """Noise with blocky labels, one class of which never occurs."""

    classes = Classes(names=("road", "sky", "unicorn"), palette=((128, 64, 128), (70, 130, 180), (255, 0, 255)))

    def __init__(self):
        rng = np.random.default_rng(7)
        self._images, self._labels = {}, {}
        for index, (height, width) in enumerate(SIZES):
            blocks = rng.choice(np.array([0, 1, 255], np.uint8), (-(-height // 8), -(-width // 8)))
            self._images[f"seq/{index}"] = rng.integers(0, 256, (height, width, 3), np.uint8)
            self._labels[f"seq/{index}"] = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
            self._labels[f"seq/{index}"].flags.writeable = False
        self.samples = tuple(Sample(id=name, role=Role.REPORT, labelled=True) for name in self._images)

    def image(self, sample):
        return self._images[sample.id]

    def labels(self, sample):
        return self._labels[sample.id]


def predict(_sample, image):
    """Random logits at a quarter of the image's size."""
    height, width = image.shape[:2]
    h, w = -(-height // 4), -(-width // 4)
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(1, 3, h, w, generator=generator), spanning(height, width, h, w)


def test_scores_are_those_of_interpolate_argmax_and_one_matrix():
    source = Source()
    expected, near_edges = ConfusionMatrix(3), ConfusionMatrix(3)
    for sample in source.samples:
        labels = torch.tensor(source.labels(sample))
        logits, _ = predict(sample, source.image(sample))
        guess = F.interpolate(logits, size=labels.shape, mode="bilinear", align_corners=False).argmax(1)[0]
        expected.update(labels, guess)
        band = boundary_band(labels)
        near_edges.update(labels[band], guess[band])
    scores = score(predict, source, source.samples)
    np.testing.assert_array_equal(scores.confusion.counts, expected.counts)
    np.testing.assert_array_equal(scores.boundary_confusion.counts, near_edges.counts)
    measures = expected.compute()
    assert (scores.miou, scores.macc, scores.aacc) == (measures.miou, measures.macc, measures.aacc)
    assert scores.boundary_miou == near_edges.compute().miou
    assert tuple(scores.per_class.values()) == measures.iou
    assert scores.samples == 3
    assert scores.pixels == sum(int((source.labels(s) != 255).sum()) for s in source.samples)


def test_a_perfect_prediction_scores_one_hundred_and_an_absent_class_is_not_counted():
    source = Source()

    def oracle(sample, _image):
        labels = torch.from_numpy(np.minimum(source.labels(sample), 1)).long()
        return F.one_hot(labels, 3).permute(2, 0, 1)[None].float(), spanning(*labels.shape, *labels.shape)

    scores = score(oracle, source, source.samples)
    assert (scores.miou, scores.macc, scores.aacc, scores.boundary_miou) == (100.0,) * 4
    assert scores.per_class == {"road": 100.0, "sky": 100.0, "unicorn": None}


def test_each_sample_is_reported_with_its_own_matrix_and_they_add_up():
    source, seen = Source(), []
    scores = score(predict, source, source.samples, on_sample=lambda *of_one: seen.append(of_one))
    assert [sample.id for sample, _ in seen] == ["seq/0", "seq/1", "seq/2"]
    np.testing.assert_array_equal(sum(matrix.counts for _, matrix in seen), scores.confusion.counts)


def test_dict_is_json_and_table_names_every_class():
    scores = score(predict, Source(), Source().samples)
    restored = json.loads(json.dumps(scores.to_dict()))
    assert restored["miou"] == scores.miou
    assert restored["per_class"] == scores.per_class
    lines = scores.table().splitlines()
    assert [line.split()[0] for line in lines] == ["class", "road", "sky", "unicorn", "mean", "aAcc"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert f"{scores.per_class['sky']:.2f}" in lines[2]
    assert lines[-1].endswith(
        f"{BAND_PIXELS} px) {scores.boundary_miou:.2f}; 3 samples, {scores.pixels:,} valid pixels"
    )


def test_table_says_na_where_there_is_nothing():
    empty = Scores(classes=("a",), samples=1, confusion=ConfusionMatrix(1), boundary_confusion=ConfusionMatrix(1))
    assert empty.table().splitlines()[1].split() == ["a", "n/a", "n/a", "0.0%"]


@pytest.mark.parametrize(("height", "width", "h", "w"), [(37, 53, 10, 14), (16, 16, 16, 16), (5, 40, 1, 3)])
def test_tiles_give_what_the_whole_picture_gives_and_stay_small(monkeypatch, height, width, h, w):
    logits = torch.randn(1, 4, h, w, generator=torch.Generator().manual_seed(3))
    mapping = spanning(height, width, h, w)
    whole = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)[0]
    monkeypatch.setattr(resample, "TILE_BYTES", 6 * 6 * 4 * 4)
    sizes, apply_weights = [], resample.apply_weights

    def spy(values, *weights):
        tile = apply_weights(values, *weights)
        sizes.extend([values.nbytes, tile.nbytes])
        return tile

    monkeypatch.setattr(resample, "apply_weights", spy)
    assert torch.equal(label_map(logits, mapping, height, width), whole.argmax(0).to(torch.uint8))
    torch.testing.assert_close(confidence_map(logits, mapping, height, width), whole.softmax(0).amax(0))
    # A tile of 6 x 6 pixels lies between at most 8 x 8 cells, when the cells are no smaller than pixels.
    assert max(sizes) <= 8 * 8 * 4 * 4


def test_cells_of_a_padded_network_lie_where_their_mapping_says():
    logits = torch.tensor([[[[0.0, 9.0]], [[4.0, 4.0]]]])
    mapping = Mapping(Axis(4.0, 1.5, 1), Axis(8.0, 0.0, 2))
    assert label_map(logits, mapping, 1, 12).tolist() == [[1, 1, 1, 1] + [0] * 8]


def test_ties_go_to_the_lowest_class():
    assert not label_map(torch.zeros(1, 3, 2, 2), spanning(5, 5, 2, 2), 5, 5).any()


def test_a_class_that_cannot_be_is_never_predicted_and_disturbs_no_other():
    log_probs = torch.tensor([[[[-1.0, -2.0]], [[-torch.inf, -torch.inf]], [[-2.0, -1.0]]]])
    assert label_map(log_probs, spanning(1, 8, 1, 2), 1, 8).tolist() == [[0, 0, 0, 0, 2, 2, 2, 2]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_output_that_is_no_number_is_refused(value):
    with pytest.raises(NonFiniteError, match=r"a network's output holds NaN or \+inf; look at its weights"):
        label_map(torch.full((1, 2, 3, 3), value), spanning(6, 6, 3, 3), 6, 6)


def test_samples_without_labels_are_refused_before_anything_is_predicted():
    source = Source()
    samples = (*source.samples, Sample(id="bare", role=Role.AUXILIARY, labelled=False))
    with pytest.raises(DataError, match="1 of 4 samples have no label map, the first is 'bare'; score a role that"):
        score(lambda *_: pytest.fail("predicted"), source, samples)


def test_nothing_to_score_is_refused():
    with pytest.raises(DataError, match="there is no sample to score; check the roles"):
        score(predict, Source(), ())


def test_labels_of_another_size_are_refused():
    source = Source()
    source._labels["seq/1"] = source._labels["seq/1"][:-1]
    with pytest.raises(DataError, match=r"'seq/1': the label map has \(30, 20\) pixels, its image \(31, 20\)"):
        score(predict, source, source.samples)


def test_an_output_of_other_classes_is_refused():
    def narrow(sample, image):
        logits, mapping = predict(sample, image)
        return logits[:, :2], mapping

    with pytest.raises(NetworkError, match=r"'seq/0': the output has shape \(1, 2, 6, 9\), expected \(1, 3, h, w\)"):
        score(narrow, Source(), Source().samples)


@pytest.mark.skipif(
    not (SHARED / "teachers").is_dir(), reason="the CamVid data and teacher are not beside the checkout"
)
def test_camvid_teacher_scores_as_in_its_own_words():
    """Its docstring: input in [0, 1] normalised with MEAN/STD, logits upsampled bilinearly, align_corners=False."""
    spec = importlib.util.spec_from_file_location("camvid_teacher", SHARED / "teachers/camvid_teacher.py")
    teacher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(teacher)
    network = teacher.build_teacher(SHARED / "teachers/camvid_teacher.pth")
    folder = SHARED / "data/camvid"
    stems = sorted(path.stem for path in (folder / "val").iterdir())[:60:20]

    class CamVid:
        classes = Classes(names=teacher.CLASSES, palette=((0, 0, 0),) * 11)
        samples = tuple(Sample(id=stem, role=Role.REPORT, labelled=True) for stem in stems)

        def image(self, sample):
            return np.asarray(Image.open(next((folder / "val").glob(f"{sample.id}.*"))).convert("RGB"))

        def labels(self, sample):
            labels = np.array(Image.open(folder / f"valannot/{sample.id}.png"))
            return np.where(labels == 11, 255, labels).astype(np.uint8)

    def logits_of(image):
        unit = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(of).view(3, 1, 1) for of in (teacher.MEAN, teacher.STD))
        with torch.inference_mode():
            return network((unit - mean) / std)

    source, logits, expected = CamVid(), {}, np.zeros((11, 11), np.int64)
    for sample in source.samples:
        labels = source.labels(sample)
        logits[sample.id] = logits_of(source.image(sample))
        guess = F.interpolate(logits[sample.id], size=labels.shape, mode="bilinear", align_corners=False)
        np.add.at(expected, (labels[labels != 255], guess.argmax(1)[0].numpy()[labels != 255]), 1)
    scores = score(
        lambda sample, image: (logits[sample.id], spanning(*image.shape[:2], *logits[sample.id].shape[2:])),
        source,
        source.samples,
    )
    np.testing.assert_array_equal(scores.confusion.counts, expected)
    assert scores.miou > 60
