"""Training runs as a whole: products, resuming after a kill, refusals, bad numbers."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.batch import Batch
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import Role, with_role
from segkd.pipeline.evaluation.scores import score
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.models.references import described, load_network
from segkd.pipeline.progress import Task
from segkd.pipeline.resample import to_pixels
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.checkpoint import network_from_checkpoint
from segkd.pipeline.student.config import TrainConfig
from segkd.pipeline.student.inputs import open_inputs
from segkd.pipeline.student.knowledge.base import Knowledge
from segkd.pipeline.student.knowledge.channel_wise import ChannelWise
from segkd.pipeline.student.knowledge.config import KnowledgeConfig
from segkd.pipeline.student.knowledge.dist import Dist
from segkd.pipeline.student.knowledge.first_order import FirstOrder
from segkd.pipeline.student.knowledge.pseudo_labels import PseudoLabels
from segkd.pipeline.student.knowledge.zero_order import ZeroOrder
from segkd.pipeline.student.losses import LossConfig
from segkd.pipeline.student.resuming import continued
from segkd.pipeline.student.runtime import torch_settings
from segkd.pipeline.student.train import TrainingStopped, train
from segkd.pipeline.student.trainer import Trainer
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.storage.errors import (
    CacheDamagedError,
    CacheMismatchError,
    CheckpointError,
    ConfigError,
    DataError,
    NetworkError,
    NonFiniteError,
    OutputExistsError,
)
from segkd.storage.reader import CacheReader

CLASSES = ("sky", "road", "car")
COLOURS = np.array([[90, 120, 220], [110, 110, 110], [200, 40, 40]])
COUNTS = {"train": 5, "auxiliary": 4, "select": 2}

NETWORKS = '''
"""Small networks that misbehave when asked to."""
import os, signal
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes, act="", at=-1):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Conv2d(8, num_classes, 1)
        self.act, self.at, self.calls = os.environ.get("ACT", act), at, 0

    def forward(self, x):
        logits = self.head(self.body(x))
        if self.training:
            self.calls += 1
            if self.calls == self.at and self.act == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.calls == self.at and self.act == "nan":
                logits = logits * float("nan")
        if self.training and self.act == "labels":
            return logits.round().long()
        if self.act == "loud":
            logits = logits * 3000
        return logits


class Pooled(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(11, num_classes, 1)

    def forward(self, x):
        return self.head(torch.cat([x, self.pool(x).expand(-1, -1, *x.shape[2:])], 1))
'''

RUN = """
[data]
reader = "folder"
root = "{folder}/data"
classes = ["sky", "road", "car"]
folders = {{ train = ["train"], auxiliary = ["auxiliary"], select = ["select"] }}

[teacher]
reference = "deeplab-mobilenetv1"
arguments = {{ width = 0.25 }}

[cache]
path = "{folder}/cache.zarr"
roles = ["train", "auxiliary"]

[student]
reference = "{folder}/networks.py:Small"
stride = 4

[augment]
crop = [32, 32]

[train]
steps = 12
labelled = 2
auxiliary = 2
warmup = 2
ema = 0.9
validate_every = 5
checkpoint_every = 4
log_every = 1
threads = 1
device = "cpu"
"""


def write_data(folder: Path) -> None:
    """Pictures of horizontal bands, each class in its colour, with noise."""
    rng = np.random.default_rng(0)
    for role, count in COUNTS.items():
        for kind in ("images", "labels"):
            (folder / kind / role).mkdir(parents=True)
        for k in range(count):
            labels = np.sort(rng.integers(0, 3, (40, 1)), axis=0).repeat(48, axis=1).astype(np.uint8)
            image = COLOURS[labels] + rng.integers(-20, 21, (40, 48, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / role / f"{role}{k}.png")
            if role != "auxiliary":
                Image.fromarray(labels).save(folder / "labels" / role / f"{role}{k}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a cache of an untrained teacher, networks and a run file."""
    folder = tmp_path_factory.mktemp("train")
    write_data(folder / "data")
    (folder / "networks.py").write_text(NETWORKS)
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    torch.manual_seed(0)
    teacher_cache(load(folder / "run.toml"))
    return folder


@pytest.fixture
def run(place: Path) -> RunConfig:
    """Distillation with auxiliary samples."""
    return load(place / "run.toml")


@pytest.fixture
def labels_only(run: RunConfig) -> RunConfig:
    return change(run, labelled=3, auxiliary=0)


def change(run: RunConfig, **settings: Any) -> RunConfig:
    """The run with other settings of its training."""
    return replace(run, train=replace(run.train, **settings))


def with_arguments(run: RunConfig, **arguments: Any) -> RunConfig:
    return replace(run, student=replace(run.the_student(), arguments=arguments))


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def untimed(output: Path) -> list[dict[str, Any]]:
    """The records without what a clock said."""
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in records(output)]


def knowledge_of(*kinds: Knowledge) -> KnowledgeConfig:
    """These alone."""
    off = {kind.name: replace(kind, weight=0.0) for kind in KnowledgeConfig().kinds()}
    return replace(KnowledgeConfig(), **off | {kind.name: kind for kind in kinds})  # type: ignore[arg-type]


