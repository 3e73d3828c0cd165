"""A teacher beside the student: what it says is what an exact cache holds, or what it makes of the crop itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from segkd.cli.main import main
from segkd.pipeline.ablation.arms import views
from segkd.pipeline.ablation.sweep import plan_sweep
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.batch import Batch
from segkd.pipeline.models.network import Preprocessing
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.models.references import load_network
from segkd.pipeline.student import checkpoint, live
from segkd.pipeline.student.inputs import Inputs, open_inputs
from segkd.pipeline.student.train import train
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.storage.errors import CheckpointError, ConfigError

RUN = """
[data]
reader = "scenes"

[data.scenes]
size = [66, 90]
train = 4
auxiliary = 3
select = 1
report = 1

[teacher]
reference = "{folder}/teacher.py:build"
stride = 4

[cache]
path = "{folder}/cache.zarr"
roles = ["train", "auxiliary"]
profile = "exact"

[student]
reference = "deeplab-mobilenetv1"
arguments = {{ width = 0.25 }}

[augment]
crop = [48, 56]
scale = [0.6, 1.6]

[train]
steps = 4
labelled = 2
auxiliary = 2
learning_rate = 1e-3
warmup = 1
validate_every = 0
checkpoint_every = 2
log_every = 1
threads = 1
device = "cpu"
"""

TEACHER = '''
import torch
from torch import nn

CALLS = []


class Teacher(nn.Module):
    """Sees 12 pixels around each of its cells."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 7, 4, 3), nn.ReLU(), nn.Conv2d(8, classes, 5, padding=2))

    def forward(self, x):
        CALLS.append(tuple(x.shape))
        return 3 * self.body(x)


def build(num_classes):
    torch.manual_seed(5)
    return Teacher(num_classes)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    (folder / "teacher.py").write_text(TEACHER)
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    teacher_cache(load(folder / "run.toml"))
    return folder


@pytest.fixture
def run(place: Path) -> RunConfig:
    return load(place / "run.toml")


def opened(run: RunConfig, view: str, **augment: float) -> Inputs:
    run = replace(
        run,
        train=replace(run.train, teacher_view=view),  # type: ignore[arg-type]
        augment=replace(run.augment, **augment),  # type: ignore[arg-type]
    )
    return open_inputs(run, run.the_student(), distill=True)


