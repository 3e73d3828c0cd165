"""Checkpoints: whole or not at all, damage found, nothing in them that runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from segkd.pipeline.data.sample import Classes
from segkd.pipeline.models.network import NetworkConfig, Preprocessing
from segkd.pipeline.models.references import load_network
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.checkpoint import (
    EMA,
    MODEL,
    Best,
    Description,
    independent,
    load,
    network_from_checkpoint,
    part,
    save,
)
from segkd.pipeline.student.seen import Seen
from segkd.storage.errors import CheckpointError

CLASSES = Classes(names=("sky", "road"), palette=((0, 0, 255), (128, 64, 128)))
STUDENT = NetworkConfig(
    reference="deeplab-mobilenetv1", arguments={"width": 0.25}, preprocessing=Preprocessing(channels="BGR")
)


def describe(**changes: Any) -> Description:
    base = Description(
        network=STUDENT,
        classes=CLASSES,
        step=7,
        validated=5,
        best=Best(step=5, scores={"miou": 12.5, "per_class": {"sky": None, "road": 25.0}}),
        run={"train": {"steps": 10, "class_weights": None}},
        samples=Seen(contaminated=0),
    )
    return replace(base, **changes)


def small_tensors() -> dict[str, Tensor]:
    tied = torch.arange(6.0).reshape(2, 3)
    return {
        "model.a": tied,
        "model.tied": tied,
        "model.transposed": tied.t(),
        "model.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "model.count": torch.tensor(3),
        "model.empty": torch.empty(0),
        "rng.cpu": torch.get_rng_state(),
    }


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    description = describe(scaler={"scale": 65536.0, "_growth_tracker": 3})
    save(path, description, small_tensors())
    held, tensors = load(path)
    assert replace(held, digest="") == description
    assert tensors.keys() == small_tensors().keys()
    for name, value in small_tensors().items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    assert list(tmp_path.iterdir()) == [path]


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    tensors = small_tensors()
    for name in ("a", "b"):
        save(tmp_path / name, describe(), tensors)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_document_of_before_a_key_was_gained_is_read(tmp_path: Path) -> None:
    """What it says of itself is checked as it was written."""
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, describe(), small_tensors())
    document = json.loads(safe_open(path, "pt").metadata()["segkd"])
    del document["samples"]["labels_before"]
    digest = hashlib.sha256(json.dumps(document | {"digest": ""}, sort_keys=True).encode())
    for name, value in sorted(small_tensors().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    document["digest"] = digest.hexdigest()
    held = {name: value.clone(memory_format=torch.contiguous_format) for name, value in small_tensors().items()}
    safetensors.torch.save_file(held, path, {"segkd": json.dumps(document)})
    assert checkpoint.load(path)[0].samples == describe().samples
    document["step"] += 1
    safetensors.torch.save_file(held, path, {"segkd": json.dumps(document)})
    with pytest.raises(CheckpointError, match="damaged, its content does not match its SHA-256"):
        checkpoint.load(path)


def test_every_flipped_byte_of_the_content_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save(path, describe(), {"model.a": torch.arange(16.0)})
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"last\.safetensors"):
            load(path)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_cut_off_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "last.safetensors"
    save(path, describe(), small_tensors())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"not a safetensors file, or a damaged one .*; take another copy"):
        load(path)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file; name a checkpoint that train-student wrote"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path))}: a folder; name a checkpoint file in it$"):
        load(tmp_path)
    for name in ("last", "best"):
        (tmp_path / f"{name}.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"a folder; name best\.safetensors or last\.safetensors in it$"):
        load(tmp_path)


def test_weights_alone_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds weights, but is no segkd-checkpoint; to start from them"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "of format 2, this segkd reads up to 1; update segkd"),
        ({"format": "other"}, "its description is damaged or no segkd-checkpoint's; take another copy"),
        (
            {"surprise": 1},
            "surprise.*is of a later segkd, or damaged: update segkd, or take another copy",
        ),
        ({"step": 8}, "damaged, its content does not match its SHA-256"),
    ],
)
def test_other_descriptions(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "last.safetensors"
    save(path, describe(), {"model.a": torch.zeros(2)})
    text = safetensors.safe_open(path, "pt").metadata()["segkd"]
    changed = json.dumps({**json.loads(text), **change})
    safetensors.torch.save_file({"model.a": torch.zeros(2)}, path, {"segkd": changed})
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    save(path, describe(), small_tensors())
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError) as caught:
        save(path, describe(step=8), small_tensors())
    assert str(caught.value).startswith(f"{path}: cannot be written: No space left on device; make room for ")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_write_does_not_stand_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    (tmp_path / ".last.partial.safetensors").write_bytes(b"half")
    save(path, describe(), small_tensors())
    assert load(path)[0].step == 7
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("prefixes", [(MODEL,), (MODEL, EMA)])
def test_network_with_its_average_if_any(tmp_path: Path, prefixes: tuple[str, ...]) -> None:
    path = tmp_path / "last.safetensors"
    networks = {prefix: load_network(STUDENT, 2) for prefix in prefixes}
    tensors = {prefix + name: value for prefix, n in networks.items() for name, value in n.state_dict().items()}
    save(path, describe(), tensors)
    network, config, classes = network_from_checkpoint(path)
    assert (config, classes) == (STUDENT, CLASSES)
    assert not network.training
    expected = networks[prefixes[-1]].eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(network(images), expected(images))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    weights = load_network(STUDENT, 3).state_dict()
    save(path, describe(), {MODEL + name: value for name, value in weights.items()})
    with pytest.raises(
        CheckpointError, match=r"2 tensors do not fit .* is \(3,.*\) in the file, \(2,.*\) in the network"
    ):
        network_from_checkpoint(path)
    save(path, describe(), {MODEL + name: value for name, value in list(weights.items())[1:]})
    with pytest.raises(CheckpointError, match="is absent in the file"):
        network_from_checkpoint(path)


CODE = """
import torch
from torch import nn
open(__file__ + ".ran", "w").close()
def build(num_classes): return nn.Conv2d(3, num_classes, 1)
"""


def test_code_is_named_by_the_caller_alone(tmp_path: Path) -> None:
    code, path = tmp_path / "mine.py", tmp_path / "last.safetensors"
    code.write_text(CODE)
    config = NetworkConfig(reference=f"{code}:build", stride=1)
    weights = nn.Conv2d(3, 2, 1).state_dict()
    save(path, describe(network=config), {f"{MODEL}network.{name}": value for name, value in weights.items()})
    with pytest.raises(CheckpointError, match="code that a checkpoint may not run by itself"):
        network_from_checkpoint(path)
    assert not (tmp_path / "mine.py.ran").exists()
    network, _, _ = network_from_checkpoint(path, reference=config.reference)
    assert torch.equal(network.state_dict()["network.weight"], weights["weight"])


def test_a_description_that_outlives_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save(path, describe(network=replace(STUDENT, init="weights.pth")), {"model.a": torch.zeros(1)})
    preprocessing = Preprocessing(range="0-255")
    assert independent(NetworkConfig(reference=str(path), preprocessing=preprocessing)) == replace(
        STUDENT, preprocessing=preprocessing
    )
    assert independent(STUDENT) is STUDENT


def test_part() -> None:
    assert part({"model.a.b": torch.tensor(1), "ema.a": torch.tensor(2)}, MODEL) == {"a.b": torch.tensor(1)}


def test_nothing_is_written_where_nothing_can_be(tmp_path: Path) -> None:
    write: Callable[[Path, bytes], None] = checkpoint.write_atomically
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory; make room for 3 bytes"):
        write(tmp_path / "file" / "out" / "run.json", b"abc")


@pytest.mark.parametrize("averaged", [True, False])
def test_a_shared_checkpoint_is_the_network_to_use_in_half_the_bytes(tmp_path: Path, averaged: bool) -> None:
    """``examples/share_checkpoint.py``."""
    network, other = (load_network(STUDENT, 2).eval() for _ in range(2))
    with torch.no_grad():
        # What half precision could not hold.
        next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d)).running_var.fill_(1e6)
    weights = {(EMA if averaged else MODEL) + name: value for name, value in network.state_dict().items()}
    if averaged:
        weights |= {MODEL + name: value for name, value in other.state_dict().items()}
    save(
        tmp_path / "last.safetensors", describe(scaler={"scale": 65536.0}), weights | {"rng.cpu": torch.get_rng_state()}
    )
    script = Path(__file__).parents[1] / "examples" / "share_checkpoint.py"
    runpy.run_path(str(script))["share"](tmp_path / "last.safetensors", tmp_path / "shared.safetensors")
    description, tensors = load(tmp_path / "shared.safetensors")
    assert description == replace(describe(), digest=description.digest)
    assert {name.partition(".")[0] for name in tensors} == {"model"}
    shared, config, classes = network_from_checkpoint(tmp_path / "shared.safetensors")
    assert (config, classes) == (STUDENT, CLASSES)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, rtol=2**-11, atol=2**-24)
    wide = sum(value.numel() for value in network.state_dict().values() if value.is_floating_point() and value.ndim > 1)
    whole = (tmp_path / "last.safetensors").stat().st_size / (2 if averaged else 1)
    assert (tmp_path / "shared.safetensors").stat().st_size == pytest.approx(whole - 2 * wide, rel=0.1)
