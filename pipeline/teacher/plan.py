"""``segkd plan``: what a cache will take in bytes, coding error and time, and whether the teacher is ready for it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.sample import Role
from segkd.pipeline.sizes import format_bytes
from segkd.pipeline.teacher import checks
from segkd.pipeline.teacher.budget import resolve_budget
from segkd.pipeline.teacher.opened import Opened, open_run
from segkd.pipeline.teacher.trial import TRIED, Trials, input_pixels
from segkd.pipeline.teacher.volume import Volume, exact_share, foretell
from segkd.storage.layout import UNIT_BYTES, Plan

TRIAL_SECONDS = 45.0
"""About so long the trial runs once the teacher is warm; it has two units at least."""
CHECK_SECONDS = 20.0
"""About so long each check of the teacher takes, two images at least."""
CHECKED = 8
"""Most images that each of them takes."""
UNIT_SECONDS = (30.0, 180.0)
"""A unit that takes less makes more files than it need, one that takes more loses more with an interruption."""
PROPOSED_SECONDS = 90.0
IGNORED_CELLS_TOLD = 0.01
"""Share of the cells in which the teacher's answer is mostly ignored from which on there is a warning."""
ROUNDING = 1e-6
"""Nats that two answers of float32 networks differ by though they are the same."""


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What ``segkd plan`` says."""

    path: str
    roles: dict[str, int]
    sampled: int
    """Samples that the figures rest on."""
    max_kl: float
    budget: str
    volume: Volume
    report: dict[str, dict[str, float]]
    """The coding report to be expected: per target the mean of each measure."""
    exact: dict[str, float]
    """Per target the share of the samples that no rung serves."""
    seconds: float
    """Time of stage 1 on a machine that does nothing else."""
    parts: dict[str, float]
    """Seconds an image of each part; decode, in ``decoders`` threads, and write run beside infer and code."""
    units: int
    unit_samples: int
    unit_seconds: float
    """What an interruption costs at most."""
    proposed_unit_samples: int | None
    """None where ``unit_samples`` does well."""
    free: int
    """Bytes free where the cache goes."""
    pays_after_steps: float
    """Steps of the run's student after which stage 1 has taken no longer than a teacher that runs in every step."""
    pays_after_epochs: float
    """The same in passes over the samples that it trains on."""
    disagreement: dict[str, float | None]
    """The teacher against itself, see :func:`segkd.pipeline.teacher.checks.self_disagreement`."""
    ignored_cells: float
    """Where its answer is mostly ignored, see :func:`segkd.pipeline.teacher.checks.ignored_cells`."""
    fit: checks.Fit | None
    """The teacher on labelled images; None where there are none of role select or train."""
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against caching this teacher: no other description of it does clearly better."""
        return self.fit is None or self.fit.suspect is None

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "fit": None if self.fit is None else self.fit.to_dict(), "ok": self.ok}

    def lines(self) -> list[str]:
        """For people."""
        samples = sum(self.roles.values())
        roles = ", ".join(f"{count:,} {role}" for role, count in self.roles.items())
        a_sample = self.volume.bytes / samples
        share = ", ".join(
            f"{name} {format_bytes(size / samples)}" for name, size in self.volume.targets.items() if size
        )
        steps = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in self.parts.items())
        lines = [
            f"{self.path}: {roles}; foretold from {self.sampled:,} samples",
            f"  size      {format_bytes(self.volume.bytes)} (± {self.volume.uncertainty:.1%}), "
            f"{a_sample:,.0f} bytes a sample ({share}); {self.volume.files:,} files; {format_bytes(self.free)} free",
            f"  time      {duration(self.seconds)}, {samples / self.seconds:,.2f} images/s; ms an image: {steps}",
            f"  bound     max_kl {self.max_kl:.3g}"
            + (f", the tightest that fits {self.budget}" if self.budget else ""),
        ]
        for target, measures in self.report.items():
            means = ", ".join(f"{name} {value:.2e}" for name, value in measures.items())
            exact = f"; {self.exact[target]:.1%} of the samples kept exact" if self.exact[target] else ""
            lines.append(f"  error     {target}: {means}{exact}")
        lines.append(
            f"  units     {self.units:,} of {self.unit_samples:,} samples; an interruption costs at most "
            f"{duration(self.unit_seconds)}"
            + ("" if self.proposed_unit_samples is None else f"; try cache.unit_samples={self.proposed_unit_samples}")
        )
        lines.append(
            f"  pays      after {self.pays_after_steps:,.0f} training steps ({self.pays_after_epochs:,.1f} epochs), "
            "against running the teacher in each of them"
        )
        told = ", ".join(
            f"{view} {'n/a' if nats is None else f'{nats:.3g}'}" for view, nats in self.disagreement.items()
        )
        lines.append(f"  teacher   disagrees with itself by (nats) {told}")
        if self.fit is not None:
            lines += _fit_lines(self.fit)
        return [*lines, *(f"Warning: {warning}" for warning in self.warnings)]


def plan(run: RunConfig, *, samples: int = TRIED) -> Foretold:
    """Foretells the cache that ``run`` describes from at most ``samples`` of its samples, and checks its teacher.

    Nothing is written at the cache's place. Raises what stage 1 raises, and ConfigError for a budget that is too small.
    """
    opened = open_run(run)
    config = resolve_budget(run, opened).cache
    tried = Trials(opened, samples).run(config, seconds=TRIAL_SECONDS)
    units = opened.units(opened.planned)
    volume = foretell(opened, units, tried)
    an_image = tried.seconds / tried.timed_pixels * _input_pixels(opened) / len(opened.planned)
    seconds = an_image * len(opened.planned)
    steps, epochs = _break_even(run, opened, units.spec.roles, seconds, tried.parts["infer"] / tried.timed_pixels)
    disagreement, ignored, fit = _checked(opened, tried.parts["infer"] / tried.timed)
    free = shutil.disk_usage(_nearest(Path(config.path))).free
    unit_samples = len(opened.planned) / len(units.units)
    return Foretold(
        path=config.path,
        roles=dict(units.spec.roles),
        sampled=tried.samples,
        max_kl=config.max_kl,
        budget=run.cache.budget,
        volume=volume,
        report={
            target: {name: measure.mean for name, measure in measures.items()}
            for target, measures in tried.statistics.measures.items()
        },
        exact={target: exact_share(tried, target) for target in opened.spec.targets},
        seconds=seconds,
        parts={part: spent / tried.timed for part, spent in tried.parts.items()},
        units=len(units.units),
        unit_samples=config.unit_samples,
        unit_seconds=an_image * min(unit_samples, config.unit_samples),
        proposed_unit_samples=_proposed(opened, units, an_image),
        free=free,
        pays_after_steps=steps,
        pays_after_epochs=epochs,
        disagreement=disagreement,
        ignored_cells=ignored,
        fit=fit,
        warnings=(
            *_warnings(run, volume, free, disagreement, fit),
            *_ignored_warnings(opened, ignored),
        ),
    )


def duration(seconds: float) -> str:
    """Seconds as people read them: ``2 h 05 min``."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60:02} min"