def assert_same_tensors(one: Path, other: Path) -> None:
    (_, expected), (_, found) = checkpoint.load(one), checkpoint.load(other)
    assert expected.keys() == found.keys()
    differing = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    assert not differing


def first_batch(run: RunConfig, class_weights: torch.Tensor | None = None) -> tuple[Trainer, Batch]:
    """A trainer whose network has no dropout, and a batch for it."""
    run = replace(run, student=NetworkConfig(reference="deeplab-mobilenetv1", arguments={"width": 0.25}))
    student = run.the_student()
    inputs = open_inputs(run, student, distill=True)
    torch.manual_seed(0)
    network = load_network(student, len(CLASSES))
    trainer = Trainer(
        network,
        run.train,
        inputs.objective,
        device=torch.device("cpu"),
        targets=inputs.targets,
        class_weights=class_weights,
    )
    return trainer, inputs.stream[0]


class SignalAt:
    """A progress that signals this process and its children when task ``title`` has advanced ``count`` times."""

    def __init__(self, title: str, count: int, number: signal.Signals) -> None:
        self.title, self.left, self.number = title, count, number

    @contextmanager
    def task(self, title: str, total: int, *, unit: str = "image", done: int = 0) -> Iterator[Task]:  # noqa: ARG002
        yield _Counted(self) if title == self.title else _Counted(None)


class _Counted:
    def __init__(self, to: SignalAt | None) -> None:
        self.to = to

    def advance(self, count: int = 1, **_: str) -> None:
        if self.to is not None:
            self.to.left -= count
            if self.to.left == 0:
                for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                    assert process.pid is not None
                    os.kill(process.pid, self.to.number)


