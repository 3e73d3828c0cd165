"""How the arms of a sweep learn: mIoU on role select along the steps, a mean over seeds, as a table and as curves.

    python benchmarks/curves.py runs/camvid-s [--json]
    python benchmarks/curves.py runs/camvid-s --gradients [--json]

The folder is what `segkd ablate --output` wrote; runs validate with `train.validate_every` above 0. A step counts for
an arm where all of its runs have reached it, so an unfinished seed shortens the curve. The curves are a Mermaid
diagram, which GitHub and many editors draw.

With ``--gradients``, how hard each term of the loss pulls instead: the norm of its weighted gradient at the logits, as
runs log it, times 1,000; a mean over the first tenth of the steps, the fifth and sixth, and the last, over all seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from segkd.pipeline.student.folder import RunFolder

PARTS = ((0, 1), (4, 6), (9, 10))
"""Of a training, in tenths."""
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


def read_gradients(sweep: Path) -> dict[str, dict[str, list[float]]]:
    """Of each arm's terms the mean norms in the parts of a training, times 1,000."""
    norms: dict[str, dict[str, list[list[float]]]] = {}
    for run in sorted(sweep.glob("*/seed-*/")):
        lines = [line for line in RunFolder(run, tensorboard=False).records() if "gradient" in line]
        steps = max((line["step"] for line in lines), default=0)
        for line in lines:
            place = 10 * line["step"] / steps
            for number, (low, high) in enumerate(PARTS):
                for term, norm in line["gradient"].items() if low < place <= high else ():
                    parts = norms.setdefault(run.parent.name, {}).setdefault(term, [[] for _ in PARTS])
                    parts[number].append(1e3 * norm)
    return {
        arm: {term: [fmean(part) for part in parts] for term, parts in terms.items() if term != "total"}
        for arm, terms in norms.items()
    }


def gradient_table(arms: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Lines of the table."""
    terms = list(dict.fromkeys(term for of in arms.values() for term in of))
    yield f"| arm | {' | '.join(terms)} |"
    yield f"|---|{'---|' * len(terms)}"
    for arm, of in arms.items():
        cells = (" → ".join(f"{norm:.1f}" for norm in of[term]) if term in of else "" for term in terms)
        yield f"| {arm} | {' | '.join(cells)} |"


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
    parser.add_argument("--gradients", action="store_true", help="the terms' gradients instead")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    if arguments.gradients:
        gradients = read_gradients(arguments.sweep)
        print(json.dumps(gradients) if arguments.json else "\n".join(gradient_table(gradients)))
        return
    arms = read_arms(arguments.sweep)
    if not arms:
        parser.error(f"{arguments.sweep}: no run with a validation is here; set train.validate_every above 0")
    print(json.dumps(arms) if arguments.json else "\n".join(markdown(arms)))


if __name__ == "__main__":
    main()
