"""What stage 1 keeps, how faithfully, and in which portions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from segkd.pipeline.data.sample import Role
from segkd.pipeline.sizes import parse_bytes
from segkd.storage.errors import ConfigError

TargetName = Literal["soft", "first_order", "first_order_logits"]


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The cache of one teacher over one list of samples."""

    path: str = "cache.zarr"
    """The folder of the cache."""
    roles: tuple[Role, ...] = (Role.TRAIN, Role.AUXILIARY, Role.REPORT)
    """Whose samples the teacher sees. Roles stay apart: training never reads those of select and report."""
    targets: tuple[TargetName, ...] = ("soft", "first_order")
    """Which maps are kept: class distributions, the first-order map of the softmax, that of the logits."""
    max_kl: float = 1e-3
    """Nats that writing may cost: the mean KL(teacher || kept) of each sample, over its cells and over its pixels."""
    budget: str = ""
    """Bytes that the cache may take, such as "200GB" or "1.5TiB", in place of max_kl: the tightest bound that fits."""
    levels: tuple[int, ...] = (255,)
    """The ladder of levels for the square root of the probability; each sample takes the first that keeps max_kl."""
    tile: int = 64
    """Side of a tile in cells: what a window read fetches at least."""
    unit_samples: int = 64
    """Samples of a unit: what an interruption costs at most."""
    batch: int = 8
    """Images that the teacher sees at once; halved when its device runs out of memory."""
    precision: Literal["off", "bf16", "fp16"] = "off"
    """The teacher's mixed precision."""
    device: str = "auto"
    """Where the teacher runs: auto, cpu, cuda, cuda:1."""
    decoders: int = 2
    """Threads that decode images."""

    def __post_init__(self) -> None:
        if not self.roles or not self.targets:
            raise ConfigError("roles and targets must each name at least one")
        if self.max_kl <= 0:
            raise ConfigError(f"max_kl must be positive, got {self.max_kl}")
        if self.budget:
            parse_bytes(self.budget)
            if self.max_kl != CacheConfig.max_kl:
                raise ConfigError(
                    f"max_kl = {self.max_kl:g} and budget = {self.budget!r} both bound the error; keep one"
                )
        for name in ("tile", "unit_samples", "batch", "decoders"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
