"""References to networks, their descriptions, and the weights that they start from."""

from __future__ import annotations

import logging
import sys
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from segkd.pipeline.data.sample import Classes
from segkd.pipeline.models.deeplab import deeplabv3plus_mobilenetv2
from segkd.pipeline.models.foreign import ForeignNetwork
from segkd.pipeline.models.network import Grid, NetworkConfig, Preprocessing
from segkd.pipeline.models.references import BUILT_IN, described, load_network
from segkd.pipeline.models.weights import Mismatch, warm_start
from segkd.storage.errors import ConfigError, NetworkError

SHARED = Path(__file__).parents[1] / "../shared"
MOBILENET_V2 = SHARED / "weights/mobilenet_v2-b0353104.pth"
TEACHER = SHARED / "teachers/camvid_teacher.py"

NETWORK_FILE = """
    from dataclasses import dataclass

    import torch
    from torch import nn

    @dataclass
    class Options:  # dataclasses look their module up by name
        channels: int = 3

    class Net(nn.Module):
        def __init__(self, num_classes, stride=4):
            super().__init__()
            self.conv = nn.Conv2d(3, num_classes, 3, stride, 1)
            self.norm = nn.BatchNorm2d(num_classes)

        def forward(self, x):
            return self.norm(self.conv(x))

    def build(*, classes_out):
        return Net(classes_out).eval()

    def broken():
        raise RuntimeError("no weights here")

    def number():
        return 7
"""


