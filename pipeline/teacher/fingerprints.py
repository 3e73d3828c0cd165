"""Digests that tell whether a cache still fits: of the teacher, of what it is fed, of the classes, of the coding.

The weights and the code have digests of their own, because no description tells in what they differ.

They depend on content, not on where it lies: a file of weights or code counts by its bytes, any path by its last part.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segkd.pipeline.data.sample import Classes
from segkd.pipeline.models.network import NetworkConfig, Views
from segkd.pipeline.models.predictor import Predictor
from segkd.storage.spec import TargetSpec


def fingerprints(teacher: Predictor, classes: Classes, targets: Iterable[TargetSpec]) -> dict[str, str]:
    """What a cache's specification records and what opening it for more compares."""
    description = kept_description(teacher)
    preprocessing = description.pop("preprocessing")
    channels = {name: description.pop(name) for name in ("classes", "class_map")}
    return {
        "teacher": content_digest(description),
        "weights": weights_digest(teacher.network),
        # What a Python file computes, or a frozen program has for weights, no tensor tells.
        "code": content_digest(code_of(teacher.config.reference)),
        "preprocessing": content_digest(preprocessing),
        "classes": content_digest({"data": classes.names, **channels}),
        "coding": content_digest([target.to_dict() for target in targets]),
    }


def kept_description(teacher: Predictor) -> dict[str, Any]:
    """What a cache keeps of its teacher."""
    return {**portable(teacher.config), "precision": teacher.precision}


def portable(config: NetworkConfig) -> dict[str, Any]:
    """The description as a cache keeps it: files by name (and, among the arguments, by content), never by place."""
    table = asdict(config)
    table["reference"] = _file_name(config.reference)
    table["init"] = None if config.init is None else _file_name(config.init)
    table["arguments"] = {name: content_of(value) for name, value in config.arguments.items()}
    # Caches are older than views, and these than windows: one that was asked plainly is described as it was then.
    views = table.pop("views", None)
    if views is not None and views["window"] is None:
        del views["window"], views["overlap"]
    if views is not None and views != {"flip": Views.flip, "scales": Views.scales}:
        table["views"] = views
    return table


def content_digest(document: Any) -> str:
    """SHA-256 of a JSON document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over every parameter and buffer: name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def code_of(reference: str) -> Any:
    """What a reference names: a file, or the source file of an importable module, where it has one; by content."""
    origin = reference.rpartition(":")[0] or reference
    module = sys.modules.get(origin) if ":" in reference else None
    return content_of(getattr(module, "__file__", None) or origin)


def content_of(value: Any) -> Any:
    """A file's name and digest instead of its path; anything else as it is."""
    if isinstance(value, str) and Path(value).is_file():
        with Path(value).open("rb") as file:
            return f"{Path(value).name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return value


def _file_name(reference: str) -> str:
    return reference.replace("\\", "/").rsplit("/", 1)[-1]
