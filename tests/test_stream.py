"""Batches are a pure function of (seed, step), hold the right cells, and never what must not be learned from."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

from segkd.pipeline.data.batch import Batch
from segkd.pipeline.data.sample import Classes, Role, Sample
from segkd.pipeline.data.stream import StreamConfig, TrainStream, loader
from segkd.pipeline.data.transforms import AugmentConfig
from segkd.pipeline.models.network import Preprocessing
from segkd.storage.coding import EXACT, CompandedDistribution
from segkd.storage.errors import CacheDamagedError, CacheMismatchError, ConfigError, ContaminationError, DataError
from segkd.storage.geometry import Mapping, network_axis

CLASSES = Classes(names=("a", "b"), palette=((0, 0, 0), (255, 255, 255)))
AUGMENT = AugmentConfig(crop=(24, 20), scale=(0.5, 2.0), photometric=0.5, auxiliary_photometric=1.0)
PLAIN = AugmentConfig(crop=(24, 20), photometric=0.0, auxiliary_photometric=0.0)


def shade(sample: Sample) -> int:
    """Another one for every sample."""
    return 20 * list(Role).index(sample.role) + int(sample.id.split("/")[1])


@dataclass
class FakeSource:
    """Images that show their own coordinates: red = y, green = x, blue = :func:`shade`."""

    samples: tuple[Sample, ...]
    forbidden: frozenset[Role] = frozenset({Role.AUXILIARY, Role.SELECT, Role.REPORT})
    classes: Classes = CLASSES
    label_size: tuple[int, int] | None = None
    hidden_from: int | None = None
    """The first column that shows nothing of the scene."""
    digests: list[str] = field(default_factory=list)

    def size(self, sample: Sample) -> tuple[int, int]:
        number = int(sample.id.split("/")[1])
        return 30 + number, 40 - number

    def image(self, sample: Sample) -> npt.NDArray[np.uint8]:
        height, width = self.size(sample)
        planes = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        return np.stack([*planes, np.full((height, width), shade(sample))], axis=-1).astype(np.uint8)

    def excluded(self, sample: Sample) -> npt.NDArray[np.bool_] | None:
        assert sample.role not in self.forbidden, "the labels of such a sample must not be opened"
        if self.hidden_from is None:
            return None
        height, width = self.size(sample)
        return np.broadcast_to(np.arange(width) >= self.hidden_from, (height, width))

    def image_digest(self, sample: Sample) -> bytes:
        self.digests.append(sample.id)
        return hashlib.sha256(self.image(sample).tobytes()).digest()[:16]

    def labels(self, sample: Sample) -> npt.NDArray[np.uint8]:
        assert sample.role not in self.forbidden, "the labels of such a sample must not be opened"
        return np.ones(self.label_size or self.size(sample), np.uint8)


@dataclass(frozen=True)
class FakeEntry:
    id: str
    role: str
    image_size: tuple[int, int]
    mapping: Mapping
    image_digest: bytes
    rungs: dict[str, int]


@dataclass
class FakeSpec:
    classes: tuple[str, ...] = CLASSES.names
    targets: dict[str, None] = field(default_factory=lambda: {"soft": None, "first_order": None})


class FakeReader:
    """Codes that tell their own cell: channel 0 is the row + 1, channel 1 the column + 1."""

    def __init__(self, source: FakeSource, stride: int = 4) -> None:
        self.spec = FakeSpec()
        self.table = {}
        for rung, sample in enumerate(source.samples):
            axes = [network_axis(pixels, -(-pixels // stride)) for pixels in source.size(sample)]
            rungs = {"soft": rung, "first_order": 0}
            digest = hashlib.sha256(source.image(sample).tobytes()).digest()[:16]
            self.table[sample.id] = FakeEntry(
                sample.id, sample.role, source.size(sample), Mapping(*axes), digest, rungs
            )

    def entry(self, sample_id: str) -> FakeEntry:
        return self.table[sample_id]

    def window(self, entry: FakeEntry, target: str, rows: range, columns: range) -> npt.NDArray[np.uint8]:  # noqa: ARG002
        cells = np.stack(np.meshgrid(rows, columns, indexing="ij")) + 1
        return cells[: 2 if target == "soft" else 1].astype(np.uint8)


def make_source(**counts: int) -> FakeSource:
    roles = counts or {"train": 5, "auxiliary": 7, "select": 2, "report": 2}
    samples = [
        Sample(id=f"{role}/{k}", role=Role(role), labelled=role != "auxiliary")
        for role in sorted(roles)
        for k in range(roles[role])
    ]
    return FakeSource(tuple(samples))


def make_stream(
    source: FakeSource | None = None,
    cache: FakeReader | None = None,
    *,
    labelled: int = 2,
    auxiliary: int = 3,
    seed: int = 0,
    augment: AugmentConfig = AUGMENT,
    targets: tuple[str, ...] = ("soft", "first_order"),
    distil: bool = True,
    preprocessing: Preprocessing | None = None,
) -> TrainStream:
    source = source or make_source()
    reader: Any = (cache or FakeReader(source)) if distil else None
    config = StreamConfig(labelled=labelled, auxiliary=auxiliary, seed=seed)
    return TrainStream(source, reader, targets, config, augment, preprocessing or Preprocessing())


def tensors(batch: Batch) -> list[torch.Tensor]:
    found = [batch.images_N3HW, batch.labels_NHW, batch.labelled_N]
    if batch.sources is not None:
        sources = batch.sources
        found += [sources.crop_S, sources.cell_to_crop_S22, sources.counts_Shw, sources.counts_first_Shw]
        found += [*sources.codes.values(), *sources.rungs.values()]
    return found


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def test_every_epoch_draws_every_sample_once_in_another_order() -> None:
    stream = make_stream()
    drawn = list(itertools.chain.from_iterable(stream.draws(step) for step in range(35)))
    for role, pool in (("train", 5), ("auxiliary", 7)):
        draws = [draw for draw in drawn if draw.sample.role == role]
        epochs = [[d.sample.id for d in draws[k : k + pool]] for k in range(0, len(draws), pool)]
        assert len(epochs) == len(draws) // pool
        assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1
        assert [d.epoch for d in draws] == [k // pool for k in range(len(draws))]
    assert {draw.sample.role for draw in drawn} == {Role.TRAIN, Role.AUXILIARY}


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    forwards, backwards = make_stream(), make_stream()
    first = [forwards[step] for step in range(4)]
    second = [backwards[step] for step in reversed(range(4))][::-1]
    assert all(map(same, first, second))
    assert not same(first[0], first[1])
    assert not same(first[0], make_stream(seed=1)[0])


def test_a_sample_is_augmented_alike_whatever_it_is_batched_with() -> None:
    small, large = make_stream(labelled=1, auxiliary=0), make_stream(labelled=5, auxiliary=3)
    for k, draw in enumerate(large.draws(0)[:5]):
        assert small.draws(k) == (draw,)
        torch.testing.assert_close(small[k].images_N3HW[0], large[0].images_N3HW[k], rtol=0, atol=0)


def test_the_same_crops_are_cut_with_and_without_a_cache() -> None:
    distilled, alone = make_stream(auxiliary=0)[3], make_stream(auxiliary=0, distil=False)[3]
    assert alone.sources is None
    assert torch.equal(distilled.images_N3HW, alone.images_N3HW)
    assert torch.equal(distilled.labels_NHW, alone.labels_NHW)


def counted(batch: Batch, counts: str = "counts_Shw") -> set[tuple[int, int, int]]:
    """(crop, row, column) of the teacher's cells that count, wherever their windows begin."""
    assert batch.sources is not None
    codes = batch.sources.codes["soft"].int() - 1
    s, y, x = getattr(batch.sources, counts).nonzero(as_tuple=True)
    return set(zip(s.tolist(), codes[s, 0, y, x].tolist(), codes[s, 1, y, x].tolist(), strict=True))


