"""From records to the rows of a table and to gains: paired differences of two arms that differ in one thing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from segkd.pipeline.ablation.arms import Arm, views
from segkd.pipeline.ablation.config import AblateConfig
from segkd.pipeline.ablation.ledger import RunRecord
from segkd.pipeline.ablation.statistics import Floats, Interval, Mean, Verdict, bootstrap, mean_of, paired_t, tallies
from segkd.pipeline.config import RunConfig

Records = Mapping[str, Mapping[int, RunRecord]]
"""By arm and seed."""

METRICS = ("miou", "macc", "aacc", "boundary_miou")

PAIRS: tuple[tuple[str, str, str], ...] = (
    ("zero", "alone", "zero-order knowledge"),
    ("first", "alone", "first-order knowledge"),
    ("zero-first", "zero", "first-order knowledge, beside zero-order"),
    ("auxiliary-zero", "zero", "auxiliary images in place of labelled ones"),
    ("auxiliary-zero-first", "zero-first", "auxiliary images in place of labelled ones, with first-order"),
    ("auxiliary-zero-first", "auxiliary-zero", "first-order knowledge, with auxiliary images"),
    ("auxiliary-zero", "pseudo-labels", "the teacher's distributions in place of its argmax"),
    ("alone-augmented", "alone", "the auxiliary arms' photometric strength"),
    ("alone-longer", "alone", "the time of distillation, spent on training"),
    ("label-smoothing", "alone", "label smoothing"),
    ("auxiliary-zero", "alone", "distillation with zero-order knowledge alone"),
    ("auxiliary-zero-first", "alone", "distillation as a whole"),
    ("auxiliary-zero-first", "alone-longer", "distillation as a whole, at its own cost in time"),
)
"""Later arm, earlier arm, what they differ in; see :func:`_in_full`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An arm over its seeds."""

    arm: str
    seeds: tuple[int, ...]
    metrics: dict[str, Mean | None]
    """Of each of :data:`METRICS` on role report, in percent; None where a seed has none."""
    select_miou: Mean | None
    miou_by_seed: tuple[float | None, ...]
    """On role report, a seed each."""
    select_miou_by_seed: tuple[float | None, ...]
    steps: int
    labelled: int
    """Labelled images seen, counted each time; of one run."""
    auxiliary: int
    parameters: int
    flops: int
    shape: tuple[int, int]
    latency_ms: float
    """Median over the seeds of the median over the passes."""
    seconds: float
    """Of training, mean over the seeds."""
    damaged: int
    """The most samples that a seed had to learn without, because the cache was damaged."""
    collapsed: tuple[int, ...]
    """Seeds whose network predicts one class alone on role report."""
    unmatched: tuple[str, ...]
    """What is not at matched compute."""
    settings: tuple[str, ...]
    gap_closed: float | None
    """Share of the gap between "alone" and the upper bound, at the seeds that all three have; None without any."""
    gap_seeds: int
    """How many these are."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A paired difference in mIoU, on role report but where select is named."""

    later: str
    earlier: str
    what: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    """A seed each."""
    mean: float
    over_seeds: Interval | None
    seeds_verdict: Verdict
    over_images: Interval | None
    images_verdict: Verdict
    select_mean: float | None
    """On role select: whether other images agree. None where a run has no score there."""
    select_over_seeds: Interval | None
    matched: bool
    """Whether both arms are at matched compute."""


def rows(arms: Mapping[str, Arm], records: Records, config: AblateConfig) -> list[Row]:
    """A row for each arm that has a record."""
    return [_row(arm, records, config.upper) for arm in arms.values() if records.get(arm.name)]


def gains(arms: Mapping[str, Arm], records: Records, config: AblateConfig) -> list[Gain]:
    """The gains of the pairs of which both arms have a seed in common: built-in arms', own arms' over their ``like``,
    and last those of a teacher beside the student.
    """
    of_views = list(views(arms))
    compared = {frozenset(pair[:2]) for pair in of_views}
    own = [
        (arm.name, arm.like, "its own settings")
        for arm in arms.values()
        if arm.like is not None and frozenset((arm.name, arm.like)) not in compared
    ]
    built_in = ((*pair[:2], _in_full(pair, arms, config)) for pair in PAIRS if pair[0] in arms and pair[1] in arms)
    pairs = [pair for pair in (*built_in, *own, *of_views) if pair[0] in arms and pair[1] in arms]
    # Once a record, not once a pair: a data set of many classes has large matrices.
    tallied = {
        arm: {seed: tallies(record.images.counts()) for seed, record in records.get(arm, {}).items()}
        for arm in {arm for later, earlier, _ in pairs for arm in (later, earlier)}
    }
    found = (_gain(pair, arms, records, tallied, config) for pair in pairs)
    return [gain for gain in found if gain is not None]


def _in_full(pair: tuple[str, str, str], arms: Mapping[str, Arm], config: AblateConfig) -> str:
    """What two built-in arms differ in, with what the run file has auxiliary images differ in besides, and with a
    length of training that no time was measured for.
    """
    later, earlier, what = pair
    if config.longer and "alone-longer" in (later, earlier):
        against = f"{config.longer:g} times the steps"
        what = against if later == "alone-longer" else f"distillation as a whole, against {against}"
    beside = list(_of_auxiliary(arms[later].run, arms[earlier].run))
    return f"{what} ({', '.join(beside)})" if beside else what


