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
from segkd.pipeline.models.network import Grid, NetworkConfig, Preprocessing, TeacherConfig, Views
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.models.references import BUILT_IN, load_network
from segkd.pipeline.resample import to_pixels
from segkd.storage.errors import ConfigError, ExportError, NetworkError, OutputExistsError
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
    probable but for rounding, either label is right."""
    images = pictures(size)
    run = FORMATS[path.suffix][1](path)
    for batch in (images, images[:1]):
        *labels, log_probs_NChw = run(batch)
        assert log_probs_NChw.dtype == np.float32
        assert len(log_probs_NChw) == len(batch)
        for number, image_3HW in enumerate(batch):
            expected_1Chw, mapping = predictor.predict([image_3HW.transpose(1, 2, 0)])
            got_1Chw = torch.from_numpy(log_probs_NChw[number])[None]
            torch.testing.assert_close(got_1Chw, expected_1Chw, atol=apart, rtol=1e-4)
            for labels_NHW in labels:
                assert labels_NHW.dtype == np.uint8
                answer_HW = labels_NHW[number]
                labels_HW = label_map(expected_1Chw, mapping, *size).numpy()
                values_CHW = to_pixels(expected_1Chw.clamp_min(-1e30), mapping, *size)[0].numpy()
                rows, columns = np.nonzero(answer_HW != labels_HW)
                behind = values_CHW.max(0)[rows, columns] - values_CHW[answer_HW[rows, columns], rows, columns]
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
    written = export(predictor, CLASSES, path, size=size)
    assert written.bytes == path.stat().st_size
    assert written.agreement.probability < 1e-4
    assert written.agreement.equal is not None
    assert written.agreement.equal > 0.999
    assert written.agreement.classes == 3
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
    written = export(predictor, CLASSES, path, size=size, labels=False)
    assert written.agreement.probability < 1e-4
    assert written.agreement.equal is None
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


def test_a_program_is_exported_again(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network, reference = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.BatchNorm2d(3)).eval(), tmp_path / "recorded.pt2"
    images, any_size = torch.zeros(2, 3, 32, 32), torch.export.Dim.AUTO
    shapes = ({0: any_size, 2: any_size, 3: any_size},)
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), reference)
    config = NetworkConfig(reference=str(reference), stride=2)
    predictor = Predictor(load_network(config, 3), config, CLASSES.names)
    export(predictor, CLASSES, tmp_path / "net.pt2", size=(40, 50))
    require_equal(predictor, tmp_path / "net.pt2", (40, 50))


@pytest.mark.parametrize("frozen", [False, True])
def test_torchscript_is_not(frozen: bool, tmp_path: Path) -> None:
    network, reference = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1)).eval(), str(tmp_path / "recorded.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(network)
        (torch.jit.freeze(script) if frozen else script).save(reference)
    config = NetworkConfig(reference=reference, stride=2)
    with pytest.raises(ConfigError) as raised:
        export(Predictor(load_network(config, 3), config, CLASSES.names), CLASSES, tmp_path / "net.pt2", size=(40, 50))
    assert str(raised.value) == (
        f"{reference} is TorchScript, which torch.export does not take: deploy that, or name the Python code that it "
        "was made of (file.py:callable)"
    )


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
        f"labels, log_probs = net(torch.zeros(4, 3, 32, 40, dtype=torch.uint8))\n"
        f"print(extra[{METADATA!r}]); print(tuple(labels.shape), len(log_probs))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    document, shape = printed.splitlines()
    assert shape == "(4, 32, 40) 4"
    said = json.loads(document)
    assert said["classes"] == written["classes"]
    assert (said["size"], said["returns"]) == ([32, 40], ["labels", "log_probabilities"])
    assert len(said["palette"]) == len(said["classes"])
    text = CliRunner().invoke(main, [*arguments, "--overwrite"]).stdout
    assert re.fullmatch(
        rf"{re.escape(str(out))}: [\d.]+ MB, images N,3,32,40 uint8 RGB -> labels and log_probabilities\n"
        r"on a photograph and on noise the label of [\d.]+% of pixels is the checkpoint's, "
        r"probabilities differ by \S+; they show \d class(es)?\n",
        text,
    )


def test_onnx_says_what_it_is(tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "net.onnx"
    export(predictor_of(Colours()), CLASSES, path, size=(32, 40))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (said,) = (json.loads(entry.value) for entry in model.metadata_props if entry.key == METADATA)
    assert said["classes"] == ["sky", "road", "car"]
    (images,) = model.graph.input
    assert images.name == "images"
    assert [values.name for values in model.graph.output] == ["labels", "log_probabilities"]
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == ["batch", 3, 32, 40]


# What goes wrong


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("net.tflite", {}, ConfigError, "{path}: there is no export to .tflite; end it in .onnx or .pt2"),
        ("net", {}, ConfigError, "{path}: there is no export to a name without extension; end it in .onnx or .pt2"),
        (
            *("net.pt2", {"size": (0, 8)}, ConfigError),
            "size is 0x8; height and width must be at least 1, and their product at most 200000000",
        ),
        (
            *("net.pt2", {"size": (99_999, 99_999)}, ConfigError),
            "size is 99999x99999; height and width must be at least 1, and their product at most 200000000",
        ),
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


def test_folders_and_links_are_no_names_to_write_to(tmp_path: Path) -> None:
    folder, link = tmp_path / "net.pt2", tmp_path / "link.pt2"
    folder.mkdir()
    link.symlink_to("nowhere")
    for path, overwrite, message in (
        (folder, True, f"{folder} is a folder; name a file"),
        (link, False, f"{link} exists; choose another name or allow it with --overwrite"),
    ):
        with pytest.raises(OutputExistsError) as raised:
            export(predictor_of(Colours()), CLASSES, path, size=(32, 40), overwrite=overwrite)
        assert str(raised.value) == message


def test_a_teacher_of_several_views_is_no_program(tmp_path: Path) -> None:
    config = TeacherConfig(reference="colours", views=Views(flip=True))
    with pytest.raises(ConfigError) as raised:
        export(Predictor(Colours(), config, CLASSES.names), CLASSES, tmp_path / "net.pt2", size=(32, 40))
    assert str(raised.value) == (
        "a teacher that is shown several views, or windows, is no single program; leave out its views"
    )


def test_images_in_which_no_cell_lies(tmp_path: Path) -> None:
    predictor = predictor_of(Colours(grid=Grid(stride=64)), preprocessing=Preprocessing(multiple_of=64))
    with pytest.raises(NetworkError) as raised:
        export(predictor, CLASSES, tmp_path / "net.pt2", size=(3, 500))
    assert str(raised.value) == (
        "an image: no cell of the network lies in its 3x500 pixels; leave the image out, or give the network a resize"
    )


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    """In a process of its own: torch ends it where it meets the full disk itself."""
    path = tmp_path / f"net{suffix}"
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from segkd.pipeline.export import export; from segkd.pipeline.data.sample import Classes\n"
        "from segkd.pipeline.models.network import NetworkConfig\n"
        "from segkd.pipeline.models.predictor import Predictor\n"
        "from segkd.pipeline.models.references import BUILT_IN\n"
        "network = BUILT_IN['fast-scnn'](num_classes=2).eval()\n"
        "classes = Classes(names=('a', 'b'), palette=((0, 0, 0), (1, 1, 1)))\n"
        "predictor = Predictor(network, NetworkConfig(reference='fast-scnn'), classes.names)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "try:\n"
        f"    export(predictor, classes, Path({str(path)!r}), size=(32, 40), labels=False)\n"
        "except OSError as error:\n"
        "    print(error.filename, error.strerror); sys.exit(3)\n"
    )
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (3, f"{path} File too large\n"), ended.stderr
    assert not list(tmp_path.iterdir())


def test_nothing_is_told_of_the_place_where_it_was_made(tmp_path: Path) -> None:
    for suffix in FORMATS:
        path = tmp_path / f"net{suffix}"
        export(predictor_of(Colours()), CLASSES, path, size=(32, 40))
        for place in (Path(exporting.__file__).parent, Path(__file__).parent, tmp_path):
            assert str(place).encode() not in path.read_bytes()


def test_onnx_needs_its_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError) as raised:
        export(predictor_of(Colours()), CLASSES, tmp_path / "net.onnx", size=(32, 40))
    assert str(raised.value) == (
        "an export to ONNX needs the package onnxruntime, which is not installed; "
        "pip install 'segkd[onnx]', or end the name in .pt2"
    )
    assert not list(tmp_path.iterdir())


class Peculiar(Colours):
    """Does one thing that keeps a network from being exported."""

    def __init__(self, peculiarity: str) -> None:
        super().__init__()
        self.peculiarity = peculiarity
        self.asked = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        match self.peculiarity:
            case "branch":
                return logits if images.abs().sum() > 0 else -logits
            case "number":
                return logits.reshape(int(images.shape[0]), *logits.shape[1:])
            case "rare":
                return torch.special.i1e(logits)
            case "dropout":
                return F.dropout(logits, 0.5, training=True)
            case "state":
                self.asked += 1
                return logits * self.asked
            case "batch":
                return logits - logits.mean((0, 2, 3), keepdim=True)
        raise AssertionError(self.peculiarity)


CANNOT = (
    r"^colours cannot be exported \(%s\); write it in operations on tensors alone, for any number of images and "
    "without a branch on their values$"
)


@pytest.mark.parametrize(
    ("peculiarity", "suffix", "message"),
    [
        ("branch", ".pt2", CANNOT % r"\w+: .+"),
        ("number", ".pt2", CANNOT % "it takes one number of images alone"),
        ("rare", ".onnx", r"^colours cannot be written as \.onnx \(\w+: .+\); try \.pt2$"),
        *(
            (
                *(peculiarity, ".pt2"),
                "^colours answers the same image in two ways, alone and with another; look for dropout that is always "
                "on, state that it keeps, and statistics of the batch$",
            )
            for peculiarity in ("dropout", "state", "batch")
        ),
    ],
)
def test_networks_that_cannot_be_exported(peculiarity: str, suffix: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(predictor_of(Peculiar(peculiarity)), CLASSES, tmp_path / f"net{suffix}", size=(32, 40))
    assert not list(tmp_path.iterdir())


def test_a_foreign_network_s_own_error_is_the_reason(tmp_path: Path) -> None:
    config = NetworkConfig(reference="colours", stride=2)
    predictor = Predictor(ForeignNetwork(Peculiar("branch"), config, 3), config, CLASSES.names)
    with pytest.raises(ExportError, match=r"^colours cannot be exported \((?!NetworkError)\w+: [^;]+\); write it in "):
        export(predictor, CLASSES, tmp_path / "net.pt2", size=(32, 40))


@pytest.mark.parametrize("wrong", ["channels", "a class", "labels"])
def test_a_program_that_answers_otherwise_is_not_kept(
    wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def changed(self: Deployed, images: Tensor) -> tuple[Tensor, ...]:
        labels, log_probs = original(self, images.flip(1) if wrong == "channels" else images)
        if wrong == "a class":  # that hardly anything shows: labels alone would not tell
            return labels, torch.cat([log_probs[:, :2], log_probs[:, 2:] - 9], 1)
        return (labels.flip(2) if wrong == "labels" else labels), log_probs

    original = Deployed.forward
    monkeypatch.setattr(exporting.Deployed, "forward", changed)
    path = tmp_path / "net.pt2"
    with pytest.raises(ExportError) as raised:
        export(predictor_of(Colours()), CLASSES, path, size=(32, 40))
    assert re.fullmatch(
        r"colours: what was exported answers otherwise than the network \(on a photograph and on noise the label of "
        r"[\d.]+% of pixels is the checkpoint's, probabilities differ by \S+; they show 3 classes\), so "
        rf"{re.escape(str(path))} was not written; try \.onnx",
        str(raised.value),
    )
    assert not list(tmp_path.iterdir())