def test_no_cell_counts_that_shows_nothing_of_the_scene() -> None:
    seen, hidden = make_stream(), make_stream(dataclasses.replace(make_source(), hidden_from=20))
    lost = unseen = 0
    for step in range(20):
        before, after = seen[step], hidden[step]
        assert torch.equal(before.images_N3HW, after.images_N3HW)
        assert torch.equal(before.labels_NHW, after.labels_NHW)
        cells, lasting = counted(before), counted(after)
        assert lasting <= cells
        assert counted(after, "counts_first_Shw") <= lasting
        # Cells are 3.7 to 4 pixels wide, and a crop pixel shows up to 2: between 17 and 24 either may be.
        gone = {(crop, row, column) for crop, row, column in cells - lasting if 4 * column + 1.5 >= 17}
        assert gone == cells - lasting
        assert all(crop < 2 for crop, _, _ in gone), "labels of auxiliary samples are not opened"
        assert not any(crop < 2 and 4 * column + 1.5 > 24 for crop, _, column in lasting)
        lost += len(gone)
        assert after.sources is not None
        unseen += int((~after.sources.counts_Shw[:2].flatten(1).any(1)).sum())
    assert lost > 100
    assert unseen > 0, "crops that show nothing else have a source as well"


def test_without_a_cache_nobody_asks_what_is_hidden() -> None:
    source = dataclasses.replace(make_source(), hidden_from=20, forbidden=frozenset({Role.SELECT, Role.REPORT}))
    source.excluded = None  # type: ignore[assignment, method-assign]
    assert make_stream(source, auxiliary=0, distil=False)[0].sources is None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_number_of_workers_changes_nothing() -> None:
    stream = make_stream()
    state = torch.get_rng_state()
    alone = list(loader(stream, 2, 7, workers=0))
    many = list(loader(stream, 2, 7, workers=2))
    assert len(alone) == len(many) == 5
    assert all(map(same, alone, many))
    assert same(alone[0], stream[2])
    assert torch.equal(torch.get_rng_state(), state), "a loader must leave the global generator alone"


