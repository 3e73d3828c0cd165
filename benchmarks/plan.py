"""What `segkd plan` foretells, and what then happens: bytes, coding error, time.

    python benchmarks/plan.py [--config configs/camvid.toml] [--samples K] [--budget SIZE]… [--chances] [--json]

The cache is really written, into a temporary folder; with budgets, one cache each. --chances tells instead how far the
bytes of K samples are from those of all, over many choices of one in each stretch, and how well two standard errors
tell that. Without a run file: the built-in scenes and an untrained teacher. Time is foretold for a machine that does
nothing else: keep other work off it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from writes import SCENES

from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.sizes import parse_bytes
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.plan import plan
from segkd.storage.reader import CacheReader


@dataclass(frozen=True)
class Comparison:
    """One line of the table."""

    what: str
    foretold: float
    happened: float

    @property
    def ratio(self) -> float:
        """What was foretold, in terms of what happened."""
        return self.foretold / self.happened if self.happened else float(self.foretold == self.happened) or float("nan")


def compare(run: RunConfig, samples: int) -> Iterator[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "cache.zarr"
        run = replace(run, cache=replace(run.cache, path=str(place)))
        foretold = plan(run, samples=samples)
        summary = teacher_cache(run)
        files = [file for file in place.rglob("*") if file.is_file()]
        yield Comparison("bytes", foretold.volume.bytes, sum(file.stat().st_size for file in files))
        yield Comparison("files", foretold.volume.files, len(files))
        for target, measures in foretold.report.items():
            for name, mean in measures.items():
                yield Comparison(f"{target} {name}", mean, summary.report[target]["measures"][name]["mean"])
        yield Comparison("seconds", foretold.seconds, summary.seconds)
        if run.cache.budget:
            yield Comparison("budget", parse_bytes(run.cache.budget), sum(file.stat().st_size for file in files))


def chances(run: RunConfig, samples: int, *, choices: int = 200, units: int = 6) -> Iterator[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        config = replace(run.cache, path=str(Path(folder) / "cache.zarr"), unit_samples=1)
        teacher_cache(replace(run, cache=config))
        records = sorted(CacheReader(config.path).records(), key=lambda record: int(record["cells"]))
    cell = [sum(it["bytes"] for it in record["objects"].values()) / record["cells"] for record in records]
    mean, left_out = statistics.mean(cell), 1 - samples / len(cell)
    edges = [number * len(cell) // samples for number in range(samples + 1)]
    errors, bounds = [], []
    for choice in range(choices):
        rng = random.Random(choice)
        chosen = [cell[rng.randrange(start, stop)] for start, stop in pairwise(edges)]
        means = [statistics.mean(chosen[unit::units]) for unit in range(units)]
        errors.append(abs(statistics.mean(chosen) / mean - 1))
        bounds.append(2 * statistics.stdev(means) / mean * math.sqrt(left_out / units))
    yield "standard deviation of a sample's bytes a cell", statistics.stdev(cell) / mean
    yield f"{samples} of {len(cell)} are off by, root mean square", math.sqrt(statistics.mean(it**2 for it in errors))
    yield "at most", max(errors)
    yield "two standard errors are at least", min(bounds)
    yield "at most", max(bounds)
    yield "choices within theirs", statistics.mean(error <= bound for error, bound in zip(errors, bounds, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run file with [data], [teacher] and [cache]")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--budget", action="append", default=[], help="a size that the cache is to keep to")
    parser.add_argument("--chances", action="store_true", help="how far off the choice of samples may be")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    run = load(arguments.config, () if arguments.config else SCENES)
    if arguments.chances:
        told = list(chances(run, arguments.samples))
        print(json.dumps(told) if arguments.json else "\n".join(f"{what:<48}{share:>8.2%}" for what, share in told))
        return
    found = {}
    for budget in arguments.budget or [""]:
        rows = list(compare(replace(run, cache=replace(run.cache, budget=budget)), arguments.samples))
        found[budget or "max_kl"] = [{**asdict(row), "ratio": row.ratio} for row in rows]
        if not arguments.json:
            print(f"{budget or 'bound of the run file':<32}{'foretold':>14}{'happened':>14}{'ratio':>8}")
            for row in rows:
                print(f"  {row.what:<30}{row.foretold:>14.6g}{row.happened:>14.6g}{row.ratio:>8.3f}", flush=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
