"""Weights to start from: a file's tensors brought into a network by their names.

Nothing in such a file can run: ``.safetensors``, or ``.pth`` read with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from segkd.storage.errors import NetworkError

_COUNTER = "num_batches_tracked"
"""Batch norm's counter: absent from old files, and without effect unless momentum is None."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """A key that both sides have, in different shapes."""

    key: str
    """The file's key."""
    file: tuple[int, ...]
    network: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a file of weights gave to a network."""

    path: str
    part: str
    """Where the file's keys begin in the network: "" for the whole of it, or "backbone."."""
    taken: tuple[str, ...]
    """Keys of the file whose tensors the network now has."""
    skipped: tuple[Mismatch, ...]
    """Keys of both, whose shapes differ."""
    unused: tuple[str, ...]
    """Keys of the file that the network does not have."""
    missing: tuple[str, ...]
    """Keys of the network that the file does not have; they keep their initial values."""

    def describe(self) -> str:
        """What was taken, and what was not, in two lines."""
        into = self.part.removesuffix(".") or "the network"
        skipped = [f"{item.key} {item.file} for {item.network}" for item in self.skipped]
        return (
            f"{self.path}: {into} took {_some(self.taken)}\n"
            f"shape differs: {_some(skipped)}; unused: {_some(self.unused)}; starting afresh: {_some(self.missing)}"
        )


def warm_start(network: nn.Module, path: str | Path) -> WarmStart:
    """Copy a file's tensors into ``network`` where names and shapes agree.

    The names are the whole network's or its backbone's own (a torchvision file for ``network.backbone``), whichever
    agrees in more tensors. Raises NetworkError for a file that cannot be read, or of which nothing fits.
    """
    tensors = _read(Path(path))
    state = network.state_dict()
    parts = [""] + ["backbone."] * isinstance(getattr(network, "backbone", None), nn.Module)
    part = max(parts, key=lambda prefix: len(_fitting(tensors, state, prefix)))
    taken = _fitting(tensors, state, part)
    if not taken:
        raise NetworkError(
            f"{path}: none of its tensors fits the network. The file has {_some(list(tensors))}; the network wants "
            f"{_some(list(state))}; take weights of this architecture, or remove init"
        )
    network.load_state_dict({part + key: tensors[key] for key in taken}, strict=False)
    present = {part + key for key in tensors}
    return WarmStart(
        path=str(path),
        part=part,
        taken=tuple(taken),
        skipped=tuple(
            Mismatch(key=key, file=tuple(tensor.shape), network=tuple(state[part + key].shape))
            for key, tensor in tensors.items()
            if part + key in state and state[part + key].shape != tensor.shape
        ),
        unused=tuple(key for key in tensors if part + key not in state),
        missing=tuple(key for key in state if key not in present and not key.endswith(_COUNTER)),
    )


def _fitting(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], part: str) -> list[str]:
    return [key for key, tensor in tensors.items() if part + key in state and state[part + key].shape == tensor.shape]


def _some(keys: Sequence[str]) -> str:
    """How many, and the first and last of them."""
    if len(keys) <= 2:
        return f"{len(keys)}" + (f" ({', '.join(keys)})" if keys else "")
    return f"{len(keys)} ({keys[0]} ... {keys[-1]})"


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises NetworkError."""
    if path.suffix not in (".pth", ".safetensors"):
        raise NetworkError(
            f"{path}: weights are read from .pth or .safetensors files; save a state_dict as one of them"
        )
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise NetworkError(f"{path}: there is no such file of weights; check the path of init") from None
    except Exception as error:  # of bytes that are anything, the unpickler raises anything
        reason = str(error).partition("\n")[0]
        raise NetworkError(
            f"{path}: cannot be read as weights alone ({type(error).__name__}: {reason}); save the network's "
            "state_dict, which holds tensors and nothing that runs"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        holds = _some([str(key) for key in content]) if isinstance(content, Mapping) else type(content).__name__
        raise NetworkError(f"{path}: expected tensors by name, found {holds}; save the network's state_dict by itself")
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    # A checkpoint knows how networks are made, and so comes after this module.
    from segkd.pipeline.student.checkpoint import EMA, METADATA_KEY, MODEL, part

    with safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping: it only has keys()
        is_checkpoint = METADATA_KEY in (file.metadata() or {})
    return (part(tensors, EMA) or part(tensors, MODEL)) if is_checkpoint else tensors
