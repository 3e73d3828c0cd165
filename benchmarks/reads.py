"""How fast random windows come out of a cache: the reader of segkd against zarr-python's own (and tensorstore's).

    python benchmarks/reads.py [--cache cache.zarr] [--json]

Without a cache: three generated ones, smooth random fields of classes through the coder and the writer, of the profiles
`plain` and `dense` for T = 1 and of `plain` for T = 1 and 4. Of the last zarr-python reads what the values are restored
from, and does not restore them. The readers take turns on the same windows in the same
process, on one core, after each has read every shard; a window is 64x64 cells at a random place of a random sample.
`loader` is what a torch DataLoader with 1, 2 and 4 workers delivers of them, samples looked up by their ids.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.targets import SoftTargets
from segkd.storage.coding import EXACT
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import PlannedSample, plan_units, tile_shape, usual_tile
from segkd.storage.reader import CacheReader, WindowRequest
from segkd.storage.spec import CacheSpec, TargetSpec
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter

SIDE, BOUND = 64, 1e-3
"""Cells of a window; nats of the generated caches."""
BATCH = 16
"""Windows of a loader's batch."""

Read = Callable[[WindowRequest], object]


@dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    cache: str
    what: str
    p50: float
    p99: float | None
    unit: str
    how: str


def generate(path: Path, config: CacheConfig, *, classes: int, grid: tuple[int, int], samples: int) -> None:
    """A cache of smooth random class fields, each sample on the coarsest level that keeps the bound over its cells."""
    names = tuple(f"class-{number}" for number in range(classes))
    size = 4 * grid[0], 4 * grid[1]
    mapping = Mapping(network_axis(size[0], grid[0]), network_axis(size[1], grid[1]))
    planned = [
        PlannedSample(id=f"train/{number:04}", role="train", image_size=size, mapping=mapping)
        for number in range(samples)
    ]
    tile = usual_tile(planned)
    soft = SoftTargets().spec(config, classes, tile)
    spec = CacheSpec(classes=names, targets={"soft": soft}, tile=tile, fingerprints={}, teacher={})
    writer = CacheWriter(path, spec, plan_units(planned, unit_samples=32, tile=tile))
    for unit in writer.pending():
        writer.write(unit, [_coded(soft, sample.id, classes, grid) for sample in writer.plan.of(unit)])
    writer.seal()


def _coded(soft: TargetSpec, name: str, classes: int, grid: tuple[int, int]) -> CodedSample:
    rng = np.random.default_rng([*name.encode()])
    logits = rng.standard_normal((1, classes, *grid))
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(grid[0]), np.fft.rfftfreq(grid[1]), indexing="ij"))
    logits = np.fft.irfft2(np.fft.rfft2(logits) * np.exp(-((frequencies * 22) ** 2)), grid)
    logits *= 9 / logits.std()
    log_probs = torch.from_numpy(logits).log_softmax(1).float()
    rungs = SoftTargets().rungs(soft, log_probs)
    codes = soft.coder.encode(log_probs, rungs)
    measures = {"soft": dict.fromkeys(soft.measures, 0.0)}
    return CodedSample(
        image_digest=bytes(16), codes={"soft": codes[0].numpy()}, rungs={"soft": int(rungs[0])}, measures=measures
    )


def draw(reader: CacheReader, ids: list[str], number: int) -> WindowRequest:
    """The window of that number: any process draws the same."""
    rng = np.random.default_rng(number)
    entry = reader.entry(ids[int(rng.integers(len(ids)))])
    spans = [(int(rng.integers(max(cells - SIDE, 0) + 1)), min(SIDE, cells)) for cells in entry.mapping.shape]
    return WindowRequest(entry, "soft", *(range(start, start + length) for start, length in spans))


def readers(reader: CacheReader) -> Iterator[tuple[str, Read]]:
    """What is compared: name and action on one window."""

    def codes(request: WindowRequest) -> npt.NDArray[Any]:
        return reader.window(*request)

    def in_numpy(request: WindowRequest) -> object:
        return reader.decode("soft", codes(request)[None], np.array([request.entry.rungs["soft"]]))

    def in_torch(request: WindowRequest) -> object:
        window = torch.from_numpy(codes(request))[None]
        return reader.decode("soft", window, torch.tensor([request.entry.rungs["soft"]]))

    yield "segkd, codes", codes
    yield "segkd, float32 log-probabilities, numpy", in_numpy
    yield "segkd, float32 log-probabilities, torch", in_torch
    yield f"zarr-python {zarr.__version__}, codes", _by_slices(reader, _zarr_array)
    if importlib.util.find_spec("tensorstore") and reader.spec.targets["soft"].codec != "context":
        yield "tensorstore, codes", _by_slices(reader, _tensorstore_array)


def _zarr_array(folder: Path) -> Callable[[slice], npt.NDArray[Any]]:
    array = zarr.open_array(folder, mode="r", zarr_format=3)
    return lambda tiles: np.asarray(array[tiles])


def _tensorstore_array(folder: Path) -> Callable[[slice], npt.NDArray[Any]]:
    tensorstore: Any = importlib.import_module("tensorstore")  # no dependency: compared with where it is installed
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 26}})
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}, "recheck_cached_data": "open"}
    array = tensorstore.open(spec, context=context).result()
    return lambda tiles: np.asarray(array[tiles].read().result())


