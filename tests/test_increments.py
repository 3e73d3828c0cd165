"""A cache that grows: images added, changed and removed after it was finished, or before."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from segkd.cli.main import main
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.files import FileSource
from segkd.pipeline.teacher.cache import summarise, teacher_cache
from segkd.pipeline.teacher.division import Share
from segkd.storage.errors import CacheMismatchError, IncompleteCacheError
from segkd.storage.reader import CacheReader


def described(run: Path, cache: str = "cache.zarr", *more: str) -> RunConfig:
    """Units of two; the tiny teacher's answer to an image does not depend on its batch."""
    path = json.dumps(str(run.parent / cache))
    return load(run, ["cache.unit_samples=2", "cache.batch=1", "cache.tile=8", f"cache.path={path}", *more])


def put(run: Path, name: str, seed: int, size: tuple[int, int] = (32, 40)) -> None:
    """An image and its label map."""
    rng = np.random.default_rng(seed)
    for kind, shape in (("images", (*size, 3)), ("labels", size)):
        path = run.parent / kind / f"{name}.png"
        Image.fromarray(rng.integers(0, 256 if kind == "images" else 3, shape, np.uint8)).save(path)


def drop(run: Path, name: str) -> None:
    for kind in ("images", "labels"):
        (run.parent / kind / f"{name}.png").unlink()


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def contents(config: RunConfig) -> dict[str, object]:
    """All that a cache says about each of its samples."""
    reader = CacheReader(config.cache.path)
    return {
        entry.id: (
            entry.role,
            entry.image_size,
            entry.mapping,
            entry.image_digest,
            entry.rungs,
            entry.measures,
            {target: reader.values(entry, target).tobytes() for target in reader.spec.targets},
        )
        for entry in reader.entries()
    }


def fresh(run: Path, *more: str) -> dict[str, object]:
    """What a cache of the list as it is now holds."""
    config = described(run, f"fresh{time.monotonic_ns()}.zarr", *more)
    teacher_cache(config)
    return contents(config)


def change(run: Path) -> None:
    """One image is added, one changes its content, one its size, and one is removed."""
    put(run, "a/2", 12)
    put(run, "b/0", 13)
    put(run, "b/1", 14, (40, 56))
    drop(run, "d/1")


def test_a_grown_cache_equals_a_fresh_one_sample_by_sample_and_no_file_of_it_has_changed(run: Path) -> None:
    config = described(run)
    teacher_cache(config)
    before = files_of(Path(config.cache.path))
    change(run)
    summary = teacher_cache(config)
    assert summary.changes == {"added": 1, "changed": 2, "removed": 1}
    assert (summary.written, summary.sealed, summary.replaced) == (3, True, 3)
    assert summary.roles == {"auxiliary": 2, "report": 1, "train": 3}
    assert "  since it was finished: 1 added, 2 changed, 1 removed" in summary.lines()
    assert contents(config) == fresh(run)
    after = files_of(Path(config.cache.path))
    assert before.items() <= after.items()
    again = teacher_cache(config)
    assert (again.written, again.sealed, again.changes) == (0, True, None)
    assert files_of(Path(config.cache.path)) == after


def test_increments_one_after_the_other(run: Path) -> None:
    """Removed and added again, in another role, and changed twice; the last one only removes."""
    config = described(run)
    teacher_cache(config)
    steps: list[tuple[Callable[[], None], dict[str, int], tuple[str, ...]]] = [
        (lambda: drop(run, "a/0"), {"added": 0, "changed": 0, "removed": 1}, ()),
        (lambda: put(run, "a/0", 5), {"added": 1, "changed": 0, "removed": 0}, ()),
        (
            lambda: put(run, "a/0", 6),
            {"added": 0, "changed": 3, "removed": 0},
            ('data.folders.train=["b"]', 'data.folders.auxiliary=["a"]'),
        ),
        (lambda: drop(run, "b/1"), {"added": 0, "changed": 3, "removed": 1}, ()),
    ]
    for generation, (step, changes, settings) in enumerate(steps, 1):
        step()
        if generation == 3:
            # All four samples of a and b change their role; a/0 its content as well.
            changes = {"added": 0, "changed": 4, "removed": 0}
        summary = teacher_cache(described(run, "cache.zarr", *settings))
        assert summary.changes == changes
        assert contents(config) == fresh(run, *settings)
        assert len(CacheReader(config.cache.path).generations) == generation + 1


def test_an_unfinished_increment_is_invisible_and_others_go_on_with_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = described(run)
    teacher_cache(config)
    before = contents(config)
    change(run)
    first = teacher_cache(config, share=Share(number=0, tasks=2, origin="a test"))
    assert (first.sealed, first.written, first.pending_units) == (False, 2, 1)
    assert first.lines()[0].startswith(f"{config.cache.path}: usable, but what is being added is NOT complete; ")
    assert contents(config) == before
    told = summarise(config.cache.path)
    assert (told.usable, told.sealed, told.pending_units) == (True, False, 1)
    assert told.lines()[-1] == "  units that are not written: 1; segkd teacher-cache goes on with them"
    with pytest.raises(
        CacheMismatchError, match="holds no sample 'a/2' yet: what is being added to it is not finished; "
    ):
        CacheReader(config.cache.path).entry("a/2")
    folder = CacheReader(config.cache.path, partial=True).generations[1].folder
    with pytest.raises(CacheMismatchError) as error:
        teacher_cache(described(run, "cache.zarr", "cache.unit_samples=7"))
    begun = config.cache.unit_samples
    assert (
        str(error.value)
        == f"{folder} was begun with cache.unit_samples = {begun}, and this run has 7; go on with {begun}"
    )
    # Which images had changed stands in the generation: the other task reads only those that it writes.
    read: list[str] = []
    digest = FileSource.image_digest
    monkeypatch.setattr(FileSource, "image_digest", lambda self, sample: read.append(sample.id) or digest(self, sample))
    second = teacher_cache(config, share=Share(number=1, tasks=2, origin="a test"))
    assert (second.sealed, second.written, second.changes) == (True, 1, {"added": 1, "changed": 2, "removed": 1})
    assert read == ["a/2"]
    assert contents(config) == fresh(run)


