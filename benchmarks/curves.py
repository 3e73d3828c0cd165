"""How the arms of a sweep learn: mIoU on role select along the steps, a mean over seeds, as a table and as curves.

    python benchmarks/curves.py runs/camvid-s [--json]

The folder is what `segkd ablate --output` wrote; runs validate with `train.validate_every` above 0. A step counts for
an arm where all of its runs have reached it, so an unfinished seed shortens the curve. The curves are a Mermaid
diagram, which GitHub and many editors draw.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from segkd.pipeline.student.folder import RunFolder

Curve = dict[int, float]
"""mIoU in percent by step."""


def curve_of(run: Path) -> Curve:
    """The validations of a run; of a step that was taken twice, after an interruption, the last."""
    lines = RunFolder(run, tensorboard=False).records()
    return {line["step"]: line["select"]["miou"] for line in lines if "select" in line}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """At the steps that all curves have."""
    steps = set.intersection(*map(set, curves))
    return {step: fmean(curve[step] for curve in curves) for step in sorted(steps)}


def read_arms(sweep: Path) -> dict[str, list[Curve]]:
    """The curves of each arm's runs."""
    arms: dict[str, list[Curve]] = {}
    for run in sorted(sweep.glob("*/seed-*/")):
        curve = curve_of(run)
        if curve:
            arms.setdefault(run.parent.name, []).append(curve)
    return arms


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
    yield from ("", "```mermaid", "xychart-beta", f"    x-axis {json.dumps([str(step) for step in shared])}")
    yield '    y-axis "mIoU on select"'
    for curve in means.values():
        yield f"    line [{', '.join(f'{curve[step]:.2f}' for step in shared)}]"
    yield "```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the output folder of segkd ablate")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    arms = read_arms(arguments.sweep)
    if not arms:
        parser.error(f"{arguments.sweep}: no run with a validation is here; set train.validate_every above 0")
    print(json.dumps(arms) if arguments.json else "\n".join(markdown(arms)))


if __name__ == "__main__":
    main()
