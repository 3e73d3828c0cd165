"""How hard each term of the loss pulls: the norm of its weighted gradient at the logits, times 1,000, arm by arm.

    python benchmarks/gradients.py runs/camvid-s-first [--json]

The folder is what `segkd ablate --output` wrote. A mean over the first tenth of the steps, the fifth and sixth, and the
last, over all seeds, of what runs log every `train.log_every` steps; nan where they have logged none.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from segkd.pipeline.student.folder import RunFolder

PARTS = ((0, 1), (4, 6), (9, 10))
"""Of a training, in tenths."""
Norms = dict[str, dict[str, list[float]]]
"""By arm, by term, of the parts of a training."""


def read(sweep: Path) -> Norms:
    """Means, times 1,000."""
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
        arm: {term: list(map(_mean, parts)) for term, parts in terms.items() if term != "total"}
        for arm, terms in norms.items()
    }


def _mean(values: list[float]) -> float:
    return fmean(values) if values else math.nan


def table(arms: Norms) -> Iterator[str]:
    """Its lines, in Markdown."""
    terms = list(dict.fromkeys(term for of in arms.values() for term in of))
    yield f"| arm | {' | '.join(terms)} |"
    yield f"|---|{'---|' * len(terms)}"
    for arm, of in arms.items():
        cells = (" → ".join(f"{norm:.1f}" for norm in of[term]) if term in of else "" for term in terms)
        yield f"| {arm} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the output folder of segkd ablate")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    norms = read(arguments.sweep)
    if not norms:
        parser.error(f"{arguments.sweep}: no run that has logged its gradients is here")
    print(json.dumps(norms) if arguments.json else "\n".join(table(norms)))


if __name__ == "__main__":
    main()
