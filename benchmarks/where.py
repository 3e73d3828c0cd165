"""Where a gain comes from: of which classes, and of which part of role report. From committed records alone.

    python benchmarks/where.py docs/results/ledger/camvid-s-ladder auxiliary-zero-first alone [--parts 3] [--json]

The first arm less the second, paired over the seeds that both have, with Student's 95 % interval. An IoU is of all
images together. Parts are runs of consecutive images of each group, as even as can be; in a part mIoU is over the
classes that occur there. Who looks at ten classes finds one by chance: these tables explain a gain, and show none.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from segkd.pipeline.ablation.ledger import Ledger, RunRecord
from segkd.pipeline.ablation.statistics import Floats, Interval, blocks_of, miou, paired_t, tallies


@dataclass(frozen=True)
class Difference:
    """Means over the seeds, in percent; NaN where a class does not occur."""

    what: str
    images: int
    earlier: float
    later: float
    over_seeds: Interval | None


def pairs(ledger: Ledger, later: str, earlier: str) -> list[tuple[RunRecord, RunRecord]]:
    """The records of both arms, by seed. Raises SystemExit where there are none."""
    seeds = [seed for arm, seed in ledger.runs() if arm == later]
    both = [(ledger.read(later, seed), ledger.read(earlier, seed)) for seed in seeds]
    found = [(after, before) for after, before in both if after is not None and before is not None]
    if not found:
        raise SystemExit(f"{ledger.folder} has no seed of both {later} and {earlier}")
    if len({record.images.ids for pair in found for record in pair}) > 1:
        raise SystemExit(f"{ledger.folder}: records of {later} and {earlier} are of other images of role report")
    return found


def of_classes(both: list[tuple[RunRecord, RunRecord]]) -> Iterator[Difference]:
    """IoU of each class."""
    images, whole = both[0][0].images, _tallied(both).sum(2)
    for number, name in enumerate(images.classes):
        # A tally of a single class has its IoU for a mean.
        yield _difference(name, len(images.ids), miou(whole[..., number, None]))


def of_parts(both: list[tuple[RunRecord, RunRecord]], parts: int) -> Iterator[Difference]:
    """mIoU of each part."""
    images, tallied = both[0][0].images, _tallied(both)
    sizes = [images.groups.count(group) for group in dict.fromkeys(images.groups)]
    for part in blocks_of(images.groups, math.ceil(max(sizes) / parts)):
        scores = miou(tallied[:, :, part].sum(2))
        yield _difference(f"{images.ids[part[0]]} to {images.ids[part[-1]]}", len(part), scores)


def _tallied(both: list[tuple[RunRecord, RunRecord]]) -> Floats:
    """Seed, later or earlier, image, tally, class."""
    return np.array([[tallies(run.images.counts()) for run in pair] for pair in both])


def _difference(what: str, images: int, scores: Floats) -> Difference:
    """Of scores (seed, later or earlier)."""
    later, earlier = scores.T
    return Difference(what, images, float(earlier.mean()), float(later.mean()), paired_t(list(later - earlier)))


def table(heading: str, earlier: str, later: str, found: list[Difference]) -> str:
    """In Markdown."""
    lines = [f"| {heading} | images | {earlier} | {later} | difference | 95 % over seeds |", f"|{'---|' * 6}"]
    for row in found:
        sure = "n/a" if row.over_seeds is None else f"{row.over_seeds.low:+.2f} to {row.over_seeds.high:+.2f}"
        change = f"{row.later - row.earlier:+.2f}"
        lines.append(f"| {row.what} | {row.images} | {row.earlier:.2f} | {row.later:.2f} | {change} | {sure} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("later")
    parser.add_argument("earlier")
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    both = pairs(Ledger(options.ledger), options.later, options.earlier)
    classes, parts = list(of_classes(both)), list(of_parts(both, options.parts))
    if options.json:
        print(json.dumps({"classes": [asdict(row) for row in classes], "parts": [asdict(row) for row in parts]}))
        return
    print(table(f"IoU, {len(both)} seeds", options.earlier, options.later, classes), end="\n\n")
    print(table(f"mIoU, {len(both)} seeds", options.earlier, options.later, parts))


if __name__ == "__main__":
    main()