def test_shapes_types_and_padding() -> None:
    batch = make_stream()[0]
    assert batch.images_N3HW.shape == (5, 3, 24, 20)
    assert batch.images_N3HW.dtype == torch.float32
    assert batch.images_N3HW.is_contiguous()
    assert batch.labels_NHW.shape == (5, 24, 20)
    assert batch.labels_NHW.dtype == torch.int64
    assert batch.labelled_N.tolist() == [True, True, False, False, False]
    sources = batch.sources
    assert sources is not None
    cells = sources.counts_Shw.shape
    assert sources.crop_S.tolist() == [0, 1, 2, 3, 4]
    assert sources.codes["soft"].shape == (5, 2, *cells[1:])
    assert sources.codes["first_order"].shape == (5, 1, *cells[1:])
    assert sources.codes["soft"].dtype == torch.uint8
    held = sources.codes["soft"][:, 0] > 0
    assert held.any(dim=2).any(dim=0).all(), "no row is padding in all windows"
    assert held.any(dim=1).any(dim=0).all(), "no column is padding in all windows"
    assert not sources.counts_Shw[~held].any()
    assert not (sources.counts_first_Shw & ~sources.counts_Shw).any()
    assert sources.rungs["soft"].dtype == torch.int64
    stream = make_stream()
    order = [sample.id for sample in make_source().samples]
    assert sources.rungs["soft"].tolist() == [order.index(draw.sample.id) for draw in stream.draws(0)]


CODER = CompandedDistribution(levels=(20.0,))


class ExactReader(FakeReader):
    """Distributions over two classes, of which the samples with an even number are kept in float16."""

    def entry(self, sample_id: str) -> FakeEntry:
        exact = int(sample_id.split("/")[1]) % 2 == 0
        return replace(super().entry(sample_id), rungs={"soft": EXACT if exact else 0})

    def window(self, entry: FakeEntry, target: str, rows: range, columns: range) -> npt.NDArray[Any]:  # noqa: ARG002
        logit = np.add.outer(np.array(rows), np.array(columns)) / 9 - 1
        log_probs = (-np.logaddexp(0, np.stack([logit, -logit]))).astype(np.float32)
        if entry.rungs["soft"] == EXACT:
            return log_probs.astype(np.float16)
        return np.asarray(CODER.encode(log_probs[None], np.array([0]))[0])

    def decode(self, target: str, codes: Any, rungs: Any) -> Any:  # noqa: ARG002
        return CODER.decode(codes, rungs)


