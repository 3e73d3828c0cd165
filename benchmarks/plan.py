"""What `segkd plan` foretells, and what then happens: bytes, coding error, time.

    python benchmarks/plan.py [--config configs/camvid.toml] [--samples K] [--budget SIZE]… [--json]

The cache is really written, into a temporary folder; with budgets, one cache each. Without a run file: the built-in
scenes and an untrained teacher. Time is foretold for a machine that does nothing else: keep other work off it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from writes import SCENES

from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.sizes import parse_bytes
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.plan import plan


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run file with [data], [teacher] and [cache]")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--budget", action="append", default=[], help="a size that the cache is to keep to")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    run = load(arguments.config, () if arguments.config else SCENES)
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
