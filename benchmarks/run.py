"""How fast both stages are on this machine: ``make bench``, or ``make bench CONFIG=run.toml`` for a run of one's own.

    python benchmarks/run.py [--config run.toml] [--json]

Without a run file the built-in scenes are used, with an untrained teacher: times do not depend on the weights, but the
size of the cache does, so its bytes mean something only for a run file with a real teacher. The cache is written into a
temporary folder. Times are medians of a few repetitions: keep other work off the machine meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from segkd import __version__
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.stream import loader
from segkd.pipeline.device import find_device
from segkd.pipeline.evaluation.speed import count_flops, count_parameters, latency
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.models.references import BUILT_IN, described, load_network
from segkd.pipeline.student.inputs import Inputs, open_inputs
from segkd.pipeline.student.trainer import Trainer
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.storage.reader import CacheReader

SCENES = (
    'data.reader="scenes"',
    "data.scenes.auxiliary=64",
    'teacher.reference="deeplabv3plus-mobilenetv2"',
    'student.reference="deeplab-mobilenetv1"',
    "student.arguments.width=0.25",
    "augment.crop=[128,128]",
    "train.labelled=8",
    "train.auxiliary=8",
)
"""What is measured without a run file."""

SHAPE = (256, 256)
"""Height and width of the networks' input."""


@dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    what: str
    value: float
    unit: str
    how: str


def stage_1(run: RunConfig) -> Iterator[Measurement]:
    summary = teacher_cache(run)
    images = sum(summary.roles.values())
    yield Measurement("stage 1", images / summary.seconds, "images/s", f"{images} images")
    yield Measurement("cache", summary.bytes / images, "bytes/image", ", ".join(run.cache.targets))


def windows(cache: CacheReader, side: int = 32, reads: int = 400) -> Iterator[Measurement]:
    """Random windows, each of another sample, as training reads them."""
    rng, entries = np.random.default_rng(0), list(cache.entries())

    def read(_: int) -> None:
        entry = entries[int(rng.integers(len(entries)))]
        spans = [(int(rng.integers(max(cells - side, 0) + 1)), min(side, cells)) for cells in entry.mapping.shape]
        rows, columns = (range(start, start + length) for start, length in spans)
        cache.window(entry, "soft", rows, columns)

    times = milliseconds(read, reads)
    yield Measurement("window read", float(np.median(times)), "ms", f"soft targets, {side}x{side} cells, p50")
    yield Measurement("window read", float(np.percentile(times, 95)), "ms", f"soft targets, {side}x{side} cells, p95")


def batches(inputs: Inputs, run: RunConfig, steps: int = 20) -> Iterator[Measurement]:
    crops = run.train.labelled + run.train.auxiliary
    for workers in (0, 2):
        arriving = iter(loader(inputs.stream, 0, steps + 4, workers))
        for _ in range(4):  # the first ones wait for the workers to start
            next(arriving)
        begin = time.perf_counter()
        count = sum(1 for _ in arriving)
        rate = count * crops / (time.perf_counter() - begin)
        size = "x".join(map(str, run.augment.crop))
        yield Measurement("batches", rate, "crops/s", f"{size} with windows, {workers} workers")


def training_steps(inputs: Inputs, run: RunConfig, repeats: int = 8) -> Iterator[Measurement]:
    """The same batch with and without the teacher's terms: the difference is what distillation costs a step."""
    batch, device, student = inputs.stream[0], find_device(run.train.device), described(run.the_student())
    alone = dataclasses.replace(inputs.objective, knowledge=())
    for how, objective in (("cross-entropy alone", alone), ("with the teacher's terms", inputs.objective)):
        network = load_network(student, len(inputs.source.classes))
        weights = inputs.class_weights
        trainer = Trainer(network, run.train, objective, device=device, targets=inputs.targets, class_weights=weights)
        times = milliseconds(functools.partial(trainer.step, batch), repeats)
        yield Measurement("training step", float(np.median(times)), "ms", f"{len(batch.labelled_N)} crops, {how}")


def networks(classes: int = 19) -> Iterator[Measurement]:
    shape = "x".join(map(str, SHAPE))
    for name in BUILT_IN:
        network = load_network(NetworkConfig(reference=name), classes).eval()
        timed = latency(network, SHAPE, runs=5)
        cost = f"{count_parameters(network) / 1e6:.2f} M parameters, {count_flops(network, SHAPE) / 1e9:.2f} GFLOP"
        yield Measurement(name, timed.p50_ms, "ms", f"1x3x{shape}, {timed.threads} threads, {timed.dtype}; {cost}")


def milliseconds(action: Callable[[int], object], repeats: int) -> list[float]:
    """Duration of each repetition, after two that warm up. ``action`` is given the repetition's number."""
    times = []
    for number in range(repeats + 2):
        begin = time.perf_counter()
        action(number)
        times.append((time.perf_counter() - begin) * 1000)
    return times[2:]


def measure(run: RunConfig) -> Iterator[Measurement]:
    with tempfile.TemporaryDirectory() as folder:
        cache_config = dataclasses.replace(run.cache, path=str(Path(folder) / "cache.zarr"))
        run = dataclasses.replace(run, cache=cache_config)
        yield from stage_1(run)
        cache = CacheReader(cache_config.path)
        yield from windows(cache)
        inputs = open_inputs(run, described(run.the_student()), distill=True)
        yield from batches(inputs, run)
        yield from training_steps(inputs, run)
    yield from networks()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run file with [data], [teacher] and [student]")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    run = load(arguments.config, () if arguments.config else SCENES)
    machine = {
        "segkd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if arguments.json:
        print(json.dumps({"machine": machine, "measurements": [dataclasses.asdict(row) for row in measure(run)]}))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for row in measure(run):
        print(f"{row.what:<26}{row.value:>12,.2f} {row.unit:<12} {row.how}", flush=True)


if __name__ == "__main__":
    main()
