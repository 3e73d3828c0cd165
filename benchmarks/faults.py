"""What befalls a cache while it is written and afterwards, and what is lost by it: nothing, or this ends with 1.

    python benchmarks/faults.py [--kills 60] [--bytes 1000] [--truncations 200] [--seed 0] [--json]

Kills, second workers, full disks, read-only folders and jumping clocks befall real caching runs of a small data set;
each time the next run must finish the cache, with the bytes of one that nothing befell. Full and read-only disks are
small tmpfs mounts; where mounting is not permitted they are left out, and the table says so. Changed and missing bytes
befall a finished cache of made-up samples: ``segkd cache verify`` must find each, the reader must find it or be right.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fault_bytes import damages, two_outcomes
from fault_runs import Finding, Place, full_disk, jumping_clock, kills, may_mount, read_only, two_workers

LEVELS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""How much of the cache the disk has room for."""
ROUNDS = 10
"""Repetitions of what is not counted by itself."""


def measure(arguments: argparse.Namespace, folder: Path) -> list[tuple[Finding, float]]:
    """Every kind of fault in turn, and the seconds that trying it took."""
    rng = random.Random(arguments.seed)
    place = Place(folder)
    bytes_ = damages(folder, arguments.bytes, arguments.truncations, rng)
    jobs: list[Callable[[], Finding]] = [
        lambda: kills(place, arguments.kills, rng),
        lambda: next(bytes_),
        lambda: next(bytes_),
        lambda: two_workers(place, ROUNDS),
        lambda: two_outcomes(folder, ROUNDS),
        lambda: jumping_clock(place, ROUNDS, rng),
    ]
    if may_mount():
        jobs += [lambda: full_disk(place, LEVELS), lambda: read_only(place, ROUNDS, rng)]
    else:
        jobs += [lambda: Finding("full disk, read-only folder", "NOT TRIED: mounting is not permitted here")]
    findings = []
    for job in jobs:
        began = time.monotonic()
        findings.append((job(), time.monotonic() - began))
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="runs to kill")
    parser.add_argument("--bytes", type=int, default=1000, help="single bytes to change")
    parser.add_argument("--truncations", type=int, default=200, help="files to cut off")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        findings = measure(arguments, Path(folder))
    if arguments.json:
        rows = [{**dataclasses.asdict(finding), "seconds": seconds} for finding, seconds in findings]
        print(json.dumps({"seed": arguments.seed, "faults": rows}))
    else:
        print(f"{'fault':<18}{'tried':>7}{'lost':>6}{'seconds':>9}  how")
        for finding, seconds in findings:
            print(f"{finding.fault:<18}{finding.tried:>7,}{len(finding.failures):>6}{seconds:>9.1f}  {finding.how}")
            for what, count in finding.notes.items():
                print(f"{'':<42}{count:,} × {what}")
            for failure in finding.failures:
                print(f"{'':<42}! {failure}")
    raise SystemExit(any(finding.failures for finding, _ in findings))


if __name__ == "__main__":
    main()
