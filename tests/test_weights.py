"""Weights to start from: what a file gives to a network, and what is said of the rest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from segkd.pipeline.data.sample import Classes
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.models.references import load_network
from segkd.pipeline.models.weights import Mismatch, warm_start
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.seen import Seen
from segkd.storage.errors import NetworkError

MOBILENET_V2 = Path(__file__).parents[1] / "../shared/weights/mobilenet_v2-b0353104.pth"


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
        description = checkpoint.Description(
            network=NetworkConfig(reference="enet"),
            classes=Classes(names=("a", "b"), palette=((0, 0, 0), (1, 1, 1))),
            step=1,
            validated=0,
            best=None,
            run={},
            samples=Seen(),
        )
        checkpoint.save(tmp_path / "last.safetensors", description, tensors)
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
        torch.save(nn.Conv2d(1, 1, 1), tmp_path / "w.pth")
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