def given(inputs: Inputs, batch: Batch) -> dict[str, torch.Tensor]:
    assert batch.sources is not None
    assert inputs.targets is not None
    return dict(inputs.targets(batch.sources))


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_whole_images_give_what_an_exact_cache_holds(run: RunConfig, cutmix: float) -> None:
    cached, beside = opened(run, "cache", cutmix=cutmix), opened(run, "image", cutmix=cutmix)
    for step in range(3):
        expected, found = cached.stream[step], beside.stream[step]
        assert torch.equal(expected.images_N3HW, found.images_N3HW)
        assert torch.equal(expected.labels_NHW, found.labels_NHW)
        assert expected.sources is not None
        assert found.sources is not None
        for name in ("crop_S", "cell_to_crop_S22", "counts_Shw", "counts_first_Shw"):
            assert torch.equal(getattr(expected.sources, name), getattr(found.sources, name))
        kept, asked = given(cached, expected), given(beside, found)
        assert kept.keys() == asked.keys() == {"soft", "first_order"}
        counts_S1hw = expected.sources.counts_Shw[:, None]
        # float16 is as exact as an exact cache is; its first-order map keeps its own bound, 1/256.
        for name, tolerance in (("soft", 0.01), ("first_order", 1 / 256)):
            error = (kept[name] - asked[name]).masked_fill(~counts_S1hw, 0).abs().max()
            assert error <= tolerance, name
        assert torch.equal(kept["soft"].argmax(1)[counts_S1hw[:, 0]], asked["soft"].argmax(1)[counts_S1hw[:, 0]])


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_crops_are_what_the_student_sees(run: RunConfig, cutmix: float) -> None:
    """Asked about each crop anew, cell by cell: the teacher's cells lie every 4 pixels, the first one at 1.5."""
    inputs = opened(run, "crop", cutmix=cutmix, photometric=0.0, auxiliary_photometric=0.0)
    teacher = run.the_teacher()
    predictor = Predictor(load_network(teacher, len(inputs.source.classes)), teacher, inputs.source.classes.names)
    for step in range(3):
        batch = inputs.stream[step]
        sources = batch.sources
        assert sources is not None
        values = given(inputs, batch)
        seen = torch.zeros(len(batch.labels_NHW), 12, 14, dtype=torch.int64)
        for s, look in enumerate(sources.looks):
            assert look.image.shape == (48, 56, 3)
            log_probs_1Chw, mapping = predictor.predict([look.image])
            assert mapping.shape == (12, 14)
            (scale_y, offset_y), (scale_x, offset_x) = sources.cell_to_crop_S22[s].tolist()
            assert scale_y == scale_x == pytest.approx(4)
            for y, x in sources.counts_Shw[s].nonzero().tolist():
                row, column = (scale_y * y + offset_y - 1.5) / 4, (scale_x * x + offset_x - 1.5) / 4
                assert row == pytest.approx(round(row))
                assert column == pytest.approx(round(column))
                expected = log_probs_1Chw[0, :, round(row), round(column)]
                assert torch.equal(values["soft"][s, :, y, x], expected)
                seen[sources.crop_S[s], round(row), round(column)] += 1
        # Mixed crops share their cells out among two images; padding has none.
        assert int(seen.max()) == 1
        if not cutmix:
            # What it looks at is the student's picture, but for the student's own normalisation.
            pictures_NHW3 = np.stack([look.image for look in sources.looks]).astype(np.float32)
            mean, std = (np.asarray(v, np.float32) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            expected = torch.from_numpy((pictures_NHW3 / 255 - mean) / std).permute(0, 3, 1, 2)
            torch.testing.assert_close(batch.images_N3HW, expected, rtol=0, atol=1e-5)


def test_an_answer_about_a_whole_image_is_kept(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = opened(run, "image")
    shown = [inputs.stream[step] for step in range(8)]
    calls: list[object] = []
    monkeypatch.setattr(Predictor, "logits", _counted(Predictor.logits, calls))
    first = [given(inputs, batch) for batch in shown]
    assert len(calls) == 7  # 4 labelled, 3 auxiliary samples
    again = [given(inputs, batch) for batch in shown]
    assert len(calls) == 7
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    # Without room for them answers are the same, asked for anew.
    monkeypatch.setattr(live, "REMEMBERED", 0)
    poor = opened(run, "image")
    forgotten = [given(poor, batch) for batch in shown]
    assert len(calls) == 7 + 8 * 4
    for one, other in zip(first, forgotten, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def _counted(function: object, calls: list[object]) -> object:
    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return function(*arguments)  # type: ignore[operator]

    return counted


@pytest.mark.parametrize("view", ["image", "crop"])
def test_a_resumed_run_is_the_same(run: RunConfig, tmp_path: Path, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(run, train=replace(run.train, teacher_view=view))  # type: ignore[arg-type]
    train(run, tmp_path / "whole")
    description, expected = checkpoint.load(tmp_path / "whole" / "last.safetensors")
    assert set(description.run["fingerprints"]) >= {"teacher", "weights", "preprocessing"}
    write = checkpoint.save

    def interrupted(path: Path, state: checkpoint.Description, tensors: dict[str, torch.Tensor]) -> None:
        write(path, state, tensors)
        if state.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "parts")
    monkeypatch.undo()
    train(run, tmp_path / "parts", resume=True)
    found = checkpoint.load(tmp_path / "parts" / "last.safetensors")[1]
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_another_teacher_is_another_run(run: RunConfig, place: Path, tmp_path: Path) -> None:
    run = replace(run, train=replace(run.train, teacher_view="image"))
    train(run, tmp_path / "out")
    (place / "other.py").write_text(TEACHER.replace("manual_seed(5)", "manual_seed(6)"))
    other = replace(run, teacher=replace(run.the_teacher(), reference=f"{place}/other.py:build"))
    with pytest.raises(CheckpointError) as caught:
        train(other, tmp_path / "out", resume=True)
    assert (
        "last.safetensors is of a run that differs in the teacher's code, the teacher's teacher, the teacher's weights;"
        in str(caught.value)
    )


def test_command(place: Path, tmp_path: Path) -> None:
    """No cache is there at all, and the run file's description of the teacher serves."""
    text = (place / "run.toml").read_text().replace("cache.zarr", "none.zarr")
    (tmp_path / "run.toml").write_text(text)
    teacher = f"{place}/teacher.py:build"
    for view in ("image", "crop"):
        arguments = ["train-student", "-q", "-c", str(tmp_path / "run.toml"), "-o", str(tmp_path / view)]
        result = CliRunner().invoke(main, [*arguments, "--teacher", teacher, "--teacher-view", view])
        assert result.exit_code == 0, result.output
        description, _ = checkpoint.load(tmp_path / view / "last.safetensors")
        assert description.run["train"]["teacher_view"] == view


def test_refusals(place: Path, run: RunConfig, tmp_path: Path) -> None:
    arguments = ["train-student", "-c", str(place / "run.toml"), "-o", str(tmp_path / "out"), "--no-distill"]
    result = CliRunner().invoke(main, [*arguments, "--teacher", "enet"])
    assert result.exit_code == 2
    assert "--no-distill and --teacher exclude each other; give the one that is meant" in result.output
    result = CliRunner().invoke(main, [*arguments, "--teacher-view", "crop"])
    assert "--no-distill and --teacher-view exclude each other; give the one that is meant" in result.output
    resized = replace(run.the_teacher(), preprocessing=Preprocessing(resize=(66, 90)))
    with pytest.raises(ConfigError) as caught:
        opened(replace(run, teacher=resized), "crop")
    assert str(caught.value) == (
        "teacher.preprocessing.resize is [66, 90], to which every crop would be enlarged; "
        'describe the teacher by preprocessing.scale, or set train.teacher_view = "image"'
    )
    with pytest.raises(ConfigError) as caught:
        replace(run.train, teacher_view="crop", most_entropy=1.0)
    assert str(caught.value) == (
        'train.teacher_view is "crop", but train.least_confidence and train.most_entropy choose samples by what the '
        'cache says of them; leave them out, or set train.teacher_view = "cache"'
    )


def test_a_sweep_compares_the_views(place: Path, tmp_path: Path) -> None:
    own = [
        """ablate.arms.beside.set=["train.teacher_view='image'"]""",
        """ablate.arms.cropped.set=["train.teacher_view='crop'"]""",
        "ablate.arms.heavy.set=['knowledge.first_order.weight=30']",
        f"""ablate.arms.other.set=["train.teacher_view='image'", "teacher.reference='{place}/third.py:build'"]""",
    ]
    (place / "third.py").write_text(TEACHER.replace("manual_seed(5)", "manual_seed(7)"))
    run = load(place / "run.toml", ["ablate.ladder=['alone','auxiliary-zero-first']", "ablate.seeds=[0]", *own])
    sweep = plan_sweep(run, tmp_path)
    assert list(views(sweep.arms)) == [
        ("auxiliary-zero-first", "beside", "the cache in place of the teacher itself: coding"),
        (
            "beside",
            "cropped",
            "the teacher on whole images in place of the student's crops: working offline",
        ),
    ]
    assert all(not arm.unmatched for arm in sweep.arms.values())
    taught = {job.arm: job.identity["cache"] for job in sweep.jobs}
    assert taught["alone"] == {}
    assert taught["beside"] == taught["cropped"]
    assert taught["beside"]["weights"] != taught["other"]["weights"]
    cached = taught["auxiliary-zero-first"]
    assert taught["beside"]["weights"] == cached["weights"]
    again = {job.arm: job.identity for job in plan_sweep(run, tmp_path).jobs}
    assert again == {job.arm: job.identity for job in sweep.jobs}
