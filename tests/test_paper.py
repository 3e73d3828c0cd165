"""Run files for GPUs, the paper's rows and protocol F: each goes through both stages on a miniature, and is built at
full size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segkd.pipeline.ablation.arms import resolve_arms
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import Role, with_role
from segkd.pipeline.evaluation.evaluate import checkpoint_predictor, evaluate_network
from segkd.pipeline.evaluation.speed import count_parameters
from segkd.pipeline.models.mobilenet import MobileNetV1, MobileNetV2
from segkd.pipeline.models.references import described, load_network
from segkd.pipeline.models.resnet import RESNET101, ResNet
from segkd.pipeline.settings import to_dict
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.optim import learning_rate
from segkd.pipeline.student.train import train
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.plan import plan

CONFIGS = Path(__file__).parents[1] / "configs" / "paper"
PROTOCOL_F = CONFIGS.parent
DATA = ("cityscapes", "pascal-context", "voc2012")
ROWS = ("alone", "zero", "zero-first", "")
"""As the files are named; the last is the data set's own file."""
SMALL = (
    "augment.crop=[65, 65]",
    "train.steps=2",
    "train.warmup=1",
    "train.amp=off",
    "train.device=cpu",
    "train.threads=1",
    "train.workers=0",
)


def config(name: str, *overrides: str) -> RunConfig:
    return load(CONFIGS / f"{name}.toml", overrides)


Write = Callable[[str, int], None]


def cityscapes(write: Write, counts: Sequence[int]) -> None:
    for split, count in zip(("train", "train_extra", "val"), counts, strict=True):
        for k in range(count):
            write(f"data/cityscapes/leftImg8bit/{split}/city/city_{k:06}_000019_leftImg8bit.png", -1)
            if split != "train_extra":
                write(f"data/cityscapes/gtFine/{split}/city/city_{k:06}_000019_gtFine_labelIds.png", 33)


def pascal_context(write: Write, counts: Sequence[int]) -> None:
    _voc("data/VOCdevkit/VOC2010", "SegmentationClassContext", "ImageSets/SegmentationContext", 59, write, counts)


def voc2012(write: Write, counts: Sequence[int]) -> None:
    root = "data/VOCdevkit/VOC2012"
    _voc(root, "SegmentationClassAug", "ImageSets/Segmentation", 20, write, counts, train="trainaug")
    write(f"{root}/SegmentationClass/train_000000.png", 20)


def _voc(
    root: str, labels: str, lists: str, top: int, write: Write, counts: Sequence[int], *, train: str = "train"
) -> None:
    names = {"train": train, "val": "val"}
    for split, count in zip(("train", "auxiliary", "val"), counts, strict=True):
        stems = [f"{split}_{k:06}" for k in range(count)]
        for stem in stems:
            if split == "auxiliary":
                write(f"data/coco/unlabeled2017/{stem}.jpg", -1)
            else:
                write(f"{root}/JPEGImages/{stem}.jpg", -1)
                write(f"{root}/{labels}/{stem}.png", top)
        if split in names:
            listed = Path(root) / lists / f"{names[split]}.txt"
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text("".join(f"{stem}\n" for stem in stems))


MAKE = {"cityscapes": cityscapes, "pascal-context": pascal_context, "voc2012": voc2012}