def test_products(run: RunConfig, tmp_path: Path) -> None:
    summary = train(run, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "run.json",
        "metrics.jsonl",
        "last.safetensors",
        "best.safetensors",
    }
    lines = records(tmp_path / "out")
    steps = [line for line in lines if "select" not in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    for line in steps:
        terms = {name: line[name] for name in ("cross_entropy", "zero_order", "first_order")}
        weights = {"cross_entropy": 1.0, "zero_order": 1.0, "first_order": 10.0}
        assert line["loss"] == pytest.approx(sum(weights[name] * terms[name] for name in terms), rel=1e-5)
        assert line["gradient"].keys() == {"total", *terms}
        assert all(value > 0 for value in (*line["gradient"].values(), line["learning_rate"]))
    assert [line["step"] for line in lines if "select" in line] == [5, 10, 12]
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    assert document["configuration"]["train"]["steps"] == 12
    assert document["configuration"]["distill"] is True
    assert document["classes"] == list(CLASSES)
    best = max((line for line in lines if "select" in line), key=lambda line: line["select"]["miou"])
    assert summary["best"] == {"step": best["step"], "scores": best["select"]}


def test_the_best_checkpoint_scores_what_it_says(run: RunConfig, tmp_path: Path, place: Path) -> None:
    summary = train(run, tmp_path)
    network, config, classes = network_from_checkpoint(
        tmp_path / "best.safetensors", reference=f"{place}/networks.py:Small"
    )
    source = open_data(run.data)
    predictor = Predictor(network, config, classes.names)
    scores = score(lambda _, image: predictor.predict([image]), source, with_role(source, Role.SELECT))
    assert scores.to_dict() == summary["best"]["scores"]


def test_training_learns(labels_only: RunConfig, tmp_path: Path) -> None:
    run = change(labels_only, steps=60, validate_every=60, learning_rate=0.02, ema=0.0)
    summary = train(run, tmp_path, distill=False)
    losses = [line["loss"] for line in records(tmp_path) if "loss" in line]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    assert summary["best"]["scores"]["aacc"] > 80


def test_resume_after_a_kill_is_bit_for_bit(run: RunConfig, place: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of step 11, two steps past the last checkpoint, and on with a loader process."""
    killed = with_arguments(run, at=11)
    code = "import sys; from segkd.pipeline.config import load; from segkd.pipeline.student.train import train\n"
    code += "train(load(sys.argv[1], sys.argv[3:]), sys.argv[2])"
    result = subprocess.run(
        [sys.executable, "-c", code, place / "run.toml", tmp_path / "killed", "student.arguments.at=11"],
        env={**os.environ, "ACT": "kill"},
        capture_output=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert checkpoint.load(tmp_path / "killed" / "last.safetensors")[0].step == 8
    assert records(tmp_path / "killed")[-1]["step"] == 10
    summary = train(change(killed, workers=1), tmp_path / "killed", resume=True)
    assert summary["steps_done_before"] == 8
    train(killed, tmp_path / "whole")
    for name in ("last.safetensors", "best.safetensors"):
        assert_same_tensors(tmp_path / "whole" / name, tmp_path / "killed" / name)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "killed")


@pytest.mark.parametrize(
    ("title", "count", "number", "workers", "step"),
    [
        ("train", 6, signal.SIGTERM, 0, 6),
        ("train", 5, signal.SIGINT, 1, 5),
        ("validate", 1, signal.SIGTERM, 1, 5),
    ],
)
def test_a_stopped_run_goes_on(
    run: RunConfig, tmp_path: Path, title: str, count: int, number: signal.Signals, workers: int, step: int
) -> None:
    """Also when a validation is due at that step, or under way, and when loader processes get the signal too."""
    run = change(run, workers=workers)
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped) as caught:
        train(run, tmp_path / "stopped", progress=SignalAt(title, count, number))  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"{number.name} stopped the run after step {step} of 12; it is saved in "
        f"{tmp_path}/stopped/last.safetensors: go on with the same command and --resume"
    )
    assert signal.getsignal(number) is before
    assert not multiprocessing.active_children()
    train(run, tmp_path / "stopped", resume=True)
    train(run, tmp_path / "whole")
    # Nothing differs, so the files are the same byte for byte.
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "stopped")


def test_what_a_run_was_made_with(
    labels_only: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All of it, where it changed on the way."""

    def made_with() -> dict[str, str]:
        held: dict[str, str] = json.loads((tmp_path / "run.json").read_text())["versions"]
        return held

    def go_on(steps: int) -> None:
        stop = SignalAt("train", steps, signal.SIGTERM)
        with pytest.raises(TrainingStopped):
            train(labels_only, tmp_path, distill=False, resume=True, progress=stop)  # type: ignore[arg-type]

    go_on(2)
    first = made_with()
    assert list(first) == ["segkd", "code", "python", "torch", "numpy"]
    assert re.fullmatch(r"[0-9a-f]{12}", first["code"])
    go_on(1)
    assert made_with() == first
    assert not caplog.records
    monkeypatch.setattr("segkd.pipeline.versions.CODE", "000000000000")
    go_on(1)
    go_on(1)
    assert made_with() == {**first, "code": f"{first['code']} then 000000000000"}
    assert caplog.messages == [f"{tmp_path}: begun with code {first['code']}, goes on with 000000000000"]


def test_what_stands_is_not_replaced_unasked(labels_only: RunConfig, tmp_path: Path) -> None:
    train(labels_only, tmp_path, distill=False)
    (tmp_path / "notes.txt").write_text("mine")
    held = (tmp_path / "last.safetensors").read_bytes()
    with pytest.raises(OutputExistsError) as caught:
        train(labels_only, tmp_path, distill=False)
    assert str(caught.value) == (
        f"{tmp_path} already holds a run (run.json, metrics.jsonl, last.safetensors, best.safetensors); "
        "go on with --resume, replace it with --overwrite, or name another output folder"
    )
    assert (tmp_path / "last.safetensors").read_bytes() == held
    with pytest.raises(ConfigError, match="--resume and --overwrite exclude each other"):
        train(labels_only, tmp_path, distill=False, resume=True, overwrite=True)
    train(change(labels_only, seed=1), tmp_path, distill=False, overwrite=True)
    assert (tmp_path / "last.safetensors").read_bytes() != held
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert records(tmp_path)[0]["step"] == 1


def test_an_output_that_is_a_file(labels_only: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is not a folder; name another output folder"):
        train(labels_only, tmp_path / "file", distill=False, overwrite=True)


def test_resuming_a_finished_run_does_nothing(
    labels_only: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(labels_only, tmp_path, distill=False, resume=True)  # There is nothing to resume: it begins.
    assert first["steps_done_before"] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with caplog.at_level(logging.INFO, "segkd"):
        second = train(labels_only, tmp_path, distill=False, resume=True)
    assert caplog.messages == [f"{tmp_path}: all 12 steps were done before; nothing to do"]
    assert second == {**first, "steps_done_before": 12}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_resuming_another_run_is_refused(run: RunConfig, tmp_path: Path) -> None:
    train(run, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        train(change(run, learning_rate=0.5, labelled=3, workers=1, log_every=2), tmp_path, resume=True)
    assert str(caught.value) == (
        f"{tmp_path}/last.safetensors is of a run that differs in train.labelled (2, now 3), "
        "train.learning_rate (0.001, now 0.5); resume it as it was begun, begin anew with --overwrite, "
        "or name another output folder"
    )
    with pytest.raises(CheckpointError, match=r"distill \(True, now False\), the cache's classes, the cache's cod"):
        train(change(run, auxiliary=0), tmp_path, resume=True, distill=False)


def test_a_run_that_is_older_than_a_setting_is_resumed(labels_only: RunConfig, tmp_path: Path) -> None:
    """Or than a kind of knowledge, as if it had its default."""
    first = train(labels_only, tmp_path, distill=False)
    last = tmp_path / "last.safetensors"
    description, tensors = checkpoint.load(last)
    changed = json.loads(json.dumps(description.run))
    changed["train"]["steps"] = 13
    for key in (
        "knowledge.first_order.near",
        "knowledge.channel_wise",
        "loss.label_smoothing",
        "loss.ohem_threshold",
        "train.most_entropy",
        "train.class_weights",
        "student.preprocessing.pad",
        "data.compare_contents",
        "data.scenes.clutter",
    ):
        older = json.loads(json.dumps(description.run))
        *tables, name = key.split(".")
        table = older
        for of in tables:
            table = table[of]
        del table[name]
        held = replace(description, run=older)
        continued(held, description, last)
        with pytest.raises(CheckpointError, match=r"differs in train\.steps \(12, now 13\); resume"):
            continued(held, replace(description, run=changed), last)
    checkpoint.save(last, held, tensors)
    assert train(labels_only, tmp_path, distill=False, resume=True) == {**first, "steps_done_before": 12}
    edges = replace(labels_only.knowledge, first_order=FirstOrder(near="edges"))
    with pytest.raises(CheckpointError, match=r"knowledge\.first_order\.near \('everywhere', now 'edges'\); resume"):
        train(replace(labels_only, knowledge=edges), tmp_path, distill=False, resume=True)


def test_crops_that_are_mostly_padding_are_warned_of(labels_only: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    student = described(labels_only.the_student())
    for crop, warned in (((64, 64), False), ((6400, 64), True)):
        caplog.clear()
        run = replace(labels_only, augment=replace(labels_only.augment, crop=crop))
        open_inputs(run, student, distill=False)
        assert [message for message in caplog.messages if "augment.crop" in message] == (
            [
                f"augment.crop is 6400 x 64, and {first_image(run)}: at the largest augment.scale, "
                f"{run.augment.scale[1]:g}, more than half of a crop is padding; lower augment.crop"
            ]
            if warned
            else []
        )


def first_image(run: RunConfig) -> str:
    source = open_data(run.data)
    sample = with_role(source, Role.TRAIN)[0]
    height, width = source.size(sample)
    return f"{sample.id} has {height} x {width} pixels"


def test_resuming_with_other_samples_is_refused(labels_only: RunConfig, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    run = replace(labels_only, data=replace(labels_only.data, root=str(tmp_path / "data")))
    train(labels_only, tmp_path / "out", distill=False)
    train(run, tmp_path / "out", distill=False, resume=True)  # The same samples elsewhere are the same.
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind / "train" / "train0.png").unlink()
    with pytest.raises(
        CheckpointError, match=r"differs in the samples \(their lists, or what their images show\); resume"
    ):
        train(run, tmp_path / "out", distill=False, resume=True)


def test_a_lost_last_checkpoint(labels_only: RunConfig, tmp_path: Path) -> None:
    train(labels_only, tmp_path, distill=False)
    (tmp_path / "last.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="is gone, so the run cannot go on, and beginning anew would replace best"
    ):
        train(labels_only, tmp_path, distill=False, resume=True)
    assert (tmp_path / "best.safetensors").exists()


def test_a_loss_that_turns_non_finite(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        train(with_arguments(run, act="nan", at=7), tmp_path)
    assert str(caught.value) == (
        "step 7: the loss or its gradient is not finite (cross_entropy nan, zero_order nan, first_order nan, "
        'gradient norm nan); lower train.learning_rate, set train.clip or a longer train.warmup, or train.amp = "off"'
    )
    description, tensors = checkpoint.load(tmp_path / "last.safetensors")
    assert description.step == 4
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
    assert records(tmp_path)[-1]["step"] == 6


def test_a_network_that_diverges_before_its_validation(labels_only: RunConfig, tmp_path: Path) -> None:
    run = change(labels_only, optimiser="sgd", learning_rate=1e30, warmup=0, validate_every=1)
    with pytest.raises(NonFiniteError) as caught:
        train(run, tmp_path, distill=False)
    assert str(caught.value) == (
        "step 1: validation met NaN or +inf in the logits; "
        'lower train.learning_rate, set train.clip or a longer train.warmup, or train.amp = "off"'
    )


def test_a_student_without_gradients(labels_only: RunConfig, tmp_path: Path, place: Path) -> None:
    labels = NetworkConfig(reference=f"{place}/networks.py:Small", stride=4, arguments={"act": "labels"})
    with pytest.raises(NetworkError) as caught:
        train(replace(labels_only, student=labels), tmp_path / "out", distill=False)
    assert str(caught.value) == (
        "the student's logits (int64) carry no gradient, so nothing can be learned; "
        "return floating-point logits and leave out argmax, detach() and no_grad()"
    )


def test_one_pooled_value_under_batch_norm(labels_only: RunConfig, tmp_path: Path, place: Path) -> None:
    run = change(labels_only, labelled=1)
    for student in (
        NetworkConfig(reference=f"{place}/networks.py:Pooled", stride=1),
        NetworkConfig(reference="deeplabv3plus-mobilenetv2"),
    ):
        with pytest.raises(NetworkError, match="train with at least 2 images a batch"):
            train(replace(run, student=student), tmp_path, distill=False, overwrite=True)


@pytest.mark.parametrize(
    ("distill", "settings", "others", "message"),
    [
        (False, {"auxiliary": 1}, {}, "train.auxiliary is 1, but without distillation nothing can be learned from"),
        (
            True,
            {},
            {"knowledge": knowledge_of()},
            r"^every weight in \[knowledge\] is 0, so nothing would be distilled; give one of zero_order, first_order, "
            "dist, channel_wise, pseudo_labels a weight, or train on labels alone with --no-distill$",
        ),
        (
            True,
            {"auxiliary": 0},
            {"knowledge": knowledge_of(PseudoLabels(weight=1.0, on="auxiliary"))},
            r'^knowledge\.pseudo_labels\.on is "auxiliary", but train\.auxiliary is 0, so it would never act; raise '
            r'train\.auxiliary, set on = "all", or knowledge\.pseudo_labels\.weight = 0$',
        ),
        (
            True,
            {},
            {"knowledge": knowledge_of(ZeroOrder(weight=1.0, class_weighted=True))},
            r"^knowledge\.zero_order\.class_weighted is true, but train\.class_weights is not given or train\.labelled "
            r"is 0, so classes have no weights; give both, or leave class_weighted out$",
        ),
        (False, {"auxiliary": 0}, {"loss": LossConfig(cross_entropy=0.0)}, "every weight of the loss is 0"),
        (False, {"auxiliary": 0, "class_weights": (1.0,)}, {}, r"has 1 weights, the data 3 classes \(sky, road, car\)"),
        (True, {"device": "cuda:99"}, {}, "'cuda:99', but torch sees"),
        (True, {"backbone_rate": 0.1}, {}, "no module called 'backbone'"),
    ],
)
def test_settings_that_do_not_fit(
    run: RunConfig, tmp_path: Path, distill: bool, settings: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    bad = replace(change(run, **settings), **others)
    with pytest.raises(ConfigError, match=message):
        train(bad, tmp_path / "out", distill=distill)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("validate_every", [0, 3])
def test_nothing_to_validate_on(
    labels_only: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, validate_every: int
) -> None:
    folders = {Role.TRAIN: ("train",)}
    run = replace(labels_only, data=replace(labels_only.data, folders=folders))
    with caplog.at_level(logging.WARNING):
        summary = train(change(run, validate_every=validate_every), tmp_path, distill=False)
    assert summary["best"] is None
    assert (tmp_path / "last.safetensors").exists()
    assert not (tmp_path / "best.safetensors").exists()
    told = [line.getMessage() for line in caplog.records]
    assert told == validate_every // 3 * [
        "the data has no sample of role select to validate on: no best.safetensors is written, "
        "last.safetensors is what training gives"
    ]


def test_a_cache_that_does_not_fit(run: RunConfig, tmp_path: Path) -> None:
    other = replace(run, data=replace(run.data, classes=("sky", "road", "bus")))
    with pytest.raises(CacheMismatchError, match="classes sky, road, car, the data of sky, road, bus"):
        train(other, tmp_path)
    lacking = replace(run, knowledge=knowledge_of(FirstOrder(form="logits")))
    with pytest.raises(CacheMismatchError, match="keeps no target 'first_order_logits', only soft, first_order"):
        train(lacking, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_of_another_teacher(run: RunConfig, tmp_path: Path, place: Path) -> None:
    """As far as the run file states it; what it says nothing about may be in files that are gone."""
    teacher = replace(run.the_teacher(), arguments={"width": 0.5}, produces="probabilities")
    with pytest.raises(CacheMismatchError) as caught:
        train(replace(run, teacher=teacher), tmp_path)
    assert str(caught.value) == (
        f"{place}/cache.zarr is of a teacher that differs in arguments.width (0.25, now 0.5), "
        "produces ('logits', now 'probabilities'); name this teacher's cache in cache.path, or write it with segkd "
        "teacher-cache"
    )
    assert not list(tmp_path.iterdir())
    train(replace(change(run, steps=1, warmup=0), teacher=None), tmp_path)


def test_a_teacher_whose_weights_are_gone(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "teacher.py").write_text("from torch import nn\ndef build(weights):\n    return nn.Conv2d(3, 3, 1)\n")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"some")
    teacher = NetworkConfig(reference=f"{tmp_path}/teacher.py:build", arguments={"weights": str(weights)})
    cache = replace(run.cache, path=str(tmp_path / "cache.zarr"))
    run = replace(change(run, steps=1, warmup=0), teacher=teacher, cache=cache)
    teacher_cache(run)
    (tmp_path / "teacher.py").write_text("def build(weights): ...\n")
    with pytest.raises(CacheMismatchError, match=r"differs in the content of \S+/teacher\.py:build; name"):
        train(run, tmp_path / "out")
    (tmp_path / "teacher.py").unlink()
    weights.write_bytes(b"others")
    with pytest.raises(CacheMismatchError, match=r"differs in arguments\.weights \(the content of weights\.pth\)"):
        train(run, tmp_path / "out")
    weights.unlink()
    assert train(run, tmp_path / "out")["steps"] == 1


def test_a_student_learns_the_classes_of_the_data(labels_only: RunConfig, tmp_path: Path) -> None:
    student = replace(labels_only.the_student(), classes=("sky", "ground", "car"))
    with pytest.raises(ConfigError, match=r"student\.classes and student\.class_map do not apply in training"):
        train(replace(labels_only, student=student), tmp_path, distill=False)


def test_a_disk_that_cannot_be_written_to(
    labels_only: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"run\.json: cannot be written: No space left on device; make room"):
        train(labels_only, tmp_path / "out", distill=False)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory; free some space or choose"):
        train(labels_only, tmp_path / "file" / "out", distill=False)


def test_an_error_in_a_loader_process_is_one_line(labels_only: RunConfig, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    for path in (tmp_path / "data" / "images" / "train").iterdir():
        path.write_bytes(path.read_bytes()[:90])
    run = replace(labels_only, data=replace(labels_only.data, root=str(tmp_path / "data")))
    with pytest.raises(DataError) as caught:
        train(change(run, workers=1), tmp_path / "out", distill=False)
    assert str(caught.value).startswith(f"{tmp_path}/data/images/train/train")
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_log_frequency_weights_against_the_formula(labels_only: RunConfig, place: Path, tmp_path: Path) -> None:
    labels = [np.asarray(Image.open(path)) for path in (place / "data" / "labels" / "train").iterdir()]
    shares = [np.mean(np.concatenate(labels) == k) for k in range(3)]
    explicit = tuple(float(1 / math.log(1.02 + share)) for share in shares)
    losses = []
    for number, weights in enumerate(("log_frequency", explicit, None)):
        output = tmp_path / str(number)
        train(change(labels_only, steps=3, warmup=0, class_weights=weights), output, distill=False)
        losses.append([line["loss"] for line in records(output) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_class_weights_that_knowledge_shares_have_a_mean_of_1(run: RunConfig, place: Path) -> None:
    labels = [np.asarray(Image.open(path)) for path in (place / "data" / "labels" / "train").iterdir()]
    shares = [np.mean(np.concatenate(labels) == k) for k in range(3)]
    explicit = (2.0, 0.5, 7.0)
    kind = ZeroOrder(weight=1.0, class_weighted=True)
    run = replace(change(run, class_weights=explicit), knowledge=knowledge_of(kind))
    given = open_inputs(run, run.the_student(), distill=True).class_weights
    assert given is not None
    assert float((given * torch.tensor(shares)).sum()) == pytest.approx(1)
    assert given.numpy() == pytest.approx(np.array(explicit) * float(given[0]) / explicit[0])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_stays_near(run: RunConfig, tmp_path: Path, amp: str) -> None:
    losses = {}
    for mode in ("off", amp):
        train(change(run, steps=4, amp=mode, checkpoint_every=2), tmp_path / mode)
        losses[mode] = [line["loss"] for line in records(tmp_path / mode) if "loss" in line]
    assert losses[amp] == pytest.approx(losses["off"], rel=0.03)
    assert losses[amp] != losses["off"]
    description, _ = checkpoint.load(tmp_path / amp / "last.safetensors")
    assert (description.scaler is not None) == (amp == "fp16")


def test_a_gradient_that_overflows_in_fp16_is_skipped(labels_only: RunConfig, tmp_path: Path) -> None:
    run = change(with_arguments(labels_only, act="loud"), steps=1, warmup=0, amp="fp16", validate_every=0)
    train(run, tmp_path / "out", distill=False)
    assert [line["gradient"]["total"] for line in records(tmp_path / "out")] == [None]
    description, tensors = checkpoint.load(tmp_path / "out" / "last.safetensors")
    assert description.scaler is not None
    assert description.scaler["scale"] == 2.0**15
    assert not [name for name in tensors if name.startswith("optimiser.")]


def test_tensorboard(labels_only: RunConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(change(labels_only, tensorboard=True), tmp_path, distill=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [line["loss"] for line in records(tmp_path) if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert {"gradient/cross_entropy", "select/miou", "select/per_class/sky"} <= set(events.Tags()["scalars"])


def test_tensorboard_that_is_not_installed(
    labels_only: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"TensorBoard is not installed; pip install 'segkd\[tensorboard\]'"):
        train(change(labels_only, tensorboard=True), tmp_path / "out", distill=False)
    assert not (tmp_path / "out").exists()


def watch_gradient(network: nn.Module, seen: list[float]) -> None:
    """Puts the norm of the gradient at the network's output into ``seen``."""

    def at_output(_module: nn.Module, _inputs: Any, logits: torch.Tensor) -> None:
        logits.register_hook(lambda gradient: seen.append(gradient.norm().item()))

    network.register_forward_hook(at_output)


def test_gradients_of_terms_are_those_at_the_logits(run: RunConfig) -> None:
    """Each alone is what a hook sees at the logits; a term's figure does not depend on the others'."""
    trainer, batch = first_batch(run)
    together = trainer.step(batch, 0, measure=True)["gradient"]
    for term in ("zero_order", "first_order"):
        kind = getattr(run.knowledge, term)
        only = replace(run, loss=LossConfig(cross_entropy=0.0), knowledge=knowledge_of(kind))
        trainer, batch = first_batch(only)
        seen: list[float] = []
        watch_gradient(trainer.network, seen)
        alone = trainer.step(batch, 0, measure=True)["gradient"]
        assert alone[term] == pytest.approx(seen[0], rel=1e-5)
        assert together[term] == pytest.approx(seen[0], rel=1e-5)
        assert set(alone) == {"total", term}


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.32, 1e-6), (1e-6, 0.4)])
def test_mining_leaves_labels_of_hard_pixels_alone(run: RunConfig, threshold: float, min_kept: float) -> None:
    """It changes what the labels teach, which is a weighted mean over the pixels that are left, and nothing else."""
    weights = torch.tensor([0.0, 1.0, 3.0])
    trainer, batch = first_batch(run, weights)
    seen: list[torch.Tensor] = []
    trainer.network.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.detach()))
    plain = trainer.step(batch, 0, measure=True)
    assert "hard_pixels" not in plain
    logits_NChw, (height, width) = seen[0].requires_grad_(), batch.labels_NHW.shape[1:]
    mapping = trainer.network.grid.mapping_in((height, width), (height, width))
    log_probs_NCHW = to_pixels(logits_NChw, mapping, height, width).log_softmax(1)
    losses_NHW = functional.nll_loss(log_probs_NCHW, batch.labels_NHW, ignore_index=255, reduction="none")
    counts_NHW = (batch.labels_NHW != 255) & (batch.labels_NHW != 0)
    hard_NHW = counts_NHW & (losses_NHW > -math.log(threshold))
    for hard_HW, losses_HW, counts_HW in zip(hard_NHW, losses_NHW, counts_NHW, strict=True):
        wanted = math.ceil(min_kept * int(counts_HW.sum()))
        if hard_HW.sum() < wanted:
            order = losses_HW[counts_HW].sort(descending=True, stable=True).indices
            hard_HW[counts_HW] = (torch.arange(len(order))[:, None] == order[:wanted]).any(1)
    share = float(hard_NHW.sum() / counts_NHW.sum())
    assert 0.05 < share < 0.95
    expected = functional.nll_loss(
        log_probs_NCHW, batch.labels_NHW.masked_fill(~hard_NHW, 255), weights, ignore_index=255
    )
    (gradient_NChw,) = torch.autograd.grad(expected, logits_NChw)
    mining = replace(run, loss=LossConfig(ohem_threshold=threshold, ohem_min_kept=min_kept))
    trainer, batch = first_batch(mining, weights)
    mined = trainer.step(batch, 0, measure=True)
    assert mined["hard_pixels"] == pytest.approx(share, abs=2e-3)
    assert mined["cross_entropy"] == pytest.approx(expected.item(), rel=1e-3)
    assert mined["gradient"]["cross_entropy"] == pytest.approx(gradient_NChw.norm().item(), rel=1e-2)
    for term in ("zero_order", "first_order"):
        assert mined[term] == plain[term]
        assert mined["gradient"][term] == plain["gradient"][term]


def test_mining_in_a_batch_without_labels(run: RunConfig) -> None:
    unlabelled = change(replace(run, loss=LossConfig(ohem_threshold=0.7)), labelled=0, auxiliary=3)
    trainer, batch = first_batch(unlabelled)
    measured = trainer.step(batch, 0)
    assert (measured["cross_entropy"], measured["hard_pixels"]) == (0, 0)


def test_clipping_bounds_the_step(run: RunConfig) -> None:
    plain = {"optimiser": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0, "warmup": 0}
    moved = {}
    for clip in (0.0, 0.01):
        trainer, batch = first_batch(change(run, **plain, clip=clip))
        before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
        norm = trainer.step(batch, 0)["gradient"]["total"]
        after = [parameter.detach() for parameter in trainer.network.parameters()]
        moved[clip] = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)))
        assert norm > 0.05
    assert moved[0.0] == pytest.approx(norm, rel=1e-3)
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)


def test_settings_of_torch_hold_for_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch_settings(TrainConfig(threads=before[0] + 1, deterministic=True)):
        assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (before[0] + 1, True)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def damaged_copy(run: RunConfig, folder: Path) -> tuple[RunConfig, int]:
    """The run with a copy of its cache whose first shard of soft targets is cut off, and how many samples it holds."""
    cache = folder / "damaged.zarr"
    shutil.copytree(run.cache.path, cache)
    shard = min(path for path in cache.rglob("soft/c*") if path.is_file())
    shard.write_bytes(shard.read_bytes()[:-9])
    return replace(run, cache=replace(run.cache, path=str(cache))), COUNTS["auxiliary"]


def test_auxiliary_samples_are_filtered_by_the_rows_of_the_cache(run: RunConfig, tmp_path: Path) -> None:
    """How many are drawn is kept in run.json, which stays JSON."""
    (tmp_path / "teacher.py").write_text("from torch import nn\ndef build():\n    return nn.Conv2d(3, 3, 9, 4, 4)\n")
    teacher = NetworkConfig(reference=f"{tmp_path}/teacher.py:build")
    run = replace(run, teacher=teacher, cache=replace(run.cache, path=str(tmp_path / "cache.zarr")))
    teacher_cache(run)
    reader = CacheReader(run.cache.path)
    measured = sorted(
        (reader.entry(entry.id).measures["soft.confidence"], entry.id) for entry in reader.entries("auxiliary")
    )
    limit = measured[2][0]
    expected = {name for confidence, name in measured if confidence >= limit}
    assert 0 < len(expected) < 4
    filtered = change(run, steps=2, warmup=0, least_confidence=limit)
    stream = open_inputs(filtered, filtered.the_student(), distill=True).stream
    drawn = {draw.sample.id for step in range(8) for draw in stream.draws(step) if draw.sample.role == Role.AUXILIARY}
    assert drawn == expected
    train(filtered, tmp_path / "out")
    text = (tmp_path / "out" / "run.json").read_text()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["pools"] == {
        "train": {"samples": 5, "drawn": 5},
        "auxiliary": {"samples": 4, "drawn": len(expected)},
    }
    assert document["configuration"]["train"]["most_entropy"] == "inf"
    train(filtered, tmp_path / "out", resume=True)
    with pytest.raises(CheckpointError, match=r"differs in train\.least_confidence"):
        train(change(filtered, least_confidence=0.0), tmp_path / "out", resume=True)
    with pytest.raises(ConfigError, match="which none of the 4 auxiliary samples satisfies"):
        train(change(run, least_confidence=1.0), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mode", ["joint", "labelled", "separate", "frozen"])
def test_mixed_batches_under_every_batch_norm(run: RunConfig, tmp_path: Path, mode: str) -> None:
    """With CutMix and a loader process: the same product in name and shape, and resuming as if nothing had happened."""
    mixing = replace(change(run, steps=6, batch_norm=mode), augment=replace(run.augment, cutmix=0.7))
    train(change(mixing, workers=1), tmp_path / "whole")
    losses = [line["loss"] for line in records(tmp_path / "whole") if "loss" in line]
    assert all(math.isfinite(loss) for loss in losses)
    with pytest.raises(TrainingStopped):
        train(mixing, tmp_path / "stopped", progress=SignalAt("train", 3, signal.SIGTERM))  # type: ignore[arg-type]
    train(mixing, tmp_path / "stopped", resume=True)
    assert_same_tensors(tmp_path / "whole" / "last.safetensors", tmp_path / "stopped" / "last.safetensors")
    _, tensors = checkpoint.load(tmp_path / "whole" / "last.safetensors")
    network = load_network(mixing.the_student(), len(CLASSES))
    held = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    assert {name: value.shape for name, value in network.state_dict().items()} == {
        name: value.shape for name, value in held.items()
    }
    moved = not torch.equal(held["network.body.1.running_mean"], network.state_dict()["network.body.1.running_mean"])
    assert moved == (mode != "frozen")
    learned = held["network.body.1.weight"] != 1
    assert learned.any(), "affine parameters learn in every mode"


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_samples_are_skipped_when_asked_and_told_of_once(
    run: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    damaged, lost = damaged_copy(change(run, workers=workers), tmp_path)
    with pytest.raises(
        CacheDamagedError, match=r"^sample \S+: .*soft/c.* or go on without .*: --on-damage skip --resume$"
    ):
        train(damaged, tmp_path / "out")
    skipping = change(damaged, on_damage="skip")
    with caplog.at_level(logging.WARNING):
        summary = train(skipping, tmp_path / "out", resume=True)
    assert len(summary["damaged"]) == lost
    told = [line.getMessage() for line in caplog.records if "knowledge" in line.getMessage()]
    assert sorted(line.split(":")[0] for line in told) == summary["damaged"]
    lines = records(tmp_path / "out")
    assert sorted(name for line in lines for name in line.get("damaged", {})) == summary["damaged"]
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["damaged_samples"] == lost
    assert all(math.isfinite(line["loss"]) for line in steps)
    again = train(skipping, tmp_path / "out", resume=True)
    assert again["damaged"] == summary["damaged"]


def test_every_kind_of_knowledge_trains_on_its_schedule_and_resumes(run: RunConfig, tmp_path: Path) -> None:
    """Resumed in the middle of a rise, a run is as if nothing had happened; gradients are logged with the weight."""
    kinds: tuple[Knowledge, ...] = (
        ZeroOrder(schedule="fall"),
        FirstOrder(weight=10.0),
        Dist(weight=1.0),
        ChannelWise(weight=0.5, on="auxiliary"),
        PseudoLabels(weight=0.5, form="confidence", schedule="rise"),
    )
    exact = replace(run.cache, path=str(tmp_path / "cache.zarr"), profile="exact")
    run = replace(change(run, steps=6), cache=exact, knowledge=knowledge_of(*kinds))
    teacher_cache(run)
    train(run, tmp_path / "whole")
    logged = [record for record in records(tmp_path / "whole") if "loss" in record]
    names = ["cross_entropy", *(kind.name for kind in kinds)]
    for step, record in enumerate(logged):
        weights = [1.0, (6 - step) / 6, 10.0, 1.0, 0.5, 0.5 * (step + 1) / 6]
        expected = sum(weight * record[name] for weight, name in zip(weights, names, strict=True))
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
        assert list(record["gradient"]) == ["total", *names]
        assert min(record["gradient"].values()) > 0
    with pytest.raises(TrainingStopped):
        train(run, tmp_path / "stopped", progress=SignalAt("train", 3, signal.SIGTERM))  # type: ignore[arg-type]
    train(run, tmp_path / "stopped", resume=True)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "stopped")
    assert_same_tensors(tmp_path / "whole" / "last.safetensors", tmp_path / "stopped" / "last.safetensors")