def _input_pixels(opened: Opened) -> int:
    return sum(input_pixels(opened.predictor, sample.image_size) for sample in opened.planned)


def _proposed(opened: Opened, plan: Plan, an_image: float) -> int | None:
    """Samples of a unit that takes a minute or two, unless the units there are do well."""
    low, high = UNIT_SECONDS
    now = len(plan.samples) / len(plan.units) * an_image
    cells = sum(math.prod(sample.mapping.shape) for sample in plan.samples) / len(plan.samples)
    # No unit has more codes, and enough units are left to share the work out.
    most = min(UNIT_BYTES / (cells * opened.spec.cell_bytes), len(plan.samples) / 8)
    proposed = max(min(round(PROPOSED_SECONDS / an_image), int(most)), 1)
    proposed -= proposed % opened.config.batch if proposed > opened.config.batch else 0
    better = proposed >= 2 * plan.spec.unit_samples if now < low else 2 * proposed <= plan.spec.unit_samples
    return proposed if not low <= now <= high and better else None


def _break_even(
    run: RunConfig, opened: Opened, roles: Mapping[str, int], seconds: float, teacher_pixel: float
) -> tuple[float, float]:
    """Steps and epochs of the run's student in which a teacher that looks at every crop takes as long as stage 1."""
    images = run.train.labelled + run.train.auxiliary
    steps = seconds / (teacher_pixel * input_pixels(opened.predictor, run.augment.crop) * images)
    return steps, steps * images / max(roles.get(Role.TRAIN, 0) + roles.get(Role.AUXILIARY, 0), 1)


