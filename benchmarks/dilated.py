"""What phases save of a training pass on a CPU: forward and backward of the paper's student with and without them.

    OMP_NUM_THREADS=1 python benchmarks/dilated.py [--json]

Both take turns in one process, on 16 crops; the median of ``--repeats``, in milliseconds of the process's own time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from segkd.pipeline.memory import keep_freed_memory
from segkd.pipeline.models.deeplab import deeplab_mobilenetv1
from segkd.pipeline.models.layers import DilatedDepthwise

SHAPES = ((0.25, 96, 128), (1.0, 192, 256))
"""Width of the network; height and width of the crops that it is fed."""
CROPS = 16


def as_torch_has_them(network: nn.Module) -> nn.Module:
    """The network with plain convolutions in place of those that may go by phases."""
    for layer in network.modules():
        if isinstance(layer, DilatedDepthwise):
            layer.forward = partial(nn.Conv2d.forward, layer)  # type: ignore[method-assign]
    return network


def once(network: nn.Module, images_N3HW: Tensor) -> float:
    """Milliseconds of forward and backward."""
    begin = time.process_time()
    network(images_N3HW).sum().backward()
    return 1e3 * (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for width, *size in SHAPES:
        networks = {
            "segkd": deeplab_mobilenetv1(11, width=width),
            "torch": as_torch_has_them(deeplab_mobilenetv1(11, width=width)),
        }
        images_N3HW = torch.randn(CROPS, 3, *size).contiguous(memory_format=torch.channels_last)
        times: dict[str, list[float]] = {name: [] for name in networks}
        for network in networks.values():
            once(network.train(), images_N3HW)
        for _ in range(options.repeats):
            for name, network in networks.items():
                times[name].append(once(network, images_N3HW))
        segkd, plain = (statistics.median(times[name]) for name in ("segkd", "torch"))
        rows.append({"width": width, "crops": [CROPS, *size], "segkd_ms": segkd, "torch_ms": plain})
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        ratio = row["torch_ms"] / row["segkd_ms"]
        print(
            f"deeplab-mobilenetv1, width {row['width']}, {'×'.join(map(str, row['crops']))}: "
            f"segkd {row['segkd_ms']:.0f} ms, torch {row['torch_ms']:.0f} ms, {ratio:.2f} times"
        )


if __name__ == "__main__":
    main()