def test_samples_that_are_kept_exactly_are_batched_with_others() -> None:
    source = make_source()
    reader = ExactReader(source)
    kinds: set[torch.dtype] = set()
    for step in range(12):
        stream = make_stream(source, reader, labelled=1, auxiliary=1, targets=("soft",))
        draws, sources = stream.draws(step), stream[step].sources
        assert sources is not None
        codes, rungs = sources.codes["soft"], sources.rungs["soft"]
        kinds.add(codes.dtype)
        assert rungs.tolist() == [reader.entry(draw.sample.id).rungs["soft"] for draw in draws]
        decoded = CODER.decode(codes, rungs)
        assert decoded.dtype == torch.float32
        assert decoded.isfinite().all()
        for s, draw in enumerate(draws):
            (alone,) = make_stream(source, reader, labelled=1, auxiliary=1, targets=("soft",))._item(draw).knowledge
            values = CODER.decode(alone.codes["soft"][None], np.array([alone.rungs["soft"]]))[0]
            height, width = values.shape[1:]
            torch.testing.assert_close(decoded[s, :, :height, :width], torch.from_numpy(values), rtol=0, atol=1e-6)
    assert kinds == {torch.uint8, torch.float16, torch.float32}


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_counting_cells_lie_where_the_image_says(cutmix: float) -> None:
    """Every code names its cell and every pixel its coordinate and image, so that they can be compared in the crop."""
    source, stream = make_source(), make_stream(augment=replace(PLAIN, scale=(1.5, 2.5), cutmix=cutmix))
    mean, std = (torch.tensor(v)[:, None, None] for v in (Preprocessing().mean, Preprocessing().std))
    compared = 0
    for step in range(3):
        batch = stream[step]
        assert batch.sources is not None
        for s, crop in enumerate(batch.sources.crop_S.tolist()):
            sample = source.samples[int(batch.sources.rungs["soft"][s])]
            entry = FakeReader(source).entry(sample.id)
            pixels = (batch.images_N3HW[crop] * std + mean) * 255
            for row, column in batch.sources.counts_Shw[s].nonzero().tolist():
                cell_y, cell_x = (batch.sources.codes["soft"][s, :, row, column].int() - 1).tolist()
                (scale_y, offset_y), (scale_x, offset_x) = batch.sources.cell_to_crop_S22[s].tolist()
                shown = pixels[:, round(scale_y * row + offset_y), round(scale_x * column + offset_x)]
                expected = entry.mapping.y.affine(cell_y), entry.mapping.x.affine(cell_x)
                # Half a crop pixel of rounding, and a clamped border pixel.
                assert shown[:2].tolist() == pytest.approx(expected, abs=1.1)
                assert shown[2].item() == pytest.approx(shade(sample), abs=1e-3)
                compared += 1
    assert compared > 100


