"""References to networks, and what networks say of themselves."""

from __future__ import annotations

import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from segkd.pipeline.data.sample import Classes
from segkd.pipeline.models.network import Grid, NetworkConfig, Preprocessing
from segkd.pipeline.models.references import BUILT_IN, described, load_network
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.seen import Seen
from segkd.storage.errors import ConfigError, NetworkError

TEACHER = Path(__file__).parents[1] / "../shared/teachers/camvid_teacher.py"

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
                r"building the network failed: TypeError: .* \(called with num_classes = 5\)$",
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

    def test_a_relative_file_is_looked_for_in_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(NetworkError) as raised:
            load_network(NetworkConfig(reference="absent.py:build"), 2)
        assert str(raised.value) == (
            "absent.py:build: there is no file absent.py; check the network's reference; "
            f"paths in a run file are relative to the folder you run from, {tmp_path}"
        )

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
    def test_a_frozen_torchscript_file_stays_in_its_mode(self, tmp_path: Path) -> None:
        network, path = nn.Sequential(nn.Conv2d(3, 2, 1, 2), nn.BatchNorm2d(2)).eval(), str(tmp_path / "net.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.freeze(torch.jit.script(network)).save(path)
        loaded = load_network(NetworkConfig(reference=path), 2)
        images = torch.randn(1, 3, 8, 16)
        assert loaded.grid == Grid(stride=2)
        assert torch.allclose(loaded.train().eval()(images), network(images), atol=1e-6)

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


def test_a_checkpoint_is_a_reference_that_describes_itself(tmp_path: Path) -> None:
    config = NetworkConfig(reference="fast-scnn", preprocessing=Preprocessing(channels="BGR"))
    network = load_network(config, 2).eval()
    path = tmp_path / "best.safetensors"
    description = checkpoint.Description(
        network=config,
        classes=Classes(names=("road", "sky"), palette=((0, 0, 0), (1, 1, 1))),
        step=1,
        validated=0,
        best=None,
        run={},
        samples=Seen(),
    )
    checkpoint.save(path, description, {f"model.{key}": value for key, value in network.state_dict().items()})
    complete = described(NetworkConfig(reference=str(path)))
    assert complete.preprocessing == config.preprocessing
    assert complete.classes == ("road", "sky")
    images = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        assert torch.equal(load_network(complete, 2).eval()(images), network(images))
    with pytest.raises(NetworkError, match=r"best\.safetensors has 2 classes, expected 3"):
        load_network(complete, 3)
