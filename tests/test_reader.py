"""Reading a cache: windows against zarr-python's, samples found without a list, damage told and never returned."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from segkd.storage import shards
from segkd.storage.coding import EXACT, CompandedDistribution, UniformSteps
from segkd.storage.errors import CacheChangedError, CacheDamagedError, CacheMismatchError, GeometryError, SegkdError
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import Plan, PlannedSample, plan_units, tile_shape
from segkd.storage.lookup import Lookup
from segkd.storage.reader import CacheReader, WindowRequest
from segkd.storage.repair import ReplacingWriter
from segkd.storage.spec import CacheSpec, TargetSpec
from segkd.storage.statistics import Statistics
from segkd.storage.table import CodedSample, Entry
from segkd.storage.writer import CacheWriter

TILE = 8
SIZES = ((44, 80), (32, 32), (130, 36), (8, 100))
"""Sides of the images in pixels; a cell has four."""
FIRST = [f"{role}/{k:02}" for role, count in (("train", 9), ("auxiliary", 5), ("report", 3)) for k in range(count)]
SECOND = ["train/03", "report/07", "auxiliary/20"]
REMOVED = ["train/03", "auxiliary/01"]
THIRD = ["auxiliary/01", "train/11"]
LIVE = sorted({*FIRST, *SECOND, *THIRD} - {"report/02"})


def spec() -> CacheSpec:
    kinds = {"soft": (3, CompandedDistribution(), True), "first_order": (1, UniformSteps(reach=(1.0,)), False)}
    targets = {
        name: TargetSpec(
            name=name,
            channels=channels,
            coder=coder,
            bound=1e-3,
            measures=("kl",),
            bounded=("kl",),
            parameters={},
            fallback=fallback,
        )
        for name, (channels, coder, fallback) in kinds.items()
    }
    return CacheSpec(classes=("a", "b", "c"), targets=targets, tile=TILE, fingerprints={"teacher": "t"}, teacher={})


def size_of(name: str) -> tuple[int, int]:
    return SIZES[int(name.split("/")[1]) % len(SIZES)]


def plan(names: list[str]) -> Plan:
    samples = []
    for name in names:
        axes = [network_axis(pixels, -(-pixels // 4)) for pixels in size_of(name)]
        samples.append(
            PlannedSample(id=name, role=name.split("/")[0], image_size=size_of(name), mapping=Mapping(*axes))
        )
    return plan_units(samples, unit_samples=2, tile=TILE)


def coded(name: str, version: int) -> CodedSample:
    rng = np.random.default_rng([version, *name.encode()])
    grid = tuple(-(-pixels // 4) for pixels in size_of(name))
    exact = int(name.split("/")[1]) % 4 == 1
    soft = rng.integers(0, 256, (3, *grid), np.uint8)
    log_probs = -rng.random((3, *grid), np.float32).astype(np.float16)
    return CodedSample(
        image_digest=hashlib.sha256(name.encode()).digest()[:16],
        codes={"soft": log_probs if exact else soft, "first_order": soft[:1] // 2},
        rungs={"soft": EXACT if exact else 0, "first_order": 0},
        measures={"soft": {"kl": 4e-4}, "first_order": {"kl": 4e-4}},
    )


def generation(path: Path, number: int, names: list[str], removed: list[str], units: int | None = None) -> CacheWriter:
    writer = CacheWriter(path, spec(), plan(names), generation=number, removed=removed)
    for unit in writer.pending()[:units]:
        writer.write(unit, [coded(sample.id, number) for sample in writer.plan.of(unit)])
    return writer


def write_cache(path: Path) -> Path:
    """Three generations: samples added, replaced, removed, and one removed that comes back."""
    steps: list[tuple[list[str], list[str]]] = [(FIRST, []), (SECOND, REMOVED), (THIRD, ["report/02"])]
    for number, (names, removed) in enumerate(steps):
        assert generation(path, number, names, removed).seal()
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("reader") / "c.zarr")


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "c.zarr"))


def version_of(name: str) -> int:
    return 2 if name in THIRD else int(name in SECOND)


def from_zarr(path: Path, entry: Entry, target: str) -> npt.NDArray[Any]:
    """All codes of a sample, by zarr-python alone."""
    name = f"{target}_exact" if entry.rungs[target] == EXACT else target
    array = zarr.open_group(path, mode="r")[f"generations/{entry.generation}/{name}"]
    assert isinstance(array, zarr.Array)
    height, width = entry.mapping.shape
    rows, columns = tile_shape((height, width), TILE)
    tiles = np.asarray(array[entry.first_tile : entry.first_tile + rows * columns])
    whole = tiles.reshape(rows, columns, -1, TILE, TILE).transpose(2, 0, 3, 1, 4)
    return whole.reshape(-1, rows * TILE, columns * TILE)[:, :height, :width]


def draw_request(data: st.DataObject, reader: CacheReader) -> WindowRequest:
    entry = reader.entry(data.draw(st.sampled_from(LIVE)))
    spans = []
    for length in entry.mapping.shape:
        start = data.draw(st.integers(0, length))
        spans.append(range(start, data.draw(st.integers(start, length))))
    return WindowRequest(entry, data.draw(st.sampled_from(["soft", "first_order"])), *spans)


def test_windows_are_those_that_zarr_reads_alone_and_batched(cache: Path) -> None:
    reader = CacheReader(cache)
    whole = {
        (name, target): from_zarr(cache, reader.entry(name), target)
        for name in LIVE
        for target in ("soft", "first_order")
    }

    @settings(max_examples=40)
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        requests = [draw_request(data, reader) for _ in range(data.draw(st.integers(0, 5)))]
        batched = reader.windows(requests)
        for request, window in zip(requests, batched, strict=True):
            rows, columns = request.rows, request.columns
            expected = whole[request.entry.id, request.target][:, rows.start : rows.stop, columns.start : columns.stop]
            assert window.dtype == expected.dtype
            np.testing.assert_array_equal(window, expected)
            np.testing.assert_array_equal(reader.window(*request), expected)

    compare()


def test_what_was_written_is_read_in_whatever_generation_it_is(cache: Path) -> None:
    reader = CacheReader(cache)
    for name in LIVE:
        entry, written = reader.entry(name), coded(name, version_of(name))
        assert (entry.id, entry.role, entry.generation) == (name, name.split("/")[0], version_of(name))
        assert entry.image_size == size_of(name)
        assert entry.rungs == written.rungs
        for target, codes in written.codes.items():
            np.testing.assert_array_equal(reader.window(entry, target, *map(range, entry.mapping.shape)), codes)


def test_a_window_that_leaves_the_grid_is_refused(cache: Path) -> None:
    reader = CacheReader(cache)
    entry = reader.entry("train/00")
    assert entry.mapping.shape == (11, 20)
    for rows, columns in ((range(12), range(2)), (range(2), range(-1, 3)), (range(0, 4, 2), range(2))):
        with pytest.raises(GeometryError) as caught:
            reader.window(entry, "soft", rows, columns)
        assert str(caught.value) == (
            f"the window {rows}, {columns} leaves the grid of train/00, 11x20 cells; "
            "ask for consecutive cells inside it"
        )


def test_samples_are_iterated_and_counted_as_a_list_of_them_would_be(cache: Path) -> None:
    reader = CacheReader(cache)
    everything = list(reader.entries())
    assert sorted(entry.id for entry in everything) == LIVE
    assert [entry.id for entry in reader.entries()] == [entry.id for entry in everything]
    assert [entry.generation for entry in everything] == sorted(entry.generation for entry in everything)
    for roles in ((), ("train",), ("report", "auxiliary"), ("select",)):
        chosen = [entry for entry in everything if not roles or entry.role in roles]
        assert list(reader.entries(*roles)) == chosen
        assert reader.count(*roles) == len(reader.entries(*roles)) == len(chosen)
    for entry in everything:
        assert reader.entry(entry.id) == entry


@given(st.text(max_size=12))
def test_an_id_that_is_not_there_is_not_found(cache: Path, name: str) -> None:
    reader = CacheReader(cache)
    for absent in (name, "report/02", "train/", "train/99", "zzz"):
        with pytest.raises(CacheMismatchError, match="holds no sample"):
            reader.entry(absent)


def test_a_target_that_is_not_kept(cache: Path) -> None:
    reader = CacheReader(cache)
    entry = next(iter(reader.entries()))
    with pytest.raises(CacheMismatchError) as error:
        reader.values(entry, "sof")
    assert str(error.value) == f"{cache} keeps soft, first_order, and no 'sof'"


def test_opening_does_not_look_at_the_samples(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = ("soft", "soft_exact", "first_order", "samples")
    for file in copy.rglob("*"):
        if file.is_file() and (file.name.startswith("0") or file.parent.name in arrays) and file.name != "zarr.json":
            file.unlink()
    monkeypatch.setattr(Lookup, "_rows", lambda *_, **__: pytest.fail("a unit's rows were read"))
    reader = CacheReader(copy)
    assert reader.sealed
    assert isinstance(reader.statistics(), Statistics)
    assert [lookup.count() for lookup in reader._lookups] == [len(FIRST), len(SECOND), len(THIRD)]


def test_the_statistics_of_the_seals_are_those_of_the_records(cache: Path) -> None:
    reader, expected = CacheReader(cache), Statistics()
    for record in reader.records():
        expected.merge(Statistics.from_dict(record["statistics"]))
    assert reader.statistics().to_dict() == expected.to_dict()


def test_of_an_unfinished_generation_only_a_partial_reader_sees_what_is_committed(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    generation(path, 0, FIRST, []).seal()
    added = generation(path, 1, SECOND, REMOVED, units=1)
    finished, partial = CacheReader(path), CacheReader(path, partial=True)
    assert not finished.sealed
    assert sorted(entry.id for entry in finished.entries()) == sorted(FIRST)
    committed = [sample.id for sample in added.plan.of(added.plan.units[0])]
    assert sorted(entry.id for entry in partial.entries()) == sorted({*FIRST, *committed} - ({*REMOVED} - {*committed}))
    assert partial.count() == len(list(partial.entries()))
    for number in (0, 1):
        assert sum(record["samples"] for record in partial.records() if record["generation"] == number) > 0
    assert partial.statistics().rungs != finished.statistics().rungs


def damages(content: bytes) -> list[bytes]:
    places = np.random.default_rng(len(content)).integers(0, len(content), 3).tolist()
    flipped = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in places]
    return [*flipped, content[: places[0]]]


def everything(path: Path) -> dict[str, Any]:
    """What a reader returns, by name; nothing where it raised an error of segkd's own."""

    def attempt(name: str, read: Callable[[], Any]) -> None:
        try:
            found[name] = read()
        except SegkdError:
            errors.append(name)

    found: dict[str, Any] = {}
    errors: list[str] = []
    try:
        reader = CacheReader(path)
    except SegkdError:
        return {}
    attempt("ids", lambda: [entry.id for entry in reader.entries()])
    attempt("statistics", lambda: reader.statistics().to_dict())
    for name in ("train/00", "train/01", "train/03", "auxiliary/01", "report/07"):
        attempt(name, lambda name=name: reader.entry(name))
        if name in found:
            for target in ("soft", "first_order"):
                attempt(f"{name} {target}", lambda e=found[name], t=target: reader.values(e, t).tobytes())
    return found


