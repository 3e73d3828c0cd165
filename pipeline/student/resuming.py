"""Whether and from where a run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.transforms import AugmentConfig
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.settings import to_dict
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.checkpoint import Description
from segkd.pipeline.student.config import TrainConfig
from segkd.pipeline.student.folder import RunFolder
from segkd.pipeline.student.knowledge.config import KnowledgeConfig
from segkd.pipeline.student.losses import LossConfig
from segkd.storage.differences import difference, leaves
from segkd.storage.errors import CheckpointError

HARMLESS = (
    "ablate",
    "teacher",
    "cache",
    "data.root",
    "train.workers",
    "train.keep_decoded",
    "train.threads",
    "train.device",
    "train.log_every",
    "train.checkpoint_every",
    "train.tensorboard",
    "train.on_damage",
)
"""What a resumed run may have otherwise: where things are, how fast it goes, whether damage stops it. What the
cache holds is compared by its fingerprints, the data by the list of its samples."""


def last_checkpoint(folder: RunFolder) -> tuple[Description, dict[str, Tensor]] | None:
    """What the folder's run goes on from; None where no run was begun. Raises CheckpointError."""
    if folder.last.exists():
        return checkpoint.load(folder.last)
    if folder.best.exists():
        raise CheckpointError(
            f"{folder.last} is gone, so the run cannot go on, and beginning anew would replace {folder.best.name}; "
            "give --overwrite if that is meant, or name another output folder"
        )
    return None


def continued(held: Description, now: Description, path: Path) -> Description:
    """The description of the checkpoint at ``path``, to go on from as the run ``now``.

    Raises CheckpointError that names what differs between the two.
    """
    after = dict(leaves(now.run))
    before = with_defaults(dict(leaves(held.run)), after)
    whose = "cache's" if now.run["train"]["teacher_view"] == "cache" else "teacher's"
    differing = [
        # Nobody can read a digest.
        f"the {whose} {key.removeprefix('fingerprints.')}"
        if key.startswith("fingerprints.")
        else difference(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not is_harmless(key)
    ]
    differing += ["the classes"] if held.classes != now.classes else []
    # Older checkpoints know less of the networks before them, and what taught a run may be gone by now.
    known = tuple(dict.fromkeys((*held.samples.labels_before, *now.samples.labels_before)))
    seen = replace(held.samples, labels_before=known)
    if seen != replace(now.samples, labels_before=known):
        differing.append("the samples (their lists, or what their images show)")
    if differing:
        raise CheckpointError(
            f"{path} is of a run that differs in {', '.join(differing)}; resume it as it was begun, "
            "begin anew with --overwrite, or name another output folder"
        )
    return replace(held, samples=seen)


def identity(state: Description) -> dict[str, str]:
    """What must be the same in all processes that go on from ``state`` together, by what it is called."""
    settings = {key: value for key, value in leaves(state.run) if not is_harmless(key)}
    parts = {
        "settings, cache or teacher": [settings, state.classes.names],
        "samples": state.samples.to_dict(),
        "checkpoint": [state.step, state.digest],
    }
    return {name: hashlib.sha256(json.dumps(part, default=str).encode()).hexdigest() for name, part in parts.items()}


def with_defaults(held: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``held``, with the settings of ``now`` that it does not know at their defaults.

    The project has gained them since, and what is new is off, or does what was done before, until somebody asks for
    it. So settings of a table that ``held`` does know are filled in, and a kind of knowledge that is off by default.
    Both are settings by dotted key, JSON-ready; those of training stand after ``prefix``.
    """
    training = {
        "augment": AugmentConfig(),
        "knowledge": KnowledgeConfig(),
        "loss": LossConfig(),
        "train": TrainConfig(),
    }
    others = {"data": DataConfig(reader="scenes"), "student": NetworkConfig(reference="")}
    defaults = dict(leaves(_plain(training), prefix)) | dict(leaves(_plain(others)))
    known = {_table(key) for key in held}

    def is_known(table: str) -> bool:
        return table in known or defaults.get(f"{table}.weight") == 0

    filled = {key: value for key, value in defaults.items() if key in now and is_known(_table(key))}
    # JSON knows no infinity, and identities write it as text.
    return {key: now[key] if str(value) == now[key] else value for key, value in filled.items()} | dict(held)


def _plain(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of settings as JSON has them."""
    plain: dict[str, Any] = json.loads(json.dumps({name: to_dict(table) for name, table in tables.items()}))
    return plain


def _table(key: str) -> str:
    return key.rpartition(".")[0]


def is_harmless(key: str) -> bool:
    """Whether a setting, by its dotted key, may change without the run being another one."""
    return any(key == name or key.startswith(f"{name}.") for name in HARMLESS)
