"""Compacting: the live samples of all generations, as a fresh cache of them would be, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from segkd.cli.main import main
from segkd.storage.audit import verify
from segkd.storage.coding import EXACT
from segkd.storage.compact import compact, entries_of
from segkd.storage.errors import (
    CacheDamagedError,
    CacheExistsError,
    CacheMismatchError,
    CacheNotFoundError,
    IncompleteCacheError,
)
from segkd.storage.reader import CacheReader
from segkd.storage.writer import CacheWriter


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, made: ModuleType) -> Path:
    path = tmp_path_factory.mktemp("compact") / "two.zarr"
    made.write_cache(path)
    return path


@pytest.fixture
def source(two: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(two, tmp_path / "source.zarr"))


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def write_fresh(made: ModuleType, path: Path, left_out: tuple[str, ...] = ()) -> Path:
    """One generation of what the two leave: the second's samples coded as there, the others as in the first."""
    names = [name for name in {*made.FIRST, *made.SECOND} - {made.REMOVED[-1]} if name not in left_out]
    plan = made.plan_of(names)
    writer = CacheWriter(path, made.SPEC, plan)
    for unit in plan.units:
        writer.write(unit, [made.coded(sample, int(sample.id in made.SECOND)) for sample in plan.of(unit)])
    assert writer.seal()
    return path


def test_it_is_the_fresh_cache_of_the_same_samples(two: Path, tmp_path: Path, made: ModuleType) -> None:
    before, heard = files_of(two), []
    summary = compact(two, tmp_path / "new.zarr", on_progress=lambda done, total: heard.append((done, total)))
    assert files_of(tmp_path / "new.zarr") == files_of(write_fresh(made, tmp_path / "fresh.zarr"))
    assert files_of(two) == before
    assert (summary.generations, summary.samples, summary.written) == (2, 16, 16)
    assert heard[-1] == (16, 16)
    again = compact(two, tmp_path / "new.zarr")
    assert again.written == 0
    assert "nothing to do" in again.lines()[0]


