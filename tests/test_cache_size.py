"""What a cache costs besides its codes, and that images of very different sizes stand in one cache side by side."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkd.storage import layout
from segkd.storage.coding import CompandedDistribution, UniformSteps
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import CUT, ENTRY_COST, WHOLE, PlannedSample, plan_units, tile_shape, usual_tile
from segkd.storage.reader import CacheReader
from segkd.storage.spec import CacheSpec, TargetSpec
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter

CHECKSUM = 4
ROOT = Path(__file__).parent.parent
SMALL, CAMVID, LARGE = (32, 32), (360, 480), (8192, 8192)


def spec(tile: int = 64) -> CacheSpec:
    """Three classes instead of eleven: what is counted here does not depend on them."""
    soft = TargetSpec(
        name="soft",
        channels=3,
        coder=CompandedDistribution(),
        bound=1e-3,
        measures=("kl_cells", "kl_pixels", "changed_pixels", "entropy", "confidence"),
        bounded=("kl_cells", "kl_pixels"),
        parameters={"temperatures": [1.0]},
        fallback=True,
    )
    first_order = TargetSpec(
        name="first_order",
        channels=1,
        coder=UniformSteps(reach=(1.5,)),
        bound=1e-2,
        measures=("largest_error", "mean_error", "recomputed_error"),
        bounded=("largest_error",),
        parameters={"features": "softmax"},
    )
    return CacheSpec(
        classes=("a", "b", "c"),
        targets={"soft": soft, "first_order": first_order},
        tile=tile,
        fingerprints=dict.fromkeys(("teacher", "preprocessing", "classes", "coding"), "0" * 64),
        teacher={"reference": "teacher.py:build"},
    )


def planned(name: str, role: str, size: tuple[int, int]) -> PlannedSample:
    axes = (network_axis(side, -(-side // 4)) for side in size)
    return PlannedSample(id=name, role=role, image_size=size, mapping=Mapping(*axes))


def write(path: Path, samples: Sequence[PlannedSample]) -> tuple[int, int]:
    """Bytes that a cache of empty maps takes besides its tiles, and those of them that index the tiles."""
    tile = usual_tile(samples)
    plan = plan_units(samples, unit_samples=64, tile=tile, cell_bytes=4)
    writer, rng = CacheWriter(path, spec(tile), plan), np.random.default_rng(0)
    for unit in plan.units:
        coded = []
        for sample in plan.of(unit):
            codes = np.zeros((3, *sample.mapping.shape), np.uint8)
            measures = {
                name: {measure: float(rng.random()) * 1e-3 for measure in target.measures}
                for name, target in spec().targets.items()
            }
            digest = hashlib.sha256(sample.id.encode()).digest()[:16]
            targets = {"soft": codes, "first_order": codes[:1]}
            coded.append(
                CodedSample(image_digest=digest, codes=targets, rungs=dict.fromkeys(targets, 0), measures=measures)
            )
        writer.write(unit, coded)
    assert writer.seal()
    total, tiles, entries = 0, 0, 0
    for file in path.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        total += len(content)
        if file.parent.name in ("soft", "first_order") and file.name.startswith("c."):
            index = np.frombuffer(content[-CHECKSUM - ENTRY_COST * plan.spec.shard_tiles : -CHECKSUM], "<u8")
            lengths = index.reshape(-1, 2)[:, 1]
            used = lengths != np.iinfo(np.uint64).max
            tiles += int((lengths[used] - CHECKSUM).sum())
            entries += int(used.sum())
    return total - tiles, entries * (ENTRY_COST + CHECKSUM)


def test_everything_but_the_codes_is_two_percent_of_camvid_and_200_bytes_a_sample(tmp_path: Path) -> None:
    samples = [planned(f"train/0016E5_{k:05}", "train", CAMVID) for k in range(367)]
    samples += [planned(f"val/0016E5_{k:05}", "report", CAMVID) for k in range(101)]
    besides, _ = write(tmp_path / "c.zarr", samples)
    payload = 14_800 * len(samples)  # bytes of the coded maps of a real teacher, 90x120 cells
    assert besides / payload < 0.02
    assert besides / len(samples) < 200


def test_everything_but_the_codes_is_200_bytes_a_small_sample(tmp_path: Path) -> None:
    samples = [planned(f"train/photograph_{k:06}", "train" if k % 10 else "report", (128, 160)) for k in range(1000)]
    besides, _ = write(tmp_path / "c.zarr", samples)
    assert besides / len(samples) < 200


def test_one_very_large_image_among_small_ones_costs_the_index_of_its_own_tiles(tmp_path: Path) -> None:
    samples = [planned(f"train/photograph_{k:06}", "train", SMALL) for k in range(600)]
    samples.append(planned("train/photograph_0003x", "train", LARGE))
    besides, index = write(tmp_path / "c.zarr", samples)
    assert (besides - index) / len(samples) < 200
    reader = CacheReader(tmp_path / "c.zarr")
    entry = reader.entry("train/photograph_0003x")
    assert entry.mapping.shape == (2048, 2048)
    assert reader.window(entry, "soft", range(2040, 2048), range(1000, 1100)).shape == (3, 8, 100)
    assert reader.entry("train/photograph_000300").mapping.shape == (8, 8)


def test_the_benchmark_counts_the_same(tmp_path: Path) -> None:
    """``benchmarks/overhead.py``, on samples of one tile and of several."""
    samples = [planned(f"train/{k}", "train", size) for k, size in enumerate([SMALL, CAMVID, CAMVID, (600, 400)])]
    besides, _ = write(tmp_path / "c.zarr", samples)
    found = importlib.util.spec_from_file_location("overhead", ROOT / "benchmarks" / "overhead.py")
    assert found is not None
    assert found.loader is not None
    overhead = importlib.util.module_from_spec(found)
    sys.modules["overhead"] = overhead
    found.loader.exec_module(overhead)
    counted = overhead.count(tmp_path / "c.zarr")
    assert (counted.samples, counted.cut, counted.tile) == (4, 1, 120)
    assert counted.total == besides
    assert counted.payload + besides == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    # Two targets; four samples in five tiles more than one each: 150x100 cells in tiles of 120.
    assert counted.parts["tiles' checksums"] == 2 * 5 * CHECKSUM


sides = st.integers(1, 300)


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=40), st.randoms())
def test_usual_grids_are_one_tile(grids: list[tuple[int, int]], random: Random) -> None:
    samples = [planned(f"{k:03}", "train", (4 * h, 4 * w)) for k, (h, w) in enumerate(grids)]
    tile = usual_tile(samples)
    random.shuffle(samples)
    assert usual_tile(samples) == tile
    fitting = [max(grid) for grid in grids if max(grid) <= WHOLE]
    if 2 * len(fitting) < len(grids):
        assert tile == CUT
        return
    assert tile in (*fitting, CUT)
    assert 10 * sum(side <= tile for side in fitting) >= 9 * len(fitting)
    if tile < CUT:
        assert all(tile_shape(grid, tile) == (1, 1) for grid in grids)


@pytest.mark.parametrize(
    ("grids", "tile"),
    [
        ({(90, 120): 408}, 120),
        ({(8, 8): 3}, 8),
        ({(128, 128): 1}, 128),
        ({(129, 20): 1}, CUT),
        ({(256, 512): 10}, CUT),
        ({(94, 125): 80, (125, 94): 20}, 125),
        ({(8, 8): 600, (2048, 2048): 1}, CUT),
        ({(60, 60): 95, (75, 60): 2, (76, 60): 3}, 75),
        ({(90, 120): 50, (256, 512): 50}, 120),
        ({(90, 120): 49, (256, 512): 51}, CUT),
    ],
)
def test_tiles_as_the_design_page_has_them(grids: dict[tuple[int, int], int], tile: int) -> None:
    samples = [
        planned(f"{h}x{w} {k}", "train", (4 * h, 4 * w)) for (h, w), count in grids.items() for k in range(count)
    ]
    assert usual_tile(samples) == tile


sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(st.lists(sizes, min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 200_000))
def test_a_unit_is_bounded_by_its_bytes_as_well_as_by_its_samples(
    images: list[tuple[int, int]], unit_samples: int, bytes_: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "UNIT_BYTES", bytes_)
        samples = [planned(f"{k:03}", "train", size) for k, size in enumerate(images)]
        plan = plan_units(samples, unit_samples=unit_samples, tile=16, cell_bytes=4)
    for unit in plan.units:
        tiles = sum(sample.tiles(16) for sample in plan.of(unit))
        assert unit.samples <= unit_samples
        assert unit.samples == 1 or tiles * 16 * 16 * 4 <= bytes_
        assert unit.shards == -(-tiles // plan.spec.shard_tiles)
    assert plan.spec.shard_tiles <= layout.SHARD_TILES


@given(st.lists(sizes, min_size=1, max_size=40))
def test_shards_never_cost_more_than_one_a_unit_or_one_size_for_the_largest(images: list[tuple[int, int]]) -> None:
    plan = plan_units([planned(f"{k:03}", "train", size) for k, size in enumerate(images)], unit_samples=4, tile=16)
    totals = [sum(sample.tiles(16) for sample in plan.of(unit)) for unit in plan.units]

    def cost(shard_tiles: int) -> int:
        return sum(-(-total // shard_tiles) for total in totals) * (layout.SHARD_COST + 16 * shard_tiles)

    assert cost(plan.spec.shard_tiles) <= min(cost(min(total, layout.SHARD_TILES)) for total in totals)