def _checked(opened: Opened, an_image: float) -> tuple[dict[str, float | None], float, checks.Fit | None]:
    """The checks of the teacher, on as many images as their time allows."""
    # The four views take as much as seven images, the other descriptions at most four.
    count = max(min(int(CHECK_SECONDS / (8 * an_image + 1e-9)), CHECKED), 2)
    images = [(sample.id, opened.data.image(opened.samples[sample.id])) for sample in _every(opened.planned, count)]
    disagreement = checks.self_disagreement(opened.predictor, images)
    ignored = checks.ignored_cells(opened.predictor, images)
    labelled = checks.labelled_samples(opened.data)
    if not labelled:
        return disagreement, ignored, None
    return disagreement, ignored, checks.fit(opened.predictor, opened.data, _every(labelled, count))


def _every(samples: Sequence[Any], count: int) -> list[Any]:
    count = min(count, len(samples))
    return [samples[(2 * k + 1) * len(samples) // (2 * count)] for k in range(count)]


def _nearest(path: Path) -> Path:
    """The innermost folder of a path that is there."""
    return next(folder for folder in (path, *path.resolve().parents) if folder.is_dir())


def _warnings(
    run: RunConfig, volume: Volume, free: int, disagreement: Mapping[str, float | None], fit: checks.Fit | None
) -> list[str]:
    warnings = []
    there = sum(file.stat().st_size for file in Path(run.cache.path).rglob("*") if file.is_file())
    needed = round(volume.bytes * (1 + volume.uncertainty)) - there
    if needed > free:
        warnings.append(
            f"{run.cache.path} needs {format_bytes(needed)}, {format_bytes(free)} are free there; free some space, "
            f"name another cache.path, or keep to a size: --budget {format_bytes(0.9 * free).replace(' ', '')}"
        )
    # A teacher that says the same by construction, but for rounding, tells nothing of its noise.
    least = min((nats for nats in disagreement.values() if nats is not None and nats > ROUNDING), default=math.inf)
    if fit is not None and fit.suspect is not None:
        warnings.append(
            f"the teacher has {_figure(fit.suspect.miou, '.1f')} mIoU with {fit.suspect.setting}, and "
            f"{_figure(fit.miou, '.1f')} as described, on {fit.samples} images; correct [teacher] before caching it"
        )
    elif fit is not None and (fit.miou or 0.0) <= fit.constant:
        warnings.append(
            f"the teacher has {_figure(fit.miou, '.1f')} mIoU, no more than always answering the most frequent class "
            f"({fit.constant:.1f}); check its weights, and whether its classes are those of the labels"
        )
    # Of a teacher that is fed wrongly, or knows nothing, it would lead astray.
    elif run.cache.max_kl > least / 10 and not run.cache.budget:
        warnings.append(
            f"max_kl {run.cache.max_kl:.3g} is over a tenth of the teacher's disagreement with itself, {least:.3g}; "
            f"set cache.max_kl to at most {least / 10:.1g}"
        )
    return warnings


def _ignored_warnings(opened: Opened, share: float) -> list[str]:
    if share < IGNORED_CELLS_TOLD:
        return []
    names = opened.predictor.config.classes or opened.predictor.classes
    ignored = ", ".join(dict.fromkeys(names[channel] for channel in opened.predictor.ignored))
    return [
        f"in {share:.1%} of the cells that were looked at the teacher gives more than half of its probability to what "
        f"teacher.class_map ignores ({ignored}); the cache holds the rest, scaled up to 1: make it a class of the data "
        "or leave out images that show little else; of role train, data.label_values can exclude such pixels"
    ]


def _fit_lines(fit: checks.Fit) -> list[str]:
    lines = [f"  labels    {_figure(fit.miou, '.2f')} mIoU on {fit.samples} images as described; with"]
    return lines + [f"            {_figure(variant.miou, '.2f'):>6} {variant.setting}" for variant in fit.variants]


def _figure(value: float | None, form: str) -> str:
    return "n/a" if value is None else f"{value:{form}}"
