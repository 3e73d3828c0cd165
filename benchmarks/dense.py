"""What the profile dense saves and costs: bytes, encoding, random windows, and the start of its compiled code.

    python benchmarks/dense.py [--config configs/camvid.toml] [--images 12] [--windows 300] [--json]

Without a run file: generated fields of 11 classes on grids of 90x120 cells. With one: its teacher over samples of role
report, evenly spread. Bytes and times are those of an image's whole tiles with their crc32c, cut as the cache cuts such
grids, against zstd as the profile plain packs them; a window is 64x64 cells at a random place, from the bytes of the
tiles it overlaps to codes, of which rows below the window are left out where the codec can. One thread. "cpu" is that
thread's time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from numcodecs.zstd import Zstd
from rate_distortion import Image, synthetic_images, teacher_images, tile_side, tiles

from segkd.pipeline.config import load
from segkd.pipeline.teacher.coded import code_targets
from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.targets import TARGETS
from segkd.storage import context
from segkd.storage.chunks import CHECKSUM
from segkd.storage.packing import ZSTD_LEVEL

Codes = npt.NDArray[np.uint8]
Pack = Callable[[Codes], bytes]
Unpack = Callable[[bytes, tuple[int, int, int], int], Codes]
WINDOW = 64
START = "import time, segkd.storage.context as c; t = time.process_time(); c.kernels(); print(time.process_time() - t)"


@dataclass(frozen=True)
class Row:
    """One target with one codec: means of an image, and percentiles of windows."""

    target: str
    codec: str
    bytes: float
    float16_ratio: float | None
    encode_ms: float
    window_cpu_p50_ms: float
    window_cpu_p99_ms: float
    window_wall_p50_ms: float
    window_wall_p99_ms: float


def targets_of(images: list[Image]) -> Iterator[tuple[str, list[Codes]]]:
    """What is packed: its name, and each image's codes (channels, h, w)."""
    for label, name, temperatures in (
        ("soft, T=1", "soft", (1.0,)),
        ("soft, T=1,4", "soft", (1.0, 4.0)),
        ("first-order map", "first_order", (1.0,)),
    ):
        config = CacheConfig(temperatures=temperatures, profile="dense")
        codes = []
        for image in images:
            specs = {
                wanted: TARGETS[wanted]().spec(config, image.log_probs.shape[1], tile_side(image.mapping.shape))
                for wanted in dict.fromkeys(("soft", name))
            }
            coded = code_targets(specs, image.log_probs, image.mapping, image.size, ["sample"])
            codes.append(np.asarray(coded[name].codes[0]))
        yield label, codes


def measure(
    target: str, codec: str, images: list[Codes], pack: Pack, unpack: Unpack, windows: int, float16: float | None
) -> Row:
    packed: list[dict[tuple[int, int], bytes]] = []
    seconds = 0.0
    for codes in images:
        cut = list(tiles(codes))
        began = time.thread_time()
        done = [pack(tile) for tile in cut]
        seconds += time.thread_time() - began
        for tile, data in zip(cut, done, strict=True):
            assert np.array_equal(unpack(data, tile.shape, len(tile[0])), tile), f"{codec} must be lossless"
        side = tile_side(codes.shape[1:])
        places = [(y, x) for y in range(0, codes.shape[1], side) for x in range(0, codes.shape[2], side)]
        packed.append(dict(zip(places, done, strict=True)))
    rng, cpu, wall = np.random.default_rng(0), [], []
    for _ in range(windows):
        chosen = int(rng.integers(len(images)))
        channels, height, width = images[chosen].shape
        side = tile_side((height, width))
        top, left = (int(rng.integers(max(cells - WINDOW, 0) + 1)) for cells in (height, width))
        wanted = [
            (data, min(side, top + WINDOW - y))
            for (y, x), data in packed[chosen].items()
            if top - side < y < top + WINDOW and left - side < x < left + WINDOW
        ]
        began_cpu, began_wall = time.thread_time(), time.perf_counter()
        for data, stop in wanted:
            unpack(data, (channels, side, side), stop)
        cpu.append(time.thread_time() - began_cpu)
        wall.append(time.perf_counter() - began_wall)
    size = sum(len(data) + CHECKSUM for image in packed for data in image.values()) / len(images)
    times = [1000 * float(np.percentile(found, q)) for found in (cpu, wall) for q in (50, 99)]
    return Row(target, codec, size, float16 and float16 / size, 1000 * seconds / len(images), *times)


def float16_bytes(image: Image) -> int:
    """What the log-probabilities take as float16, with zstd at level 9."""
    return sum(len(Zstd(9).encode(tile.tobytes())) + CHECKSUM for tile in tiles(image.log_probs[0].half().numpy()))


def zstd_decode(data: bytes, shape: tuple[int, int, int], stop: int) -> Codes:  # noqa: ARG001  # it undoes all
    return np.frombuffer(Zstd().decode(data), np.uint8).reshape(shape)


def dense_decode(data: bytes, shape: tuple[int, int, int], stop: int) -> Codes:
    return context.decode(data, shape, stop=stop)


def start_up() -> tuple[float, float]:
    """Seconds of CPU to import numba and compile the kernels, and to load them from the disk, each in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        command, environment = [sys.executable, "-c", START], {**os.environ, "NUMBA_CACHE_DIR": folder}
        first, second = (
            float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
            for _ in range(2)
        )
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a run file with [data] and [teacher]; generated fields without one")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--windows", type=int, default=300, help="of each target and codec")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.config and not Path(load(arguments.config, ()).data.root).exists():
        print(json.dumps({"skipped": arguments.config, "reason": "its data are not here"}))
        return
    compiling, loading = start_up()
    context.kernels()
    images = (
        teacher_images(arguments.config, arguments.images)
        if arguments.config
        else synthetic_images(arguments.images, classes=11, height=360, width=480)
    )
    half = float(np.mean([float16_bytes(image) for image in images]))
    zstd = Zstd(ZSTD_LEVEL)
    rows = []
    for target, codes in targets_of(images):
        float16 = half if target.startswith("soft") else None
        rows += [
            measure(
                target, "zstd", codes, lambda tile: zstd.encode(tile.tobytes()), zstd_decode, arguments.windows, float16
            ),
            measure(target, "dense", codes, context.encode, dense_decode, arguments.windows, float16),
        ]
    source = arguments.config or "generated fields, 11 classes"
    if arguments.json:
        found = {"source": source, "images": len(images), "float16_zstd_bytes": half, "compile_s": compiling}
        print(json.dumps({**found, "load_s": loading, "rows": [asdict(row) for row in rows]}))
        return
    print(f"{source}, {len(images)} images; float16 + zstd takes {half:,.0f} bytes an image")
    print(
        f"{'target':<17}{'codec':<7}{'bytes':>9}{'f16 /':>7}{'enc ms':>8}{'window cpu p50':>16}"
        f"{'p99':>7}{'wall p50':>10}{'p99':>7}"
    )
    for row in rows:
        ratio = "" if row.float16_ratio is None else f"{row.float16_ratio:.1f}"
        print(
            f"{row.target:<17}{row.codec:<7}{row.bytes:>9,.0f}{ratio:>7}{row.encode_ms:>8.1f}{row.window_cpu_p50_ms:>16.2f}"
            f"{row.window_cpu_p99_ms:>7.2f}{row.window_wall_p50_ms:>10.2f}{row.window_wall_p99_ms:>7.2f}"
        )
    print(f"first use, cpu: {compiling:.1f} s to compile, {loading:.2f} s to load from disk, numba's import included")


if __name__ == "__main__":
    main()
