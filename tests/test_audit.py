"""The audit: every byte is checked, damage is told by file, tile and sample, and nothing found in a cache stops it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segkd.cli.main import main
from segkd.storage.audit import verify
from segkd.storage.errors import CacheMismatchError, CacheNotFoundError
from segkd.storage.publish import canonical, signed


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, made: ModuleType) -> Path:
    """A cache of two generations, the second of which replaces samples of the first, and removes one."""
    path = tmp_path_factory.mktemp("audit") / "two.zarr"
    made.write_cache(path)
    return path


@pytest.fixture
def cache(two: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(two, tmp_path / "c.zarr"))


def names_of(cache: Path) -> list[str]:
    return sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file())


def unit_objects(cache: Path, unit: int, generation: int = 0) -> list[str]:
    record = json.loads((cache / f"generations/{generation}/commits/{unit:08d}.json").read_bytes())
    return list(record["objects"])


def test_a_whole_cache_is_whole_to_the_last_file(two: Path) -> None:
    heard: list[tuple[int, int]] = []
    report = verify(two, workers=2, on_progress=lambda done, total: heard.append((done, total)))
    assert report.whole
    assert report.sealed
    assert not report.strays
    assert report.files == len(names_of(two))
    assert report.bytes == sum((two / name).stat().st_size for name in names_of(two))
    assert heard == [(done, report.units) for done in range(1, report.units + 1)]


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "longer", "lose", "folder"])
def test_damage_to_any_file_is_found_and_named(cache: Path, kind: str) -> None:
    rng = random.Random(0)
    for name in names_of(cache):
        content = (cache / name).read_bytes()
        at = rng.randrange(len(content))
        damaged = {
            "flip": content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :],
            "cut": content[:at],
            "empty": b"",
            "longer": content + b"\0",
        }
        (cache / name).unlink()
        if kind in damaged:
            (cache / name).write_bytes(damaged[kind])
        elif kind == "folder":
            (cache / name).mkdir()
        report = verify(cache, workers=1)
        if (name, kind) == ("generations/1/commits/seal.json", "lose"):
            assert report.whole  # the same as a generation that has not been sealed yet
            assert not report.sealed
        else:
            assert name in [damage.file for damage in report.damage], kind
        if kind == "folder":
            (cache / name).rmdir()
        (cache / name).write_bytes(content)
    assert verify(cache).whole


def test_a_damaged_tile_concerns_its_sample_alone(cache: Path, made: ModuleType) -> None:
    """Every tile of every shard in turn: the sample that the audit names is the one whose tile it is."""
    found: set[str] = set()
    for array in ("soft", "soft_exact", "first_order"):
        for shard in sorted((cache / "generations/0" / array).glob("c.*.0.0.0")):
            content = shard.read_bytes()
            tiles = json.loads((cache / "generations/0" / array / "zarr.json").read_text())["chunk_grid"]
            index = content[-16 * tiles["configuration"]["chunk_shape"][0] - 4 : -4]
            places = np.frombuffer(index, "<u8").reshape(-1, 2)
            for offset in sorted(int(offset) for offset, length in places if length != 2**64 - 1):
                changed = bytearray(content)
                changed[offset] ^= 255
                shard.write_bytes(changed)
                report = verify(cache, workers=1)
                assert len(report.damage) == 1
                assert len(report.damage[0].affected.ids) <= 1
                found.update(report.samples)
            shard.write_bytes(content)
    # Those that the second generation has replaced or removed are read from there, or not at all.
    assert found == set(made.FIRST) - set(made.REMOVED)


def test_without_its_index_a_shard_is_lost_and_without_its_table_a_unit(cache: Path, made: ModuleType) -> None:
    plan = made.plan_of(made.FIRST)
    unit = plan.units[-1]
    ids = [sample.id for sample in plan.of(unit)]
    folder = cache / "generations/0"
    for name in unit_objects(cache, unit.number):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        affected = verify(cache).damage[0].affected
        if name.startswith("samples/"):
            assert (affected.ids, affected.unnamed, affected.first) == ((), len(ids), ids[0])
            assert str(affected) == f"{len(ids)} in order from {ids[0]} on"
        else:
            assert affected.ids == tuple(ids)
        (folder / name).write_bytes(content)


def test_a_record_that_is_signed_but_not_the_unit_s_own_is_found(cache: Path) -> None:
    commits = cache / "generations/0/commits"
    content = (commits / "00000001.json").read_bytes()
    (commits / "00000001.json").write_bytes((commits / "00000002.json").read_bytes())
    (damage,) = verify(cache).damage
    assert (damage.file, damage.unit) == ("generations/0/commits/00000001.json", 1)
    assert "is another unit's" in str(damage)
    document = json.loads(content)
    del document["sha256"]
    document["samples"] += 1
    (commits / "00000001.json").write_bytes(canonical(signed(document)))
    (damage,) = verify(cache).damage
    assert str(damage) == "generations/0/commits/seal.json: is not the seal of these commit records"


def test_generations_are_a_chain(cache: Path, tmp_path: Path, made: ModuleType) -> None:
    made.write_generation(tmp_path / "other.zarr", made.FIRST[:5])
    made.write_generation(tmp_path / "other.zarr", made.SECOND, number=1, removed=made.REMOVED)
    seal = "generations/1/commits/seal.json"
    shutil.copy(tmp_path / "other.zarr" / seal, cache / seal)
    assert f"{seal}: does not follow upon generations/0/commits/seal.json" in map(str, verify(cache).damage)
    shutil.rmtree(cache / "generations/0")
    report = verify(cache)
    assert not report.whole
    assert "generations/0/zarr.json: is lost" in map(str, report.damage)


def test_an_unfinished_cache_is_checked_as_far_as_it_goes(tmp_path: Path, made: ModuleType) -> None:
    made.write_generation(tmp_path / "c.zarr", made.FIRST, stop=2)
    units = len(made.plan_of(made.FIRST).units)
    report = verify(tmp_path / "c.zarr")
    assert (report.whole, report.sealed, report.pending, report.units) == (True, False, units - 2, units)
    assert f"NOT finished: {units - 2} of {units} units are not written" in report.lines()[0]
    name = unit_objects(tmp_path / "c.zarr", 1)[0]
    (tmp_path / "c.zarr/generations/0" / name).write_bytes(b"x")
    (damage,) = verify(tmp_path / "c.zarr").damage
    assert (damage.file, damage.unit) == (f"generations/0/{name}", 1)


def test_what_belongs_to_nothing_is_no_damage(cache: Path) -> None:
    for name in ("notes.txt", "generations/0/soft/c.99.0.0.0", "generations/0/commits/attempts/00000000-x/0"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"x")
    report = verify(cache)
    assert report.whole
    assert sorted(report.strays) == [
        "generations/0/commits/attempts/00000000-x/0",
        "generations/0/soft/c.99.0.0.0",
        "notes.txt",
    ]
    assert "3 files belong to nothing" in report.lines()[-1]


def test_where_there_is_no_cache_or_another_format(tmp_path: Path) -> None:
    with pytest.raises(
        CacheNotFoundError, match=r"there is no cache at .*none.zarr; write one with segkd teacher-cache"
    ):
        verify(tmp_path / "none.zarr")
    old = tmp_path / "old.zarr"
    old.mkdir()
    (old / "zarr.json").write_text('{"attributes": {"segkd": {"format": "0.1"}}}')
    with pytest.raises(CacheMismatchError, match=r"has cache format 0\.1"):
        verify(old)


CONTENT = st.one_of(
    st.binary(max_size=40),
    st.none(),
    st.integers(0, 50),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 2**70), st.text(max_size=5)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    ).map(lambda tree: json.dumps(tree).encode()),
    st.dictionaries(st.text(max_size=4), st.integers()).map(lambda tree: canonical(signed(tree))),
)
"""What may stand in a file: noise, nothing (it is gone), another file's content, any JSON, any JSON that is signed."""


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_cache_the_audit_says_so(two: Path, cache: Path, data: st.DataObject) -> None:
    names = names_of(two)
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True)):
        content = data.draw(CONTENT)
        (cache / name).unlink(missing_ok=True)
        if content is not None:
            other = (two / names[content % len(names)]).read_bytes() if isinstance(content, int) else content
            (cache / name).write_bytes(other)
    try:
        changed = [name for name in names if not (cache / name).exists() or not same(cache / name, two / name)]
        try:
            report = verify(cache, workers=1)
        except (CacheNotFoundError, CacheMismatchError):
            return
        assert report.lines()
        if report.whole:
            assert changed in ([], ["generations/1/commits/seal.json"])
    finally:
        shutil.copytree(two, cache, dirs_exist_ok=True)


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_the_command_ends_with_1_for_damage_and_lists_the_samples(cache: Path) -> None:
    run = CliRunner()
    whole = run.invoke(main, ["cache", "verify", str(cache), "-q"])
    assert whole.exit_code == 0
    assert whole.output.startswith(f"{cache}: whole; finished; {len(names_of(cache))} files, ")
    name = next(name for name in unit_objects(cache, 4) if name.startswith("first_order"))
    content = (cache / "generations/0" / name).read_bytes()
    (cache / "generations/0" / name).write_bytes(content[:-8])
    damaged = run.invoke(main, ["cache", "verify", str(cache), "-q", "--workers", "1"])
    assert damaged.exit_code == 1
    assert damaged.output.splitlines() == [
        f"{cache}: DAMAGED in 1 files; finished; {len(names_of(cache))} files, "
        + damaged.output.split("files, ")[1].splitlines()[0],
        f"  generations/0/{name}: has {len(content) - 8:,} bytes, {len(content):,} were written; samples: "
        "train/10, train/11, train/13",
        f"  segkd cache repair {cache} --config RUN.toml writes this again, and nothing else",
    ]
    found = json.loads(run.invoke(main, ["cache", "verify", str(cache), "-q", "--json"]).output)
    assert (found["whole"], found["samples"], found["damage"][0]["unit"]) == (
        False,
        ["train/10", "train/11", "train/13"],
        4,
    )