def draw(name: str, top: int) -> None:
    """A picture of noise in large blocks, or (``top`` >= 0) a label map of values up to ``top``."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([*name.encode()])
    shape, values = ((5, 7), top + 1) if top >= 0 else ((5, 7, 3), 256)
    blocks = rng.integers(0, values, shape, np.uint8)
    Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands in for ImageNet weights: backbones as torchvision's and our own files name their tensors."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(ResNet(RESNET101, 8).state_dict(), folder / "resnet101.pth")
    torch.save(MobileNetV1(1.0, 8).state_dict(), folder / "mobilenet_v1.pth")
    torch.save(MobileNetV2(16).state_dict(), folder / "mobilenet_v2-b0353104.pth")
    return folder


@pytest.mark.parametrize("data", DATA)
def test_rows_go_through_both_stages(data: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder that the README describes, with nothing changed but sizes, durations and the device."""
    monkeypatch.chdir(tmp_path)
    Path("weights").symlink_to(weights)
    MAKE[data](draw, (3, 3, 2))
    teacher = config(f"{data}-teacher", *SMALL, "train.labelled=2")
    train(teacher, f"runs/paper/{data}-teacher", distill=False)
    small = (*SMALL, "train.labelled=2", "cache.device=cpu")
    full = config(data, *small, "train.auxiliary=1")
    foretold = plan(full)
    assert foretold.roles == {"auxiliary": 3, "train": 3}
    summary = teacher_cache(full)
    assert summary.sealed
    assert summary.roles == foretold.roles
    for row in ROWS:
        # A row has its own auxiliary images, or none; the miniature has one where it has some.
        run = config("-".join(filter(None, (data, row))), *small, *([] if row else ["train.auxiliary=1"]))
        output = tmp_path / "out" / (row or "full")
        train(run, output, distill=row != "alone")
        description, _ = checkpoint.load(output / "last.safetensors")
        assert description.step == 2
        assert description.samples.labels_of.count == 3
        assert description.samples.images_of.count == (0 if row else 3)
        source = open_data(run.data)
        predictor, _ = checkpoint_predictor(
            output / "last.safetensors", source.classes, reference=None, device=torch.device("cpu")
        )
        assert evaluate_network(predictor, source, Role.REPORT).scores.samples == 2


COUNTS = {
    "cityscapes": (2_975, 19_998, 500),
    "pascal-context": (4_998, 2_000, 5_105),
    "voc2012": (10_582, 2_000, 1_449),
}
"""Images of role train, auxiliary and report, as the data sets' authors give them; of COCO's 123,403 some."""
PARAMETERS = {
    "cityscapes": (43_901_068, 3_382_099),
    "pascal-context": (46_850_348, 3_750_779),
    "voc2012": (44_048_532, 3_400_533),
}
"""Of teacher and student, worked out by hand: backbones of 42,500,160 and 3,206,976, and 3x3 convolutions to the
classes, four of 2,048 channels and one of 1,024."""


@pytest.mark.parametrize("data", DATA)
def test_full_size_networks(data: str) -> None:
    run, of_teacher = config(data), config(f"{data}-teacher")
    classes = {"cityscapes": 19, "pascal-context": 59, "voc2012": 21}[data]
    teacher, student = (replace(described(each.the_student()), init=None) for each in (of_teacher, run))
    assert teacher.reference == "deeplabv2-resnet101"
    sizes = tuple(count_parameters(load_network(each, classes)) for each in (teacher, student))
    assert sizes == PARAMETERS[data]
    heads = 4 * (9 * 2048 * classes + classes), 9 * 1024 * classes + classes
    assert tuple(size - head for size, head in zip(sizes, heads, strict=True)) == (42_500_160, 3_206_976)