def test_interrupted_anywhere_the_same_command_goes_on(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "whole.zarr"
    compact(two, expected)
    new, write, stops = tmp_path / "new.zarr", CacheWriter.write, 0
    for units in (0, 2, 1):
        left = iter([True] * units)

        def stop(self: CacheWriter, *arguments: object, left: object = left) -> object:
            if not next(left, False):  # type: ignore[call-overload]
                raise KeyboardInterrupt
            return write(self, *arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(CacheWriter, "write", stop)
            with pytest.raises(KeyboardInterrupt):
                compact(two, new)
        stops += 1
        with pytest.raises(IncompleteCacheError):
            CacheReader(new)
    assert compact(two, new).written < 16
    assert stops == 3
    assert files_of(new) == files_of(expected)


def damage(source: Path, name: str, at: int = 3) -> None:
    content = bytearray((source / name).read_bytes())
    content[at] ^= 255
    (source / name).write_bytes(content)


def test_damaged_samples_are_left_out_when_asked(source: Path, tmp_path: Path, made: ModuleType) -> None:
    unit = made.plan_of(made.FIRST).units[4]
    damage(source, f"generations/0/first_order/c.{unit.first_shard}.0.0.0")
    lost = verify(source).samples
    assert len(lost) == 1
    with pytest.raises(CacheDamagedError) as caught:
        compact(source, tmp_path / "new.zarr")
    assert str(caught.value) == (
        f"{source} is damaged in 1 files; write them again with segkd cache repair, "
        "or leave the damaged samples out with --skip-damaged"
    )
    assert not (tmp_path / "new.zarr").exists()
    summary = compact(source, tmp_path / "new.zarr", skip_damaged=True)
    assert summary.skipped == lost
    assert files_of(tmp_path / "new.zarr") == files_of(write_fresh(made, tmp_path / "fresh.zarr", lost))
    assert f"left out as damaged: {lost[0]}; segkd teacher-cache" in summary.lines()[1]


def test_a_unit_whose_table_is_damaged_is_left_out_whole(source: Path, tmp_path: Path, made: ModuleType) -> None:
    plan = made.plan_of(made.FIRST)
    damage(source, "generations/0/samples/c.4.0")
    damage(source, "generations/0/commits/00000001.json")  # which is none of a sample's data
    ids = tuple(sample.id for sample in plan.of(plan.units[4]))
    summary = compact(source, tmp_path / "new.zarr", skip_damaged=True)
    assert (summary.skipped, summary.unnamed) == ((), len(ids))
    assert files_of(tmp_path / "new.zarr") == files_of(write_fresh(made, tmp_path / "fresh.zarr", ids))


def test_damage_to_entries_that_nobody_reads_is_left_behind(source: Path, tmp_path: Path, made: ModuleType) -> None:
    generation = CacheReader(source).generations[0]
    entry = next(
        entry
        for unit in generation.units()
        for entry in entries_of(generation, unit) or ()
        if entry.id == made.REMOVED[0]
    )
    array = "soft_exact" if entry.rungs["soft"] == EXACT else "soft"
    number, tile = divmod(entry.first_tile, generation.plan.shard_tiles)
    name = f"generations/0/{array}/c.{number}.0.0.0"
    content = bytearray((source / name).read_bytes())
    index = len(content) - 16 * generation.plan.shard_tiles - 4
    content[int.from_bytes(content[index + 16 * tile : index + 16 * tile + 8], "little")] ^= 1
    (source / name).write_bytes(content)
    report = verify(source)
    assert (report.whole, report.idle, report.samples) == (False, True, ())
    assert report.lines()[1].endswith("; concerns no sample in use (only entries replaced or removed since)")
    assert report.lines()[-1] == (f"  no sample in use is lost; segkd cache compact {source} NEW drops what is damaged")
    summary = compact(source, tmp_path / "new.zarr")
    assert (summary.skipped, summary.unnamed) == ((), 0)
    assert files_of(tmp_path / "new.zarr") == files_of(write_fresh(made, tmp_path / "fresh.zarr"))


def test_what_else_is_refused(two: Path, source: Path, tmp_path: Path, made: ModuleType) -> None:
    with pytest.raises(CacheExistsError, match=r"two.zarr is the cache to be compacted; give the new one another path"):
        compact(two, two)
    with pytest.raises(CacheNotFoundError, match=r"there is no cache at .*none.zarr"):
        compact(tmp_path / "none.zarr", tmp_path / "new.zarr")
    (source / "generations/1/commits/seal.json").unlink()
    with pytest.raises(IncompleteCacheError, match=r"source.zarr is not finished; run segkd teacher-cache again"):
        compact(source, tmp_path / "new.zarr")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").touch()
    with pytest.raises(CacheExistsError, match=r"photos exists and is not a cache"):
        compact(two, photos)
    made.write_generation(tmp_path / "other.zarr", made.FIRST)
    with pytest.raises(CacheMismatchError, match=r"other.zarr was written with another list of samples"):
        compact(two, tmp_path / "other.zarr")
    with pytest.raises(CacheExistsError):
        compact(tmp_path / "other.zarr", two)


def test_what_was_begun_from_another_state_is_refused(two: Path, tmp_path: Path, made: ModuleType) -> None:
    """The same samples, but not the same codes of them."""
    names = list({*made.FIRST, *made.SECOND} - {made.REMOVED[-1]})
    made.write_generation(tmp_path / "new.zarr", names, stop=2)
    with pytest.raises(
        CacheMismatchError, match=r"new.zarr holds another report/21 than .*two.zarr; remove it, or give"
    ):
        compact(two, tmp_path / "new.zarr")


def test_the_command(two: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.zarr"
    done = CliRunner().invoke(main, ["cache", "compact", str(two), str(new), "-q"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{new}: complete; 16 samples of 2 generations of {two} in one; 16 samples written; ")
    found = json.loads(CliRunner().invoke(main, ["cache", "compact", str(two), str(new), "-q", "--json"]).output)
    assert (found["samples"], found["written"], found["skipped"]) == (16, 0, [])
