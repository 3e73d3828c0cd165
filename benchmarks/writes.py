"""What stage 1 adds to the teacher's own time, an image: decoding, deriving and coding, writing.

    python benchmarks/writes.py [--config configs/camvid.toml] [--json]

The bare forward pass and the whole loop of `segkd teacher-cache` take turns on the same images in the same process, so
what else the machine does falls on both; figures are medians over the rounds. Without a run file: the built-in scenes
and an untrained teacher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from segkd.pipeline.config import load
from segkd.pipeline.evaluation.speed import synchronise
from segkd.pipeline.memory import keep_freed_memory
from segkd.pipeline.models.predictor import batched
from segkd.pipeline.teacher.opened import Opened, open_run
from segkd.pipeline.teacher.trial import Trials, spread

SCENES = (
    'data.reader="scenes"',
    "data.scenes.auxiliary=64",
    'teacher.reference="deeplabv3plus-mobilenetv2"',
)
"""What is measured without a run file."""


@dataclass(frozen=True, kw_only=True)
class Writes:
    """Milliseconds an image, medians over the rounds."""

    images: int
    batch: int
    device: str
    threads: int
    rounds: int
    bare_forward: float
    """The network alone, from inputs in memory to logits."""
    decode: float
    """Reading, decoding, preprocessing and hashing an image; in threads of its own."""
    infer: float
    """The network, and normalised log-probabilities of the cells in the image."""
    code: float
    """Deriving the targets, coding, decoding and measuring them."""
    write: float
    """Compressing, hashing, writing and syncing, in a thread of its own."""
    loop: float
    """The whole loop, overlapping."""
    overhead: float
    """Median of the rounds' ``loop / bare_forward - 1``."""


def measure(opened: Opened, images: int, rounds: int) -> Writes:
    """Both in turn on the same ``images``, after a round that warms up."""
    trials = Trials(opened, images)
    inputs = batches(opened, images)
    bare, loops = [], []
    parts: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        alone, count = forward(opened, inputs), sum(len(batch[0]) for batch in inputs)
        tried = trials.run(opened.config)
        if number:
            bare.append(1e3 * alone / count)
            loops.append(1e3 * tried.seconds / tried.timed)
            for part, seconds in tried.parts.items():
                parts.setdefault(part, []).append(1e3 * seconds / tried.timed)
    return Writes(
        images=count,
        batch=len(inputs[0][0]),
        device=str(opened.predictor.device),
        threads=torch.get_num_threads(),
        rounds=rounds,
        bare_forward=statistics.median(bare),
        **{part: statistics.median(values) for part, values in parts.items()},
        loop=statistics.median(loops),
        overhead=statistics.median(loop / alone - 1 for loop, alone in zip(loops, bare, strict=True)),
    )


def batches(opened: Opened, images: int) -> list[list[Tensor]]:
    """The prepared inputs of the trial's images that have the commonest size: batches, each in all views."""
    chosen = spread(opened.planned, images)
    size = statistics.mode(sample.image_size for sample in chosen)
    inputs = [
        opened.predictor.prepare(opened.data.image(opened.samples[sample.id]))
        for sample in chosen
        if sample.image_size == size
    ]
    step = opened.config.batch
    return [batched(inputs[start : start + step]) for start in range(0, len(inputs), step)]


@torch.inference_mode()
def forward(opened: Opened, inputs: Sequence[Sequence[Tensor]]) -> float:
    """Seconds of the bare forward passes."""
    predictor = opened.predictor
    began = time.perf_counter()
    for batch in inputs:
        for of_view in batch:
            predictor.logits(of_view.to(predictor.device, non_blocking=True))
    synchronise(predictor.device)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run file with [data] and [teacher]")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    keep_freed_memory()  # as every command does
    opened = open_run(load(arguments.config, () if arguments.config else SCENES))
    found = measure(opened, arguments.images, arguments.rounds)
    if arguments.json:
        print(json.dumps(asdict(found)))
        return
    print(
        f"{found.images} images, batches of {found.batch}, {found.device}, {found.threads} threads, "
        f"{found.rounds} rounds; ms an image"
    )
    for name in ("bare_forward", "decode", "infer", "code", "write", "loop"):
        value = getattr(found, name)
        print(f"{name.replace('_', ' '):<14}{value:>10.2f}  {value / found.bare_forward:>7.1%} of the bare forward")
    print(f"{'overhead':<14}{found.overhead:>10.1%}  of the whole loop, its parts overlapping, over the bare forward")


if __name__ == "__main__":
    main()
