"""Stage 1 from end to end, on images of several sizes and a teacher of a user's own."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.stream import StreamConfig, TrainStream
from segkd.pipeline.data.transforms import AugmentConfig
from segkd.pipeline.models.network import Grid, NetworkConfig
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.models.references import load_network
from segkd.pipeline.student.alignment import align
from segkd.pipeline.teacher import loop, targets
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.config import CacheConfig
from segkd.storage.coding import EXACT, Raw
from segkd.storage.differences import leaves
from segkd.storage.errors import CacheError, CacheMismatchError, DataError, NetworkError, NonFiniteError
from segkd.storage.geometry import Mapping
from segkd.storage.reader import CacheReader
from segkd.storage.spec import TargetSpec
from segkd.storage.writer import CacheWriter

SIZES = {"a": (32, 40), "b": (33, 75), "c": (32, 40), "d": (70, 41)}


@pytest.fixture
def sized(run: Path) -> RunConfig:
    """The tiny run with images of several sizes, and small units."""
    rng = np.random.default_rng(1)
    for folder, (height, width) in SIZES.items():
        for kind, shape in (("images", (height, width, 3)), ("labels", (height, width))):
            for number in range(3):
                pixels = rng.integers(0, 256 if kind == "images" else 3, shape, np.uint8)
                Image.fromarray(pixels).resize((width, height)).save(run.parent / kind / folder / f"{number}.png")
    return load(run, ["cache.unit_samples=2", "cache.batch=2", "cache.tile=8"])


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def moved(run: RunConfig, name: str) -> RunConfig:
    """The same run with another cache path."""
    return replace(run, cache=replace(run.cache, path=str(Path(run.cache.path).with_name(name))))


def test_the_cache_holds_what_the_teacher_says(sized: RunConfig) -> None:
    summary = teacher_cache(sized)
    assert summary.roles == {"auxiliary": 3, "report": 3, "train": 3}
    reader, data = CacheReader(sized.cache.path), open_data(sized.data)
    teacher = sized.the_teacher()
    predictor = Predictor(load_network(teacher, 3), teacher, data.classes.names)
    worst = 0.0
    for sample in data.samples:
        if sample.role == "select":
            continue
        entry = reader.entry(sample.id)
        log_probs, mapping = predictor.predict([data.image(sample)])
        kept = torch.from_numpy(reader.values(entry, "soft"))[None]
        assert entry.mapping == mapping
        assert entry.image_size == data.size(sample)
        assert torch.equal(kept.argmax(1), log_probs.argmax(1))
        worst = max(worst, float((log_probs.exp() * (log_probs - kept)).sum(1).mean()))
        first = targets.TARGETS["first_order"]().values(
            targets.Output(log_probs_NChw=log_probs, mapping=mapping, image_size=data.size(sample))
        )
        assert float((torch.from_numpy(reader.values(entry, "first_order"))[None] - first).abs().max()) < 1.001 / 256
    assert summary.report["soft"]["measures"]["kl_cells"]["maximum"] == pytest.approx(worst, rel=1e-3)


def test_the_second_run_does_nothing(sized: RunConfig) -> None:
    assert teacher_cache(sized).written == 9
    before = files_of(Path(sized.cache.path))
    again = teacher_cache(sized)
    assert (again.written, again.sealed) == (0, True)
    assert again.lines()[0] == (
        f"{sized.cache.path}: complete (not verified: segkd cache verify checks every byte); "
        "3 auxiliary, 3 report, 3 train; nothing to do"
    )
    assert files_of(Path(sized.cache.path)) == before


def test_a_unit_whose_record_is_lost_is_written_again_and_told_of(
    sized: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    teacher_cache(sized)
    cache = Path(sized.cache.path)
    before = files_of(cache)
    (cache / "generations/0/commits/00000001.json").unlink()
    caplog.clear()
    assert teacher_cache(sized).written == 1
    assert [line.getMessage() for line in caplog.records if line.levelname == "WARNING"] == [
        f"{cache}/generations/0: unit 1 is written again: its commit record is lost"
    ]
    assert files_of(cache) == before


def test_a_share_of_the_bytes_is_of_what_is_stored(sized: RunConfig) -> None:
    summary = replace(teacher_cache(sized), bytes=1200, replaced=3)
    assert summary.lines()[1].startswith(
        "  0.00 MB of targets and tables, 100 bytes a sample, entries replaced since among them: 1/"
    )
    assert "100 bytes a sample: 1/" in replace(summary, bytes=900, replaced=0).lines()[1]


def test_killed_at_any_time_it_goes_on_and_ends_with_the_same_bytes(sized: RunConfig, run: Path) -> None:
    teacher_cache(sized)
    killed = Path(sized.cache.path).with_name("killed.zarr")
    command = [sys.executable, "-m", "segkd.cli", "teacher-cache", "-c", str(run), "-q"]
    for setting in ("unit_samples=2", "batch=2", "tile=8", f"path={json.dumps(str(killed))}"):
        command += ["--set", f"cache.{setting}"]
    kills = 0
    for committed in (0, 2, 4):
        # Slow enough to be caught between units: each batch of the teacher waits a moment.
        process = subprocess.Popen([sys.executable, "-c", SLOWED, *command[3:]])
        while process.poll() is None and len(list((killed / "generations/0/commits").glob("0*.json"))) <= committed:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "complete" in finished.stdout
    assert files_of(killed) == files_of(Path(sized.cache.path))


SLOWED = """
import sys, time
from segkd.pipeline.models.predictor import Predictor
infer = Predictor.infer
def slowly(self, *arguments):
    time.sleep(0.3)
    return infer(self, *arguments)
