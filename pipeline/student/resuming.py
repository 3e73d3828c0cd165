"""Whether and from where a run goes on."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.checkpoint import Description
from segkd.pipeline.student.folder import RunFolder
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


def require_same(held: Description, now: Description, path: Path) -> None:
    """Raises CheckpointError that names what differs between the run of the checkpoint at ``path`` and this one."""
    before, after = dict(leaves(held.run)), dict(leaves(now.run))
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
    differing += ["the samples (their lists, or what their images show)"] if held.samples != now.samples else []
    if differing:
        raise CheckpointError(
            f"{path} is of a run that differs in {', '.join(differing)}; resume it as it was begun, "
            "begin anew with --overwrite, or name another output folder"
        )


def is_harmless(key: str) -> bool:
    """Whether a setting, by its dotted key, may change without the run being another one."""
    return any(key == name or key.startswith(f"{name}.") for name in HARMLESS)