def test_no_damage_to_any_file_changes_what_is_read(copy: Path) -> None:
    expected = everything(copy)
    assert len(expected) == 2 + 5 * 3
    for file in sorted(file for file in copy.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for damaged in damages(content):
            file.write_bytes(damaged)
            for name, value in everything(copy).items():
                assert value == expected[name], f"{file} changes {name}"
        file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["zarr.json", "generations/1/zarr.json", "generations/0/soft/zarr.json", "generations/1/removed/zarr.json"]
)
def test_a_changed_or_lost_metadata_file_is_named_on_opening(copy: Path, name: str) -> None:
    file = copy / name
    content = file.read_bytes()
    file.write_bytes(content.replace(b"1", b"2", 1))
    with pytest.raises(CacheDamagedError, match=rf"{name} cannot be read \(its digest is not that of the seal\);"):
        CacheReader(copy)
    file.unlink()
    with pytest.raises(CacheDamagedError, match=rf"{name} cannot be read \(it is lost\); segkd cache verify"):
        CacheReader(copy)


def test_seals_must_follow_upon_each_other(copy: Path, tmp_path: Path) -> None:
    other = generation(tmp_path / "other.zarr", 0, FIRST[1:], [])
    other.seal()
    seal = copy / "generations/1/commits/seal.json"
    content = seal.read_bytes()
    seal.write_bytes((tmp_path / "other.zarr/generations/0/commits/seal.json").read_bytes())
    with pytest.raises(CacheDamagedError, match=r"seal.json cannot be read \(it does not follow upon the seal of the"):
        CacheReader(copy)
    seal.write_bytes(content)
    (copy / "generations/0/commits/seal.json").unlink()
    with pytest.raises(CacheDamagedError, match=r"1/commits/seal.json cannot be read \(it does not follow upon"):
        CacheReader(copy)