Predictor.infer = slowly
from segkd.cli.main import main
main(sys.argv[1:])
"""


def test_out_of_memory_halves_the_batch(sized: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = teacher_cache(sized)
    infer, batches = Predictor.infer, []

    def small(self: Predictor, inputs: Sequence[Tensor], *rest: object) -> tuple[Tensor, Mapping]:
        batches.append(len(inputs[0]))
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return infer(self, inputs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "infer", small)
    summary = teacher_cache(moved(sized, "halved.zarr"))
    # A batch of another size may be added up in another order.
    assert dict(leaves(summary.report)) == pytest.approx(dict(leaves(expected.report)), rel=1e-6)
    assert set(batches) == {1, 2}


def test_what_did_not_fit_is_freed_before_the_halves_are_tried(
    sized: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer, held = Predictor.infer, []

    def small(self: Predictor, inputs: Sequence[Tensor], *rest: object) -> tuple[Tensor, Mapping]:
        assert [tensor for tensor in held if tensor() is not None] == []
        activations = inputs[0] + 1
        held.append(weakref.ref(activations))
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return infer(self, inputs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "infer", small)
    assert teacher_cache(sized).sealed
    assert len(held) > 9


def test_an_error_stops_the_decoding_of_what_comes_after(sized: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    prepare = loop.Stage1.prepare

    def slow(self: loop.Stage1, planned: loop.PlannedSample) -> loop.Prepared:
        decoded.append(planned.id)
        time.sleep(0.1)
        return prepare(self, planned)

    def broken(*_: object) -> None:
        raise NonFiniteError("the teacher is broken")

    monkeypatch.setattr(loop.Stage1, "prepare", slow)
    monkeypatch.setattr(Predictor, "infer", broken)
    with pytest.raises(NonFiniteError, match="the teacher is broken"):
        teacher_cache(replace(sized, cache=replace(sized.cache, batch=16, decoders=1)))
    assert len(decoded) < 6


def test_one_image_that_is_too_large_for_the_device_is_an_error(
    sized: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Predictor, "infer", never)
    with pytest.raises(
        NetworkError,
        match=r"^the device has no memory for one image of 33x75 pixels; run with a teacher\.views\.window that",
    ):
        teacher_cache(sized)


def refusal(run: RunConfig) -> str:
    """What the cache is said to differ in."""
    with pytest.raises(CacheMismatchError) as refused:
        teacher_cache(run)
    remedy = "; give this run another cache.path, or remove the old cache"
    beginning = f"{run.cache.path} differs from this run in "
    assert str(refused.value).startswith(beginning)
    assert str(refused.value).endswith(remedy)
    return str(refused.value).removeprefix(beginning).removesuffix(remedy)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["teacher.preprocessing.channels='BGR'"], "teacher.preprocessing.channels ('RGB', now 'BGR')"),
        (["cache.max_kl=0.002"], "soft.bound (0.001, now 0.002)"),
        (["cache.temperatures=[1, 4]"], "soft.parameters.temperatures ([1.0], now [1.0, 4.0])"),
        (["cache.targets=['soft']"], "targets (['soft', 'first_order'], now ['soft'])"),
        (["cache.precision='bf16'"], "teacher.precision ('off', now 'bf16')"),
        (["cache.tile=16"], "tile (8, now 16)"),
        (
            ["data.classes=['red', 'green', 'azure']"],
            "classes (['red', 'green', 'blue'], now ['red', 'green', 'azure'])",
        ),
        (
            ["cache.profile='exact'"],
            "soft.fallback (True, now False), soft.profile ('plain', now 'exact')",
        ),
        (
            ["cache.profile='dense'", "cache.max_first_order_error=0.02"],
            "soft.profile ('plain', now 'dense'), first_order.bound (0.00390625, now 0.02), "
            "first_order.profile ('plain', now 'dense')",
        ),
    ],
)
def test_a_mismatch_says_what_differs(run: Path, settings: list[str], told: str) -> None:
    teacher_cache(load(run, ["cache.tile=8"]))
    assert refusal(load(run, ["cache.tile=8", *settings])) == told


def test_other_weights_are_told_from_other_code(run: Path) -> None:
    """Weights that no file and no argument names: the module draws them from something else."""
    teacher = run.parent / "teacher.py"
    teacher.write_text(
        teacher.read_text().replace(
            "        self.gain", "        self.register_buffer('other', SCALE)\n        self.gain"
        )
        + "\n\nimport os\n\nSCALE = torch.tensor(float(os.environ.get('SEGKD_TEST_SCALE', 1)))\n"
    )
    described = load(run)
    teacher_cache(described)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGKD_TEST_SCALE", "2")
        assert refusal(described) == "the teacher's weights"


def test_another_teacher_is_refused_and_the_same_one_elsewhere_is_not(sized: RunConfig, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    torch.save({"x": torch.zeros(1)}, weights / "a.pth")
    teacher = Path(sized.the_teacher().reference.split(":")[0])
    source = teacher.read_text().replace("def build(failing: bool = False)", "def build(weights: str, failing=False)")
    teacher.write_text(source)
    described = replace(sized.the_teacher(), arguments={"weights": str(weights / "a.pth")})
    named = replace(sized, teacher=described)
    teacher_cache(named)
    (weights / "a.pth").rename(tmp_path / "a.pth")
    elsewhere = replace(named, teacher=replace(described, arguments={"weights": str(tmp_path / "a.pth")}))
    assert teacher_cache(elsewhere).written == 0
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pth")
    assert refusal(elsewhere) == "teacher.arguments.weights (the content of a.pth)"
    torch.save({"x": torch.zeros(1)}, tmp_path / "a.pth")
    assert teacher_cache(elsewhere).written == 0
    teacher.write_text(source.replace("4.0", "3.0"))
    assert refusal(elsewhere) == "the code of teacher.py"


def test_batches_have_one_size_and_never_cross_a_unit(sized: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    code_batch = loop.Stage1._code_batch

    def spy(self: loop.Stage1, batch: list[loop.PlannedSample], inputs: Tensor) -> object:
        seen.append([sample.id for sample in batch])
        assert len({sample.image_size for sample in batch}) == 1
        assert len({sample.role for sample in batch}) == 1
        return code_batch(self, batch, inputs)

    monkeypatch.setattr(loop.Stage1, "_code_batch", spy)
    teacher_cache(sized)
    assert sorted(name for batch in seen for name in batch) == sorted(f"{f}/{k}" for f in "abd" for k in range(3))
    assert max(map(len, seen)) == 2


def test_samples_that_no_rung_serves_are_kept_exactly(sized: RunConfig) -> None:
    summary = teacher_cache(replace(sized, cache=replace(sized.cache, max_kl=1e-11)))
    assert summary.report["soft"]["rungs"] == {EXACT: 9}
    reader = CacheReader(sized.cache.path)
    values = reader.values(reader.entry("a/0"), "soft")
    np.testing.assert_allclose(np.exp(values).sum(0), 1, atol=1e-6)


def test_a_sample_that_no_rung_serves_stops_the_run_when_asked(sized: RunConfig) -> None:
    message = (
        r"^[ab]/0: soft is off by \S+ at best, the bound is 1e-11; "
        r'allow more with cache.max_kl, or keep such samples exactly with cache.beyond = "exact"$'
    )
    with pytest.raises(CacheError, match=message):
        teacher_cache(replace(sized, cache=replace(sized.cache, max_kl=1e-11, beyond="stop")))


def test_an_image_that_holds_no_cell_is_named(sized: RunConfig) -> None:
    small = Path(sized.data.root) / "images" / "b" / "1.png"
    Image.fromarray(np.zeros((1, 40, 3), np.uint8)).save(small)
    padded = replace(sized.the_teacher().preprocessing, multiple_of=8)
    message = "b/1: no cell of the network lies in its 1x40 pixels; leave the image out, or give the network a resize"
    with pytest.raises(DataError, match=f"^{message}$"):
        teacher_cache(replace(sized, teacher=replace(sized.the_teacher(), preprocessing=padded)))


@dataclass(frozen=True)
class Ramps(targets.Target):
    """A third target: the pixel coordinates of every cell's centre. All that a target needs stands here."""

    def spec(self, config: CacheConfig, classes: int, tile: int) -> TargetSpec:  # noqa: ARG002
        return TargetSpec(
            name="ramps", channels=2, coder=Raw(), bound=0.0, measures=("error",), bounded=("error",), parameters={}
        )

    def values(self, output: targets.Output) -> Tensor:
        mapping = output.mapping
        y = mapping.y.scale * torch.arange(mapping.y.cells) + mapping.y.offset
        x = mapping.x.scale * torch.arange(mapping.x.cells) + mapping.x.offset
        return (
            torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]
            .expand(len(output.log_probs_NChw), -1, -1, -1)
            .clone()
        )

    def measure(self, spec: TargetSpec, values: Tensor, decoded: Tensor, output: targets.Output) -> dict[str, Tensor]:  # noqa: ARG002
        return {"error": (values - decoded).abs().flatten(1).amax(1)}