def test_a_network_at_half_scale_gets_smaller_images_and_the_same_labels_and_cells() -> None:
    whole = make_stream(augment=PLAIN)[0]
    half = make_stream(augment=PLAIN, preprocessing=Preprocessing(scale=0.5))[0]
    height, width = whole.images_N3HW.shape[-2:]
    assert half.images_N3HW.shape[-2:] == (height // 2, width // 2)
    assert torch.equal(half.labels_NHW, whole.labels_NHW)
    assert whole.sources is not None
    assert half.sources is not None
    assert torch.equal(half.sources.cell_to_crop_S22, whole.sources.cell_to_crop_S22)
    # The pictures are coordinate ramps, of which a mean over two pixels is the value between them.
    means = F.avg_pool2d(whole.images_N3HW, 2)[..., 2:-2, 2:-2]
    torch.testing.assert_close(half.images_N3HW[..., 2:-2, 2:-2], means, rtol=0, atol=0.03)


MIXED = replace(AUGMENT, cutmix=1.0)


def samples_of(batch: Batch, crop: int) -> list[int]:
    """The numbers of the samples that a crop of a batch from :class:`FakeReader` has sources of."""
    assert batch.sources is not None
    return batch.sources.rungs["soft"][batch.sources.crop_S == crop].tolist()


def test_without_mixing_auxiliary_crops_are_what_they_would_be_anyway() -> None:
    """Also those that a probability leaves alone, and all labelled ones."""
    plain, half = make_stream(), make_stream(augment=replace(AUGMENT, cutmix=0.5))
    mixed = 0
    for step in range(12):
        before, after = plain[step], half[step]
        for n in range(5):
            sources = samples_of(after, n)
            assert sources[0] == samples_of(before, n)[0]
            assert torch.equal(before.images_N3HW[n], after.images_N3HW[n]) == (len(sources) == 1)
            mixed += len(sources) - 1
        assert [len(samples_of(after, n)) for n in (0, 1)] == [1, 1]
    assert 8 < mixed < 28, "half of 36"


def test_a_mix_shows_the_first_image_as_it_is_cut_alone_and_another_one_in_a_rectangle() -> None:
    source = make_source()
    plain, mixing = make_stream(augment=PLAIN), make_stream(augment=replace(PLAIN, cutmix=1.0))
    others: Counter[int] = Counter()
    for step in range(20):
        alone, mixed = plain[step], mixing[step]
        for n, draw in enumerate(mixing.draws(step)):
            if draw.sample.role is Role.TRAIN:
                assert samples_of(mixed, n) == [source.samples.index(draw.sample)]
                assert torch.equal(mixed.images_N3HW[n], alone.images_N3HW[n])
                continue
            first, second = samples_of(mixed, n)
            assert source.samples[first] == draw.sample
            assert source.samples[second].role is Role.AUXILIARY
            assert first != second
            others[second] += 1
            changed = (mixed.images_N3HW[n] != alone.images_N3HW[n]).any(0)
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            # Where both images are padding nothing changes; elsewhere the third channel tells any two images apart.
            height, width = (int(line.max() - line.min()) + 1 for line in (rows, columns))
            assert height < 24
            assert width < 20
    assert len(others) == 7, "every image of the pool is mixed into some other"


def test_mixes_are_a_pure_function_of_seed_and_step() -> None:
    forwards, backwards = make_stream(augment=MIXED), make_stream(augment=MIXED)
    first = [forwards[step] for step in range(4)]
    second = [backwards[step] for step in reversed(range(4))][::-1]
    assert all(map(same, first, second))
    assert not same(first[0], make_stream(augment=MIXED, seed=1)[0])
    large = make_stream(augment=MIXED, labelled=5, auxiliary=7)
    small = make_stream(augment=MIXED, labelled=0, auxiliary=1)
    for k in range(7):
        assert small.draws(k) == (large.draws(0)[5 + k],)
        assert torch.equal(small[k].images_N3HW[0], large[0].images_N3HW[5 + k])


def test_sources_of_a_mix_share_no_pixel_and_leave_none_out() -> None:
    stream = make_stream(augment=replace(PLAIN, cutmix=1.0, scale=(1.0, 1.0)), labelled=0)
    for step in range(5):
        for draw in stream.draws(step):
            first, second = stream._pieces(draw, draw.generator(0))
            assert first.sample == draw.sample
            np.testing.assert_array_equal(first.region, ~second.region)
            assert first.region.any()
            assert second.region.any()
            assert stream._knowledge is not None
            whole = replace(second, region=np.ones(second.region.shape, bool))
            read, needed = (stream._knowledge.of(piece)[0].window.counts for piece in (whole, second))
            assert needed.size <= read.size * second.region.mean() + 2 * sum(read.shape) + 4, "a window costs a window"


def test_both_images_of_a_mix_are_held_against_what_the_teacher_saw() -> None:
    source = make_source(train=1, auxiliary=2)
    for lost in ("auxiliary/0", "auxiliary/1"):
        reader = FakeReader(source)
        with_entry(lost, image_digest=b"")(reader)
        with pytest.raises(CacheMismatchError, match=f"^the image of {lost} is not the one that the teacher saw"):
            make_stream(source, reader, labelled=1, auxiliary=1, augment=MIXED)[0]


def test_a_mix_of_which_one_image_is_kept_exactly_is_batched() -> None:
    source = make_source(train=1, auxiliary=4)
    reader = ExactReader(source)
    kinds = set()
    for step in range(20):
        stream = make_stream(source, reader, labelled=0, auxiliary=1, targets=("soft",), augment=MIXED)
        sources, (draw,) = stream[step].sources, stream.draws(step)
        assert sources is not None
        decoded = CODER.decode(sources.codes["soft"], sources.rungs["soft"])
        kinds.add(tuple(sorted(sources.rungs["soft"].tolist())))
        for s, alone in enumerate(stream._item(draw).knowledge):
            values = CODER.decode(alone.codes["soft"][None], np.array([alone.rungs["soft"]]))[0]
            height, width = values.shape[1:]
            torch.testing.assert_close(decoded[s, :, :height, :width], torch.from_numpy(values), rtol=0, atol=1e-6)
    assert kinds == {tuple(sorted((0, EXACT))), (0, 0), (EXACT, EXACT)}


def test_a_mix_needs_two_images() -> None:
    with pytest.raises(ConfigError) as error:
        make_stream(make_source(train=1, auxiliary=1), auxiliary=1, augment=MIXED)
    assert str(error.value) == (
        "augment.cutmix is 1, but there is only one auxiliary sample to draw from, and a mix needs two; "
        "set it to 0, or provide more images"
    )
    assert make_stream(make_source(train=2), auxiliary=0, augment=MIXED)[0].sources is not None


def test_auxiliary_labels_are_never_opened_and_all_255() -> None:
    batch = make_stream(labelled=0, auxiliary=7)[0]
    assert (batch.labels_NHW == 255).all()
    assert not batch.labelled_N.any()
    labelled = make_stream(labelled=5, auxiliary=0)[0]
    assert set(labelled.labels_NHW.unique().tolist()) <= {1, 255}
    assert (labelled.labels_NHW == 1).any()


def test_each_pool_has_its_own_photometric_strength() -> None:
    plain = make_stream(augment=PLAIN)[0].images_N3HW
    strong = make_stream(augment=replace(PLAIN, auxiliary_photometric=1.0))[0].images_N3HW
    assert torch.equal(plain[:2], strong[:2])
    assert all(not torch.equal(plain[k], strong[k]) for k in range(2, 5))


def test_digests_are_computed_once_a_sample() -> None:
    source = make_source()
    stream = make_stream(source)
    for step in range(10):
        stream[step]
    assert sorted(source.digests) == sorted({draw.sample.id for step in range(10) for draw in stream.draws(step)})


def with_entry(sample_id: str, **changes: object) -> Callable[[FakeReader], None]:
    def change(reader: FakeReader) -> None:
        reader.table[sample_id] = replace(reader.table[sample_id], **changes)  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize("role", ["select", "report"])
def test_samples_for_choosing_or_reporting_are_refused(role: str) -> None:
    source = make_source()
    reader = FakeReader(source)
    with_entry("train/3", role=role)(reader)
    with_entry("auxiliary/1", role=role)(reader)
    with pytest.raises(ContaminationError) as error:
        make_stream(source, reader)
    assert str(error.value) == (
        f"sample train/3 has role train in the data but {role} in the cache, "
        "and such samples must not be learned from; correct the lists of the data"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_entry("train/1", role="auxiliary"),
            "sample train/1 has role train in the data but auxiliary in the cache; "
            "correct the lists of the data, or run segkd teacher-cache again",
        ),
        (
            with_entry("train/1", image_size=(3, 4)),
            "the image of train/1 is 31x39 pixels, the teacher saw one of 3x4; run segkd teacher-cache again",
        ),
        (
            with_entry("train/1", image_digest=b""),
            "the image of train/1 is not the one that the teacher saw: its digest differs; "
            "run segkd teacher-cache again",
        ),
        (
            lambda reader: setattr(reader, "spec", FakeSpec(classes=("a", "c"))),
            "the cache is of the classes a, c, the data of a, b; use a cache written for these data",
        ),
        (
            lambda reader: setattr(reader, "spec", FakeSpec(targets={"soft": None})),
            "the cache keeps no target 'first_order', only soft; "
            "write it again with that target, or give its loss the weight 0",
        ),
    ],
)
def test_another_cache_is_refused(change: Callable[[FakeReader], None], message: str) -> None:
    source = make_source()
    reader = FakeReader(source)
    change(reader)
    with pytest.raises(CacheMismatchError) as error:
        list(loader(make_stream(source, reader), 0, 3, workers=0))
    assert str(error.value) == message