def _of_auxiliary(later: RunConfig, earlier: RunConfig) -> Iterator[str]:
    """What the auxiliary images of the later run have otherwise than labelled ones, where the earlier has none."""
    augment, train = later.augment, later.train
    if not train.auxiliary or earlier.train.auxiliary:
        return
    strength, labelled = augment.auxiliary_photometric, earlier.augment.photometric
    if strength != labelled:
        yield f"auxiliary photometric strength {strength:g}, labelled {labelled:g}"
    if augment.cutmix:
        yield f"CutMix {augment.cutmix:g}"
    if train.batch_norm not in ("joint", "frozen"):
        yield f"batch norm {train.batch_norm}"
    if train.least_confidence:
        yield f"confidence of at least {train.least_confidence:g}"
    if train.most_entropy < math.inf:
        yield f"entropy of at most {train.most_entropy:g}"


def _row(arm: Arm, records: Records, upper: str) -> Row:
    by_seed = dict(sorted(records[arm.name].items()))
    in_common = set.intersection(*(set(records.get(name, {})) for name in (arm.name, "alone", upper)))
    runs = list(by_seed.values())
    first = runs[0]
    return Row(
        arm=arm.name,
        seeds=tuple(by_seed),
        metrics={metric: _mean([run.report[metric] for run in runs]) for metric in METRICS},
        select_miou=_mean([_select(run) for run in runs]),
        miou_by_seed=tuple(run.report["miou"] for run in runs),
        select_miou_by_seed=tuple(_select(run) for run in runs),
        steps=first.steps,
        labelled=first.seen.labelled,
        auxiliary=first.seen.auxiliary,
        parameters=first.cost["parameters"],
        flops=first.cost["flops"],
        shape=(first.cost["shape"][0], first.cost["shape"][1]),
        latency_ms=float(np.median([run.cost["latency"]["p50_ms"] for run in runs])),
        seconds=float(np.mean([run.seconds for run in runs])),
        damaged=max(run.damaged for run in runs),
        collapsed=tuple(seed for seed, run in by_seed.items() if _predicts_one_class(run)),
        unmatched=arm.unmatched,
        settings=arm.settings,
        gap_closed=_gap_closed(arm.name, records, upper, sorted(in_common)),
        gap_seeds=len(in_common),
    )


def _select(run: RunRecord) -> float | None:
    """mIoU on role select."""
    return None if run.select is None else run.select["miou"]


def _predicts_one_class(run: RunRecord) -> bool:
    counts = run.images.counts()
    return len(run.images.classes) > 1 and int(np.count_nonzero(counts.any(axis=(0, 1)))) == 1


def _mean(values: Sequence[float | None]) -> Mean | None:
    present = [value for value in values if value is not None]
    return mean_of(present) if len(present) == len(values) else None


def _gap_closed(arm: str, records: Records, upper: str, seeds: Sequence[int]) -> float | None:
    """``(arm - alone) / (upper - alone)`` of means over ``seeds``, which all three have; None for no gap to close."""
    scores = [[records[name][seed].report["miou"] for seed in seeds] for name in (arm, "alone", upper) if seeds]
    if not seeds or any(None in of_arm for of_arm in scores):
        return None
    reached, alone, most = map(float, np.mean(scores, 1))
    return (reached - alone) / (most - alone) if most > alone else None


def _gain(
    pair: tuple[str, str, str],
    arms: Mapping[str, Arm],
    records: Records,
    tallied: Mapping[str, Mapping[int, Floats]],
    config: AblateConfig,
) -> Gain | None:
    later, earlier, what = pair
    seeds = sorted(records.get(later, {}).keys() & records.get(earlier, {}).keys())
    both = [(records[later][seed], records[earlier][seed]) for seed in seeds]
    differences = _differences([(after.report["miou"], before.report["miou"]) for after, before in both])
    if not differences:
        return None
    select = _differences([(_select(after), _select(before)) for after, before in both])
    over_seeds = paired_t(differences)
    over_images = bootstrap(
        [tallied[later][seed] for seed in seeds],
        [tallied[earlier][seed] for seed in seeds],
        both[0][0].images.groups,
        block=config.block,
        resamples=config.resamples,
    )
    return Gain(
        later=later,
        earlier=earlier,
        what=what,
        seeds=tuple(seeds),
        differences=tuple(differences),
        mean=mean_of(differences).mean,
        over_seeds=over_seeds,
        seeds_verdict=_verdict(over_seeds, config.margin),
        over_images=over_images,
        images_verdict=_verdict(over_images, config.margin),
        select_mean=mean_of(select).mean if select else None,
        select_over_seeds=paired_t(select),
        matched=not (arms[later].unmatched or arms[earlier].unmatched),
    )


def _differences(scores: Sequence[tuple[float | None, float | None]]) -> list[float]:
    """Later minus earlier, a seed each; none at all where a seed has no score."""
    present = [after - before for after, before in scores if after is not None and before is not None]
    return present if len(present) == len(scores) else []


def _verdict(interval: Interval | None, margin: float) -> Verdict:
    return "undecided" if interval is None else interval.verdict(margin)