@pytest.mark.parametrize("student", [Grid(stride=4), Grid(stride=8), Grid(stride=3), Grid(stride=16)])
def test_ramps_through_a_real_cache_and_the_training_stream(
    sized: RunConfig, monkeypatch: pytest.MonkeyPatch, student: Grid
) -> None:
    """C2 from end to end: written by stage 1, read by windows, placed by the student's side."""
    monkeypatch.setitem(targets.TARGETS, "ramps", Ramps)
    cache = replace(sized.cache, targets=("soft", "first_order", "ramps"))  # type: ignore[arg-type]
    teacher_cache(replace(sized, cache=cache))
    reader, data = CacheReader(cache.path), open_data(sized.data)
    augment = AugmentConfig(crop=(37, 45), scale=(0.5, 2.0), photometric=0.0)
    described = NetworkConfig(reference="enet")
    stream = TrainStream(
        data, reader, ("ramps",), StreamConfig(labelled=2, auxiliary=2), augment, described.preprocessing
    )
    grid, checked = student.mapping(*augment.crop), 0
    for step in range(12):
        sources = stream[step].sources
        assert sources is not None
        for s in range(len(sources.crop_S)):
            # What lies where in the original: the crop's pixels by the ramps themselves, at two cells of the window.
            ramps = sources.codes["ramps"][s]
            valid = sources.counts_Shw[s]
            if valid.sum() < 4:
                continue
            rows, columns = (sorted(set(index.tolist())) for index in valid.nonzero(as_tuple=True))
            affine = []
            for axis, (cells, line) in enumerate(((rows, ramps[0, :, columns[0]]), (columns, ramps[1, rows[0]]))):
                if len(cells) < 2:
                    break
                scale, offset = sources.cell_to_crop_S22[s, axis].tolist()
                low, high = cells[0], cells[-1]
                slope = float(line[high] - line[low]) / (scale * (high - low))
                affine.append((slope, float(line[low]) - slope * (scale * low + offset)))
            if len(affine) < 2:
                continue
            places = []
            for (slope, start), axis_ in zip(affine, (grid.y, grid.x), strict=True):
                places.append(start + slope * (axis_.scale * torch.arange(axis_.cells) + axis_.offset))
            logits = torch.stack(torch.meshgrid(*places, indexing="ij"))[None].expand(4, -1, -1, -1)
            aligned = align(logits, grid, sources)[s]
            for axis in range(2):
                low_, high_ = sorted((float(places[axis][0]), float(places[axis][-1])))
                expected = ramps[axis].clamp(low_, high_)
                assert float((aligned[axis] - expected)[valid].abs().max()) / 4 < 0.01
            checked += 1
    assert checked > 20