def test_labels_of_another_size_are_refused() -> None:
    source = replace(make_source(train=1), label_size=(5, 6))
    with pytest.raises(DataError) as error:
        make_stream(source, labelled=1, auxiliary=0)[0]
    assert str(error.value) == (
        "the labels of train/0 are 5x6 pixels, its image is 30x40; "
        "they must be of one size: segkd data check lists all such samples"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"distil": False},
            "a batch has 3 auxiliary samples but there is no cache and no teacher; "
            "they are learned from through the teacher alone: set auxiliary to 0, or distil",
        ),
        (
            {"source": make_source(train=3)},
            "a batch needs 3 samples of role auxiliary, but the data has none; "
            "give some samples this role, or ask for 0",
        ),
        (
            {"labelled": 0, "auxiliary": 0},
            "labelled and auxiliary are both 0; a batch needs samples: raise one of them",
        ),
        ({"labelled": -1}, "labelled is -1; it must be 0 or more"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
    ],
)
def test_bad_composition_says_what_to_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_stream(**arguments)
    assert str(error.value) == message


@dataclass(frozen=True)
class FakeTarget:
    channels: int
    coder: CompandedDistribution = field(default_factory=CompandedDistribution)


class DamagedReader(FakeReader):
    """What cannot be read: the row of ``train/1``, the tiles of ``train/2`` and ``auxiliary/0``."""

    def __init__(self, source: FakeSource) -> None:
        super().__init__(source)
        self.spec.targets = {"soft": FakeTarget(2), "first_order": FakeTarget(1)}  # type: ignore[dict-item]

    def entry(self, sample_id: str) -> FakeEntry:
        if sample_id == "train/1":
            raise CacheDamagedError("samples/c/0/0: lost")
        return super().entry(sample_id)

    def window(self, entry: FakeEntry, target: str, rows: range, columns: range) -> npt.NDArray[np.uint8]:
        if entry.id in ("train/2", "auxiliary/0"):
            raise CacheDamagedError("soft/c/0: lost")
        return super().window(entry, target, rows, columns)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_crop_whose_knowledge_is_damaged_keeps_its_labels_and_counts_in_no_cell(workers: int) -> None:
    source = make_source()
    config = StreamConfig(labelled=2, auxiliary=3, on_damage="skip")
    skipping = TrainStream(source, DamagedReader(source), ("soft", "first_order"), config, AUGMENT, Preprocessing())  # type: ignore[arg-type]
    whole = make_stream(source)
    lost = 0
    for step, batch in enumerate(loader(skipping, 0, 8, workers)):
        expected, draws = whole[step], whole.draws(step)
        assert torch.equal(batch.images_N3HW, expected.images_N3HW)
        assert torch.equal(batch.labels_NHW, expected.labels_NHW)
        found, undamaged = batch.sources, expected.sources
        assert found is not None
        assert undamaged is not None
        assert found.crop_S.tolist() == list(range(5))
        damaged = [draw.sample.id in ("train/1", "train/2", "auxiliary/0") for draw in draws]
        assert set(batch.damaged) == {draw.sample.id for draw, is_so in zip(draws, damaged, strict=True) if is_so}
        for s in range(5):
            counts, counts_first = found.counts_Shw[s], found.counts_first_Shw[s]
            if damaged[s]:
                assert not counts.any()
                assert not counts_first.any()
                lost += 1
                continue
            h, w = (min(sizes) for sizes in zip(counts.shape, undamaged.counts_Shw[s].shape, strict=True))
            assert torch.equal(counts[:h, :w], undamaged.counts_Shw[s, :h, :w])
            assert counts.sum() == undamaged.counts_Shw[s].sum()
            assert torch.equal(found.codes["soft"][s, :, :h, :w].int(), undamaged.codes["soft"][s, :, :h, :w].int())
    assert lost > 8


