"""Exported programs against the predictor that evaluation and prediction use, picture by picture."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

from segkd.cli.main import main
from segkd.pipeline import export as exporting
from segkd.pipeline.data.sample import Classes
from segkd.pipeline.evaluation.pixels import label_map
from segkd.pipeline.export import FORMATS, METADATA, export, probes
from segkd.pipeline.models.deployed import Deployed, upsampling
from segkd.pipeline.models.foreign import ForeignNetwork
from segkd.pipeline.models.network import Grid, NetworkConfig, Preprocessing
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.models.references import BUILT_IN, load_network
from segkd.pipeline.resample import to_pixels
from segkd.storage.errors import ConfigError, NetworkError, OutputExistsError
from segkd.storage.geometry import Axis, Mapping

CLASSES = Classes(names=("sky", "road", "car"), palette=((0, 0, 255), (99, 99, 99), (255, 0, 0)))


class Colours(nn.Module):
    """Logits are what a 3x3 convolution of stride 2 sees, so that a cell knows its surroundings."""

    def __init__(self, channels: int = 3, grid: Grid | None = None) -> None:
        super().__init__()
        self.grid = grid or Grid(stride=2)
        self.num_classes = channels
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(channels, 3, 3, 3, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight, stride=2, padding=1)


def predictor_of(network: nn.Module, **settings: Any) -> Predictor:
    return Predictor(network, NetworkConfig(reference="colours", **settings), CLASSES.names)


def pictures(size: tuple[int, int], count: int = 3) -> np.ndarray:
    """Count,3,H,W: a photograph and its crops, enlarged; not what exports try themselves on."""
    astronaut, noise = probes((size[0] + 8, size[1] + 8))
    mixed = (astronaut // 2 + noise // 8)[:, ::-1]
    return np.stack([mixed[i : i + size[0], i : i + size[1]].transpose(2, 0, 1) for i in range(count)])


def require_equal(predictor: Predictor, path: Path, size: tuple[int, int], apart: float = 0.001) -> None:
    """What a file says of pictures, one and several at once, is what the predictor says; where two classes are equally
    probable but for rounding, either is right."""
    images = pictures(size)
    run = FORMATS[path.suffix][1](path)
    for batch in (images, images[:1]):
        answers = run(batch)
        assert answers.shape[0] == len(batch)
        for image_3HW, answer in zip(batch, answers, strict=True):
            log_probs_1Chw, mapping = predictor.predict([image_3HW.transpose(1, 2, 0)])
            if answer.dtype == np.float32:
                torch.testing.assert_close(torch.from_numpy(answer), log_probs_1Chw[0], atol=apart, rtol=1e-4)
                continue
            assert answer.dtype == np.uint8
            labels_HW = label_map(log_probs_1Chw, mapping, *size).numpy()
            values_CHW = to_pixels(log_probs_1Chw.clamp_min(-1e30), mapping, *size)[0].numpy()
            rows, columns = np.nonzero(answer != labels_HW)
            behind = values_CHW.max(0)[rows, columns] - values_CHW[answer[rows, columns], rows, columns]
            assert len(rows) <= 0.01 * labels_HW.size
            assert np.all(behind <= apart)
            assert len(np.unique(labels_HW)) > 1, "a picture of one label shows nothing"


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("network", "settings"),
    [
        (Colours(), {}),
        (
            Colours(),
            {"preprocessing": Preprocessing(mean=(99, 100, 101), std=(3, 4, 5), range="0-255", channels="BGR")},
        ),
        (Colours(), {"preprocessing": Preprocessing(multiple_of=16, pad="edge")}),
        (Colours(grid=Grid(stride=2, convention="corners")), {"preprocessing": Preprocessing(multiple_of=16)}),
        (Colours(grid=Grid(stride=2, convention="corners")), {}),
        (Colours(grid=Grid(stride=2, convention="stride")), {}),
        (
            Colours(channels=5),
            {
                "classes": ("sky", "car", "road", "lorry", "nothing"),
                "class_map": {"lorry": "car", "nothing": "ignore"},
            },
        ),
    ],
    ids=["plain", "BGR", "padded", "padded corners", "corners", "stride", "classes"],
)
def test_a_program_says_what_the_network_says(
    network: Colours, settings: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    predictor, size, path = predictor_of(network, **settings), (38, 53), tmp_path / f"net{suffix}"
    export(predictor, CLASSES, path, size=size, returns="log-probabilities")
    require_equal(predictor, path, size)
    written = export(predictor, CLASSES, path, size=size, overwrite=True)
    assert written.bytes == path.stat().st_size
    assert written.apart < 1e-4
    assert written.equal > 0.999
    require_equal(predictor, path, size)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(scale=0.5),
        Preprocessing(scale=1.5),
        Preprocessing(resize=(40, 40)),
        Preprocessing(resize=(90, 31)),
    ],
    ids=str,
)
def test_images_are_resized_as_pillow_does_it(preprocessing: Preprocessing, suffix: str, tmp_path: Path) -> None:
    predictor, size = predictor_of(Colours(), preprocessing=preprocessing), (61, 83)
    path = tmp_path / f"net{suffix}"
    export(predictor, CLASSES, path, size=size)
    # Some pixels of the input are one or two steps of 255 higher or lower.
    require_equal(predictor, path, size, apart=0.2)


# Unpooling and dilated depthwise layers are what ONNX might not have.
@pytest.mark.parametrize(
    ("reference", "suffix"),
    [(name, ".onnx" if name in ("enet", "deeplab-mobilenetv1") else ".pt2") for name in BUILT_IN],
)
def test_every_built_in_network_can_be_exported(reference: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = BUILT_IN[reference](num_classes=len(CLASSES)).eval()
    predictor, size, path = predictor_of(network), (41, 54), tmp_path / f"net{suffix}"
    assert export(predictor, CLASSES, path, size=size, returns="log-probabilities").apart < 1e-4
    require_equal(predictor, path, size)


class Hard(nn.Module):
    """Probabilities of 0 and 1: the brightest channel alone."""

    def forward(self, images: Tensor) -> Tensor:
        means = F.avg_pool2d(images, 2) + torch.arange(3)[:, None, None] / 1000  # no two are equal
        return (means == means.amax(1, keepdim=True)).float()


@pytest.mark.parametrize("suffix", FORMATS)
def test_probabilities_may_be_nothing(suffix: str, tmp_path: Path) -> None:
    config = NetworkConfig(reference="hard", produces="probabilities", stride=2)
    predictor = Predictor(ForeignNetwork(Hard(), config, 3), config, CLASSES.names)
    path = tmp_path / f"net{suffix}"
    export(predictor, CLASSES, path, size=(38, 52))
    require_equal(predictor, path, (38, 52))


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_a_network_that_was_recorded_is_exported_again(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network, reference = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1)).eval(), tmp_path / f"recorded{suffix}"
    if suffix == ".pt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.freeze(torch.jit.script(network)).save(str(reference))
    else:
        images, any_size = torch.zeros(2, 3, 32, 32), torch.export.Dim.AUTO
        shapes = ({0: any_size, 2: any_size, 3: any_size},)
        torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), reference)
    config = NetworkConfig(reference=str(reference), stride=2)
    predictor = Predictor(load_network(config, 3), config, CLASSES.names)
    export(predictor, CLASSES, tmp_path / "net.pt2", size=(40, 50))
    require_equal(predictor, tmp_path / "net.pt2", (40, 50))


def test_cells_reach_pixels_by_the_operation_that_runtimes_have() -> None:
    spanning, at_corners = Axis(4.0, 1.5, 10), Axis(39 / 9, 0.0, 10)
    assert upsampling(Mapping(spanning, spanning), (40, 40)) == "span"
    assert upsampling(Mapping(at_corners, at_corners), (40, 40)) == "corners"
    assert upsampling(Mapping(spanning, at_corners), (40, 40)) == "weights"
    assert upsampling(Mapping(Axis(4.0, 1.5, 9), spanning), (40, 40)) == "weights"
    assert upsampling(Mapping(Axis(4.0, 0.0, 10), spanning), (40, 40)) == "weights"


def test_a_file_runs_without_segkd_and_says_what_it_is(done: Path, tmp_path: Path) -> None:
    checkpoint = done.parent / "student" / "best.safetensors"
    out = tmp_path / "new" / "net.pt2"
    arguments = ["export", str(checkpoint), str(out), "--size", "32", "40"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert written["path"] == str(out)
    assert written["size"] == [32, 40]
    program = (
        "import sys; sys.modules['segkd'] = None; import torch\n"
        f"extra = {{{METADATA!r}: ''}}; net = torch.export.load({str(out)!r}, extra_files=extra).module()\n"
        f"print(extra[{METADATA!r}]); print(tuple(net(torch.zeros(4, 3, 32, 40, dtype=torch.uint8)).shape))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    document, shape = printed.splitlines()
    assert shape == "(4, 32, 40)"
    said = json.loads(document)
    assert said["classes"] == written["classes"]
    assert (said["size"], said["returns"]) == ([32, 40], "labels")
    assert len(said["palette"]) == len(said["classes"])
    text = CliRunner().invoke(main, [*arguments, "--overwrite"]).stdout
    assert re.fullmatch(
        rf"{re.escape(str(out))}: [\d.]+ MB, images N,3,32,40 uint8 RGB -> labels\non a photograph and on noise its "
        r"label is the checkpoint's in [\d.]+% of pixels, and the mean difference \S+ nats\n",
        text,
    )


def test_onnx_says_what_it_is(tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "net.onnx"
    export(predictor_of(Colours()), CLASSES, path, size=(32, 40), returns="log-probabilities")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (said,) = (json.loads(entry.value) for entry in model.metadata_props if entry.key == METADATA)
    assert said["classes"] == ["sky", "road", "car"]
    (images,), (values,) = model.graph.input, model.graph.output
    assert (images.name, values.name) == ("images", "log_probabilities")
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == ["batch", 3, 32, 40]


# What goes wrong


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("net.tflite", {}, ConfigError, "{path}: there is no export to .tflite; end it in .onnx or .pt2"),
        ("net", {}, ConfigError, "{path}: there is no export to a name without extension; end it in .onnx or .pt2"),
        ("net.pt2", {"size": (0, 8)}, ConfigError, "size is 0x8; height and width must be at least 1"),
    ],
)
def test_wrong_usage(name: str, settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(error) as raised:
        export(predictor_of(Colours()), CLASSES, path, **{"size": (32, 40)} | settings)
    assert str(raised.value) == message.format(path=path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_stands_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("mine")
    with pytest.raises(OutputExistsError) as raised:
        export(predictor_of(Colours()), CLASSES, path, size=(32, 40))
    assert str(raised.value) == f"{path} exists; choose another name or allow it with --overwrite"
    assert path.read_text() == "mine"
    export(predictor_of(Colours()), CLASSES, path, size=(32, 40), overwrite=True)
    require_equal(predictor_of(Colours()), path, (32, 40))


def test_onnx_needs_its_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError) as raised:
        export(predictor_of(Colours()), CLASSES, tmp_path / "net.onnx", size=(32, 40))
    assert str(raised.value) == (
        "an export to ONNX needs the package onnxruntime, which is not installed; "
        "pip install 'segkd[onnx]', or end the name in .pt2"
    )
    assert not list(tmp_path.iterdir())


class Branching(Colours):
    """Does another thing with bright images."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.mean() > 0 else -images)


def test_a_network_that_branches_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(
        NetworkError,
        match=r"^colours cannot be exported \(\w+: .+\); write it in operations on tensors alone, for any number of "
        r"images and without a branch on their values$",
    ):
        export(predictor_of(Branching()), CLASSES, tmp_path / "net.pt2", size=(32, 40))
    assert not list(tmp_path.iterdir())


def test_a_program_that_answers_otherwise_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def shifted(self: Deployed, images: Tensor) -> Tensor:
        return original(self, images.roll(1, -1))

    original = Deployed.forward
    monkeypatch.setattr(exporting.Deployed, "forward", shifted)
    path = tmp_path / "net.pt2"
    with pytest.raises(NetworkError) as raised:
        export(predictor_of(Colours()), CLASSES, path, size=(32, 40))
    assert re.fullmatch(
        r"colours: what was exported answers otherwise than the network, by \S+ in the mean of a photograph and of "
        rf"noise \(0.001 is allowed\), so {re.escape(str(path))} was not written; try \.onnx",
        str(raised.value),
    )
    assert not list(tmp_path.iterdir())
