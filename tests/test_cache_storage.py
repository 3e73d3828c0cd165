"""The cache on disk: what is written is read, units are whole or absent, a plan is a pure function of its list."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from segkd.storage import publish
from segkd.storage.coding import CompandedDistribution, Raw
from segkd.storage.errors import (
    CacheDamagedError,
    CacheError,
    CacheExistsError,
    CacheMismatchError,
    CacheNotFoundError,
    ConfigError,
    IncompleteCacheError,
)
from segkd.storage.generation import read_spec
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import Plan, PlannedSample, plan_units, tile_shape
from segkd.storage.packing import cut_tile, pack_shards, zarr_codecs
from segkd.storage.reader import CacheReader
from segkd.storage.spec import CacheSpec, TargetSpec, require_equal
from segkd.storage.statistics import Measure
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter

TILE = 8
GENERATION = "generations/0"
SIZES = ((30, 50), (64, 64), (9, 100), (120, 33), (8, 8), (64, 64), (200, 200))


def planned(number: int, size: tuple[int, int], role: str = "train") -> PlannedSample:
    mapping = Mapping(network_axis(size[0], -(-size[0] // 4)), network_axis(size[1], -(-size[1] // 4)))
    return PlannedSample(id=f"{role}/{number:03}", role=role, image_size=size, mapping=mapping)


def small_plan(unit_samples: int = 2) -> Plan:
    samples = [planned(k, size) for k, size in enumerate(SIZES)] + [planned(k, SIZES[k], "report") for k in range(3)]
    return plan_units(samples, unit_samples=unit_samples, tile=TILE)


def spec_for(**changes: str) -> CacheSpec:
    targets = {
        "soft": TargetSpec(
            name="soft",
            channels=3,
            coder=CompandedDistribution(),
            bound=1e-3,
            measures=("kl", "changed"),
            bounded=("kl",),
            parameters={"temperatures": [1.0]},
        ),
        "ramps": TargetSpec(
            name="ramps", channels=2, coder=Raw(), bound=0.0, measures=("error",), bounded=("error",), parameters={}
        ),
    }
    fingerprints = {"teacher": "t", "preprocessing": "p", "classes": "c", "coding": "k", **changes}
    return CacheSpec(
        classes=("a", "b", "c"),
        targets=targets,
        tile=TILE,
        fingerprints=fingerprints,
        teacher={"reference": "x", "mean": (0.5, 0.5, 0.5)},
    )


def codes_of(sample: PlannedSample) -> CodedSample:
    """Codes that tell sample, channel and cell apart."""
    seed = int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:4], "big")
    rng = np.random.default_rng(seed)
    height, width = sample.mapping.shape
    y = sample.mapping.y.scale * np.arange(height) + sample.mapping.y.offset
    x = sample.mapping.x.scale * np.arange(width) + sample.mapping.x.offset
    return CodedSample(
        image_digest=hashlib.sha256(sample.id.encode()).digest()[:16],
        codes={
            "soft": rng.integers(0, 256, (3, height, width), np.uint8),
            "ramps": np.stack(np.meshgrid(y, x, indexing="ij")).astype(np.float32),
        },
        rungs={"soft": 0, "ramps": 0},
        measures={"soft": {"kl": 4e-4 + sample.image_size[0] * 1e-5, "changed": 0.01}, "ramps": {"error": 0.0}},
    )


def write_units(writer: CacheWriter, units: Sequence[int] | None = None) -> None:
    for unit in writer.plan.units:
        if units is None or unit.number in units:
            samples = writer.plan.of(unit)
            writer.write(unit, [codes_of(sample) for sample in samples])


def write_cache(path: Path) -> Plan:
    plan = small_plan()
    writer = CacheWriter(path, spec_for(), plan)
    write_units(writer)
    assert writer.seal()
    return plan


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@given(
    st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=12), st.integers(1, 5), st.data()
)
def test_a_plan_does_not_depend_on_the_order_and_gives_every_sample_its_own_tiles(
    sizes: list[tuple[int, int]], unit_samples: int, data: st.DataObject
) -> None:
    samples = [planned(k, size, ("train", "report")[k % 2]) for k, size in enumerate(sizes)]
    plan = plan_units(samples, unit_samples=unit_samples, tile=TILE)
    assert plan == plan_units(data.draw(st.permutations(samples)), unit_samples=unit_samples, tile=TILE)
    used: set[int] = set()
    for unit in plan.units:
        owned = range(
            unit.first_shard * plan.spec.shard_tiles, (unit.first_shard + unit.shards) * plan.spec.shard_tiles
        )
        assert unit.samples <= unit_samples
        for sample, first in zip(plan.of(unit), unit.first_tiles, strict=True):
            tiles = set(range(first, first + sample.tiles(TILE)))
            assert sample.role == unit.role
            assert tiles <= set(owned)
            assert not tiles & used
            used |= tiles
    assert sum(unit.samples for unit in plan.units) == len(samples)
    assert sum(unit.shards for unit in plan.units) == plan.spec.shards


def test_an_empty_list_and_an_id_twice_are_refused(tmp_path: Path) -> None:
    empty = plan_units([], unit_samples=1, tile=8)
    with pytest.raises(CacheError, match=r"^there is no sample to cache; check the roles and the lists of the data$"):
        CacheWriter(tmp_path / "c.zarr", spec_for(), empty)
    assert not (tmp_path / "c.zarr").exists()
    with pytest.raises(CacheError, match=r"^two samples have the id 'train/001'; ids must be unique in a cache$"):
        plan_units([planned(1, (8, 8)), planned(1, (9, 9))], unit_samples=1, tile=8)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^the codec 'gzip' is none of .*zstd; choose one of these$"):
        zarr_codecs("gzip")


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9))
def test_tiles_are_cut_row_by_row(height: int, width: int, tile: int) -> None:
    codes = np.arange(1, 2 * height * width + 1, dtype=np.int64).reshape(2, height, width)
    for number, (row, column) in enumerate(np.ndindex(tile_shape((height, width), tile))):
        cut = cut_tile(codes, number, tile, codes.dtype)
        assert cut.shape == (2, tile, tile)
        part = codes[:, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        np.testing.assert_array_equal(cut[:, : part.shape[1], : part.shape[2]], part)
        assert np.count_nonzero(cut) == part.size


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["u1", "f2", "f4"])
def test_shards_are_those_that_zarr_writes_whatever_the_threads(dtype: str, threads: int) -> None:
    rng = np.random.default_rng(0)
    # Two samples of 6 and 4 tiles in shards of 4, with a gap between them; the third shard has only one of its tiles.
    codes = [rng.integers(0, 9, shape).astype(dtype) for shape in ((2, 11, 20), (2, 16, 15))]
    codes[1][:] = 3
    documents: dict[str, Any] = {}
    array = zarr.create_array(
        MemoryStore(documents),
        shape=(16, 2, TILE, TILE),
        shards=(4, 2, TILE, TILE),
        chunks=(1, 2, TILE, TILE),
        dtype=dtype,
        fill_value=0,
        **zarr_codecs("zstd"),
        config={"write_empty_chunks": False},
    )
    placed = [(1, codes[0]), (8, codes[1][:, :8])]
    for first, values in placed:
        count = tile_shape((values.shape[1], values.shape[2]), TILE)
        array[first : first + count[0] * count[1]] = np.stack(
            [cut_tile(values, k, TILE, values.dtype) for k in range(count[0] * count[1])]
        )
    with ThreadPoolExecutor(threads) as executor:
        shards = pack_shards(placed, tile=TILE, shard_tiles=4, dtype=codes[0].dtype, codec="zstd", executor=executor)
        packed = dict(shards)
    expected = {name: content.to_bytes() for name, content in documents.items() if name != "zarr.json"}
    assert {f"c/{shard}/0/0/0": content for shard, content in packed.items()} == expected


def test_what_is_written_is_read(tmp_path: Path) -> None:
    plan = write_cache(tmp_path / "cache.zarr")
    reader = pickle.loads(pickle.dumps(CacheReader(tmp_path / "cache.zarr")))
    assert [entry.id for entry in reader.entries()] == [sample.id for sample in plan.samples]
    assert len(reader.entries("report")) == 3
    for sample in plan.samples:
        entry, coded = reader.entry(sample.id), codes_of(sample)
        assert (entry.image_size, entry.mapping, entry.role) == (sample.image_size, sample.mapping, sample.role)
        assert entry.image_digest == coded.image_digest
        for target, codes in coded.codes.items():
            height, width = entry.mapping.shape
            np.testing.assert_array_equal(reader.window(entry, target, range(height), range(width)), codes)


@settings(max_examples=60)
@given(st.data())
def test_a_window_is_the_part_of_the_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "windows.zarr"
    if not path.exists():
        write_cache(path)
    reader = CacheReader(path)
    sample = data.draw(st.sampled_from(small_plan().samples))
    height, width = sample.mapping.shape
    y0, x0 = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
    rows, columns = range(y0, data.draw(st.integers(y0, height))), range(x0, data.draw(st.integers(x0, width)))
    window = reader.window(reader.entry(sample.id), "ramps", rows, columns)
    expected = codes_of(sample).codes["ramps"][:, rows.start : rows.stop, columns.start : columns.stop]
    np.testing.assert_array_equal(window, expected)


def test_zarr_alone_reads_a_sample(tmp_path: Path) -> None:
    plan = write_cache(tmp_path / "cache.zarr")
    root = zarr.open_group(tmp_path / "cache.zarr", mode="r")
    spec, generation = root.attrs["segkd"], root["generations/0"]
    unit = plan.units[0]
    first = unit.first_tiles[0]
    rows, columns = tile_shape(plan.samples[0].mapping.shape, spec["tile"])
    tiles = generation["soft"][first : first + rows * columns]
    whole = tiles.reshape(rows, columns, 3, TILE, TILE).transpose(2, 0, 3, 1, 4).reshape(3, rows * TILE, columns * TILE)
    height, width = plan.samples[0].mapping.shape
    np.testing.assert_array_equal(whole[:, :height, :width], codes_of(plan.samples[0]).codes["soft"])
    assert sorted(name for name, _ in generation.members()) == ["commits", "ramps", "samples", "soft", "units"]


def test_every_chunk_has_a_checksum(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache.zarr")
    for name in ("soft", "ramps", "samples", "units"):
        metadata = json.loads((tmp_path / "cache.zarr" / GENERATION / name / "zarr.json").read_text())
        codecs = metadata["codecs"]
        if codecs[0]["name"] == "sharding_indexed":
            assert codecs[0]["configuration"]["index_codecs"][-1]["name"] == "crc32c"
            codecs = codecs[0]["configuration"]["codecs"]
        assert [codec["name"] for codec in codecs] == ["bytes", "zstd", "crc32c"]


def test_any_order_and_any_interruption_give_the_same_bytes(tmp_path: Path) -> None:
    write_cache(tmp_path / "whole.zarr")
    plan = small_plan()
    for units in ([3, 1], [0], None):
        writer = CacheWriter(tmp_path / "parts.zarr", spec_for(), plan)
        assert 3 not in [unit.number for unit in writer.pending()] or units == [3, 1]
        write_units(writer, units)
    assert writer.seal()
    assert files_of(tmp_path / "parts.zarr") == files_of(tmp_path / "whole.zarr")


def test_an_unfinished_cache_says_how_far_it_is(tmp_path: Path) -> None:
    plan = small_plan()
    writer = CacheWriter(tmp_path / "c.zarr", spec_for(), plan)
    write_units(writer, [0])
    assert not writer.seal()
    with pytest.raises(
        IncompleteCacheError, match=r"c.zarr is not finished: 1 of \d+ units are written; run segkd teacher-cache again"
    ):
        CacheReader(tmp_path / "c.zarr")
    assert len(CacheReader(tmp_path / "c.zarr", partial=True).entries()) == plan.units[0].samples


def test_the_second_of_two_owners_loses_politely(tmp_path: Path) -> None:
    plan = small_plan()
    first, second = (CacheWriter(tmp_path / "c.zarr", spec_for(), plan) for _ in range(2))
    samples = plan.of(plan.units[0])
    coded = [codes_of(sample) for sample in samples]
    assert first.write(plan.units[0], coded) is not None
    before = files_of(tmp_path / "c.zarr")
    assert second.write(plan.units[0], [*coded[:-1], codes_of(planned(77, samples[-1].image_size))]) is None
    assert files_of(tmp_path / "c.zarr") == before


def test_a_worker_whose_attempt_was_cleared_away_by_the_sealer_loses_politely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan()
    late = CacheWriter(tmp_path / "c.zarr", spec_for(), plan)
    write_synced = publish.write_synced

    def seal_first(path: Path, content: bytes) -> None:
        monkeypatch.setattr(publish, "write_synced", write_synced)
        write_cache(tmp_path / "c.zarr")
        write_synced(path, content)

    monkeypatch.setattr(publish, "write_synced", seal_first)
    write_units(late, [0])
    assert late.seal()
    write_cache(tmp_path / "whole.zarr")
    assert files_of(tmp_path / "c.zarr") == files_of(tmp_path / "whole.zarr")


def test_a_finished_cache_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_cache(tmp_path / "c.zarr")
    monkeypatch.setattr(publish, "write_synced", lambda *_: pytest.fail("something was written"))
    writer = CacheWriter(tmp_path / "c.zarr", spec_for(), plan)
    assert writer.pending() == []
    assert writer.seal()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import importlib.util
spec = importlib.util.spec_from_file_location("cases", {file!r})
cases = importlib.util.module_from_spec(spec)
sys.modules["cases"] = cases
spec.loader.exec_module(cases)
from pathlib import Path
from typing import Any
from segkd.storage import publish
plan = cases.small_plan()
writer = cases.CacheWriter(Path({path!r}), cases.spec_for(), plan)
writer.pending()
left = [int(sys.argv[1])]
def hook(event, args):
    # Every change that the file system is asked for is a moment to die at.
    if event in ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
        if {path!r} in str(args[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
cases.write_units(writer)
writer.seal()
"""


