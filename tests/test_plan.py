"""``segkd plan``: what it foretells against what then happens, the budget of bytes, and what it warns of."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segkd.cli.main import main
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.sample import Role
from segkd.pipeline.sizes import UNITS, format_bytes, parse_bytes
from segkd.pipeline.teacher import checks
from segkd.pipeline.teacher import plan as planning
from segkd.pipeline.teacher.budget import BOUNDS, resolve_budget
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.opened import open_run
from segkd.pipeline.teacher.trial import spread
from segkd.storage.errors import CacheMismatchError, ConfigError
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import PlannedSample
from segkd.storage.reader import CacheReader


def noisy(run: Path, sizes: dict[str, tuple[int, int]], each: int) -> None:
    """Other images, of several sizes, and smooth enough for a coder to have something to gain."""
    rng = np.random.default_rng(2)
    for folder, (height, width) in sizes.items():
        for number in range(each):
            labels = rng.integers(0, 3, (height // 8 + 1, width // 8 + 1)).repeat(8, 0).repeat(8, 1)[:height, :width]
            pixels = np.clip(60 + 120 * np.eye(3)[labels] + rng.normal(0, 30, (height, width, 3)), 0, 255)
            for kind, content in (("images", pixels), ("labels", labels)):
                Image.fromarray(content.astype(np.uint8)).save(run.parent / kind / folder / f"{number}.png")


@pytest.fixture
def sized(run: Path) -> RunConfig:
    noisy(run, {"a": (64, 80), "b": (48, 96), "c": (32, 40), "d": (64, 80)}, 4)
    return load(run, ["cache.unit_samples=4", "cache.batch=2", "cache.tile=8", "cache.device=cpu"])


def total_bytes(path: str) -> int:
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def files(path: str) -> int:
    return sum(file.is_file() for file in Path(path).rglob("*"))


# The choice of samples


def planned(number: int, cells: int, role: str) -> PlannedSample:
    axis = network_axis(4 * cells, cells)
    return PlannedSample(id=f"{number:04d}", role=role, image_size=(4 * cells, 4 * cells), mapping=Mapping(axis, axis))


@given(
    sizes=st.lists(st.tuples(st.sampled_from([8, 16, 64]), st.sampled_from(["train", "report"])), min_size=1),
    count=st.integers(1, 40),
    seed=st.randoms(),
)
def test_every_size_and_role_has_its_share_of_the_samples_that_are_tried(
    sizes: list[tuple[int, str]], count: int, seed: object
) -> None:
    samples = [planned(number, cells, role) for number, (cells, role) in enumerate(sizes)]
    chosen = spread(samples, count)
    seed.shuffle(samples)  # type: ignore[attr-defined]
    assert spread(samples, count) == chosen
    assert len({sample.id for sample in chosen}) == len(chosen) == min(count, len(samples))
    everywhere, here = (Counter((sample.image_size, sample.role) for sample in them) for them in (samples, chosen))
    for kind, number in everywhere.items():
        assert abs(here[kind] - number * len(chosen) / len(samples)) < 2


def test_what_comes_in_sequences_is_not_tried_at_one_place_of_each() -> None:
    chosen = spread([planned(number, 8, "train") for number in range(480)], 48)
    places = Counter(int(sample.id) % 10 for sample in chosen)
    assert len(places) >= 8
    assert max(places.values()) <= 12


# What is foretold


def test_of_all_samples_it_foretells_what_happens(sized: RunConfig) -> None:
    foretold = planning.plan(sized, samples=1000)
    assert not Path(sized.cache.path).exists()
    assert list(Path(sized.cache.path).parent.glob("*segkd*")) == []
    summary = teacher_cache(sized)
    assert (foretold.sampled, foretold.roles) == (12, summary.roles)
    assert foretold.volume.uncertainty == 0
    assert foretold.volume.files == files(sized.cache.path)
    # Tables and records of 12 samples in units of 2 pack a little worse than in units of 4.
    assert foretold.volume.bytes == pytest.approx(total_bytes(sized.cache.path), rel=0.05)
    for target, measures in foretold.report.items():
        for name, mean in measures.items():
            assert mean == pytest.approx(summary.report[target]["measures"][name]["mean"], rel=1e-4, abs=1e-9)
    assert foretold.units == len(CacheReader(sized.cache.path).records())


def test_values_that_are_foretold_within_tiles_are_planned_within_the_caches_own(sized: RunConfig) -> None:
    run = replace(sized, cache=replace(sized.cache, temperatures=(1.0, 4.0), tile=0))
    foretold = planning.plan(run, samples=1000).volume.bytes
    teacher_cache(with_budget(run, "1GB"))
    reader = CacheReader(run.cache.path)
    assert reader.spec.tile != 64
    assert reader.spec.targets["soft"].codec == "zstd"  # such a bound is below those of foretold values
    shutil.rmtree(run.cache.path)
    teacher_cache(run)
    assert CacheReader(run.cache.path).spec.targets["soft"].codec == "residuals"
    assert total_bytes(run.cache.path) == pytest.approx(foretold, rel=0.05)


def test_of_some_samples_it_foretells_about_what_happens(sized: RunConfig) -> None:
    foretold = planning.plan(sized, samples=8)
    summary = teacher_cache(sized)
    assert foretold.sampled == 8
    assert 0 < foretold.volume.uncertainty < 0.2
    assert foretold.volume.bytes == pytest.approx(total_bytes(sized.cache.path), rel=0.15)
    measured = summary.report["soft"]["measures"]["kl_cells"]["mean"]
    assert foretold.report["soft"]["kl_cells"] == pytest.approx(measured, rel=0.2)
    assert list(foretold.parts) == ["decode", "infer", "code", "write"]
    assert min(foretold.parts.values()) > 0


def test_break_even_is_the_time_of_a_teacher_that_looks_at_every_crop(sized: RunConfig) -> None:
    wide = replace(sized, augment=replace(sized.augment, crop=(64, 64)))
    foretold = planning.plan(wide, samples=12)
    images = wide.train.labelled + wide.train.auxiliary
    assert foretold.pays_after_epochs == pytest.approx(foretold.pays_after_steps * images / 8)
    mean_pixels = (2 * 64 * 80 + 48 * 96) / 3
    live = foretold.parts["infer"] * 64 * 64 / mean_pixels * images
    assert foretold.pays_after_steps * live == pytest.approx(foretold.seconds, rel=0.3)


def test_a_single_sample_is_enough_to_foretell_from(sized: RunConfig) -> None:
    for name in (*range(1, 4), "c"):
        for kind in ("images", "labels"):
            place = Path(sized.data.root) / kind
            for file in place.glob("c/*" if name == "c" else f"[abd]/{name}.png"):
                file.unlink()
    alone = replace(
        sized,
        data=replace(sized.data, folders={Role.TRAIN: ("a",)}),
        cache=replace(sized.cache, roles=(Role.TRAIN,)),
    )
    foretold = planning.plan(alone, samples=5)
    assert (foretold.sampled, foretold.roles, foretold.volume.uncertainty) == (1, {"train": 1}, 0)
    assert foretold.pays_after_steps > 0


def test_a_unit_is_proposed_that_costs_a_minute_or_two(sized: RunConfig) -> None:
    opened = open_run(sized)
    units = opened.units([replace(it, id=f"{k:05d}{it.id}") for k in range(40) for it in opened.planned])
    assert planning._proposed(opened, units, an_image=15.0) is None
    assert planning._proposed(opened, units, an_image=1.5) == 60
    assert planning._proposed(opened, units, an_image=90.0) == 1
    # However fast the teacher is, several units are left to share out.
    assert planning._proposed(opened, units, an_image=1e-4) == len(units.samples) // 8


def test_duration() -> None:
    told = [planning.duration(seconds) for seconds in (0.25, 12.4, 119, 150, 7320, 360000)]
    assert told == ["0.2 s", "12 s", "119 s", "2 min", "2 h 02 min", "100 h 00 min"]


# The command


def segkd(run: Path, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["plan", "-c", str(run), "-q", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_in_words_and_as_json(run: Path) -> None:
    status, text, _ = segkd(run)
    assert status == 0
    for word in ("size", "time", "bound", "units", "pays", "disagrees with itself", "mIoU on 4 images as described"):
        assert word in text
    status, document, _ = segkd(run, "--json", "--samples", "4")
    foretold = json.loads(document)
    assert (status, foretold["ok"], foretold["sampled"]) == (0, True, 4)
    assert foretold["fit"]["miou"] > 90
    assert set(foretold["disagreement"]) == {"flip", "scale 1/2", "scale 2", "quarter crop"}


def test_a_wrong_description_ends_with_status_1_and_says_what_does_better(run: Path) -> None:
    status, text, _ = segkd(run, "--set", "teacher.preprocessing.channels=BGR")
    assert status == 1
    assert re.search(r'Warning: the teacher has 9\d\.\d mIoU with preprocessing: channels = "RGB", and ', text)
    assert "as described, on 4 images; correct [teacher] before caching it" in text


def test_too_little_space_is_said_before_it_is_used(sized: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
    (warning,) = [text for text in planning.plan(sized, samples=4).warnings if "free there" in text]
    assert warning.startswith(f"{sized.cache.path} needs ")
    assert (
        "20.0 kB are free there; free some space, name another cache.path, or keep to a size: --budget 18.0kB"
        in warning
    )


def test_a_bound_near_the_teachers_own_noise_is_pointed_out(sized: RunConfig) -> None:
    loose = replace(sized, cache=replace(sized.cache, max_kl=0.05))
    foretold = planning.plan(loose, samples=4)
    assert any("max_kl 0.05 is over a tenth of the teacher's disagreement" in text for text in foretold.warnings)


def test_cells_that_show_what_is_not_cached_are_pointed_out(run: Path) -> None:
    noisy(run, {"a": (64, 80), "b": (48, 96), "c": (32, 40), "d": (64, 80)}, 4)
    colours = ["red", "green", "blue"]
    dropped = [
        'data.classes=["red", "green"]',
        'data.label_values={0 = "red", 1 = "green", 2 = "ignore"}',
        f"teacher.classes={colours}",
        'teacher.class_map={blue = "ignore"}',
    ]
    foretold = planning.plan(load(run, dropped), samples=4)
    assert 0.1 < foretold.ignored_cells < 0.5
    (warning,) = [text for text in foretold.warnings if "class_map" in text]
    assert warning.startswith(
        f"in {foretold.ignored_cells:.1%} of the cells that were looked at the teacher gives more "
    )
    assert "to what teacher.class_map ignores (blue); the cache holds the rest, scaled up to 1: " in warning


@pytest.mark.parametrize(("share", "told"), [(0.009, False), (0.011, True)])
def test_a_few_such_cells_are_not(run: Path, monkeypatch: pytest.MonkeyPatch, share: float, told: bool) -> None:
    monkeypatch.setattr(checks, "ignored_cells", lambda *_: share)
    foretold = planning.plan(load(run), samples=4)
    assert any("class_map" in text for text in foretold.warnings) == told


# Amounts of bytes


def test_amounts_of_bytes() -> None:
    assert parse_bytes("200GB") == 200 * 10**9
    assert parse_bytes(" 1.5 TiB ") == 3 * 2**39
    assert parse_bytes("10kb") == 10_000
    assert [format_bytes(count) for count in (0, 999, 1000, 24_832, 2e11)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "24.8 kB",
        "200 GB",
    ]
    for unit, factor in UNITS.items():
        assert parse_bytes(f"3{unit}") == 3 * factor


@pytest.mark.parametrize("text", ["", "200", "GB", "-1GB", "1XB", "0GB", "1e9B", "1,5GB", "9" * 320 + "PB"])
def test_what_is_no_amount_of_bytes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no amount of bytes; write a number and one of B, kB, MB.*: 200GB$"):
        parse_bytes(text)


# The budget


def with_budget(run: RunConfig, budget: str) -> RunConfig:
    return replace(run, cache=replace(run.cache, budget=budget))


def test_the_cache_keeps_to_its_budget(sized: RunConfig) -> None:
    loosest = replace(sized, cache=replace(sized.cache, max_kl=BOUNDS[-1]))
    least = planning.plan(loosest, samples=1000).volume.bytes
    budget = f"{1.2 * least / 1000:.3f}kB"
    teacher_cache(with_budget(sized, budget))
    settled = CacheReader(sized.cache.path).spec.targets["soft"].bound
    assert settled in BOUNDS[:-1]
    assert total_bytes(sized.cache.path) <= parse_bytes(budget)
    # A cache that stands has decided: another task, or another day, takes its bound.
    assert resolve_budget(with_budget(sized, "1TB")).cache.max_kl == settled
    assert teacher_cache(with_budget(sized, budget)).written == 0


def test_a_budget_that_is_ample_buys_the_tightest_bound(run: Path) -> None:
    settled = resolve_budget(load(run, ["cache.budget=1TB"])).cache
    assert (settled.max_kl, settled.budget) == (BOUNDS[0], "")


def test_a_budget_that_nothing_fits_is_refused_with_what_would(sized: RunConfig) -> None:
    message = (
        r"^cache.budget = 2kB is too small: with max_kl 0.1, the loosest bound that is of use, this cache takes "
        r"[\d.]+ kB; give more, or leave out samples or targets$"
    )
    with pytest.raises(ConfigError, match=message):
        teacher_cache(with_budget(sized, "2kB"))
    assert not Path(sized.cache.path).exists()


def test_a_budget_and_a_bound_exclude_each_other(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_kl = 0.002 and budget = '1GB' both bound the error; keep one"):
        load(run, ["cache.max_kl=2e-3", "cache.budget=1GB"])
    with pytest.raises(ConfigError, match=r"'much' is no amount of bytes"):
        load(run, ["cache.budget=much"])
    status, _, error = segkd(run, "--budget", "1GB", "--set", "cache.max_kl=2e-3")
    assert (status, "keep one" in error) == (2, True)


def test_a_budget_needs_a_target_whose_bound_it_finds(sized: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r'^cache.budget needs the target "soft", whose bound it finds; add it'):
        resolve_budget(replace(sized, cache=replace(sized.cache, budget="1GB", targets=("first_order",))))
    with pytest.raises(ConfigError, match=r'^cache.budget has no bound to find where profile = "exact"; take another'):
        resolve_budget(replace(sized, cache=replace(sized.cache, budget="1GB", profile="exact")))


def test_a_budget_for_a_cache_that_stands_without_that_target_is_refused(sized: RunConfig) -> None:
    teacher_cache(replace(sized, cache=replace(sized.cache, targets=("first_order",))))
    with pytest.raises(CacheMismatchError) as caught:
        resolve_budget(with_budget(replace(sized, cache=replace(sized.cache, targets=("soft",))), "1TB"))
    assert str(caught.value) == (
        f'{sized.cache.path} keeps first_order and no target "soft", whose bound a budget finds; '
        "give this run another cache.path, or remove the old cache"
    )


def test_the_bounds_are_a_fine_grid() -> None:
    ratios = [after / before for before, after in pairwise(BOUNDS)]
    assert max(ratios) == pytest.approx(min(ratios))
    assert (BOUNDS[0], BOUNDS[-1]) == (pytest.approx(1e-6), pytest.approx(0.1))
    assert math.log10(ratios[0]) == pytest.approx(0.05)


def test_of_a_teacher_that_knows_nothing_only_that_is_pointed_out(sized: RunConfig) -> None:
    knows_nothing = SimpleNamespace(suspect=None, miou=10.0, constant=20.0, samples=4)
    volume = SimpleNamespace(bytes=1, uncertainty=0.0)
    loose = replace(sized, cache=replace(sized.cache, max_kl=0.05))
    warnings = planning._warnings(loose, volume, 10**9, {"flip": 1e-3}, knows_nothing)  # type: ignore[arg-type]
    assert warnings == [
        "the teacher has 10.0 mIoU, no more than always answering the most frequent class (20.0); check its weights, "
        "and whether its classes are those of the labels"
    ]
