"""The tightest bound on the coding error whose cache fits a number of bytes."""

from __future__ import annotations

import bisect
import functools
import logging
import sys
from dataclasses import replace
from pathlib import Path

from segkd.pipeline.config import RunConfig
from segkd.pipeline.sizes import format_bytes, parse_bytes
from segkd.pipeline.teacher.opened import Opened, open_run
from segkd.pipeline.teacher.trial import TRIED, Trials
from segkd.pipeline.teacher.volume import foretell
from segkd.storage.errors import CacheError, CacheMismatchError, ConfigError
from segkd.storage.generation import METADATA, read_spec

logger = logging.getLogger(__name__)

STEPS = 20
"""Bounds that are tried to a decade: between two of them lie about 2 % of the bytes."""
BOUNDS = tuple(10 ** (-6 + k / STEPS) for k in range(5 * STEPS + 1))
"""From next to nothing to 0.1 nats, which is as much as teachers disagree with themselves at another scale."""


def resolve_budget(run: RunConfig, opened: Opened | None = None) -> RunConfig:
    """The run with the bound that its budget leads to, and no budget; a run without one is returned as it is.

    The bound is a pure function of the run, so every task finds the same one; a cache that stands already has decided
    it. ``opened``: this run, where it is open already. Raises ConfigError for a budget that no bound fits,
    CacheMismatchError for a cache that stands without a target whose bound it finds.
    """
    config = run.cache
    if not config.budget:
        return run
    if "soft" not in config.targets:
        raise ConfigError('cache.budget needs the target "soft", whose bound it finds; add it, or remove the budget')
    if config.profile == "exact":
        raise ConfigError(
            'cache.budget has no bound to find where profile = "exact"; take another profile, or no budget'
        )
    if (Path(config.path) / METADATA).exists():
        standing = read_spec(Path(config.path)).targets
        if "soft" not in standing:
            raise CacheMismatchError(
                f'{config.path} keeps {", ".join(standing)} and no target "soft", whose bound a budget finds; '
                "give this run another cache.path, or remove the old cache"
            )
        bound = standing["soft"].bound
        logger.info("%s stands with max_kl %.3g, which the budget leaves as it is", config.path, bound)
    else:
        bound = _tightest(run, Trials(opened or open_run(run), TRIED, remember=True))
        logger.info("max_kl %.3g is the tightest bound that fits %s", bound, config.budget)
    return replace(run, cache=replace(config, max_kl=bound, budget=""))


def _tightest(run: RunConfig, trials: Trials) -> float:
    limit, opened = parse_bytes(run.cache.budget), trials.opened
    units = opened.units(opened.planned)

    @functools.cache
    def needed(number: int) -> int:
        """Bytes to allow for at one of the bounds: what is foretold, and how far off that may be."""
        try:
            tried = trials.run(replace(run.cache, max_kl=BOUNDS[number], budget=""))
        except CacheError as error:
            # A sample that no rung serves is not to be kept exactly; not even here, where the bound is loosest.
            if number == len(BOUNDS) - 1:
                raise
            logger.debug("max_kl %.3g cannot be kept: %s", BOUNDS[number], error)
            return sys.maxsize
        volume = foretell(opened, units, tried)
        logger.debug("max_kl %.3g takes %s", BOUNDS[number], format_bytes(volume.bytes))
        return round(volume.bytes * (1 + volume.uncertainty))

    if needed(len(BOUNDS) - 1) > limit:
        raise ConfigError(
            f"cache.budget = {run.cache.budget} is too small: with max_kl {BOUNDS[-1]:g}, the loosest bound that is of "
            f"use, this cache takes {format_bytes(needed(len(BOUNDS) - 1))}; give more, or leave out samples or targets"
        )
    # Bytes fall as the bound grows.
    return BOUNDS[bisect.bisect_left(range(len(BOUNDS)), True, key=lambda number: needed(number) <= limit)]