def write(folder: Path, text: str = NETWORK_FILE, name: str = "user_net.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def foreign(network: nn.Module, num_classes: int = 2, **settings: Any) -> ForeignNetwork:
    return ForeignNetwork(network, NetworkConfig(reference="net", **settings), num_classes)


class Returns(nn.Module):
    """A 1x1 convolution to two channels whose result is packed by ``pack``."""

    def __init__(self, pack: Any, stride: int = 1) -> None:
        super().__init__()
        self.pack = pack
        self.conv = nn.Conv2d(3, 2, 1, stride)

    def forward(self, images: Tensor) -> Any:
        return self.pack(self.conv(images))


class Holder:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class TestBuiltIn:
    @pytest.mark.parametrize("reference", BUILT_IN)
    def test_by_name_with_the_datas_classes(self, reference: str) -> None:
        network = load_network(NetworkConfig(reference=reference), 5)
        assert network.eval()(torch.zeros(1, 3, 33, 47)).shape[1] == network.num_classes == 5

    def test_arguments_reach_the_constructor(self) -> None:
        config = NetworkConfig(reference="deeplab-mobilenetv1", arguments={"width": 0.25, "output_stride": 16})
        network = load_network(config, 3)
        assert network.grid == Grid(stride=16)
        assert network.get_parameter("head.branches.0.weight").shape == (3, 256, 3, 3)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"reference": "fastscnn"}, "'fastscnn' is no network; did you mean 'fast-scnn'"),
            ({"reference": "net.pth"}, "a .pth holds weights only and is an init"),
            (
                {"reference": "fast-scnn", "arguments": {"widht": 2}},
                r"fast-scnn cannot be built with arguments .*'widht'\]: .*'widht'; it takes \(num_classes",
            ),
            (
                {"reference": "deeplab-mobilenetv1", "arguments": {"width": "x"}},
                "building the network failed: TypeError",
            ),
            ({"reference": "enet", "arguments": {"num_classes": 4}}, "enet has 4 classes, expected 5"),
            (
                {"reference": "enet", "stride": 8},
                "enet declares stride 1, its description says stride = 8; remove stride",
            ),
            ({"reference": "enet", "align_corners": True}, 'cells lie by "span", .* align_corners = true; remove'),
            ({"reference": "enet", "output": "out"}, "description says output = 'out'; remove output"),
            ({"reference": "enet", "produces": "probabilities"}, "produces = 'probabilities'; remove produces"),
        ],
    )
    def test_mistakes_are_named(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(NetworkError, match=message):
            load_network(NetworkConfig(**settings), 5)

    def test_a_stride_that_agrees_is_accepted(self) -> None:
        assert load_network(NetworkConfig(reference="fast-scnn", stride=8), 2).grid == Grid(stride=8)


class TestPython:
    def test_a_class_in_a_file(self, tmp_path: Path) -> None:
        path = list(sys.path)
        network = load_network(NetworkConfig(reference=f"{write(tmp_path)}:Net", arguments={"stride": 2}), 6)
        assert network.grid == Grid(stride=2)
        assert network.training
        assert network(torch.zeros(2, 3, 11, 7)).shape == (2, 6, 6, 4)
        assert sys.path == path
        assert "user_net" not in sys.modules

    def test_a_function_without_num_classes_is_not_given_any(self, tmp_path: Path) -> None:
        config = NetworkConfig(reference=f"{write(tmp_path)}:build", arguments={"classes_out": 4}, stride=4)
        network = load_network(config, 4)
        assert not network.training
        assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 2, 2)

    def test_files_of_one_name_do_not_meet(self, tmp_path: Path) -> None:
        folders = [tmp_path / "a", tmp_path / "b"]
        for classes, folder in enumerate(folders, 2):
            folder.mkdir()
            write(folder, f"from torch import nn\ndef build(): return nn.Conv2d(3, {classes}, 1)")
        networks = [
            load_network(NetworkConfig(reference=f"{folder}/user_net.py:build"), classes)
            for classes, folder in enumerate(folders, 2)
        ]
        assert [network(torch.zeros(1, 3, 2, 2)).shape[1] for network in networks] == [2, 3]

    def test_an_installed_module(self) -> None:
        images = torch.randn(1, 3, 5, 4)
        network = load_network(NetworkConfig(reference="torch.nn:Identity"), 3)
        assert network.grid == Grid(stride=1)
        assert torch.equal(network(images), images)

    @pytest.mark.parametrize(
        ("reference", "message", "cause"),
        [
            ("{file}:broken", "building the network failed: RuntimeError: no weights here", RuntimeError),
            ("{file}:number", "returned an object of type int, expected a torch.nn.Module", None),
            ("{file}:biuld", "nothing to call by the name 'biuld'; did you mean 'build'", None),
            ("{file}:build", r"cannot be built with arguments \[\]: missing a required argument: 'classes_out'", None),
            ("{folder}/absent.py:build", "there is no file .*absent.py", None),
            ("{folder}/syntax.py:build", "importing it failed: SyntaxError", SyntaxError),
            ("no_such_module_x:build", "importing it failed: ModuleNotFoundError", ModuleNotFoundError),
        ],
    )
    def test_mistakes_are_named_with_their_cause(
        self, tmp_path: Path, reference: str, message: str, cause: type[Exception] | None
    ) -> None:
        write(tmp_path, "def (", "syntax.py")
        modules = set(sys.modules)
        with pytest.raises(NetworkError, match=message) as raised:
            load_network(NetworkConfig(reference=reference.format(file=write(tmp_path), folder=tmp_path)), 2)
        assert type(raised.value.__cause__) is (cause or type(None))
        assert not any("syntax" in name for name in set(sys.modules) - modules)

    @pytest.mark.skipif(not TEACHER.exists(), reason="needs the shared CamVid teacher in ../shared")
    @torch.no_grad()
    def test_a_users_teacher(self) -> None:
        config = NetworkConfig(
            reference=f"{TEACHER}:build_teacher", arguments={"weights": str(TEACHER.with_suffix(".pth"))}
        )
        network = load_network(config, 11)
        assert network.grid == Grid(stride=4)
        assert not network.training
        assert network(torch.zeros(1, 3, 61, 83)).shape == (1, 11, 16, 21)


