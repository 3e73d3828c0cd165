"""What it costs to give freed memory back to the system: networks on a CPU with and without ``keep_freed_memory``.

    OMP_NUM_THREADS=1 python benchmarks/allocation.py [--json]

Each measurement is a process of its own, and the two ways take turns. CPU seconds and page faults of one call and the
highest memory of such a process, which warms up first: the median over ``--rounds`` processes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from typing import Any

import torch

from segkd.pipeline.memory import keep_freed_memory
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.models.references import load_network

WARM_UP, CALLS = 5, 6
WAYS = {"given back": False, "kept": True}


def teacher_forward(network: str, images: tuple[int, ...]) -> Callable[[], None]:
    """What stage 1 does with a batch."""
    teacher = load_network(NetworkConfig(reference=network), 19).eval()
    images_N3HW = torch.randn(images).to(memory_format=torch.channels_last)

    def call() -> None:
        with torch.inference_mode():
            teacher(images_N3HW)

    return call


def student_step(network: str, images: tuple[int, ...], **arguments: Any) -> Callable[[], None]:
    """Forward and backward of a training step, without its loss."""
    student = load_network(NetworkConfig(reference=network, arguments=arguments), 19).train()
    images_N3HW = torch.randn(images).to(memory_format=torch.channels_last)
    return lambda: student(images_N3HW).square().mean().backward()


WORK: Mapping[str, tuple[Callable[..., Callable[[], None]], tuple[Any, ...], dict[str, Any]]] = {
    "deeplabv3plus-mobilenetv2, forward, 4x3x360x480": (
        teacher_forward,
        ("deeplabv3plus-mobilenetv2", (4, 3, 360, 480)),
        {},
    ),
    "deeplabv2-resnet101, forward, 1x3x321x321": (teacher_forward, ("deeplabv2-resnet101", (1, 3, 321, 321)), {}),
    "deeplab-mobilenetv1 of width 0.25, step, 16x3x96x128": (
        student_step,
        ("deeplab-mobilenetv1", (16, 3, 96, 128)),
        {"width": 0.25},
    ),
    "deeplabv3plus-mobilenetv2, step, 8x3x192x256": (
        student_step,
        ("deeplabv3plus-mobilenetv2", (8, 3, 192, 256)),
        {},
    ),
}


def measured(work: str, keeps: bool) -> dict[str, float]:
    """One process's figures for a call."""
    if keeps:
        keep_freed_memory()
    make, given, named = WORK[work]
    call = make(*given, **named)
    for _ in range(WARM_UP):
        call()
    faults, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    for _ in range(CALLS):
        call()
    seconds, used = time.process_time() - seconds, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds / CALLS,
        "faults": (used.ru_minflt - faults) / CALLS,
        "peak_mib": used.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for work in WORK:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way, keeps in WAYS.items():
                with get_context("spawn").Pool(1) as pool:
                    found[way].append(pool.apply(measured, (work, keeps)))
        medians = {
            way: {figure: statistics.median(each[figure] for each in processes) for figure in processes[0]}
            for way, processes in found.items()
        }
        rows.append({"work": work, **medians})
    if arguments.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "measurements": rows}))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; given back → kept")
    print(f"{'':<54}{'CPU s a call':>16}{'ratio':>7}{'page faults':>18}{'peak MiB':>14}")
    for row in rows:
        before, after = (row[way] for way in WAYS)
        seconds = f"{before['seconds']:.3f} → {after['seconds']:.3f}"
        faults = f"{before['faults']:,.0f} → {after['faults']:,.0f}"
        peak = f"{before['peak_mib']:.0f} → {after['peak_mib']:.0f}"
        print(f"{row['work']:<54}{seconds:>16}{before['seconds'] / after['seconds']:>7.2f}{faults:>18}{peak:>14}")


if __name__ == "__main__":
    main()