def test_a_cache_that_was_never_finished_has_no_addition(run: Path) -> None:
    config = described(run)
    first = teacher_cache(config, share=Share(number=0, tasks=2, origin="a test"))
    assert (first.usable, first.sealed) == (False, False)
    assert first.lines()[0].startswith(f"{config.cache.path}: NOT complete; ")
    with pytest.raises(CacheMismatchError, match=r"holds no sample 'z/9': its role is none of cache\.roles"):
        CacheReader(config.cache.path, partial=True).entry("z/9")


def test_dask_workers_write_an_increment(run: Path) -> None:
    config = described(run)
    teacher_cache(config)
    change(run)
    summary = teacher_cache(config, dask="local:1")
    assert (summary.sealed, summary.written) == (True, 3)
    assert contents(config) == fresh(run)


KILLED = """
import os, signal, sys
from segkd.storage import publish
create_whole, left = publish.create_whole, [int(sys.argv.pop(1))]
def dying(path, *rest):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return create_whole(path, *rest)
from segkd.storage import writer
publish.create_whole = writer.create_whole = dying
from segkd.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("files", [5, 12, 16])
def test_killed_during_an_increment_it_goes_on_and_ends_with_the_same_bytes(run: Path, files: int) -> None:
    config, undisturbed = described(run), described(run, "undisturbed.zarr")
    for each in (config, undisturbed):
        teacher_cache(each)
    before = contents(config)
    change(run)
    teacher_cache(undisturbed)
    command = ["teacher-cache", "-c", str(run), "-q"]
    for setting in ("unit_samples=2", "batch=1", "tile=8"):
        command += ["--set", f"cache.{setting}"]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(files), *command], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert contents(config) == before
    assert teacher_cache(config).sealed
    assert files_of(Path(config.cache.path)) == files_of(Path(undisturbed.cache.path))


def test_a_list_that_changed_before_the_cache_was_finished(run: Path) -> None:
    """Refused with two remedies: the old list, or closing; and so for an increment."""
    config = described(run)
    teacher_cache(config, share=Share(number=0, tasks=2, origin="a test"))
    change(run)
    message = (
        f"{config.cache.path} was begun with another list of samples and is not finished: generation 0 was to hold 6 "
        "and has 4, of which the list has removed 0 and changed 1; it has 6 now. Give --close: what is written "
        "stays, and the rest is added; or finish it with the list that it was begun with"
    )
    with pytest.raises(CacheMismatchError) as refused:
        teacher_cache(config)
    assert str(refused.value) == message
    with pytest.raises(IncompleteCacheError):
        CacheReader(config.cache.path)
    closing = ["teacher-cache", "-c", str(run), "--close", "-q", "--json"]
    for setting in ("unit_samples=2", "batch=1", "tile=8"):
        closing += ["--set", f"cache.{setting}"]
    done = CliRunner().invoke(main, closing)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sealed"]
    assert contents(config) == fresh(run)

    put(run, "a/3", 20)
    put(run, "a/4", 21)
    put(run, "b/4", 21)
    teacher_cache(config, share=Share(number=0, tasks=2, origin="a test"))
    drop(run, "b/4")
    with pytest.raises(CacheMismatchError, match="is not finished: generation 2 was to hold 3 and has 1, of which the"):
        teacher_cache(config)
    assert teacher_cache(config, close=True).sealed
    assert contents(config) == fresh(run)


def test_the_side_of_tiles_that_a_cache_was_begun_with_stays(run: Path) -> None:
    """A list of larger images would begin with larger tiles; what is added is cut like the rest."""
    config = described(run, "cache.zarr", "cache.tile=0")
    teacher_cache(config)
    reader = CacheReader(config.cache.path)
    tile = reader.spec.tile
    assert tile == max(max(entry.mapping.shape) for entry in reader.entries())
    for name in ("a/2", "b/2", "d/2"):
        put(run, name, 21, (64, 72))
    summary = teacher_cache(config)
    assert summary.changes == {"added": 3, "changed": 0, "removed": 0}
    assert CacheReader(config.cache.path).spec.tile == tile
    other = described(run, "other.zarr", "cache.tile=0")
    teacher_cache(other)
    assert CacheReader(other.cache.path).spec.tile > tile
    assert contents(config) == contents(other)
    with pytest.raises(CacheMismatchError, match=rf"differs from this run in tile \({tile}, now {tile + 1}\)"):
        teacher_cache(described(run, "cache.zarr", f"cache.tile={tile + 1}"))