class TestFiles:
    @torch.no_grad()
    def test_torchscript(self, tmp_path: Path) -> None:
        network = nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), nn.BatchNorm2d(2)).eval()
        path = str(tmp_path / "scripted.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(network).save(path)
        loaded = load_network(NetworkConfig(reference=path), 2)
        images = torch.randn(1, 3, 9, 12)
        assert loaded.grid == Grid(stride=2)
        assert torch.equal(loaded.eval()(images), network(images))

    @torch.no_grad()
    def test_exported_program(self, tmp_path: Path) -> None:
        network = nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), nn.BatchNorm2d(2)).eval()
        path = str(tmp_path / "net.pt2")
        torch.export.save(torch.export.export(network, (torch.zeros(1, 3, 8, 16),)), path)
        config = NetworkConfig(reference=path, preprocessing=Preprocessing(resize=(8, 16)))
        loaded = load_network(config, 2)
        images = torch.randn(1, 3, 8, 16)
        assert loaded.grid == Grid(stride=2)
        # It stays in the mode that it was exported in.
        assert torch.equal(loaded.train().eval()(images), network(images))
        with pytest.raises(NetworkError, match=r"not exported for inputs of shape \(1, 3, 8, 8\)"):
            loaded(torch.zeros(1, 3, 8, 8))
        with pytest.raises(NetworkError, match="not exported for inputs of shape"):
            load_network(NetworkConfig(reference=path), 2)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("x.pt", "not a TorchScript file"), ("x.pt2", "not a program that this PyTorch .* can read")],
    )
    def test_other_content_is_refused(self, tmp_path: Path, name: str, message: str) -> None:
        torch.save({"weight": torch.zeros(1)}, tmp_path / name)
        with pytest.raises(NetworkError, match=message):
            load_network(NetworkConfig(reference=str(tmp_path / name)), 2)

    @pytest.mark.parametrize("name", ["x.pt", "x.pt2", "x.safetensors"])
    def test_an_absent_file_and_arguments_are_refused(self, name: str) -> None:
        with pytest.raises(NetworkError, match=f"{name}: there is no such file"):
            load_network(NetworkConfig(reference=name), 2)
        with pytest.raises(NetworkError, match=r"takes no arguments, got \['width'\]"):
            load_network(NetworkConfig(reference=name, arguments={"width": 1}), 2)


class TestGrid:
    @pytest.mark.parametrize("stride", [1, 2, 3, 4, 8, 16, 32])
    def test_the_stride_of_a_network_that_declares_none_is_inferred(self, stride: int) -> None:
        assert foreign(nn.Conv2d(3, 2, 1, stride)).grid == Grid(stride=stride)

    def test_align_corners_makes_the_convention(self) -> None:
        assert foreign(nn.Conv2d(3, 2, 1, 4), align_corners=True).grid == Grid(stride=4, convention="corners")
        assert foreign(nn.Conv2d(3, 2, 1, 4), align_corners=True, stride=4).grid.convention == "corners"

    def test_a_declared_grid_is_kept_and_not_contradicted(self) -> None:
        network = nn.Conv2d(3, 2, 1, 4)
        network.grid = Grid(stride=4, convention="stride")  # type: ignore[assignment]
        assert foreign(network).grid.convention == "stride"
        with pytest.raises(NetworkError, match="declares stride 4, its description says stride = 8"):
            foreign(network, stride=8)

    def test_inference_leaves_the_network_as_it_was(self) -> None:
        network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2).eval())
        before = {name: value.clone() for name, value in network.state_dict().items()}
        assert foreign(network).training
        assert [module.training for module in network] == [True, True, False]
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    def test_the_size_comes_from_the_preprocessing(self) -> None:
        seen: list[torch.Size] = []
        network = Returns(lambda logits: seen.append(logits.shape) or logits)
        foreign(network, preprocessing=Preprocessing(resize=(50, 70), multiple_of=32))
        assert seen == [(1, 2, 64, 96)]

    def test_cells_that_no_stride_explains_are_refused(self) -> None:
        with pytest.raises(NetworkError, match="254x254 cells for 256x256 pixels, which is not ceil"):
            foreign(nn.Conv2d(3, 2, 3))
        with pytest.raises(NetworkError, match="128x256 cells for 256x256 pixels"):
            foreign(nn.Conv2d(3, 2, 1, (2, 1)))

    def test_a_network_that_fails_says_what_it_was_asked(self) -> None:
        with pytest.raises(NetworkError, match=r"failed on a black image of 256x256 .* state stride") as raised:
            foreign(nn.Conv2d(4, 2, 1))
        assert isinstance(raised.value.__cause__, RuntimeError)

    def test_a_wrong_stride_shows_on_the_first_pass(self) -> None:
        network = foreign(nn.Conv2d(3, 2, 1, 4), stride=8)
        with pytest.raises(
            NetworkError, match="net returned 4x5 cells for an input of 16x20 pixels; stride 8 means 2x3"
        ):
            network(torch.zeros(1, 3, 16, 20))

    def test_a_network_that_rounds_down_shows_on_an_odd_size(self) -> None:
        network = foreign(nn.Conv2d(3, 2, 2, 2))
        assert network(torch.zeros(1, 3, 6, 6)).shape[2:] == (3, 3)
        with pytest.raises(NetworkError, match=r"set preprocessing\.multiple_of"):
            network(torch.zeros(1, 3, 7, 6))


