"""A checkpoint: tensors and one JSON document in a safetensors file, which can hold nothing that runs.

``last`` checkpoints hold all that a run needs to go on (tensors ``model.*``, ``ema.*``, ``optimiser.*``, ``rng.*``);
``best`` ones hold the network to use as ``model.*``. Both are read by the same functions. The document carries a
SHA-256 of itself and of every tensor, so that damage is found. The specification is docs/format.md's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from segkd.pipeline.data.sample import Classes
from segkd.pipeline.models.layers import Network
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.models.references import BUILT_IN, load_network
from segkd.pipeline.output import replacing
from segkd.pipeline.settings import parse, to_dict
from segkd.pipeline.student.seen import Seen
from segkd.storage.errors import CheckpointError, ConfigError
from segkd.storage.publish import sync_folder, write_synced

FORMAT = "segkd-checkpoint"
VERSION = 1
METADATA_KEY = "segkd"
SUFFIX = ".safetensors"
MODEL, EMA = "model.", "ema."


@dataclass(frozen=True, kw_only=True)
class Best:
    """The validation that went best."""

    step: int
    """Steps done by then."""
    scores: dict[str, Any]
    """As :meth:`segkd.pipeline.evaluation.scores.Scores.to_dict` gives them."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The JSON part of a checkpoint."""

    network: NetworkConfig
    classes: Classes
    step: int
    """Optimiser steps done."""
    validated: int
    """Steps done at the latest validation; 0 before the first."""
    best: Best | None
    """The best validation up to this step; None before the first."""
    run: dict[str, Any]
    """The resolved configuration of the run, and whether it distils."""
    samples: Seen
    """What the network has seen of which samples."""
    scaler: dict[str, Any] | None = None
    """State of the gradient scaler of fp16."""
    format: str = FORMAT
    version: int = VERSION
    digest: str = ""
    """SHA-256 of this document without it, followed by every tensor, in the order of their names."""


def save(path: str | Path, description: Description, tensors: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint; at no time does a half-written file stand at ``path``. Raises CheckpointError."""
    # safetensors refuses tensors that share memory, as tied weights do.
    held = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    sealed = replace(description, digest=_digest(to_dict(description), held))
    # Not save_file, which does not notice a full disk.
    write_atomically(Path(path), safetensors.torch.save(held, {METADATA_KEY: _to_json(to_dict(sealed))}))


def load(path: str | Path) -> tuple[Description, dict[str, Tensor]]:
    """Reads a checkpoint, tensors on the CPU. Raises CheckpointError for one that is absent, foreign or damaged."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; name a checkpoint that train-student wrote") from None
    except IsADirectoryError:
        held = sorted(file.name for file in Path(path).glob(f"*{SUFFIX}")) or ["a checkpoint file"]
        raise CheckpointError(f"{path}: a folder; name {' or '.join(held)} in it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; name a checkpoint file") from None
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file, or a damaged one ({error}); take another copy"
        ) from None
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    description = _parse(path, text)
    # Of the document as it was written: this segkd may know keys that were not there then.
    if description.digest != _digest(json.loads(text), tensors):
        raise CheckpointError(f"{path}: damaged, its content does not match its SHA-256; take another copy")
    return description, tensors


def is_checkpoint(path: Path) -> bool:
    """Whether a file is there and says that it is a checkpoint, and not weights alone."""
    if path.suffix != SUFFIX or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def network_from_checkpoint(
    path: str | Path, *, reference: str | None = None
) -> tuple[Network, NetworkConfig, Classes]:
    """The network to use, in eval mode with averaged weights where there are any, its description and its classes.

    A checkpoint may only name built-in networks by itself. One whose network is somebody's code is loaded if the
    caller names that code as ``reference``. Raises CheckpointError.
    """
    description, tensors = load(path)
    config = replace(description.network, init=None)
    if reference is not None:
        config = replace(config, reference=reference)
    elif config.reference not in BUILT_IN:
        raise CheckpointError(
            f"{path}: its network is {config.reference!r}, code that a checkpoint may not run by itself; "
            "name that reference yourself if you trust it"
        )
    network = load_network(config, len(description.classes))
    load_weights(network, part(tensors, EMA) or part(tensors, MODEL), path)
    return network.eval(), config, description.classes


def independent(config: NetworkConfig) -> NetworkConfig:
    """The same network described by itself, where ``config`` refers to a checkpoint, which may be gone one day."""
    if Path(config.reference).suffix != SUFFIX:
        return config
    held = load(config.reference)[0].network
    return replace(held, init=None, preprocessing=config.preprocessing, classes=config.classes)


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Copies ``weights`` into the network. Raises CheckpointError, naming the first difference."""
    expected = network.state_dict()
    differing = sorted(expected.keys() ^ weights.keys())
    differing += [name for name in expected if name in weights and expected[name].shape != weights[name].shape]
    if differing:
        name = differing[0]
        held, wanted = (tuple(side[name].shape) if name in side else "absent" for side in (weights, expected))
        raise CheckpointError(
            f"{path}: {len(differing)} tensors do not fit the network; {name!r} is {held} in the file, {wanted} "
            "in the network; use the network's code as it was when the checkpoint was written"
        )
    network.load_state_dict(weights)


def write_atomically(path: Path, content: bytes) -> None:
    """Makes ``path`` hold ``content``, on the disk, or leaves it as it was. Raises CheckpointError."""
    try:
        with replacing(path) as partial:
            write_synced(partial, content)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror}; make room for {len(content):,} bytes on a disk that can be "
            "written to, then go on with --resume. What stood there is untouched"
        ) from error


def _digest(document: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_to_json(document | {"digest": ""}).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_json(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True)


def _parse(path: str | Path, text: str | None) -> Description:
    if text is None:
        raise CheckpointError(
            f"{path}: holds weights, but is no {FORMAT}; to start from them, make them a network's init"
        )
    try:
        raw = json.loads(text)
        form, version = raw["format"], int(raw["version"])
    except (ValueError, KeyError, TypeError):
        form, version = None, VERSION
    if form != FORMAT:
        raise CheckpointError(f"{path}: its description is damaged or no {FORMAT}'s; take another copy")
    if version > VERSION:
        raise CheckpointError(f"{path}: of format {version}, this segkd reads up to {VERSION}; update segkd")
    try:
        return parse(Description, raw, place=str(path))
    except ConfigError as error:
        raise CheckpointError(
            f"{error}; the checkpoint is of a later segkd, or damaged: update segkd, or take another copy"
        ) from None