def test_first_order_values_move_and_do_not_change(sized: RunConfig) -> None:
    """Under any scale or flip the cells of a window are those of the cache, as written and in their order."""
    teacher_cache(sized)
    reader, data = CacheReader(sized.cache.path), open_data(sized.data)
    augment = AugmentConfig(crop=(30, 30), scale=(0.5, 2.0))
    preprocessing = NetworkConfig(reference="enet").preprocessing
    stream = TrainStream(data, reader, ("first_order",), StreamConfig(labelled=3), augment, preprocessing)
    flipped = 0
    for step in range(10):
        sources, draws = stream[step].sources, stream.draws(step)
        assert sources is not None
        for s, draw in enumerate(draws):
            entry = reader.entry(draw.sample.id)
            height, width = entry.mapping.shape
            whole = reader.window(entry, "first_order", range(height), range(width))[0]
            codes, valid = sources.codes["first_order"][s, 0].numpy(), sources.counts_Shw[s].numpy()
            flipped += bool(sources.cell_to_crop_S22[s, 1, 0] < 0)
            if valid.any():
                assert found_as_written(codes, valid, whole)
    assert flipped > 3


def found_as_written(codes: np.ndarray, valid: np.ndarray, whole: np.ndarray) -> bool:
    """Whether the valid part of a window stands somewhere in the whole map, unchanged."""
    rows, columns = np.flatnonzero(valid.any(1)), np.flatnonzero(valid.any(0))
    part = codes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    windows = np.lib.stride_tricks.sliding_window_view(whole, part.shape)
    same: Callable[..., np.ndarray] = np.all
    return bool(same(windows == part, axis=(2, 3)).any())


