"""Generations of a cache: what later images add, what they remove, how a unit is taken out and a generation closed."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import zarr

from segkd.storage import publish
from segkd.storage.coding import EXACT, CompandedDistribution, UniformSteps
from segkd.storage.errors import (
    CacheDamagedError,
    CacheError,
    CacheMismatchError,
    CacheNotFoundError,
    IncompleteCacheError,
)
from segkd.storage.generation import Generation
from segkd.storage.geometry import Mapping as GridMapping
from segkd.storage.geometry import network_axis
from segkd.storage.layout import Plan, PlannedSample, plan_units
from segkd.storage.reader import CacheReader
from segkd.storage.sealing import seal_generations
from segkd.storage.spec import CacheSpec, TargetSpec
from segkd.storage.statistics import Statistics
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter

TILE = 8
FIRST = [*(f"train/{k}" for k in range(5)), "report/0", "report/1"]
"""What the cache begins with."""
SECOND = ["train/1", "train/7", "report/2"]
"""What is added later: one of them a changed image."""


def spec() -> CacheSpec:
    soft = TargetSpec(
        name="soft",
        channels=3,
        coder=CompandedDistribution(),
        bound=1e-3,
        measures=("kl",),
        bounded=("kl",),
        parameters={},
        fallback=True,
    )
    first_order = TargetSpec(
        name="first_order",
        channels=1,
        coder=UniformSteps(reach=(1.0,)),
        bound=0.01,
        measures=("error",),
        bounded=("error",),
        parameters={},
    )
    targets = {"soft": soft, "first_order": first_order}
    return CacheSpec(classes=("a", "b", "c"), targets=targets, tile=TILE, fingerprints={"teacher": "t"}, teacher={})


def plan(names: Iterable[str]) -> Plan:
    axes = GridMapping(network_axis(44, 11), network_axis(80, 20))
    samples = [PlannedSample(id=name, role=name.split("/")[0], image_size=(44, 80), mapping=axes) for name in names]
    return plan_units(samples, unit_samples=2, tile=TILE)


def coded(name: str, version: int, exact: Iterable[str] = ()) -> CodedSample:
    rng = np.random.default_rng([version, *name.encode()])
    soft = rng.integers(0, 256, (3, 11, 20), np.uint8)
    log_probs = -rng.random((3, 11, 20), np.float32).astype(np.float16)
    return CodedSample(
        image_digest=hashlib.sha256(f"{name} {version}".encode()).digest()[:16],
        codes={"soft": log_probs if name in exact else soft, "first_order": soft[:1]},
        rungs={"soft": EXACT if name in exact else 0, "first_order": 0},
        measures={"soft": {"kl": 2e-3 if name.endswith("1") else 4e-4}, "first_order": {"error": 0.004}},
    )


def fill(writer: CacheWriter, units: Iterable[int] | None = None, exact: Iterable[str] = ()) -> None:
    version = writer.generation.number
    for unit in writer.pending():
        if units is None or unit.number in units:
            writer.write(unit, [coded(sample.id, version, exact) for sample in writer.plan.of(unit)])


def first(path: Path, names: Iterable[str] = FIRST, exact: Iterable[str] = ()) -> CacheWriter:
    writer = CacheWriter(path, spec(), plan(names))
    fill(writer, exact=exact)
    return writer


def second(path: Path) -> CacheWriter:
    return CacheWriter(path, spec(), plan(SECOND), generation=1, removed=["train/1", "report/0"])


def two(path: Path) -> tuple[CacheWriter, CacheWriter]:
    """A cache of two sealed generations."""
    begun = first(path)
    assert begun.seal()
    added = second(path)
    fill(added)
    assert added.seal()
    return begun, added


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def ids(path: Path) -> list[str]:
    return sorted(entry.id for entry in CacheReader(path).entries())


def whole(reader: CacheReader, name: str, target: str = "soft") -> np.ndarray:
    return reader.window(reader.entry(name), target, range(11), range(20))


def test_a_generation_adds_replaces_and_removes_and_changes_no_file(tmp_path: Path) -> None:
    assert first(tmp_path / "c.zarr").seal()
    before = files_of(tmp_path / "c.zarr")
    added = second(tmp_path / "c.zarr")
    fill(added, [0])
    assert ids(tmp_path / "c.zarr") == sorted(FIRST)  # what is not sealed does not count
    fill(added)
    assert added.seal()
    assert ids(tmp_path / "c.zarr") == sorted({*FIRST, *SECOND} - {"report/0"})
    reader = CacheReader(tmp_path / "c.zarr")
    for name in ids(tmp_path / "c.zarr"):
        generation = int(name in SECOND)
        assert reader.entry(name).generation == generation
        np.testing.assert_array_equal(whole(reader, name), coded(name, generation).codes["soft"])
    after = files_of(tmp_path / "c.zarr")
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("generations/1/") for name in after.keys() - before.keys())


def test_a_generation_may_only_remove(tmp_path: Path) -> None:
    first(tmp_path / "c.zarr").seal()
    removal = CacheWriter(tmp_path / "c.zarr", spec(), plan([]), generation=1, removed=["train/3", "report/0"])
    assert removal.pending() == []
    assert removal.seal()
    assert ids(tmp_path / "c.zarr") == sorted({*FIRST} - {"train/3", "report/0"})


def test_seals_are_a_chain_and_cover_the_metadata(tmp_path: Path) -> None:
    two(tmp_path / "c.zarr")
    seals = [publish.read_signed(tmp_path / f"c.zarr/generations/{g}/commits/seal.json") for g in range(2)]
    assert seals[0]["previous_sha256"] is None
    assert seals[1]["previous_sha256"] == seals[0]["sha256"]
    files = files_of(tmp_path / "c.zarr")
    covered = {name for seal in seals for name in seal["metadata_sha256"]}
    described = {name for name in files if name.endswith("zarr.json") or "/units/c" in name or "/removed/c" in name}
    assert covered == described
    for seal in seals:
        for name, digest in seal["metadata_sha256"].items():
            assert hashlib.sha256(files[name]).hexdigest() == digest
    assert [seal["roles"] for seal in seals] == [{"report": 2, "train": 5}, {"report": 1, "train": 2}]
    assert [seal["samples"] for seal in seals] == [7, 3]
    assert seals[0]["pixels"] == 7 * 44 * 80
    assert seals[0]["cells"] == 7 * 11 * 20
    stored = [name for name in files if name.startswith("generations/0/") and "/c." in name and "/units/" not in name]
    assert seals[0]["bytes"] == sum(len(files[name]) for name in stored)
    assert seals[0]["statistics"]["soft"]["over_bound"] == 2


def test_statistics_are_a_function_of_the_rows(tmp_path: Path) -> None:
    first(tmp_path / "c.zarr").seal()
    generation = Generation.open(tmp_path / "c.zarr", spec(), 0)
    packed = np.ascontiguousarray(zarr.open_array(generation.array_folder("samples"), mode="r")[:])
    rows = packed.view(generation.row_dtype())[:, 0]
    made_again = Statistics.of(rows[rows["state"] == 1], spec()).to_dict()
    assert made_again == publish.read_signed(generation.seal_path)["statistics"]


def test_a_generation_is_begun_and_sealed_after_the_one_before_it(tmp_path: Path) -> None:
    begun = CacheWriter(tmp_path / "c.zarr", spec(), plan(FIRST))
    fill(begun, [0, 1])
    message = r"c.zarr cannot be added to: its generation 0 is not finished; run segkd teacher-cache with the list that"
    with pytest.raises(CacheError, match=message):
        second(tmp_path / "c.zarr")
    fill(begun)
    begun.seal()
    added = second(tmp_path / "c.zarr")
    fill(added)
    (tmp_path / "c.zarr/generations/0/commits/seal.json").unlink()
    assert not added.seal()
    assert begun.seal()
    assert added.seal()


def test_another_list_for_a_begun_generation_is_refused(tmp_path: Path) -> None:
    first(tmp_path / "c.zarr").seal()
    second(tmp_path / "c.zarr")
    with pytest.raises(CacheMismatchError, match="was written with another list of samples; give this run another"):
        CacheWriter(tmp_path / "c.zarr", spec(), plan(SECOND[:2]), generation=1)
    with pytest.raises(CacheMismatchError, match=r"removed/c.0.0 differs from what this version of segkd and zarr"):
        CacheWriter(tmp_path / "c.zarr", spec(), plan(SECOND), generation=1, removed=["train/1", "report/1"])


EXACT_ONES = ["report/0", "report/1", "train/1"]


def test_samples_that_no_rung_serves_stand_in_an_array_of_their_own(tmp_path: Path) -> None:
    writer = first(tmp_path / "c.zarr", exact=EXACT_ONES)
    assert writer.seal()
    reader = CacheReader(tmp_path / "c.zarr")
    for name in FIRST:
        codes, expected = whole(reader, name), coded(name, 0, EXACT_ONES).codes["soft"]
        assert codes.dtype == expected.dtype == (np.float16 if name in EXACT_ONES else np.uint8)
        np.testing.assert_array_equal(codes, expected)
    objects = [
        sorted({name.split("/")[0] for name in publish.read_signed(writer.generation.record_path(unit))["objects"]})
        for unit in range(4)
    ]
    kept, both = ["first_order", "samples", "soft"], ["first_order", "samples", "soft", "soft_exact"]
    assert objects == [["first_order", "samples", "soft_exact"], both, kept, kept]
    arrays = zarr.open_group(tmp_path / "c.zarr/generations/0", mode="r")
    entry = reader.entry("train/1")
    assert np.count_nonzero(arrays["soft"][entry.first_tile : entry.first_tile + 6]) == 0
    np.testing.assert_array_equal(
        arrays["soft_exact"][entry.first_tile, :, :, :], coded("train/1", 0, EXACT_ONES).codes["soft"][:, :8, :8]
    )


def test_a_unit_that_is_withdrawn_is_pending_and_written_again(tmp_path: Path) -> None:
    begun, added = two(tmp_path / "c.zarr")
    before = files_of(tmp_path / "c.zarr")
    begun.withdraw(begun.plan.units[1])
    left = files_of(tmp_path / "c.zarr")
    assert before.keys() - left.keys() == {
        "generations/1/commits/seal.json",
        "generations/0/commits/seal.json",
        "generations/0/commits/00000001.json",
        *(f"generations/0/{name}" for name in ("soft/c.1.0.0.0", "first_order/c.1.0.0.0", "samples/c.1.0")),
    }
    with pytest.raises(IncompleteCacheError, match="is not finished: 3 of 4 units are written"):
        CacheReader(tmp_path / "c.zarr")
    assert [unit.number for unit in begun.pending()] == [1]
    assert not added.seal()
    fill(begun)
    assert seal_generations(tmp_path / "c.zarr")
    assert files_of(tmp_path / "c.zarr") == before


def test_a_unit_written_again_leaves_nothing_of_the_one_withdrawn(tmp_path: Path) -> None:
    writer = first(tmp_path / "c.zarr", exact=["train/0"])
    writer.seal()
    orphan = tmp_path / "c.zarr/generations/0/soft_exact/c.1.0.0.0"
    kept = orphan.read_bytes()
    writer.withdraw(writer.plan.units[1])
    orphan.write_bytes(kept)  # as if the withdrawal had been killed
    fill(writer)
    writer.seal()
    first(tmp_path / "never.zarr").seal()
    assert files_of(tmp_path / "c.zarr") == files_of(tmp_path / "never.zarr")


def test_a_generation_closed_before_it_is_finished_counts_without_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    writer = CacheWriter(path, spec(), plan(FIRST))
    fill(writer, [0, 2])
    writer.close()
    seal = publish.read_signed(path / "generations/0/commits/seal.json")
    assert (seal["missing"], seal["units"], seal["samples"]) == ([1, 3], 4, 4)
    assert seal["roles"] == {"report": 2, "train": 2}
    assert ids(path) == ["report/0", "report/1", "train/2", "train/3"]
    late = CacheWriter(path, spec(), plan(FIRST))
    assert late.pending() == []
    before = files_of(path)
    unit = late.plan.units[1]
    assert late.write(unit, [coded(sample.id, 0) for sample in late.plan.of(unit)]) is None
    assert late.seal()
    assert files_of(path) == before
    added = CacheWriter(path, spec(), plan(["train/0", "train/1", "train/9"]), generation=1)
    fill(added)
    assert added.seal()
    assert ids(path) == sorted(["report/0", "report/1", *(f"train/{k}" for k in (0, 1, 2, 3, 9))])


def test_a_closed_generation_stays_closed_when_a_unit_is_withdrawn(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    writer = CacheWriter(path, spec(), plan(FIRST))
    fill(writer, [0, 2])
    writer.close()
    before = files_of(path)
    writer.withdraw(writer.plan.units[2])
    assert [unit.number for unit in CacheWriter(path, spec(), plan(FIRST)).pending()] == [2]
    fill(writer)
    assert writer.seal()
    assert files_of(path) == before


def test_a_later_generation_cannot_be_closed_before_the_one_it_adds_to_is_sealed(tmp_path: Path) -> None:
    begun, added = two(tmp_path / "c.zarr")
    begun.withdraw(begun.plan.units[0])
    with pytest.raises(CacheError, match=r"generations/1 cannot be closed before the generation that it adds to$"):
        added.close()


def test_damage_to_a_record_or_a_seal_is_told_and_located(tmp_path: Path) -> None:
    begun, _ = two(tmp_path / "c.zarr")
    rng = np.random.default_rng(0)
    for path in (begun.generation.record_path(0), begun.generation.seal_path):
        whole_file = path.read_bytes()
        for place in rng.integers(0, len(whole_file), 60):
            damaged = bytearray(whole_file)
            damaged[place] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            with pytest.raises(CacheDamagedError, match=f"^{path} cannot be read "):
                publish.read_signed(path)
        path.write_bytes(whole_file)


class Killed(BaseException):
    """Stands for SIGKILL: from its first moment on, the file system takes no further change, clean-up included."""


class Killer:
    """Counts the changes of the file system beneath a folder and dies at the n-th and at every later one."""

    events = ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

    def __init__(self) -> None:
        self.folder = ""
        self.left = 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder and event in self.events and str(arguments[0]).startswith(self.folder):
            self.left -= 1
            if self.left <= 0:
                raise Killed

    def kills(self, action: Callable[[], object], folder: Path, moment: int) -> bool:
        """Whether ``action`` came to the moment and died of it."""
        self.folder, self.left = str(folder), moment
        try:
            action()
        except Killed:
            return True
        finally:
            self.folder = ""
        return False


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()  # one for all, since an audit hook is never removed


def test_a_kill_at_any_change_of_an_added_generation_loses_nothing(tmp_path: Path, killer: Killer) -> None:
    two(tmp_path / "whole.zarr")
    expected = files_of(tmp_path / "whole.zarr")
    first(tmp_path / "begun.zarr").seal()

    def add(path: Path) -> None:
        added = second(path)
        fill(added)
        added.seal()

    for moment in range(1, 1000, 4):
        path = tmp_path / f"{moment}.zarr"
        shutil.copytree(tmp_path / "begun.zarr", path)
        died = killer.kills(partial(add, path), path, moment)
        assert ids(path) in (sorted(FIRST), sorted({*FIRST, *SECOND} - {"report/0"}))  # a complete cache all along
        add(path)
        assert files_of(path) == expected
        shutil.rmtree(path)
        if not died:
            break
    assert moment > 60


def test_a_kill_at_any_change_of_a_withdrawal_loses_nothing(tmp_path: Path, killer: Killer) -> None:
    two(tmp_path / "whole.zarr")
    expected = files_of(tmp_path / "whole.zarr")

    def repair(path: Path) -> None:
        writer = CacheWriter(path, spec(), plan(FIRST))
        writer.withdraw(writer.plan.units[0])
        fill(writer)
        seal_generations(path)

    for moment in range(1, 1000, 2):
        path = tmp_path / f"{moment}.zarr"
        shutil.copytree(tmp_path / "whole.zarr", path)
        died = killer.kills(partial(repair, path), path, moment)
        fill(CacheWriter(path, spec(), plan(FIRST)))
        assert seal_generations(path)
        assert files_of(path) == expected
        shutil.rmtree(path)
        if not died:
            break
    assert moment > 30


def test_a_kill_at_any_change_of_a_closing_leaves_it_open_or_closed(tmp_path: Path, killer: Killer) -> None:
    begun = CacheWriter(tmp_path / "begun.zarr", spec(), plan(FIRST))
    fill(begun, [0, 2])
    for moment in range(1, 100, 2):
        path = tmp_path / f"{moment}.zarr"
        shutil.copytree(tmp_path / "begun.zarr", path)
        died = killer.kills(lambda path=path: CacheWriter(path, spec(), plan(FIRST)).close(), path, moment)
        CacheWriter(path, spec(), plan(FIRST)).close()
        assert CacheReader(path).sealed
        assert ids(path) == ["report/0", "report/1", "train/2", "train/3"]
        if not died:
            break
    assert moment > 5


def is_killed_after(files: int, begin: Callable[[], CacheWriter]) -> bool:
    """Whether ``begin`` was to write more metadata files than so many; it has written no more."""
    left = files

    def dying(path: Path, content: bytes, scratch: Path) -> bool:
        nonlocal left
        # The scratch folder is there before any file is.
        scratch.mkdir(parents=True, exist_ok=True)
        left -= not path.exists()
        if left < 0:
            raise Killed
        return publish.create_whole(path, content, scratch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segkd.storage.writer.create_whole", dying)
        try:
            begin()
        except Killed:
            return True
    return False


def test_a_cache_of_which_only_part_of_the_metadata_is_written_has_not_begun(tmp_path: Path) -> None:
    assert first(tmp_path / "whole.zarr").seal()
    for files in count():
        path = tmp_path / f"{files}.zarr"
        if not is_killed_after(files, partial(CacheWriter, path, spec(), plan(FIRST))):
            break
        if files == 0:
            with pytest.raises(CacheNotFoundError, match="there is no cache at"):
                CacheReader(path, partial=True)
        else:
            reader = CacheReader(path, partial=True)
            assert (reader.sealed, reader.count(), list(reader.entries()), reader.records()) == (False, 0, [], [])
            with pytest.raises(IncompleteCacheError, match="is not finished: 0 of "):
                CacheReader(path)
        assert first(path).seal()
        assert files_of(path) == files_of(tmp_path / "whole.zarr")
    assert files > 8


def test_a_generation_of_which_only_part_of_the_metadata_is_written_is_not_there(tmp_path: Path) -> None:
    two(tmp_path / "whole.zarr")
    for files in count():
        path = tmp_path / f"{files}.zarr"
        assert first(path).seal()
        if not is_killed_after(files, partial(second, path)):
            break
        for some in (False, True):
            reader = CacheReader(path, partial=some)
            assert reader.sealed == (files == 0)
            assert sorted(entry.id for entry in reader.entries()) == sorted(FIRST)
            assert reader.count() == len(FIRST)
        added = second(path)
        fill(added)
        assert added.seal()
        assert files_of(path) == files_of(tmp_path / "whole.zarr")
    assert files > 8