def test_a_kill_at_any_change_of_the_file_system_loses_nothing(tmp_path: Path) -> None:
    write_cache(tmp_path / "whole.zarr")
    path = tmp_path / "killed.zarr"
    script = KILLED.format(tests=str(Path(__file__).parent), file=__file__, path=str(path))
    kills = 0
    for moment in [2, 5, 13, 9, 17, 21, 12, 18]:
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(moment)], check=False)
        kills += done.returncode == -signal.SIGKILL
        committed = sorted(file.name for file in (path / GENERATION / "commits").glob("0*.json"))
        for name in committed:
            record = json.loads((path / GENERATION / "commits" / name).read_bytes())
            for place, entry in record["objects"].items():
                assert hashlib.sha256((path / GENERATION / place).read_bytes()).hexdigest() == entry["sha256"]
    plan = small_plan()
    writer = CacheWriter(path, spec_for(), plan)
    write_units(writer, [unit.number for unit in writer.pending()])
    assert writer.seal()
    assert kills >= 4
    assert files_of(path) == files_of(tmp_path / "whole.zarr")


def test_a_decided_unit_is_finished_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan()
    writer = CacheWriter(tmp_path / "c.zarr", spec_for(), plan)
    with monkeypatch.context() as patch:
        patch.setattr(publish.UnitPublisher, "_promote", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(publish.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_units(writer, [0])
    assert not writer.publisher.committed(0)
    again = CacheWriter(tmp_path / "c.zarr", spec_for(), plan)
    assert 0 not in [unit.number for unit in again.pending()]
    write_units(again, [unit.number for unit in again.pending()])
    assert again.seal()
    write_cache(tmp_path / "whole.zarr")
    assert files_of(tmp_path / "c.zarr") == files_of(tmp_path / "whole.zarr")


FORGED: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "cut off": lambda decision, outside: None,  # noqa: ARG005
    "empty": lambda decision, outside: decision.clear(),  # noqa: ARG005
    "absolute attempt": lambda decision, outside: decision.update(attempt=str(outside)),
    "attempt above": lambda decision, outside: decision.update(attempt=f"../../../../../{outside.name}"),
    "attempt of another unit": lambda decision, outside: decision.update(  # noqa: ARG005
        attempt="00000001" + decision["attempt"][8:]
    ),
    "absolute absent": lambda decision, outside: decision.update(absent=[str(outside / "0")]),
    "absent above": lambda decision, outside: decision.update(absent=[f"../../../{outside.name}/0"]),
    "absent of another unit": lambda decision, outside: decision.update(absent=["samples/c.1.0"]),  # noqa: ARG005
    "absent directory": lambda decision, outside: decision.update(absent=["units/c.0.0"]),  # noqa: ARG005
    "order": lambda decision, outside: decision["order"].append(str(outside / "1")),
    "record of another unit": lambda decision, outside: decision["record"].update(unit=1),  # noqa: ARG005
}


@pytest.mark.parametrize("forge", FORGED)
def test_a_forged_or_damaged_decision_touches_nothing_and_is_left_aside(
    forge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in "01":
        (outside / name).write_text("mine")
    plan, path = small_plan(), tmp_path / "c.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(publish.UnitPublisher, "_promote", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_units(CacheWriter(path, spec_for(), plan), [0])
    winner = path / GENERATION / "commits/attempts/00000000.winner.json"
    decision = json.loads(winner.read_bytes())
    decision.pop("sha256", None)
    FORGED[forge](decision, outside)
    content = publish.canonical(publish.signed(decision))
    winner.write_bytes(content[:40] if forge == "cut off" else content)
    writer = CacheWriter(path, spec_for(), plan)
    pending = [unit.number for unit in writer.pending()]
    assert 0 in pending
    assert not winner.exists()
    assert f"{winner} is damaged and is left aside; unit 0 is pending" in caplog.text
    assert files_of(outside) == {"0": b"mine", "1": b"mine"}
    write_units(writer, pending)
    assert writer.seal()
    write_cache(tmp_path / "whole.zarr")
    assert files_of(path) == files_of(tmp_path / "whole.zarr")


def test_a_disk_that_is_full_at_any_change_holds_nothing_up_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_units([planned(0, (8, 8))], unit_samples=1, tile=TILE)
    whole = CacheWriter(tmp_path / "whole.zarr", spec_for(), plan)
    write_units(whole)
    whole.seal()
    failures = 0
    for moment in range(1, 100):
        path, left = tmp_path / f"{moment}.zarr", iter([False] * (moment - 1) + [True])
        writer = CacheWriter(path, spec_for(), plan)

        def full(change: Callable[..., object], left: Iterator[bool], *arguments: object) -> object:
            if next(left, False):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return change(*arguments)

        with monkeypatch.context() as patch:
            for name in ("fsync", "link", "mkdir", "rename", "replace"):
                patch.setattr(os, name, partial(full, getattr(os, name), left))
            try:
                write_units(writer)
                writer.seal()
            except CacheError:
                failures += 1
        again = CacheWriter(path, spec_for(), plan)
        write_units(again, [unit.number for unit in again.pending()])
        assert again.seal()
        assert files_of(path) == files_of(tmp_path / "whole.zarr")
        if next(left, None) is not None:
            break
    assert failures > 20


def test_a_commit_record_comes_after_the_folders_of_its_objects_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan()
    writer = CacheWriter(tmp_path / "c.zarr", spec_for(), plan)
    synced: list[Path] = []
    sync_folder = publish.sync_folder
    monkeypatch.setattr(publish, "sync_folder", lambda folder: (synced.append(folder), sync_folder(folder)))
    write_units(writer, [0])
    before = synced[: synced.index(tmp_path / "c.zarr" / GENERATION / "commits")]
    for name in json.loads((tmp_path / "c.zarr" / GENERATION / publish.record_name(0)).read_bytes())["objects"]:
        parents = [parent for parent in (tmp_path / "c.zarr" / GENERATION / name).parents if parent != tmp_path]
        assert set(parents) - set(tmp_path.parents) <= set(before)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (28, "the disk is full; free some space"),
        (30, "the file system is read-only; remount it or choose another path"),
    ],
)
def test_a_disk_that_refuses_leaves_finished_units_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    plan = small_plan()
    writer = CacheWriter(tmp_path / "c.zarr", spec_for(), plan)
    write_units(writer, [0])
    before = files_of(tmp_path / "c.zarr")

    def refuse(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(publish, "write_synced", refuse)
    with pytest.raises(CacheError) as caught:
        write_units(writer, [1])
    assert str(caught.value) == (
        f"cannot write to {tmp_path / 'c.zarr'}: {remedy}, then run the same command again: finished units are kept"
    )
    assert files_of(tmp_path / "c.zarr") == before


def test_another_teacher_is_named_and_nothing_changes(tmp_path: Path) -> None:
    plan = write_cache(tmp_path / "c.zarr")
    before = files_of(tmp_path / "c.zarr")
    with pytest.raises(CacheMismatchError) as caught:
        CacheWriter(tmp_path / "c.zarr", spec_for(teacher="another", coding="other"), plan)
    assert str(caught.value) == (
        f"{tmp_path / 'c.zarr'} differs from this run in the teacher, the coding; "
        "give this run another cache.path, or remove the old cache"
    )
    other = plan_units(plan.samples[:-1], unit_samples=2, tile=TILE)
    with pytest.raises(CacheMismatchError, match="was written with another list of samples; give this run another"):
        CacheWriter(tmp_path / "c.zarr", spec_for(), other)
    assert files_of(tmp_path / "c.zarr") == before


def test_something_else_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    plan = small_plan()
    with pytest.raises(CacheExistsError, match="photos exists and is not a cache; choose another path or remove it"):
        CacheWriter(tmp_path / "photos", spec_for(), plan)
    with pytest.raises(CacheExistsError, match=r"a.jpg exists and is not a cache; choose another path or remove it"):
        CacheWriter(tmp_path / "photos" / "a.jpg", spec_for(), plan)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(
        CacheExistsError, match=r"other.zarr is a Zarr group but not a segkd cache; choose another path"
    ):
        CacheWriter(tmp_path / "other.zarr", spec_for(), plan)


def test_there_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(
        CacheNotFoundError, match=r"there is no cache at .*none.zarr; write one with segkd teacher-cache"
    ):
        CacheReader(tmp_path / "none.zarr")


def with_format(path: Path, version: object) -> Path:
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["segkd"]["format"] = version
    document["attributes"]["segkd"]["targets"][0]["novelty"] = 1
    document["attributes"]["segkd"]["targets"][0]["coder"]["novelty"] = [1]
    (path / "zarr.json").write_text(json.dumps(document))
    return path


def test_an_unpromised_format_and_a_newer_major_one_are_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr")
    for version, message in (
        ("0.1", "which was not promised to last; this version of segkd reads 1.0: remove it and write it again with"),
        ("2.0", "this version of segkd reads 1.0; install a newer one: pip install --upgrade segkd"),
    ):
        with pytest.raises(CacheMismatchError, match=rf"c.zarr has cache format {version}, {message}"):
            read_spec(with_format(tmp_path / "c.zarr", version))


@pytest.mark.parametrize("version", [None, 1, 1.0, "", "1", "1.", "v1.0", "-1.0", "1.0\n", [1]])
def test_what_names_no_format_is_not_told_to_be_a_newer_one(tmp_path: Path, version: object) -> None:
    write_cache(tmp_path / "c.zarr")
    with pytest.raises(CacheMismatchError) as caught:
        read_spec(with_format(tmp_path / "c.zarr", version))
    assert str(caught.value) == (
        f"{tmp_path / 'c.zarr'} says {version!r} where the format of a cache should stand, such as '1.0': it is no "
        "cache of a format that segkd knows, or damaged; "
        "segkd cache verify lists all damage, segkd cache repair writes it again"
    )


def test_a_newer_minor_format_is_read(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr")
    require_equal(spec_for(), read_spec(with_format(tmp_path / "c.zarr", "1.7")), "c.zarr")


def test_an_unknown_sample_is_named(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.zarr")
    with pytest.raises(
        CacheMismatchError, match=r"c.zarr holds no sample 'train/999': its role is none of cache.roles, or the data"
    ):
        CacheReader(tmp_path / "c.zarr").entry("train/999")


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
@pytest.mark.parametrize("name", ["generations/0/soft/c.0.0.0.0", "generations/0/samples/c.0.0"])
def test_what_is_damaged_or_lost_is_not_returned(tmp_path: Path, name: str, damage: str) -> None:
    plan = write_cache(tmp_path / "c.zarr")
    file = tmp_path / "c.zarr" / name
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    if damage == "lose":
        file.unlink()
    reader = CacheReader(tmp_path / "c.zarr")
    with pytest.raises(CacheDamagedError, match=rf"{name} cannot be read \(.*; segkd cache verify lists all damage"):
        reader.window(reader.entry(plan.samples[0].id), "soft", range(1), range(1))


@pytest.mark.parametrize("name", ["zarr.json", "generations/0/commits/00000000.json"])
def test_a_description_that_is_cut_off_is_damage(tmp_path: Path, name: str) -> None:
    write_cache(tmp_path / "c.zarr")
    file = tmp_path / "c.zarr" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CacheDamagedError, match=rf"{name} cannot be read \("):
        CacheReader(tmp_path / "c.zarr").records()


@pytest.mark.parametrize("content", [b"", b"[1]", b"3", b"[" * 100_000, b'{"a": \xff}'])
def test_whatever_stands_where_a_description_was_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "zarr.json").write_bytes(content)
    with pytest.raises(
        CacheDamagedError,
        match=r"zarr.json cannot be read \(.*; segkd cache verify lists all .* repair writes it again$",
    ):
        read_spec(tmp_path)


def test_a_lost_commit_record_is_damage_and_written_again(tmp_path: Path) -> None:
    plan = write_cache(tmp_path / "c.zarr")
    before = files_of(tmp_path / "c.zarr")
    (tmp_path / "c.zarr" / GENERATION / publish.record_name(1)).unlink()
    message = rf"c.zarr was finished and has lost 1 of its {len(plan.units)} commit records; segkd cache repair"
    with pytest.raises(CacheDamagedError, match=message):
        CacheReader(tmp_path / "c.zarr").records()
    writer = CacheWriter(tmp_path / "c.zarr", spec_for(), plan)
    write_units(writer, [unit.number for unit in writer.pending()])
    assert files_of(tmp_path / "c.zarr") == before


@given(st.lists(st.floats(0, 1e3), max_size=12), st.integers(0, 12))
def test_statistics_add_exactly_in_any_grouping(values: list[float], cut: int) -> None:
    whole, left, right = Measure(), Measure(), Measure()
    for k, value in enumerate(values):
        whole.add(value)
        (left if k < cut else right).add(value)
    right.merge(left)
    assert right == whole
    assert Measure.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    assert sum(whole.histogram.values()) == len(values)
    if values:
        assert whole.mean == pytest.approx(float(np.mean(values)), abs=1e-11)
        assert whole.largest == pytest.approx(max(values), abs=1e-11)


def test_a_measure_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a coding measure must be finite, got nan$"):
        Measure().add(float("nan"))


def test_the_example_of_the_format_page_reads_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    plan = write_cache(tmp_path / "cache.zarr")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(example, found)
    reader = CacheReader(tmp_path / "cache.zarr")
    expected = np.exp(reader.values(reader.entry(plan.samples[0].id), "soft"))
    np.testing.assert_allclose(found["p"], expected, rtol=1e-4, atol=1e-7)