@pytest.mark.parametrize("data", DATA)
def test_full_size_lists(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of the official lists are there by name: hard links to one file, which a reader does not open."""
    monkeypatch.chdir(tmp_path)
    MAKE[data](linked(tmp_path), COUNTS[data])
    source = open_data(config(data).data)
    found = tuple(len(with_role(source, role)) for role in (Role.TRAIN, Role.AUXILIARY, Role.REPORT))
    assert found == COUNTS[data]
    assert not with_role(source, Role.SELECT)
    teacher = open_data(config(f"{data}-teacher").data)
    assert [sample.id for sample in with_role(teacher, Role.TRAIN)] == [
        sample.id for sample in with_role(source, Role.TRAIN)
    ]


def linked(folder: Path) -> Write:
    """Writes nothing but names."""
    origin = folder / "origin"
    origin.write_bytes(b"")

    def write(name: str, top: int) -> None:  # noqa: ARG001  # a name is all that counts
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        os.link(origin, name)

    return write


@pytest.mark.parametrize("data", DATA)
def test_rows_are_at_matched_compute_and_are_the_arms(data: str) -> None:
    full = config(data)
    arms = resolve_arms(full, None)
    assert list(arms) == ["alone", "zero", "zero-first", "auxiliary-zero-first"]
    assert all(not arm.unmatched for arm in arms.values())
    for row, arm in zip(ROWS, arms.values(), strict=True):
        by_hand = to_dict(replace(config("-".join(filter(None, (data, row)))), ablate=full.ablate))
        swept = to_dict(replace(arm.run, ablate=full.ablate))
        if row == "alone":  # by --no-distill, not by weights of 0
            del by_hand["knowledge"], swept["knowledge"]
        assert by_hand == swept


@pytest.mark.parametrize("data", DATA)
def test_schedule(data: str) -> None:
    train_config = config(data).train
    assert train_config == replace(config(f"{data}-teacher").train, labelled=8, auxiliary=8, backbone_rate=1.0)
    rates = [learning_rate(step, train_config) for step in (0, 999, 1000, train_config.steps - 1)]
    assert rates[1] == pytest.approx(1e-2)
    assert rates[0] == pytest.approx(1e-5)
    assert rates[2] <= rates[1]
    assert 0 < rates[3] < 1e-5


def test_the_readme_names_every_run_file() -> None:
    named = set(re.findall(r"`([\w-]+\.toml)`", (CONFIGS / "README.md").read_text()))
    assert named == {path.name for path in CONFIGS.glob("*.toml")}


# Protocol F


STUDENTS = {"camvid-f": 3_206_976 + 9 * 1024 * 11 + 11, "camvid-f-enet": 363_098, "camvid-f-mobilenetv2": 2_717_243}
"""Run files, and the parameters of their students at CamVid's 11 classes."""
WIDE = ("augment.crop=[65, 81]", *SMALL[1:])


def of_protocol_f(name: str, *overrides: str) -> RunConfig:
    return load(PROTOCOL_F / f"{name}.toml", overrides)


@pytest.fixture
def camvid(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout beside a miniature of the shared data; the current folder."""
    root = tmp_path / "shared" / "data" / "camvid"
    for split, roles in (("train", ("labelled", "auxiliary", "select")), ("val", ("report",))):
        for role in roles:
            ids = [f"{split}/{role}_{k}" for k in range(3)]
            for each in ids:
                draw(str(root / f"{each}.jpg"), -1)
                draw(str(root / f"{each.replace(split, f'{split}annot')}.png"), 11)
            (root / "lists").mkdir(exist_ok=True)
            (root / "lists" / f"{role}.txt").write_text("\n".join(ids) + "\n")
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    for folder in (Path("weights"), tmp_path / "shared" / "weights"):
        folder.symlink_to(weights)


@pytest.mark.usefixtures("camvid")
def test_protocol_f_goes_through_both_stages() -> None:
    train(of_protocol_f("camvid-f-teacher", *WIDE, "train.labelled=2"), "runs/camvid-f-teacher", distill=False)
    small = (*WIDE, "train.labelled=1", "train.auxiliary=1", "cache.device=cpu")
    assert teacher_cache(of_protocol_f("camvid-f", *small)).sealed
    for name in STUDENTS:
        train(of_protocol_f(name, *small), f"out/{name}", distill=True)
        assert checkpoint.load(f"out/{name}/last.safetensors")[0].step == 2


@pytest.mark.parametrize("name", STUDENTS)
def test_arms_and_student_of_protocol_f(name: str) -> None:
    run = of_protocol_f(name)
    arms = resolve_arms(run, run.ablate.longer)
    assert len(arms) == 11
    assert [arm.name for arm in arms.values() if arm.unmatched] == ["alone-longer"]
    student = replace(described(run.the_student()), init=None)
    assert student.preprocessing.scale == 1
    assert count_parameters(load_network(student, 11)) == STUDENTS[name]
