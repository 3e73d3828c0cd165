"""What the cross-entropy with labels costs, forward and backward: segkd's, of all or of hard pixels, and torch's.

    OMP_NUM_THREADS=1 python benchmarks/label_loss.py [--device cuda] [--json]

They take turns on the same logits in one process; the median of ``--repeats``. Memory is what one call of each adds
at its peak to what a process of its own has by then: on a GPU what torch has allocated, else Linux's VmHWM, reset.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.data.sample import IGNORE
from segkd.pipeline.memory import keep_freed_memory
from segkd.pipeline.resample import to_pixels
from segkd.pipeline.student.label_loss import summed_cross_entropy
from segkd.pipeline.student.ohem import mine_hard_pixels
from segkd.storage.geometry import Mapping, network_axis

SHAPES = {
    "CamVid, protocol S": (16, 11, (24, 32), (192, 256)),
    "Cityscapes, crops of 512×1024": (4, 19, (128, 256), (512, 1024)),
    "ADE20K, crops of 512×512": (8, 150, (128, 128), (512, 512)),
}
"""Crops, classes, logits' cells and pixels of a batch."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Loss = Callable[[Tensor, Mapping, Tensor], Tensor]


def at_all_pixels(logits_NChw: Tensor, mapping: Mapping, labels_NHW: Tensor) -> Tensor:
    pixels_NCHW = to_pixels(logits_NChw, mapping, *labels_NHW.shape[1:])
    return F.cross_entropy(pixels_NCHW, labels_NHW, ignore_index=IGNORE, reduction="sum")


def of_hard_pixels(logits_NChw: Tensor, mapping: Mapping, labels_NHW: Tensor) -> Tensor:
    return summed_cross_entropy(
        logits_NChw, mapping, mine_hard_pixels(logits_NChw, mapping, labels_NHW, 0.7, 1 / 16)[0]
    )


LOSSES: dict[str, Loss] = {"segkd": summed_cross_entropy, "ohem": of_hard_pixels, "torch": at_all_pixels}


def inputs(shape: str, device: str) -> tuple[Tensor, Mapping, Tensor]:
    crops, classes, cells, pixels = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    logits_NChw = torch.randn((crops, classes, *cells), generator=generator).to(device)
    labels_NHW = torch.randint(0, classes, (crops, *pixels), generator=generator)
    labels_NHW[torch.rand(labels_NHW.shape, generator=generator) < 0.1] = IGNORE
    y, x = (network_axis(length, count) for length, count in zip(pixels, cells, strict=True))
    return logits_NChw.requires_grad_(), Mapping(y, x), labels_NHW.to(device)


def once(loss: Loss, given: tuple[Tensor, Mapping, Tensor]) -> float:
    """Seconds of forward and backward."""
    begin = time.perf_counter()
    torch.autograd.grad(loss(*given), given[0])
    if given[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def added_bytes(name: str, shape: str, device: str) -> int:
    given = inputs(shape, device)
    once(LOSSES[name], inputs_of_nothing(device))
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        once(LOSSES[name], given)
        return torch.cuda.max_memory_allocated() - before
    CLEAR.write_text("5")  # the highest so far, which a process has of the one that made it, is forgotten
    before = kibibytes("VmRSS")
    once(LOSSES[name], given)
    return (kibibytes("VmHWM") - before) * 1024


def kibibytes(name: str) -> int:
    """An entry of this process's memory, by the kernel's name for it."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def inputs_of_nothing(device: str) -> tuple[Tensor, Mapping, Tensor]:
    """What loads a function's code before its memory is measured."""
    mapping = Mapping(network_axis(8, 2), network_axis(8, 2))
    return torch.zeros((1, 2, 2, 2), device=device, requires_grad=True), mapping, torch.zeros(1, 8, 8).long().to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    keep_freed_memory()  # as every command does
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            added = {name: pool.apply(added_bytes, (name, shape, arguments.device)) for name in LOSSES}
        given = inputs(shape, arguments.device)
        times: dict[str, list[float]] = {name: [] for name in LOSSES}
        for number in range(1 + arguments.repeats):
            for name, loss in LOSSES.items():
                seconds = once(loss, given)
                if number:  # the first one warms up
                    times[name].append(1000 * seconds)
        rows += [
            {"batch": shape, "loss": name, "ms": statistics.median(times[name]), "bytes": added[name]}
            for name in LOSSES
        ]
    if arguments.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "measurements": rows}))
        return
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads")
    print(f"{'batch':<32}{'loss':<8}{'ms':>9}{'MiB':>9}")
    for row in rows:
        print(f"{row['batch']:<32}{row['loss']:<8}{row['ms']:>9.1f}{row['bytes'] / 2**20:>9.0f}")


if __name__ == "__main__":
    main()