class TestOutput:
    @pytest.mark.parametrize(
        ("pack", "output"),
        [
            (lambda logits: {"aux": logits.sum(), "out": logits}, "out"),
            (lambda logits: (logits.sum(), logits), 1),
            (lambda logits: [logits], 0),
            (Holder, "logits"),
        ],
        ids=["dict", "tuple", "list", "object"],
    )
    def test_the_logits_are_picked(self, pack: Any, output: str | int) -> None:
        network = Returns(pack)
        images = torch.randn(1, 3, 4, 6)
        assert torch.equal(foreign(network, output=output)(images), network.conv(images))

    @pytest.mark.parametrize(
        ("pack", "output", "message"),
        [
            (
                lambda x: {"out": x},
                None,
                r"a mapping with keys \['out'\], and no output is chosen; set output to the key",
            ),
            (lambda x: {"out": x}, "logits", "output = 'logits' is no tensor of it; set output to the key"),
            (lambda x: (x, x), None, "a tuple of 2, and no output is chosen; set output to the position"),
            (lambda x: (x, None), 1, "output = 1 is no tensor of it"),
            (lambda x: (x, x), "out", "output = 'out' is no tensor of it"),
            (Holder, None, "an object of type Holder, and no output is chosen; set output to the attribute"),
            (lambda x: x, 0, "a tensor, and output = 0 is no tensor of it; remove output"),
            (lambda x: x.argmax(1), None, r"shape \(1, 4, 6\), expected \(1, classes, height, width\)"),
            (lambda x: x[0], None, r"shape \(2, 4, 6\), expected \(1, classes"),
        ],
    )
    def test_mistakes_are_named_with_the_key_to_set(self, pack: Any, output: str | int | None, message: str) -> None:
        network = foreign(Returns(pack), output=output, stride=1)
        with pytest.raises(NetworkError, match=message):
            network(torch.zeros(1, 3, 4, 6))

    def test_another_number_of_classes_is_refused(self) -> None:
        network = foreign(nn.Conv2d(3, 2, 1), num_classes=5)
        with pytest.raises(NetworkError, match=r"net returned 2 classes, expected 5; state its own classes"):
            network(torch.zeros(1, 3, 4, 6))

    def test_probabilities_become_their_logarithm(self) -> None:
        network = foreign(Returns(lambda logits: logits.softmax(1)), produces="probabilities")
        images = torch.randn(2, 3, 4, 6)
        expected = network.network.conv(images).log_softmax(1)
        torch.testing.assert_close(network(images), expected)

    def test_a_probability_of_zero_becomes_minus_infinity_and_a_nan_stays(self) -> None:
        values = torch.tensor([1.0, 0.0, float("nan"), 0.5, 0.0, 1.0, 0.5, 0.5]).reshape(1, 2, 2, 2)
        network = foreign(Returns(lambda _: values), produces="probabilities", stride=1)
        with np.errstate(divide="ignore"):
            expected = torch.from_numpy(np.log(values.numpy()))
        torch.testing.assert_close(network(torch.zeros(1, 3, 2, 2)), expected, equal_nan=True)
        assert network(torch.zeros(1, 3, 2, 2))[0, 0, 0, 1] == -torch.inf

    def test_half_precision_probabilities_are_read(self) -> None:
        values = torch.tensor([0.9995, 0.0005]).reshape(1, 2, 1, 1).bfloat16()
        result = foreign(Returns(lambda _: values), produces="probabilities", stride=1)(torch.zeros(1, 3, 1, 1))
        assert result.dtype == torch.float32

    @pytest.mark.parametrize("change", [lambda x: 5 * x, torch.sigmoid, lambda x: x.softmax(1) / 2])
    def test_what_are_no_probabilities_is_refused(self, change: Any) -> None:
        network = foreign(Returns(change), produces="probabilities", stride=1)
        with pytest.raises(NetworkError, match=r'add up to .* over the classes; set produces = "logits"'):
            network(torch.randn(1, 3, 4, 6))

    def test_a_pooled_value_under_batch_norm_is_explained(self) -> None:
        network = foreign(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)), stride=8)
        with pytest.raises(NetworkError, match="train with at least 2 images a batch"):
            network.train()(torch.zeros(1, 3, 8, 8))
        assert network.eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 2, 1, 1)


