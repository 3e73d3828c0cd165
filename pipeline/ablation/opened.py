"""What the runs of a sweep read, opened once for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from segkd.pipeline.ablation.arms import Arm
from segkd.pipeline.ablation.identity import Held, identity_of, read_held
from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import DataSource, Role, with_role
from segkd.pipeline.progress import Progress
from segkd.pipeline.settings import to_dict
from segkd.pipeline.student.live import open_live_teacher
from segkd.pipeline.teacher.named import require_named_teacher
from segkd.storage.differences import difference
from segkd.storage.errors import ConfigError
from segkd.storage.reader import CacheReader
from segkd.storage.spec import CacheSpec


class Opened:
    """Data sets and caches of a sweep, each opened once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._data: dict[str, tuple[DataSource, Held]] = {}
        self._fingerprints: dict[str, Mapping[str, str]] = {}

    def data(self, run: RunConfig) -> tuple[DataSource, Held]:
        """The run's data set and what its samples hold."""
        key = json.dumps(to_dict(run.data), sort_keys=True)
        if key not in self._data:
            source = open_data(run.data)
            self._data[key] = source, read_held(source, self._progress)
        return self._data[key]

    def marked(self, arm: Arm, base: RunConfig) -> Arm:
        """The arm, with what its samples have otherwise than the run file's among what is not matched.

        Raises ConfigError for an arm that reports on other samples.
        """
        drawn = [Role.TRAIN, *([Role.AUXILIARY] if arm.run.train.auxiliary else [])]
        (before, held_before), (after, held_after) = self.data(base), self.data(arm.run)
        others = [
            role for role in (*drawn, Role.REPORT) if held_before.digest(before, role) != held_after.digest(after, role)
        ]
        if Role.REPORT in others:
            raise ConfigError(
                f"arm {arm.name} reports on other samples than the run file, so nothing compares with it; "
                "leave role report as it is"
            )
        marks = (
            difference(f"samples of role {role}", len(with_role(before, role)), len(with_role(after, role)))
            for role in others
        )
        return replace(arm, unmatched=(*arm.unmatched, *marks))

    def identity(self, arm: Arm, run: RunConfig) -> dict[str, Any]:
        """Of a run of the arm."""
        source, held = self.data(run)
        fingerprints = self._teacher(run, source) if arm.distills else {}
        return identity_of(arm, run, source, held, fingerprints)

    def _teacher(self, run: RunConfig, source: DataSource) -> Mapping[str, str]:
        """Fingerprints of what the run is taught by: its cache, or the teacher itself."""
        cached = run.train.teacher_view == "cache"
        key = run.cache.path if cached else json.dumps([to_dict(run.the_teacher()), run.cache.precision])
        if key not in self._fingerprints:
            opened = _cache_of(run) if cached else open_live_teacher(run, source.classes, ())
            self._fingerprints[key] = opened.fingerprints
        return self._fingerprints[key]


def _cache_of(run: RunConfig) -> CacheSpec:
    cache = CacheReader(run.cache.path)
    require_named_teacher(cache.spec, run.teacher, cache.path)
    return cache.spec
