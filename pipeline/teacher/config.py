"""What stage 1 keeps, how faithfully, and in which portions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from segkd.pipeline.data.sample import Role
from segkd.pipeline.sizes import parse_bytes
from segkd.storage.errors import ConfigError

TargetName = Literal["soft", "first_order", "first_order_logits"]

LEAST_FIRST_ORDER_ERROR = 0.003
"""What 8 bits hold of the first-order map of the softmax, whose values end at sqrt(2)."""
TEMPERATURES = (0.1, 100.0)
"""Temperatures that mean something: beyond them distributions are one class, or all classes alike."""
LARGEST_TILE = 1024
"""Cells that a tile's side may have."""


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
    temperatures: tuple[float, ...] = (1.0,)
    """The temperatures at which max_kl holds: those that training will use."""
    profile: Literal["plain", "dense", "exact"] = "plain"
    """How distributions are kept: anyone can read plain; dense is smaller and slower; exact is float16, and large."""
    beyond: Literal["exact", "stop"] = "exact"
    """What becomes of a sample that cannot be kept within max_kl: it is kept in float16, or stage 1 stops."""
    max_first_order_error: float = 1 / 256
    """The largest absolute error of the first-order map (of the softmax) that writing may cost a cell."""
    tile: int = 0
    """Side of a tile in cells: what a window read fetches at least. 0: as suits the grids that a cache begins with."""
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
        if not 0 < self.max_kl < math.inf:
            raise ConfigError(f"max_kl must be positive, got {self.max_kl}")
        if not self.temperatures or not all(TEMPERATURES[0] <= t <= TEMPERATURES[1] for t in self.temperatures):
            low, high = TEMPERATURES
            raise ConfigError(f"temperatures must lie between {low:g} and {high:g}, got {list(self.temperatures)}")
        if len({f"{t:g}" for t in self.temperatures}) < len(self.temperatures):
            raise ConfigError(f"temperatures must differ, got {list(self.temperatures)}")
        if not LEAST_FIRST_ORDER_ERROR <= self.max_first_order_error < math.inf:
            raise ConfigError(
                f"max_first_order_error must be at least {LEAST_FIRST_ORDER_ERROR}, which takes all 255 steps, "
                f"got {self.max_first_order_error:g}"
            )
        if self.budget:
            parse_bytes(self.budget)
            if self.max_kl != CacheConfig.max_kl:
                raise ConfigError(
                    f"max_kl = {self.max_kl:g} and budget = {self.budget!r} both bound the error; keep one"
                )
        for name in ("unit_samples", "batch", "decoders"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.tile <= LARGEST_TILE:
            raise ConfigError(
                f"tile must be 1 to {LARGEST_TILE} cells, or 0 for a side that suits the samples, got {self.tile}"
            )