class TestDescription:
    FILE = """
        from torch import nn

        SEGKD_NETWORK = {
            "stride": 4,
            "produces": "probabilities",
            "arguments": {"width": 2, "depth": 3},
            "classes": ("road", "sky"),
            "preprocessing": {"range": "0-255", "mean": (1, 2, 3), "multiple_of": 8},
        }

        def build():
            return nn.Identity()
    """

    def test_the_module_completes_what_the_run_file_leaves_open(self, tmp_path: Path) -> None:
        config = NetworkConfig(reference=f"{write(tmp_path, self.FILE)}:build")
        assert described(config) == replace(
            config,
            stride=4,
            produces="probabilities",
            arguments={"width": 2, "depth": 3},
            classes=("road", "sky"),
            preprocessing=Preprocessing(range="0-255", mean=(1.0, 2.0, 3.0), multiple_of=8),
        )

    def test_the_run_file_wins_key_by_key_and_doing_it_twice_changes_nothing(self, tmp_path: Path) -> None:
        config = NetworkConfig(
            reference=f"{write(tmp_path, self.FILE)}:build",
            stride=2,
            arguments={"depth": 5},
            preprocessing=Preprocessing(multiple_of=16, channels="BGR"),
        )
        result = described(config)
        assert result.stride == 2
        assert result.arguments == {"width": 2, "depth": 5}
        assert result.preprocessing == Preprocessing(
            range="0-255", mean=(1.0, 2.0, 3.0), multiple_of=16, channels="BGR"
        )
        assert described(result) == result

    @pytest.mark.parametrize("reference", ["enet", "torch.nn:Identity", "net.pt2"])
    def test_nothing_is_added_where_nothing_is_said(self, reference: str) -> None:
        config = NetworkConfig(reference=reference, stride=3)
        assert described(config) == config

    @pytest.mark.parametrize(
        ("description", "error", "message"),
        [
            ({"strid": 4}, ConfigError, "strid = 4: there is no such key; did you mean stride"),
            ({"preprocessing": {"range": "0-1000"}}, ConfigError, "preprocessing.range"),
            ([("stride", 4)], NetworkError, "SEGKD_NETWORK is a list, expected a dict"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path: Path, description: Any, error: type[Exception], message: str) -> None:
        file = write(tmp_path, f"SEGKD_NETWORK = {description!r}\ndef build(): ...")
        with pytest.raises(error, match=message):
            described(NetworkConfig(reference=f"{file}:build"))


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], network: NetworkConfig) -> None:
    from segkd.pipeline.student import checkpoint

    classes = Classes(names=("road", "sky"), palette=((0, 0, 0), (1, 1, 1)))
    description = checkpoint.Description(
        network=network, classes=classes, step=1, validated=0, best=None, run={}, samples=""
    )
    checkpoint.save(path, description, tensors)


def test_a_checkpoint_is_a_reference_that_describes_itself(tmp_path: Path) -> None:
    config = NetworkConfig(reference="fast-scnn", preprocessing=Preprocessing(channels="BGR"))
    network = load_network(config, 2).eval()
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, {f"model.{key}": value for key, value in network.state_dict().items()}, config)
    complete = described(NetworkConfig(reference=str(path)))
    assert complete.preprocessing == config.preprocessing
    assert complete.classes == ("road", "sky")
    images = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        assert torch.equal(load_network(complete, 2).eval()(images), network(images))
    with pytest.raises(NetworkError, match=r"best\.safetensors has 2 classes, expected 3"):
        load_network(complete, 3)