def test_a_write_error_stops_the_teacher_before_its_next_batches(
    sized: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of nine units cannot be written: the teacher hears of it within two batches."""
    failed = threading.Event()
    infer, asked = Predictor.infer, []

    def fails(*_: object) -> None:
        failed.set()
        raise CacheError("the disk is full")

    def waits(self: Predictor, *arguments: object) -> tuple[Tensor, Mapping]:
        asked.append(arguments)
        if len(asked) > 1:
            assert failed.wait(10)
            time.sleep(0.1)
        return infer(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "infer", waits)
    monkeypatch.setattr(CacheWriter, "write", fails)
    with pytest.raises(CacheError, match=r"^the disk is full$"):
        teacher_cache(replace(sized, cache=replace(sized.cache, batch=1, unit_samples=1)))
    assert len(asked) <= 3


def test_code_of_an_importable_module_counts_by_its_file(
    sized: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(sized.the_teacher().reference.split(":")[0]).read_text()
    module = tmp_path / "importable" / "segkd_test_module.py"
    module.parent.mkdir()
    monkeypatch.syspath_prepend(str(module.parent))
    named = replace(sized, teacher=replace(sized.the_teacher(), reference="segkd_test_module:build"))
    for text, refused in ((source, False), (source, False), (source.replace("4.0", "3.0"), True)):
        module.write_text(text)
        importlib.invalidate_caches()
        sys.modules.pop("segkd_test_module", None)
        if refused:
            assert refusal(named) == "the code of segkd_test_module"
        else:
            teacher_cache(named)
    sys.modules.pop("segkd_test_module", None)


def test_the_log_of_a_cache_that_is_gone_is_begun_anew(sized: RunConfig) -> None:
    """Else the time of stage 1 would be that of both."""
    log = Path(f"{sized.cache.path}.log")
    teacher_cache(sized)
    lines = log.read_text().splitlines()
    shutil.rmtree(sized.cache.path)
    teacher_cache(sized)
    units = [json.loads(line)["unit"] for line in log.read_text().splitlines()]
    assert sorted(units) == sorted(json.loads(line)["unit"] for line in lines)
