"""Decoded images that are kept: asked for once, within their bytes, and no batch differs."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from segkd.pipeline.data.kept import KeptSource, Pixels
from segkd.pipeline.data.sample import DataSource, Role, Sample
from segkd.pipeline.data.scenes import SceneConfig, SceneSource
from segkd.pipeline.data.stream import StreamConfig, TrainStream, loader
from segkd.pipeline.data.transforms import AugmentConfig
from segkd.pipeline.models.network import Preprocessing
from segkd.pipeline.settings import parse
from segkd.pipeline.student.config import TrainConfig
from segkd.storage.errors import ConfigError

SIZE = (32, 40)
IMAGE, LABELS = 32 * 40 * 3, 32 * 40


class Counting(SceneSource):
    """Counts what is read of it."""

    def __init__(self) -> None:
        super().__init__(SceneConfig(train=4, auxiliary=2, select=0, report=0, size=SIZE))
        self.read: list[tuple[str, str]] = []

    def image(self, sample: Sample) -> Pixels:
        self.read.append(("image", sample.id))
        return super().image(sample)

    def labels(self, sample: Sample) -> Pixels:
        self.read.append(("labels", sample.id))
        return super().labels(sample)


def ask_for_all(source: DataSource) -> None:
    for sample in source.samples:
        source.image(sample)
        if sample.role is Role.TRAIN:
            source.labels(sample)


def test_what_there_is_room_for_is_read_once() -> None:
    counting = Counting()
    kept = KeptSource(counting, 6 * IMAGE + 4 * LABELS)
    ask_for_all(kept)
    first = list(counting.read)
    ask_for_all(kept)
    assert counting.read == first
    assert len(first) == 10


def test_what_there_is_no_room_for_is_read_again_and_the_rest_stays() -> None:
    counting = Counting()
    kept = KeptSource(counting, 2 * IMAGE + LABELS)
    for _ in range(3):
        ask_for_all(kept)
    again = {what for what in counting.read if counting.read.count(what) == 3}
    assert {counting.read.count(what) for what in counting.read} == {1, 3}
    assert len(again) == 10 - 3


def test_without_room_nothing_is_kept() -> None:
    counting = Counting()
    kept = KeptSource(counting, 0)
    assert kept.image(kept.samples[0]).flags.writeable
    kept.image(kept.samples[0])
    assert len(counting.read) == 2


def test_values_are_the_sources_own_and_cannot_be_changed() -> None:
    source = SceneSource(SceneConfig(train=1, auxiliary=0, select=0, report=0, size=SIZE))
    kept, (sample,) = KeptSource(source, 10 * IMAGE), source.samples
    for _ in range(2):
        np.testing.assert_array_equal(kept.image(sample), source.image(sample))
        np.testing.assert_array_equal(kept.labels(sample), source.labels(sample))
    with pytest.raises(ValueError, match="read-only"):
        kept.image(sample)[0, 0] = 0


class Hiding(Counting):
    """Names pixels that show nothing of the scene, as a view of something larger."""

    def excluded(self, sample: Sample) -> npt.NDArray[np.bool_]:
        self.read.append(("excluded", sample.id))
        return np.broadcast_to(np.arange(SIZE[1]) > 30, SIZE)


@pytest.mark.parametrize("source", [Counting(), Hiding()])
def test_excluded_pixels_are_asked_for_once_too(source: Counting) -> None:
    kept, sample = KeptSource(source, 10 * IMAGE), source.samples[0]
    for _ in range(3):
        expected, found = type(source)().excluded(sample), kept.excluded(sample)
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert found.dtype == np.bool_
            np.testing.assert_array_equal(found, expected)
    assert len(source.read) == (1 if isinstance(source, Hiding) else 0)


def test_what_is_kept_of_a_view_does_not_change_with_it() -> None:
    buffer = np.zeros((*SIZE, 6), np.uint8)

    class Views(Counting):
        def image(self, sample: Sample) -> Pixels:  # noqa: ARG002 - as the protocol has it
            return buffer[..., :3]

    kept = KeptSource(Views(), 10 * IMAGE)
    kept.image(kept.samples[0])
    buffer[:] = 9
    assert not kept.image(kept.samples[0]).any()
    assert buffer.flags.writeable


def test_a_copy_for_another_process_carries_no_pixels() -> None:
    source = SceneSource(SceneConfig(train=20, auxiliary=0, select=0, report=0, size=SIZE))
    kept = KeptSource(source, 100 * IMAGE)
    ask_for_all(kept)
    assert len(pickle.dumps(kept)) < len(pickle.dumps(source)) + 200
    copy = pickle.loads(pickle.dumps(kept))
    assert copy.samples == kept.samples
    np.testing.assert_array_equal(copy.image(copy.samples[3]), kept.image(kept.samples[3]))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same(workers: int) -> None:
    source = SceneSource(SceneConfig(train=3, auxiliary=0, select=0, report=0, size=SIZE))
    config = StreamConfig(labelled=2)
    # Crops as large as the image at its own scale, and unperturbed: what could pass an image on as it is.
    for augment in (AugmentConfig(crop=(16, 16)), AugmentConfig(crop=SIZE, scale=(1, 1), flip=False, photometric=0)):
        given = (None, (), config, augment, Preprocessing())
        plain, kept = (TrainStream(each, *given) for each in (source, KeptSource(source, 2 * IMAGE + LABELS)))
        for one, other in zip(loader(plain, 0, 6, workers), loader(kept, 0, 6, workers), strict=True):
            assert torch.equal(one.images_N3HW, other.images_N3HW)
            assert torch.equal(one.labels_NHW, other.labels_NHW)


def test_the_setting_is_an_amount_of_bytes() -> None:
    assert TrainConfig().kept_bytes == 256 * 10**6
    assert parse(TrainConfig, {"keep_decoded": 0}).kept_bytes == 0
    with pytest.raises(ConfigError) as caught:
        replace(TrainConfig(), keep_decoded="much")
    assert str(caught.value) == (
        "train.keep_decoded: 'much' is no amount of bytes; write a number and one of B, kB, MB, GB, TB, PB, KiB, MiB, "
        "GiB, TiB, PiB: 200GB, or 0 without quotes"
    )