class TestWarmStart:
    def tiny(self) -> nn.Module:
        network = nn.Module()
        network.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        network.head = nn.Conv2d(4, 2, 1)
        return network

    def test_a_whole_network(self, tmp_path: Path) -> None:
        given, network = self.tiny(), self.tiny()
        torch.save(given.state_dict(), tmp_path / "w.pth")
        result = warm_start(network, tmp_path / "w.pth")
        assert result.part == ""
        assert set(result.taken) == set(given.state_dict())
        assert (result.skipped, result.unused, result.missing) == ((), (), ())
        assert all(torch.equal(value, given.state_dict()[name]) for name, value in network.state_dict().items())

    def test_a_backbones_own_keys(self, tmp_path: Path) -> None:
        given, network = self.tiny().backbone, self.tiny()
        head = network.get_parameter("head.weight").clone()
        state = {"0.weight": given[0].weight.half(), "1.weight": torch.ones(7), "fc.weight": torch.ones(1)}
        safetensors.torch.save_file(state, tmp_path / "w.safetensors")
        result = warm_start(network, tmp_path / "w.safetensors")
        assert result.part == "backbone."
        assert result.taken == ("0.weight",)
        assert result.skipped == (Mismatch(key="1.weight", file=(7,), network=(4,)),)
        assert result.unused == ("fc.weight",)
        # An old file has no counters, and they are not missed.
        assert result.missing == (
            "backbone.0.bias",
            "backbone.1.bias",
            "backbone.1.running_mean",
            "backbone.1.running_var",
            "head.weight",
            "head.bias",
        )
        assert torch.equal(network.get_parameter("backbone.0.weight"), given[0].weight.half().float())
        assert torch.equal(network.get_parameter("head.weight"), head)
        assert result.describe() == (
            f"{tmp_path}/w.safetensors: backbone took 1 (0.weight)\n"
            "shape differs: 1 (1.weight (7,) for (4,)); unused: 1 (fc.weight); "
            "starting afresh: 6 (backbone.0.bias ... head.bias)"
        )

    def test_a_checkpoints_averaged_weights_are_preferred(self, tmp_path: Path) -> None:
        given, network = self.tiny(), self.tiny()
        state = given.state_dict()
        tensors = {f"model.{key}": torch.zeros_like(value) for key, value in state.items()}
        tensors |= {f"ema.{key}": value for key, value in state.items()}
        save_checkpoint(tmp_path / "last.safetensors", tensors, NetworkConfig(reference="enet"))
        assert len(warm_start(network, tmp_path / "last.safetensors").taken) == len(state)
        assert torch.equal(network.get_parameter("head.weight"), state["head.weight"])

    @pytest.mark.skipif(not MOBILENET_V2.exists(), reason="needs torchvision's weights of MobileNetV2 in ../shared")
    def test_torchvisions_mobilenet_fills_the_backbone(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="segkd"):
            config = NetworkConfig(reference="deeplabv3plus-mobilenetv2", init=str(MOBILENET_V2))
            network = load_network(config, 11)
        assert "backbone took 306 (features.0.0.weight ... features.17.conv.3" in caplog.text
        assert "unused: 8 (features.18.0.weight ... classifier.1.bias)" in caplog.text
        published = torch.load(MOBILENET_V2, weights_only=True)
        for name, value in network.get_submodule("backbone").state_dict().items():
            assert torch.equal(value, published[name]), name

    def test_nothing_that_fits(self, tmp_path: Path) -> None:
        torch.save({"a": torch.zeros(1), "b": torch.zeros(2)}, tmp_path / "w.pth")
        before = self.tiny()
        with pytest.raises(
            NetworkError,
            match=r"none of its tensors fits .* file has 2 \(a, b\); .*wants 9 \(backbone.0.weight ... head",
        ):
            warm_start(before, tmp_path / "w.pth")

    def test_code_inside_a_file_is_refused(self, tmp_path: Path) -> None:
        torch.save(deeplabv3plus_mobilenetv2(2, width=8), tmp_path / "w.pth")
        with pytest.raises(NetworkError, match=r"cannot be read as weights alone .* save the network's state_dict"):
            warm_start(self.tiny(), tmp_path / "w.pth")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("w.pth", {"state_dict": {}, "epoch": 3}, r"expected tensors by name, found 2 \(state_dict, epoch\)"),
            ("w.pth", [1, 2], "expected tensors by name, found list"),
            ("w.pth", b"", "cannot be read as weights alone"),
            ("w.safetensors", b"nonsense", "cannot be read as weights alone"),
            ("w.bin", b"", "read from .pth or .safetensors files"),
            ("w.pth", None, "there is no such file of weights; check the path of init"),
            ("w.safetensors", None, "there is no such file of weights; check the path of init"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path: Path, name: str, content: Any, message: str) -> None:
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(NetworkError, match=message):
            warm_start(self.tiny(), tmp_path / name)