def _by_slices(reader: CacheReader, opened: Callable[[Path], Callable[[slice], npt.NDArray[Any]]]) -> Read:
    """A window by one slice of tiles for each row of tiles, which is what zarr does best."""
    tile, arrays = reader.spec.tile, {}

    def read(request: WindowRequest) -> npt.NDArray[Any]:
        entry, target, rows, columns = request
        name = f"{target}_exact" if entry.rungs[target] == EXACT else target
        folder = reader.generations[entry.generation].array_folder(name)
        if folder not in arrays:
            arrays[folder] = opened(folder)
        across = tile_shape(entry.mapping.shape, tile)[1]
        first, last = columns.start // tile, (columns.stop - 1) // tile
        strips = []
        for row in range(rows.start // tile, (rows.stop - 1) // tile + 1):
            begin = entry.first_tile + row * across + first
            tiles = arrays[folder](slice(begin, begin + last - first + 1))
            strips.append(tiles.transpose(1, 2, 0, 3).reshape(tiles.shape[1], tile, -1))
        top, left = rows.start // tile * tile, first * tile
        whole = np.concatenate(strips, axis=1)
        return whole[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]

    return read


def windows(name: str, reader: CacheReader, ids: list[str], count: int) -> Iterator[Measurement]:
    compared = dict(readers(reader))
    times: dict[str, list[float]] = {what: [] for what in compared}
    for number in range(-count // 4, count):
        request = draw(reader, ids, abs(number))
        for what, read in compared.items():
            begin = time.perf_counter()
            read(request)
            if number >= 0:  # before, caches fill
                times[what].append((time.perf_counter() - begin) * 1000)
    ours = np.median(times["segkd, codes"])
    for what, values in times.items():
        p50, p99 = np.percentile(values, [50, 99])
        how = "" if what.startswith("segkd") else f"{np.median(values) / ours:.1f} x as long as segkd, codes"
        yield Measurement(name, what, float(p50), float(p99), "ms", how)


class Windows(Dataset[torch.Tensor]):
    """Random windows of a cache, as codes."""

    def __init__(self, reader: CacheReader, ids: list[str], count: int) -> None:
        self.reader, self.ids, self.count = reader, ids, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.reader.window(*draw(self.reader, self.ids, number)))


def loaders(name: str, reader: CacheReader, ids: list[str], count: int) -> Iterator[Measurement]:
    for method in ("fork", "spawn"):
        for workers in (1, 2, 4):
            dataset = Windows(reader, ids, count)
            loader = DataLoader(
                dataset, batch_size=BATCH, num_workers=workers, multiprocessing_context=method, collate_fn=torch.stack
            )
            arriving = iter(loader)
            for _ in range(2 * workers + 2):  # the first ones wait for the workers to start
                next(arriving)
            begin = time.perf_counter()
            delivered = sum(len(batch) for batch in arriving)
            rate = delivered / (time.perf_counter() - begin)
            yield Measurement(name, f"loader, {method}, {workers} workers", rate, None, "windows/s", "")


def measure(name: str, path: Path, count: int) -> Iterator[Measurement]:
    reader = CacheReader(path)
    ids = [entry.id for entry in reader.entries() if min(entry.mapping.shape) >= SIDE]
    if not ids:
        raise SystemExit(f"{path} has no sample of {SIDE}x{SIDE} cells or more; give another --cache")
    # Before any thread of zarr's or tensorstore's: the workers are forked from this process.
    yield from loaders(name, reader, ids, 4 * count)
    yield from windows(name, CacheReader(path), ids, count)


def all_caches(arguments: argparse.Namespace) -> Iterator[Measurement]:
    if arguments.cache:
        yield from measure(Path(arguments.cache).name, Path(arguments.cache), arguments.windows)
        return
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            "plain": CacheConfig(max_kl=BOUND),
            "dense": CacheConfig(max_kl=BOUND, profile="dense"),
            "T=1,4": CacheConfig(max_kl=BOUND, temperatures=(1.0, 4.0)),
        }
        for name, config in configs.items():
            if config.profile == "dense" and not importlib.util.find_spec("numba"):
                continue
            path = Path(folder) / f"{name}.zarr"
            generate(path, config, classes=arguments.classes, grid=tuple(arguments.grid), samples=arguments.samples)
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / arguments.samples
            how = f"{arguments.classes}x{arguments.grid[0]}x{arguments.grid[1]} cells, {arguments.samples} samples"
            yield Measurement(name, "generated", size, None, "bytes/sample", how)
            yield from measure(name, path, arguments.windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="a cache of one's own, with soft targets")
    parser.add_argument("--windows", type=int, default=1000, help="windows that are timed")
    parser.add_argument("--classes", type=int, default=11, help="of the generated caches")
    parser.add_argument("--grid", type=int, nargs=2, default=(90, 120), help="cells of a generated sample")
    parser.add_argument("--samples", type=int, default=96, help="of the generated caches")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores, as asked for
    machine = {
        "python": platform.python_version(),
        "zarr": zarr.__version__,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "tensorstore": "installed" if importlib.util.find_spec("tensorstore") else "not installed",
    }
    rows = all_caches(arguments)
    if arguments.json:
        print(json.dumps({"machine": machine, "measurements": [dataclasses.asdict(row) for row in rows]}))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'cache':<8}{'what':<44}{'p50':>11}{'p99':>9}")
    for row in rows:
        tail = f"{row.p99:>9.3f}" if row.p99 is not None else " " * 9
        p50 = f"{row.p50:>11.3f}" if row.p99 is not None else f"{row.p50:>11,.0f}"
        print(f"{row.cache:<8}{row.what:<44}{p50}{tail} {row.unit:<13}{row.how}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