def test_a_damaged_unit_hides_no_sample_of_another_role(copy: Path) -> None:
    reader = CacheReader(copy)
    unit = reader.entry("auxiliary/04").unit
    next(copy.glob(f"generations/0/samples/c?{unit}?0")).write_bytes(b"damaged")
    reader = CacheReader(copy)
    assert reader.entry("train/00").role == "train"
    with pytest.raises(CacheDamagedError, match=r"generations/0/samples/.* cannot be read \(its checksum differs\)"):
        reader.entry("auxiliary/04")


def test_threads_share_a_reader(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    monkeypatch.setattr(shards, "INDEX_BYTES", 100)
    monkeypatch.setattr(shards, "TABLE_BYTES", 100)
    reader, expected = CacheReader(cache), CacheReader(cache)
    whole = {name: expected.values(expected.entry(name), "soft") for name in LIVE}

    def read(seed: int) -> None:
        for name in np.random.default_rng(seed).permutation(LIVE).tolist():
            np.testing.assert_array_equal(reader.values(reader.entry(name), "soft"), whole[name])

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(read, range(4)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_processes_of_any_kind_read_the_same(cache: Path, method: str) -> None:
    reader = CacheReader(cache)
    entries = list(reader.entries())
    expected = [reader.values(entry, "soft") for entry in entries]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as executor:
        found = [executor.submit(reader.values, entry, "soft") for entry in entries]
        for future, values in zip(found, expected, strict=True):
            np.testing.assert_array_equal(future.result(timeout=120), values)
    np.testing.assert_array_equal(reader.values(entries[0], "soft"), expected[0])


def test_a_pickled_reader_has_nothing_open(cache: Path) -> None:
    reader = CacheReader(cache)
    first = reader.values(reader.entry("train/03"), "soft")
    again = pickle.loads(pickle.dumps(reader))
    assert not any(kept._values for kept in (again._shards._files, again._shards._indexes, again._shards._tables))
    np.testing.assert_array_equal(again.values(again.entry("train/03"), "soft"), first)


def written_anew(path: Path, version: int, names: list[str] = FIRST, *, back: bool = True) -> None:
    """What repair does to all units of generation 0 with a teacher that says something else; the others stay."""
    writer = ReplacingWriter(path, spec(), plan(names))
    for unit in writer.plan.units:
        if back:
            writer.write(unit, [coded(sample.id, version) for sample in writer.plan.of(unit)])
        else:
            writer.withdraw(unit)
    assert writer.seal() == back


CHANGED = (
    r"0/commits/seal.json is no longer the seal that the cache was opened with: units are being written again, or have "
    r"been; once segkd cache verify finds it whole, open it again \(segkd train goes on from its checkpoint\)$"
)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    generation(tmp_path / "s.zarr", 0, FIRST, []).seal()
    return tmp_path / "s.zarr"


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("pickled", [True, False])
def test_rows_of_one_version_are_not_used_with_tiles_of_another(small: Path, pickled: bool, back: bool) -> None:
    reader = CacheReader(small)
    entry = reader.entry("train/01")
    written_anew(small, 7, back=back)
    reader = pickle.loads(pickle.dumps(reader)) if pickled else reader
    for _ in range(2):
        with pytest.raises(CacheChangedError, match=CHANGED):
            reader.values(entry, "soft")
        with pytest.raises(CacheChangedError, match=CHANGED):
            reader.entry("auxiliary/00")
        with pytest.raises(CacheChangedError, match=CHANGED):
            list(reader.entries())
    if back:
        again = CacheReader(small)
        np.testing.assert_array_equal(
            again.window(again.entry("train/01"), "soft", *map(range, entry.mapping.shape)),
            coded("train/01", 7).codes["soft"],
        )


def test_tiles_of_one_version_are_not_used_with_rows_of_another(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TABLE_BYTES", 0)  # the rows of one unit are kept
    reader = CacheReader(small)
    entry = reader.entry("train/01")
    expected = reader.values(entry, "soft")
    reader.entry("report/02")
    written_anew(small, 7)
    np.testing.assert_array_equal(reader.values(entry, "soft"), expected)  # both are of the version before
    with pytest.raises(CacheChangedError, match=CHANGED):
        reader.entry("train/01")


def test_shards_that_were_closed_are_not_opened_in_another_version(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "OPEN_FILES", 1)
    reader = CacheReader(small)
    first, second = reader.entry("train/00"), reader.entry("train/08")
    for entry in (first, second):
        reader.values(entry, "soft")
    written_anew(small, 7)
    reader.values(second, "soft")
    with pytest.raises(CacheChangedError, match=CHANGED):
        reader.values(first, "soft")


def test_a_reader_goes_on_where_the_same_bytes_were_written_again_or_samples_were_added(small: Path) -> None:
    reader = CacheReader(small)
    seal = small / "generations/0/commits/seal.json"
    before = seal.stat()
    written_anew(small, 0)
    generation(small, 1, SECOND, REMOVED).seal()
    assert seal.stat().st_mtime_ns != before.st_mtime_ns
    for name in FIRST:
        entry = reader.entry(name)
        codes = reader.window(entry, "soft", *map(range, entry.mapping.shape))
        np.testing.assert_array_equal(codes, coded(name, 0).codes["soft"])


def test_a_seal_is_read_once_and_looked_at_only_where_a_file_is_opened(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segkd.storage import watch

    reads: list[Path] = []
    looks: list[Path] = []
    whole, identity = watch.read_signed, watch._identity
    monkeypatch.setattr(watch, "read_signed", lambda path: (reads.append(path), whole(path))[1])
    monkeypatch.setattr(watch, "_identity", lambda path: (looks.append(path), identity(path))[1])
    reader = CacheReader(small)
    for entry in list(reader.entries()):
        reader.values(reader.entry(entry.id), "soft")
    assert len(reads) == 1
    looked = len(looks)
    for entry in [reader.entry(name) for name in FIRST]:
        reader.values(entry, "soft")
    assert len(looks) == looked
