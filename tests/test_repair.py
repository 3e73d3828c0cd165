"""Repair: after any damage the cache is, byte for byte, what it was before, or what cannot be repaired is said."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from segkd.cli.main import main
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.student.inputs import open_inputs
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.repair import repair
from segkd.storage.audit import verify
from segkd.storage.compact import compact
from segkd.storage.errors import CacheDamagedError, CacheError, CacheExistsError, CacheMismatchError, SegkdError
from segkd.storage.locks import at_work
from segkd.storage.reader import CacheReader
from segkd.storage.repair import ReplacingWriter

SETTINGS = ("cache.unit_samples=2", "cache.batch=2", "cache.tile=8", "cache.max_kl=0.01")


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[[Path], Path]) -> Path:
    """A folder with a run of six samples, and its cache of three units."""
    run = make_run(tmp_path_factory.mktemp("repair"))
    teacher_cache(load(run, SETTINGS))
    return run.parent


@pytest.fixture
def run(place: Path, tmp_path: Path) -> RunConfig:
    """The run with a copy of its cache to damage."""
    shutil.copytree(place / "cache.zarr", tmp_path / "c.zarr")
    return load(place / "tiny.toml", [*SETTINGS, f"cache.path={json.dumps(str(tmp_path / 'c.zarr'))}"])


def damage(path: Path, at: int = 5) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 85
    path.write_bytes(content)


def test_damage_to_any_file_is_repaired_byte_for_byte(run: RunConfig) -> None:
    cache, rng = Path(run.cache.path), random.Random(0)
    whole = files_of(cache)
    for number, (name, content) in enumerate(whole.items()):
        kind = ("flip", "cut", "lose")[number % 3]
        if kind == "flip":
            damage(cache / name, rng.randrange(len(content)))
        elif kind == "cut":
            (cache / name).write_bytes(content[: rng.randrange(len(content))])
        else:
            (cache / name).unlink()
        summary = repair(run)
        assert (summary.whole, summary.sealed, summary.failures) == (True, True, ()), (name, kind)
        assert files_of(cache) == whole, (name, kind)
        redone = "/c." in name and not name.startswith("generations/0/units/")
        assert summary.units == redone, name
    assert repair(run).lines()[0].startswith(f"{cache}: whole and finished; nothing to do; ")


def test_much_damage_at_once(run: RunConfig) -> None:
    cache = Path(run.cache.path)
    whole = files_of(cache)
    for name in ("zarr.json", "generations/0/zarr.json", "generations/0/soft/zarr.json"):
        damage(cache / name, 40)
    shutil.rmtree(cache / "generations/0/soft")
    damage(cache / "generations/0/samples/c.1.0")
    damage(cache / "generations/0/commits/00000002.json")
    assert repair(run).whole
    assert files_of(cache) == whole


def test_a_lost_seal_with_damage_beside_it(run: RunConfig) -> None:
    cache = Path(run.cache.path)
    whole = files_of(cache)
    damage(cache / "generations/0/commits/seal.json")
    damage(cache / "generations/0/first_order/c.0.0.0.0")
    assert repair(run).whole
    assert files_of(cache) == whole


def test_interrupted_anywhere_it_says_so_and_goes_on(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops in the moment in which the first, then the second damaged unit has been withdrawn."""
    cache = Path(run.cache.path)
    whole = files_of(cache)
    for unit in range(2):
        damage(cache / f"generations/0/samples/c.{unit}.0")
    with monkeypatch.context() as patch:
        withdraw = ReplacingWriter.withdraw

        def stop(self: ReplacingWriter, unit: object) -> None:
            withdraw(self, unit)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        patch.setattr(ReplacingWriter, "withdraw", stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                repair(run)
            assert not verify(cache).sealed
            with pytest.raises(CacheError):
                CacheReader(cache)
    summary = repair(run)
    assert (summary.units, summary.whole, summary.sealed) == (2, True, True)
    assert files_of(cache) == whole


def damage_first_tile(cache: Path, unit: int) -> None:
    """One byte of a tile that the unit's samples use."""
    damage(cache / f"generations/0/first_order/c.{unit}.0.0.0", 3)


def test_a_record_is_not_made_again_from_damaged_tiles(run: RunConfig) -> None:
    """Without a seal the tiles' checksums alone tell."""
    cache = Path(run.cache.path)
    whole = files_of(cache)
    (cache / "generations/0/commits/seal.json").unlink()
    damage(cache / "generations/0/commits/00000001.json", 30)
    damage_first_tile(cache, 1)
    summary = repair(run)
    assert (summary.units, summary.whole, summary.sealed) == (1, True, True)
    assert files_of(cache) == whole


def test_what_cannot_be_repaired_is_not_sealed_as_if_it_were_whole(place: Path, run: RunConfig, tmp_path: Path) -> None:
    root, cache = tmp_path / "data", Path(run.cache.path)
    shutil.copytree(place, root, ignore=shutil.ignore_patterns("*.zarr*"))
    toml = root / "tiny.toml"
    toml.write_text(toml.read_text().replace(str(place), str(root)))
    changed = load(toml, [*SETTINGS, f"cache.path={json.dumps(str(cache))}"])
    id_ = next(iter(CacheReader(cache).entries())).id
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(root / "images" / f"{id_}.png")
    damage(cache / "generations/0/commits/00000000.json", 30)
    damage_first_tile(cache, 0)
    damage_first_tile(cache, 2)
    before = (cache / "generations/0/commits/00000000.json").read_bytes()
    summary = repair(changed)
    assert summary.failures
    assert not summary.whole
    assert not summary.sealed
    assert (cache / "generations/0/commits/00000000.json").read_bytes() == before
    assert not verify(cache).whole


def test_a_repair_works_alone(run: RunConfig) -> None:
    cache = Path(run.cache.path)
    whole = files_of(cache)
    damage(cache / "generations/0/samples/c.1.0")
    damaged = files_of(cache)
    remedy = "wait until it has ended, then run the same command again$"
    for alone, command in ((True, repair), (False, repair), (True, teacher_cache)):
        others = "another segkd cache repair or teacher-cache" if command is repair else "segkd cache repair"
        with at_work(cache, alone=alone), pytest.raises(CacheError, match=f"^{others} is at work on .*; {remedy}"):
            command(run)
    assert files_of(cache) == damaged
    assert repair(run).whole
    with at_work(cache, alone=False):  # one that writes units hinders no other
        teacher_cache(run)
    assert files_of(cache) == whole


def test_a_cache_is_not_compacted_into_itself(run: RunConfig) -> None:
    cache = Path(run.cache.path)
    whole = files_of(cache)
    with pytest.raises(CacheExistsError, match=r"is inside the cache to be compacted; give the new one a path beside"):
        compact(cache, cache / "inside")
    assert files_of(cache) == whole


@pytest.fixture
def grown(tmp_path: Path, place: Path) -> tuple[RunConfig, Path]:
    """A run of its own whose cache has a second generation: one image changed, one added, one removed."""
    root = tmp_path / "data"
    shutil.copytree(place, root, ignore=shutil.ignore_patterns("*.zarr*"))
    text = (root / "tiny.toml").read_text().replace(str(place), str(root))
    (root / "tiny.toml").write_text(text)
    grown = load(root / "tiny.toml", SETTINGS)
    teacher_cache(grown)
    rng = np.random.default_rng(5)
    picture = Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8))
    picture.save(root / "images" / "b" / "1.png")
    picture.save(root / "images" / "b" / "7.png")
    (root / "images" / "d" / "0.png").unlink()
    (root / "labels" / "d" / "0.png").unlink()
    teacher_cache(grown)
    assert len(CacheReader(grown.cache.path).generations) == 2
    return grown, root


