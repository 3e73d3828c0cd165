"""How the arms of a sweep learn: mIoU on role select along the steps, a mean over seeds, as a table and as curves.

    python benchmarks/curves.py docs/results/ledger/camvid-s-ladder [--json]

Of the committed records that have the validations of their run (`train.validate_every` above 0). A step counts for an
arm where all of its runs have reached it, so a longer arm goes on by itself. The curves are a Mermaid diagram, which
GitHub and many editors draw, in the order of the table's columns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from segkd.pipeline.ablation.arms import KEPT
from segkd.pipeline.ablation.ledger import Ledger

Curve = dict[int, float]
"""mIoU in percent by step."""


def read_arms(ledger: Ledger) -> dict[str, list[Curve]]:
    """The curves of each arm's runs, arms in the order of the ladder, then a run file's own by name."""
    arms: dict[str, list[Curve]] = {}
    for arm, seed in ledger.runs():
        record = ledger.read(arm, seed)
        if record is not None and record.curve:
            curve = {int(step): miou for step, miou in record.curve.items() if miou is not None}
            arms.setdefault(arm, []).append(curve)
    order = [*(arm for arm in KEPT if arm in arms), *(arm for arm in arms if arm not in KEPT)]
    return {arm: arms[arm] for arm in order}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """At the steps that all curves have."""
    steps = set.intersection(*map(set, curves))
    return {step: fmean(curve[step] for curve in curves) for step in sorted(steps)}


def markdown(arms: dict[str, list[Curve]]) -> Iterator[str]:
    """Lines of the table, then of the diagram."""
    means = {f"{arm} ({len(curves)})": mean_curve(curves) for arm, curves in arms.items()}
    steps = sorted(set().union(*means.values()))
    yield f"| step | {' | '.join(means)} |"
    yield f"|---|{'---|' * len(means)}"
    for step in steps:
        yield f"| {step:,} | {' | '.join(f'{curve[step]:.2f}' if step in curve else '' for curve in means.values())} |"
    # The diagram has one axis for all, so it ends where the shortest curve does.
    shared = sorted(set.intersection(*map(set, means.values())))
    if not shared:
        return
    yield from ("", "```mermaid", "xychart-beta", f"    x-axis {json.dumps([str(step) for step in shared])}")
    yield '    y-axis "mIoU on select"'
    for curve in means.values():
        yield f"    line [{', '.join(f'{curve[step]:.2f}' for step in shared)}]"
    yield "```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    arms = read_arms(Ledger(arguments.ledger))
    if not arms:
        parser.error(
            f"{arguments.ledger}: no record here has validations; name a ledger of runs with train.validate_every "
            "above 0 (records of before validations were kept have none)"
        )
    print(json.dumps(arms) if arguments.json else "\n".join(markdown(arms)))


if __name__ == "__main__":
    main()