def test_damage_to_one_image_of_a_mix_leaves_the_other_one() -> None:
    source = make_source(train=1, auxiliary=3)
    config = StreamConfig(labelled=0, auxiliary=3, on_damage="skip")
    reader: Any = DamagedReader(source)
    skipping = TrainStream(source, reader, ("soft", "first_order"), config, MIXED, Preprocessing())
    whole = make_stream(source, labelled=0, auxiliary=3, augment=MIXED)
    lost = source.samples.index(next(sample for sample in source.samples if sample.id == "auxiliary/0"))
    seen = 0
    for step in range(6):
        found, expected = skipping[step], whole[step]
        assert torch.equal(found.images_N3HW, expected.images_N3HW)
        assert found.sources is not None
        assert expected.sources is not None
        assert torch.equal(found.sources.crop_S, expected.sources.crop_S)
        damaged = expected.sources.rungs["soft"] == lost
        assert set(found.damaged) == ({"auxiliary/0"} if damaged.any() else set())
        cells = found.sources.counts_Shw.sum((1, 2))
        assert not cells[damaged].any()
        assert torch.equal(cells[~damaged], expected.sources.counts_Shw.sum((1, 2))[~damaged])
        seen += int(damaged.sum())
    assert seen > 3


def test_damage_is_not_skipped_unasked() -> None:
    source = make_source()
    with pytest.raises(CacheDamagedError, match=r"^sample \S+: samples/c/0/0: lost; or train .*: --on-damage skip$"):
        make_stream(source, DamagedReader(source))
    few = make_stream(make_source(train=1, auxiliary=1), DamagedReader(source), labelled=1, auxiliary=1)
    with pytest.raises(
        CacheDamagedError, match=r"^sample \S+: soft/c/0: lost; or go on .*: --on-damage skip --resume$"
    ):
        few[0]
