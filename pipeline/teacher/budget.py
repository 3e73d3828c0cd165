"""The tightest bound on the coding error whose cache fits a number of bytes."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from segkd.pipeline.config import RunConfig
from segkd.pipeline.sizes import format_bytes, parse_bytes
from segkd.pipeline.teacher.opened import Opened, open_run
from segkd.pipeline.teacher.trial import TRIED, Trials
from segkd.pipeline.teacher.volume import foretell
from segkd.storage.errors import ConfigError
from segkd.storage.generation import METADATA, read_spec
from segkd.storage.layout import Plan, plan_units

logger = logging.getLogger(__name__)

STEPS = 20
"""Bounds that are tried to a decade: between two of them lie about 2 % of the bytes."""
BOUNDS = tuple(10 ** (-6 + k / STEPS) for k in range(5 * STEPS + 1))
"""From next to nothing to 0.1 nats, which is as much as teachers disagree with themselves at another scale."""


def resolve_budget(run: RunConfig, opened: Opened | None = None) -> RunConfig:
    """The run with the bound that its budget leads to, and no budget; a run without one is returned as it is.

    The bound is a pure function of the run, so every task finds the same one; a cache that stands already has decided
    it. ``opened``: this run, where it is open already. Raises ConfigError for a budget that no bound fits.
    """
    config = run.cache
    if not config.budget:
        return run
    if "soft" not in config.targets:
        raise ConfigError('cache.budget needs the target "soft", whose bound it finds; add it, or remove the budget')
    if (Path(config.path) / METADATA).exists():
        bound = read_spec(Path(config.path)).targets["soft"].bound
        logger.info("%s stands with max_kl %.3g, which the budget leaves as it is", config.path, bound)
    else:
        bound = _tightest(run, Trials(opened or open_run(run), TRIED))
        logger.info("max_kl %.3g is the tightest bound that fits %s", bound, config.budget)
    return replace(run, cache=replace(config, max_kl=bound, budget=""))


def _tightest(run: RunConfig, trials: Trials) -> float:
    limit, needed = parse_bytes(run.cache.budget), _Needed(run, trials)
    if needed[len(BOUNDS) - 1] > limit:
        raise ConfigError(
            f"cache.budget = {run.cache.budget} is too small: with max_kl {BOUNDS[-1]:g}, the loosest bound that is of "
            f"use, this cache takes {format_bytes(needed[len(BOUNDS) - 1])}; give more, or leave out samples or targets"
        )
    # Bytes fall as the bound grows.
    return BOUNDS[bisect.bisect_left(needed, True, key=lambda size: size <= limit)]


class _Needed(Sequence[int]):
    """Bytes to allow for at each of the bounds, tried when they are asked for."""

    def __init__(self, run: RunConfig, trials: Trials) -> None:
        self._run, self._trials = run, trials
        self._known: dict[int, int] = {}

    def __len__(self) -> int:
        return len(BOUNDS)

    def __getitem__(self, number: int) -> int:  # type: ignore[override]  # nobody slices it
        if number not in self._known:
            config, opened = self._run.cache, self._trials.opened
            tried = self._trials.run(replace(config, max_kl=BOUNDS[number], budget=""))
            volume = foretell(opened, self._plan, tried)
            self._known[number] = round(volume.bytes * (1 + volume.uncertainty))
            logger.debug("max_kl %.3g: %s", BOUNDS[number], format_bytes(self._known[number]))
        return self._known[number]

    @cached_property
    def _plan(self) -> Plan:
        config = self._run.cache
        return plan_units(self._trials.opened.planned, unit_samples=config.unit_samples, tile=config.tile)
