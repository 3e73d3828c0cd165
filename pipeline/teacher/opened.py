"""What stage 1 begins with: a run's data and teacher, opened, and the specification of the cache that they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import DataSource, Sample, with_role
from segkd.pipeline.device import find_device
from segkd.pipeline.models.predictor import Predictor, no_cell
from segkd.pipeline.models.references import described_predictor
from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.fingerprints import fingerprints, kept_description
from segkd.pipeline.teacher.loop import Stage1
from segkd.pipeline.teacher.targets import TARGETS
from segkd.storage.errors import DataError
from segkd.storage.generation import tile_of
from segkd.storage.layout import Plan, PlannedSample, plan_units, usual_tile
from segkd.storage.spec import CacheSpec, TargetSpec


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run's data and teacher, opened: all that stage 1 begins with."""

    config: CacheConfig
    data: DataSource
    samples: dict[str, Sample]
    """The samples to cache, by id."""
    predictor: Predictor
    planned: list[PlannedSample]
    """The same samples with their sizes and grids."""
    spec: CacheSpec

    def units(self, samples: Sequence[PlannedSample]) -> Plan:
        """The units of these samples, all of them or the newly added ones."""
        return plan_units(
            samples,
            unit_samples=self.config.unit_samples,
            tile=self.spec.tile,
            cell_bytes=self.spec.cell_bytes,
        )

    def stage(self, plan: Plan) -> Stage1:
        """Stage 1 over a plan of these samples."""
        return Stage1(
            data=self.data,
            samples=self.samples,
            predictor=self.predictor,
            spec=self.spec,
            plan=plan,
            batch=self.config.batch,
            decoders=self.config.decoders,
        )


def open_run(run: RunConfig) -> Opened:
    """Opens what stage 1 needs; image headers are read, no image is. Raises ConfigError, DataError, NetworkError."""
    config = run.cache
    data = open_data(run.data)
    samples = with_role(data, *config.roles)
    if not samples:
        raise DataError(f"the data has no sample of role {', '.join(config.roles)}; check cache.roles and the lists")
    predictor = described_predictor(
        run.the_teacher(), data.classes.names, device=find_device(config.device), precision=config.precision
    )
    planned = plan_samples(data, samples, predictor, threads=config.decoders)
    # What a cache was begun with stays, whatever its list has become.
    tile = config.tile or tile_of(Path(config.path), usual_tile(planned))
    targets = target_specs(config, len(data.classes), tile)
    spec = CacheSpec(
        classes=data.classes.names,
        targets=targets,
        tile=tile,
        fingerprints=fingerprints(predictor, data.classes, targets.values()),
        teacher=kept_description(predictor),
    )
    return Opened(
        config=config,
        data=data,
        samples={sample.id: sample for sample in samples},
        predictor=predictor,
        planned=planned,
        spec=spec,
    )


def target_specs(config: CacheConfig, classes: int, tile: int) -> dict[str, TargetSpec]:
    """What the cache says about each of the targets that ``config`` names."""
    return {name: TARGETS[name]().spec(config, classes, tile) for name in config.targets}


def plan_samples(
    data: DataSource, samples: Sequence[Sample], predictor: Predictor, *, threads: int
) -> list[PlannedSample]:
    """Size and grid of every sample, from the images' headers. Raises DataError for an unreadable one."""
    with ThreadPoolExecutor(threads) as executor:
        sizes = list(executor.map(data.size, samples))
    # Most data sets have few sizes.
    blind = {size: predictor.blind_scale(*size) for size in set(sizes)}
    for sample, size in zip(samples, sizes, strict=True):
        if (scale := blind[size]) is not None:
            raise DataError(no_cell(sample.id, size, scale))
    return [
        PlannedSample(id=sample.id, role=sample.role, image_size=size, mapping=predictor.mapping(*size))
        for sample, size in zip(samples, sizes, strict=True)
    ]
