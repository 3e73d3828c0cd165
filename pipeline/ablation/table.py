"""What a sweep has found, as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from segkd.pipeline.ablation.config import AblateConfig
from segkd.pipeline.ablation.gains import Gain, Row
from segkd.pipeline.ablation.ledger import RunRecord
from segkd.pipeline.ablation.statistics import Interval, Mean, blocks_of

MARK = "†"
"""Behind the name of an arm that is not at matched compute."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Rows, gains, and what stands in the way of more."""

    rows: tuple[Row, ...]
    gains: tuple[Gain, ...]
    records: tuple[RunRecord, ...]
    """What they were made from."""
    config: AblateConfig
    stamps: tuple[str, ...]
    failures: Mapping[str, str]
    """Runs of this call that failed, and why."""
    missing: tuple[str, ...]
    """Runs that are not done."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "stamps": list(self.stamps),
            "rows": [asdict(row) for row in self.rows],
            "gains": [asdict(gain) for gain in self.gains],
            "margin": self.config.margin,
            "block": self.config.block,
            "resamples": self.config.resamples,
            "conditions": self._conditions(),
            "failures": dict(self.failures),
            "missing": list(self.missing),
        }

    def markdown(self) -> str:
        """The arms, their scores by seed, their gains, and what must be known to read them."""
        parts = [f"**{stamp}**" for stamp in self.stamps]
        if self.rows:
            parts += ["\n".join(self._arm_table()), "\n".join(self._notes()), "\n".join(self._seed_table())]
        if self.gains:
            parts += ["\n".join(self._gain_table()), self._gain_note()]
        if self.missing:
            parts.append(f"Not done: {len(self.missing)} runs ({'; '.join(_few(self.missing))}).")
        parts += [f"Failed: {job}: {why}" for job, why in self.failures.items()]
        return "\n\n".join(parts)

    def _arm_table(self) -> Iterator[str]:
        upper = bool(self.config.upper)
        seen, cost = ["labelled", "auxiliary", "total seen"], ["parameters", "GFLOPs", "latency"]
        yield from _head(["arm", "seeds", "mIoU", "on select", *seen, *cost, *(["gap closed"] if upper else [])])
        for row in self.rows:
            closed = "n/a" if row.gap_closed is None else f"{100 * row.gap_closed:.0f} %"
            if row.gap_closed is not None and row.gap_seeds < len(row.seeds):
                closed += f" of {row.gap_seeds} seed{'s' if row.gap_seeds > 1 else ''}"
            cells = [
                f"{row.arm}{MARK if row.unmatched else ''}",
                f"{len(row.seeds)}",
                _mean(row.metrics["miou"]),
                _mean(row.select_miou),
                f"{row.labelled:,}",
                f"{row.auxiliary:,}",
                f"{row.labelled + row.auxiliary:,}",
                f"{row.parameters / 1e6:.2f} M",
                f"{row.flops / 1e9:.2f}",
                f"{row.latency_ms:.1f} ms",
            ]
            yield _line([*cells, *([closed] if upper else [])])

    def _seed_table(self) -> Iterator[str]:
        """The scores that means are of, so that pairs can be seen."""
        seeds = sorted({seed for row in self.rows for seed in row.seeds})
        yield from _head(["seed: mIoU on report / on select", *map(str, seeds)])
        for row in self.rows:
            both = zip(row.seeds, row.miou_by_seed, row.select_miou_by_seed, strict=True)
            scores = {seed: f"{_score(report)} / {_score(select)}" for seed, report, select in both}
            yield _line([f"{row.arm}{MARK if row.unmatched else ''}", *(scores.get(seed, "") for seed in seeds)])

    def _gain_table(self) -> Iterator[str]:
        over = ["95 % over seeds", "", "95 % over images", ""]
        yield from _head(["gain", "differs in", "seeds", "mIoU", *over, "on select", "95 % over seeds"])
        for gain in self.gains:
            yield _line(
                [
                    f"{gain.later} − {gain.earlier}{'' if gain.matched else f' {MARK}'}",
                    gain.what,
                    f"{len(gain.seeds)}",
                    f"{gain.mean:+.2f}",
                    _interval(gain.over_seeds),
                    gain.seeds_verdict,
                    _interval(gain.over_images),
                    gain.images_verdict,
                    "n/a" if gain.select_mean is None else f"{gain.select_mean:+.2f}",
                    _interval(gain.select_over_seeds),
                ]
            )

    def _notes(self) -> Iterator[str]:
        """What the rows are of."""
        first = self.rows[0]
        conditions = self._conditions()
        ran = "; ".join(f"{name} {', '.join(values)}" for name, values in conditions.items())
        yield (
            f"mIoU on role report, {len(self.records[0].images.ids):,} images, of the averaged network of the last "
            f"step: mean ± standard deviation over seeds. Images seen are counted each time. FLOPs and latency at "
            f"{first.shape[0]}x{first.shape[1]}, latency beside whatever else ran. Ran on: {ran}."
        )
        for row in self.rows:
            if row.unmatched:
                yield f"{MARK} {row.arm} is not at matched compute: {'; '.join(row.unmatched)}."
            if row.collapsed:
                seeds = ", ".join(map(str, row.collapsed))
                yield f"{row.arm}, seed {seeds}: predicts one class alone, so that no gain of it counts."
            if row.damaged:
                yield f"{row.arm}: up to {row.damaged} samples without the teacher's knowledge: the cache is damaged."

    def _gain_note(self) -> str:
        groups = self.records[0].images.groups
        blocks = blocks_of(groups, self.config.block)
        return (
            "Differences are paired by seed. Over seeds: Student's t. Over images: a bootstrap of "
            f"{len(blocks)} blocks of up to {self.config.block} consecutive frames, {self.config.resamples:,} "
            f"resamples, seeds averaged. equal: the interval lies within ±{self.config.margin:g}; gain, loss: it "
            "leaves 0 out; else undecided."
        )

    def _conditions(self) -> dict[str, list[str]]:
        """Where the records were made: more than one value is to be known."""
        found = {
            "device": {record.device for record in self.records},
            "threads": {str(record.threads) for record in self.records},
            **{
                name: {record.versions.get(name, "unknown") for record in self.records}
                for name in dict.fromkeys(name for record in self.records for name in record.versions)
            },
        }
        return {name: sorted(values) for name, values in found.items()}


def _head(cells: Sequence[str]) -> Iterator[str]:
    yield _line(cells)
    yield f"|{'---|' * len(cells)}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(value: Mean | None) -> str:
    if value is None:
        return "n/a"
    return f"{value.mean:.2f}" if value.sd is None else f"{value.mean:.2f} ± {value.sd:.2f}"


def _score(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def _interval(interval: Interval | None) -> str:
    return "n/a" if interval is None else f"{interval.low:+.2f} to {interval.high:+.2f}"


def _few(names: Sequence[str], count: int = 5) -> list[str]:
    return [*names[:count], *(["…"] if len(names) > count else [])]