def test_generations_are_repaired_one_after_another(grown: tuple[RunConfig, Path]) -> None:
    run, _ = grown
    cache = Path(run.cache.path)
    whole, left = files_of(cache), []
    for name, content in whole.items():
        damage(cache / name, len(content) // 2)
        summary = repair(run)
        if summary.failures:
            left.append(name)
            assert not summary.whole
            assert summary.sealed
            (cache / name).write_bytes(content)
        assert files_of(cache) == whole, name
    # The units of the first generation whose images are not what they were: these bytes nobody can make again.
    commits = (json.loads((cache / f"generations/0/commits/0000000{unit}.json").read_bytes()) for unit in (0, 1))
    assert sorted(left) == sorted(f"generations/0/{name}" for record in commits for name in record["objects"])


def test_a_unit_whose_images_have_changed_is_named_and_left_alone(grown: tuple[RunConfig, Path]) -> None:
    run, _ = grown
    cache = Path(run.cache.path)
    damage(cache / "generations/0/soft/c.0.0.0.0")
    damage(cache / "generations/0/soft/c.1.0.0.0")
    before = files_of(cache)
    summary = repair(run)
    assert summary.lines()[0].startswith(f"{cache}: STILL DAMAGED and finished; no unit written; ")
    assert summary.failures == (
        "unit 0 of generation 0: images that it was made of have changed since: b/1",
        "unit 1 of generation 0: images that it was made of are no longer in the list: d/0",
    )
    assert files_of(cache) == before
    assert "segkd cache compact" in summary.lines()[-1]
    assert not summary.idle
    # What the last line says to do: the same samples as they are now, and compacted again a fresh cache of them.
    new, fresh = (replace(run, cache=replace(run.cache, path=f"{cache}-{name}.zarr")) for name in ("new", "fresh"))
    lost = compact(cache, new.cache.path, skip_damaged=True).skipped
    assert lost
    assert not set(lost) & {"b/1", "d/0"}
    assert teacher_cache(new).sealed
    compact(new.cache.path, f"{cache}-again.zarr")
    teacher_cache(fresh)
    assert files_of(Path(f"{cache}-again.zarr")) == files_of(Path(fresh.cache.path))


def test_the_side_of_tiles_is_found_again_though_the_list_would_begin_with_another(
    tmp_path: Path, make_run: Callable[[Path], Path]
) -> None:
    file = make_run(tmp_path)
    run = load(file, ["cache.unit_samples=2", "cache.batch=1"])
    teacher_cache(run)
    cache = Path(run.cache.path)
    whole, tile = files_of(cache), CacheReader(cache).spec.tile
    for image in tmp_path.glob("*/*/*.png"):
        with Image.open(image) as opened:
            width, height = opened.size
            opened.resize((2 * width, 2 * height), Image.Resampling.NEAREST).save(
                image.with_stem(f"{image.stem}-twice")
            )
    text, said = (cache / "zarr.json").read_text(), f'"tile": {tile}'
    assert said in text
    for content in ("{", text.replace(said, f'"tile": {tile + 1}')):
        (cache / "zarr.json").write_text(content)
        assert repair(run).restored == ("zarr.json",)
        assert files_of(cache) == whole
    (cache / "zarr.json").write_text("{")
    damage(cache / "generations/0/first_order/zarr.json")
    assert set(repair(run).restored) == {"zarr.json", "generations/0/first_order/zarr.json"}
    assert files_of(cache) == whole


def test_another_teacher_is_refused_before_anything_is_touched(run: RunConfig, place: Path) -> None:
    cache = Path(run.cache.path)
    damage(cache / "generations/0/samples/c.0.0")
    other = load(place / "tiny.toml", [*SETTINGS, f"cache.path={json.dumps(run.cache.path)}", "cache.tile=16"])
    before = files_of(cache)
    with pytest.raises(CacheMismatchError, match=r"differs from this run in tile \(8, now 16\); give this run"):
        repair(other)
    damage(cache / "zarr.json")
    with pytest.raises(
        CacheDamagedError, match=r"zarr.json is damaged, and no seal says that it is what this run file"
    ):
        repair(other)
    damage(cache / "zarr.json")
    assert files_of(cache) == before


def test_the_command(run: RunConfig, place: Path) -> None:
    cache = Path(run.cache.path)
    whole = files_of(cache)
    damage(cache / "generations/0/soft/c.2.0.0.0")
    damage(cache / "generations/zarr.json")
    arguments = ["cache", "repair", str(cache), "-q", "-c", str(place / "tiny.toml")]
    arguments += [part for setting in SETTINGS for part in ("--set", setting)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    first, second = done.output.splitlines()
    assert first.startswith(f"{cache}: whole and finished; 1 units of 2 samples written again; ")
    assert second == "  made again from what is intact: generations/zarr.json"
    assert files_of(cache) == whole
    damage(cache / "generations/0/samples/c.0.0")
    shutil.move(place / "images" / "b", place / "images" / "hidden")
    try:
        with pytest.raises(SegkdError):
            repair(run)
    finally:
        shutil.move(place / "images" / "hidden", place / "images" / "b")


def test_training_says_when_it_sees_an_earlier_generation(
    grown: tuple[RunConfig, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = grown
    (Path(run.cache.path) / "generations/1/commits/seal.json").unlink()
    with contextlib.suppress(SegkdError):  # the samples of the unfinished generation are not there
        open_inputs(run, run.student, distill=True)
    assert "has a generation that is not finished, and training sees the cache before it" in caplog.text
