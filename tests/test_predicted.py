"""Distributions whose values are foretold by their neighbours: the page's rules cell by cell, and what they promise."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax

from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.targets import SoftTargets
from segkd.storage.coding import (
    EXACT,
    CompandedDistribution,
    PredictedDistribution,
    coder_from_dict,
    coder_to_dict,
    from_float16,
    to_float16,
)
from segkd.storage.errors import CacheDamagedError, ConfigError, NonFiniteError
from segkd.storage.fields import Fields
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import PlannedSample, plan_units
from segkd.storage.packing import encode_chunk
from segkd.storage.prediction import ARGMAX, ARGMAX_KEPT, BEYOND, VALUES, residuals, restored
from segkd.storage.reader import CacheReader
from segkd.storage.spec import CacheSpec, TargetSpec
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter

SIDE = 7
CODER = PredictedDistribution(temperature=3.5, levels=(4.5, 27.33, 43.0, 360.0), side=SIDE)
PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text()


def slow_foretold(values: npt.NDArray[np.int64], y: int, x: int, s: int) -> int:
    """What docs/format.md says of one cell of one class: values t,t, all that it needs being known."""
    side = len(values)

    def at(dy: int, dx: int) -> int:
        v, u = y + dy * s, x + dx * s
        return int(values[v if 0 <= v < side else y - dy * s, u if 0 <= u < side else x - dx * s])

    if x % (2 * s) == 0:
        return (at(-1, 0) + at(1, 0) + 1) >> 1
    if y % (2 * s) == 0:
        return (at(0, -1) + at(0, 1) + 1) >> 1
    return (at(-1, 0) + at(1, 0) + at(0, -1) + at(0, 1) + 2) >> 2


def order(side: int) -> list[tuple[int, int, int]]:
    """Cells y, x and their s, in the order of the page; the first cell, which nothing foretells, is left out."""
    cells = []
    s = 1
    while 2 * s < side:
        s *= 2
    while s >= 1 and side > 1:
        for odd_y, odd_x in ((1, 0), (0, 1), (1, 1)):
            cells += [(y, x, s) for y in range(s * odd_y, side, 2 * s) for x in range(s * odd_x, side, 2 * s)]
        s //= 2
    return cells


def slow_restored(kept: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    values = np.zeros(kept.shape, np.int64)
    steps = np.where(kept == -128, 0, kept).astype(np.int64) * 32
    for plane, step in zip(values, steps, strict=True):
        plane[0, 0] = step[0, 0] % 8192
        for y, x, s in order(kept.shape[1]):
            plane[y, x] = (slow_foretold(plane, y, x, s) + step[y, x]) % 8192
    for x in range(kept.shape[2]):
        argmax = 0
        for y in range(kept.shape[1]):
            marked = np.flatnonzero(kept[:, y, x] == -128)
            argmax = int(marked[0]) if len(marked) else argmax
            values[argmax, y, x] = ARGMAX
    return values


def slow_codes(log_probs: npt.NDArray[np.float32], coder: PredictedDistribution, rung: int) -> npt.NDArray[np.int64]:
    """The page's rule for writers, of a map C,h,w that is one tile at most."""
    classes, height, width = log_probs.shape
    roots = np.floor(16384 * np.exp(log_probs.astype(np.float64) / (2 * coder.temperature)) + 0.5)
    wanted = np.floor(32 * coder.levels[rung] * (roots / np.sqrt((roots**2).sum(0))) + 0.5).astype(int)
    top = log_probs.argmax(0)
    values = np.zeros((classes, coder.side, coder.side), np.int64)
    up = 32 - int(np.floor(32 * coder.first + 0.5))
    for k in range(classes):
        for y, x, s in [(0, 0, 0), *order(coder.side)]:
            foretold = slow_foretold(values[k], y, x, s) if s else 0
            r = 0
            if y < height and x < width and top[y, x] != k:
                d = wanted[k, y, x] - foretold
                r = ((abs(d) + up) >> 5) * (1 if d > 0 else -1)
                r = max(r, -(foretold >> 5))
                r = {128: 127, -128: -127}.get(r, r)
            values[k, y, x] = foretold + 32 * r
    codes = values[:, :height, :width].copy()
    np.put_along_axis(codes, top[None], ARGMAX, 0)
    return codes


@st.composite
def log_distributions(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    """Log-probabilities: ordinary, extreme, one-hot with -inf, uniform, with ties; of one tile or several."""
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 6) | st.just(150), st.integers(1, 16), st.integers(1, 16)))
    elements = draw(
        st.sampled_from(
            [
                st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0, 80.0]),
                st.just(0.0),
                st.floats(-(2.0**126), 2.0**126, width=32),
            ]
        )
    )
    logits = draw(hnp.arrays(np.float32, shape, elements=elements, fill=st.just(0.5))).astype(np.float64)
    if draw(st.booleans()):
        winner = draw(hnp.arrays(np.int64, (shape[0], 1, *shape[2:]), elements=st.integers(0, shape[1] - 1)))
        logits = np.where(np.arange(shape[1])[None, :, None, None] == winner, logits, -np.inf)
    return log_softmax(logits, axis=1).astype(np.float32)


def smooth(classes: int, height: int, width: int, seed: int = 0, sharpness: float = 6.0) -> npt.NDArray[np.float32]:
    """Log-probabilities 1,C,h,w that change slowly, as a teacher's do."""
    coarse = torch.randn(1, classes, height // 8 + 2, width // 8 + 2, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (sharpness * fine).log_softmax(1).numpy()


rungs = st.integers(0, CODER.rungs - 1)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8, 11, 13])
@settings(max_examples=8)
@given(data=st.data())
def test_values_are_restored_as_the_format_page_says(side: int, data: st.DataObject) -> None:
    elements = st.integers(-3, 3) | st.sampled_from([-128, -127, 127])
    kept = data.draw(hnp.arrays(np.int8, (2, side, side), elements=elements))
    kept[:, 0] = np.where(kept[:, 0] == -128, 0, kept[:, 0])
    kept[0, 0] = ARGMAX_KEPT
    kept[1] = np.where(kept[0] == -128, 0, kept[1])
    expected = slow_restored(kept)
    for rows in range(1, side + 1):
        np.testing.assert_array_equal(restored(kept, rows), expected[:, :rows])


@settings(max_examples=40)
@given(log_distributions(), rungs)
def test_what_is_kept_gives_the_values_back(values: npt.NDArray[np.float32], rung: int) -> None:
    codes = CODER.encode(values[:1, :, :SIDE, :SIDE], np.array([rung]))[0]
    height, width = codes.shape[1:]
    tile = np.full((len(codes), SIDE, SIDE), BEYOND, np.int16)
    tile[:, :height, :width] = codes
    kept = residuals(tile)
    np.testing.assert_array_equal(restored(kept)[:, :height, :width], codes)
    assert (kept[:, height:] == 0).all()
    assert (kept[:, :, width:] == 0).all()
    np.testing.assert_array_equal(slow_restored(kept)[:, :height, :width], codes)


def test_values_that_no_coder_gives_are_not_written() -> None:
    with pytest.raises(AssertionError, match="no coder gives such values"):
        residuals(np.full((2, SIDE, SIDE), 17, np.int16))


@pytest.mark.parametrize("seed", range(6))
def test_writers_choose_as_the_format_page_says(seed: int) -> None:
    generator = np.random.default_rng(seed)
    height, width = generator.integers(1, SIDE + 1, 2)
    logits = generator.normal(size=(1, 5, height, width)) * generator.choice([0.3, 3.0, 30.0])
    values = log_softmax(logits, axis=1).astype(np.float32)
    if seed % 2:
        values[:, 3] = -np.inf
    for rung in range(CODER.rungs):
        np.testing.assert_array_equal(CODER.encode(values, np.array([rung]))[0], slow_codes(values[0], CODER, rung))


@settings(max_examples=40)
@given(log_distributions(), rungs)
def test_numpy_and_torch_give_equal_codes(values: npt.NDArray[np.float32], rung: int) -> None:
    codes = CODER.encode(values, np.full(len(values), rung))
    assert codes.dtype == np.int16
    assert codes.max() < VALUES
    found = CODER.encode(torch.from_numpy(values), torch.full((len(values),), rung))
    np.testing.assert_array_equal(found.numpy(), codes)


def test_every_root_is_the_one_that_a_table_of_thresholds_names() -> None:
    """Two classes, so that the roots show: q of the second is all that the argmax leaves."""
    thresholds = CODER._thresholds[1:-1]
    beside = [np.nextafter(thresholds, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate([thresholds, *beside, -np.geomspace(1e-6, 80, 999, dtype=np.float32)])
    values = values[values < 0][None, None, None]
    both = np.concatenate([np.zeros_like(values), values], axis=1)
    roots = np.searchsorted(thresholds, values, side="right")
    expected = np.floor(32 * 360.0 * (roots / np.sqrt(16384.0**2 + roots.astype(float) ** 2)) + 0.5)
    np.testing.assert_array_equal(CODER._wanted(both, np.array([3]))[:, 1:], expected)
    np.testing.assert_array_equal(CODER._wanted(torch.from_numpy(both), torch.tensor([3]))[:, 1:], expected)


@settings(max_examples=40)
@given(log_distributions(), rungs)
def test_decoding_gives_a_finite_distribution_with_the_same_argmax(values: npt.NDArray[np.float32], rung: int) -> None:
    on = np.full(len(values), rung)
    decoded = CODER.decode(CODER.encode(values, on), on)
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(np.exp(decoded.astype(np.float64)).sum(1), 1, atol=1e-4)
    np.testing.assert_array_equal(decoded.argmax(1), values.argmax(1))


def test_codes_decode_to_what_the_format_page_says() -> None:
    values, on = smooth(5, 20, 17), np.array([1])
    codes = CODER.encode(values, on)
    q = (np.maximum(codes[0].astype(float), 32 * 0.25) / (32 * 27.33)) ** 2 * (codes[0] >= 0)
    q = np.where(codes[0] < 0, np.maximum(1 - q.sum(0), 1.001 * q.max(0)), q)
    p = q**3.5 / (q**3.5).sum(0)
    np.testing.assert_allclose(np.exp(CODER.decode(codes, on)[0]), p, rtol=1e-4, atol=1e-9)
    from_torch = CODER.decode(torch.from_numpy(codes), torch.from_numpy(on)).numpy()
    np.testing.assert_allclose(from_torch, CODER.decode(codes, on), atol=2e-5)


def test_padding_and_exact_samples_decode_too() -> None:
    assert np.isfinite(CODER.decode(np.zeros((2, 5, 2, 2), np.int16), np.array([0, 3]))).all()
    values = smooth(5, 4, 4)
    kept = to_float16(values)
    np.testing.assert_array_equal(CODER.decode(kept, np.array([EXACT])), from_float16(kept))


def test_a_value_is_less_than_the_least_difference_off() -> None:
    values, on = smooth(6, 40, 33), np.array([2])
    codes = CODER.encode(values, on)
    q = np.exp(log_softmax(values / 3.5, axis=1))
    off = np.abs(np.sqrt(q) * 43.0 - codes / 32)[codes >= 0]
    assert 0.5 < off.max() <= 0.59375 + 1.5 / 32


def test_the_cost_in_kl_falls_with_the_levels_as_the_fisher_rao_metric_says() -> None:
    logits = np.random.default_rng(1).normal(size=(1, 10, 64, 64)) * 2
    values = log_softmax(logits, axis=1).astype(np.float32)
    coder = dataclasses.replace(CODER, levels=(20.0, 40.0, 80.0, 160.0), side=64)
    q = log_softmax(values / 3.5, axis=1)
    costs = []
    for rung in range(4):
        decoded = log_softmax(coder.decode(coder.encode(values, np.array([rung])), np.array([rung])) / 3.5, axis=1)
        costs.append(float((np.exp(q) * (q - decoded)).sum(1).mean()))
    assert sorted(costs, reverse=True) == costs
    # Nine classes are off by about 0.1 levels squared each; KL = 2 sum (delta sqrt q)^2.
    for cost, levels in zip(costs[1:], coder.levels[1:], strict=True):
        assert cost == pytest.approx(2 * 10 * 0.1 / levels**2, rel=0.35)


@pytest.mark.parametrize("side", [1, 4, 16])
@pytest.mark.parametrize("levels", [147.0, 250.0, 360.0])
def test_a_step_of_any_height_is_kept(side: int, levels: float) -> None:
    """From nothing to half of all and back, between neighbours and in the first cell, however many levels that is."""
    p = np.where(np.random.default_rng(0).random((1, 1, side, side)) < 0.5, 0.001, 0.45)
    values = np.log(np.concatenate([p, 1 - p], axis=1)).astype(np.float32)
    coder = dataclasses.replace(CODER, levels=(levels,), side=side)
    on = np.array([0])
    decoded = coder.decode(coder.encode(values, on), on)
    assert float((np.exp(values) * (values - decoded)).sum(1).max()) < 40 / levels**2


def test_hesitating_teachers_are_kept_on_the_ladder() -> None:
    """A temperature below the coder's is the stricter where classes compete, and asks for many levels."""
    values = torch.from_numpy(smooth(6, 20, 24, sharpness=1.0))
    for max_kl, foretold in ((1e-2, True), (1e-3, True), (3e-4, True), (1e-4, False)):
        spec = SoftTargets().spec(CacheConfig(max_kl=max_kl, temperatures=(1.0, 4.0)), 6, 20)
        assert isinstance(spec.coder, PredictedDistribution) is foretold
        rungs = SoftTargets().rungs(spec, values)
        decoded = spec.coder.decode(spec.coder.encode(values, rungs), rungs)
        assert float((values.exp() * (values - decoded)).sum(1).mean()) <= max_kl


def test_a_small_map_in_a_large_tile_is_coded_as_its_part_of_it() -> None:
    """What lies beyond the grid is foretold as far as the grid depends on it."""
    coder, on = dataclasses.replace(CODER, side=1024), np.array([2])
    values = smooth(3, 5, 9)
    codes = coder.encode(values, on)
    tile = np.full((3, 1024, 1024), BEYOND, np.int16)
    tile[:, :5, :9] = codes[0]
    np.testing.assert_array_equal(restored(residuals(tile), 5)[:, :, :9], codes[0])


def test_it_takes_fewer_bytes_than_codes_by_themselves_where_classes_count() -> None:
    values = smooth(11, 64, 64)
    sizes = []
    for coder in (
        PredictedDistribution.for_bound(1e-3, (1.0, 4.0), 64),
        CompandedDistribution.for_bound(1e-3, 11, (1.0, 4.0)),
    ):
        for level in range(len(coder.levels)):
            rung = np.array([level * len(coder.floors)])
            codes = coder.encode(values, rung)
            decoded = coder.decode(codes, rung)
            costs = [
                float((np.exp(p) * (p - q)).sum(1).mean())
                for p, q in ((log_softmax(values / t, axis=1), log_softmax(decoded / t, axis=1)) for t in (1, 4))
            ]
            if max(costs) <= 1e-3:
                sizes.append(len(encode_chunk(codes[0], "residuals" if codes.dtype == np.int16 else "zstd")))
                break
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize("temperatures", [(2.0,), (1.0, 4.0), (0.5, 20.0)])
@pytest.mark.parametrize("max_kl", [1e-6, 1e-3, 0.1])
def test_a_ladder_ascends_and_fits_a_byte(temperatures: tuple[float, ...], max_kl: float) -> None:
    coder = PredictedDistribution.for_bound(max_kl, temperatures, 64)
    assert (np.diff(coder.levels) > 0).all()
    assert coder.levels[-1] == 360
    assert coder.rungs <= EXACT  # which is the number of none of them


def test_as_many_classes_as_16_bits_number() -> None:
    values = log_softmax(np.random.default_rng(3).normal(size=(1, 65535, 1, 2)) * 0.3, axis=1).astype(np.float32)
    decoded = CODER.decode(CODER.encode(values, np.array([3])), np.array([3]))
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded.argmax(1), values.argmax(1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    values = np.full((1, 3, 2, 2), -1.0986, np.float32)
    values[0, 1, 1, 0] = bad
    with pytest.raises(NonFiniteError, match=r"^log-probabilities with NaN or \+inf cannot be coded; look at"):
        CODER.encode(values, np.zeros(1, np.int64))


def test_a_coder_survives_json() -> None:
    assert coder_from_dict(json.loads(json.dumps(coder_to_dict(CODER)))) == CODER


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": ()}, "levels must be 1 to 255 numbers above 1 and up to 360, got 0 numbers, the last None"),
        (
            {"levels": (2.0, 361.0)},
            "levels must be 1 to 255 numbers above 1 and up to 360, got 2 numbers, the last 361.0",
        ),
        ({"floors": (0.1, 0.2)}, r"floors must be one number between 0 and 1 levels, got \[0.1, 0.2\]"),
        ({"first": 1.0}, "first must be at least 0.5 and less than 1 levels, got 1.0"),
        ({"side": 2.5}, "side must be a whole number above 0, got 2.5"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
    ],
)
def test_parameters_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        dataclasses.replace(CODER, **fields)


def soft(**changes: Any) -> TargetSpec:
    stated = {
        "name": "soft",
        "channels": 4,
        "coder": CODER,
        "bound": 1e-3,
        "measures": ("kl_cells",),
        "bounded": ("kl_cells",),
        "parameters": {"temperatures": [1.0, 4.0]},
        "codec": "residuals",
    }
    return TargetSpec(**{**stated, **changes})


def spec_of(target: TargetSpec, tile: int = SIDE) -> CacheSpec:
    return CacheSpec(classes=("a", "b", "c", "d"), targets={"soft": target}, tile=tile, fingerprints={}, teacher={})


@pytest.mark.parametrize("changes", [{"codec": "zstd"}, {"codec": "context"}, {"coder": CompandedDistribution()}])
def test_the_coder_and_its_codec_go_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"soft is kept (by|in) "):
        soft(**changes)
    table = {**soft().to_dict(), **changes}
    if "coder" in changes:
        table["coder"] = coder_to_dict(changes["coder"])
    table = json.loads(json.dumps(table))
    with pytest.raises(CacheDamagedError, match=r"^c/zarr.json cannot be read \(codec is '\w+', expected "):
        TargetSpec.from_fields(Fields(table, "c/zarr.json"))


def test_values_are_foretold_within_tiles_of_the_cache() -> None:
    message = "soft is foretold within 7 cells and kept in tiles of 8; give its coder the side of the tiles"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        spec_of(soft(), tile=8)
    table = {**json.loads(json.dumps(spec_of(soft()).to_dict())), "tile": 8}
    with pytest.raises(CacheDamagedError, match=r"^c/zarr.json cannot be read \(tile is 8, expected that of the"):
        CacheSpec.from_dict(table, "c")


SIZES = ((20, 30), (7, 7), (3, 50), (16, 15))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, npt.NDArray[np.int16]]]:
    """A cache of samples of several sizes, and their codes."""
    path = tmp_path_factory.mktemp("predicted") / "cache.zarr"
    samples = [
        PlannedSample(
            id=f"{k:03}",
            role="train",
            image_size=(4 * height, 4 * width),
            mapping=Mapping(network_axis(4 * height, height), network_axis(4 * width, width)),
        )
        for k, (height, width) in enumerate(SIZES)
    ]
    plan = plan_units(samples, unit_samples=2, tile=SIDE)
    writer = CacheWriter(path, spec_of(soft()), plan)
    codes = {
        sample.id: CODER.encode(smooth(4, *sample.mapping.shape, seed=k, sharpness=30.0), np.array([3]))[0]
        for k, sample in enumerate(samples)
    }
    for unit in plan.units:
        coded = [
            CodedSample(
                image_digest=bytes(16),
                codes={"soft": codes[sample.id]},
                rungs={"soft": 3},
                measures={"soft": {"kl_cells": 1e-4}},
            )
            for sample in plan.of(unit)
        ]
        writer.write(unit, coded)
    assert writer.seal()
    return path, codes


@settings(max_examples=30)
@given(data=st.data())
def test_windows_are_parts_of_the_whole_map(
    cache: tuple[Path, dict[str, npt.NDArray[np.int16]]], data: st.DataObject
) -> None:
    path, codes = cache
    reader = CacheReader(path)
    name = data.draw(st.sampled_from(sorted(codes)))
    height, width = codes[name].shape[1:]
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    window = reader.window(reader.entry(name), "soft", range(top, bottom), range(left, right))
    np.testing.assert_array_equal(window, codes[name][:, top:bottom, left:right])


def test_zarr_reads_the_numbers_that_the_page_restores(
    cache: tuple[Path, dict[str, npt.NDArray[np.int16]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, codes = cache
    array = zarr.open_array(path / "generations/0/soft", mode="r")
    assert array.dtype == np.int8
    first, second = PAGE.split("### A sample in a few lines")[1].split("```python\n")[1:3]
    begun, found = first.split("```")[0].splitlines()[:-6], dict[str, Any]()
    monkeypatch.chdir(path.parent)
    exec("\n".join([*begun, second.split("```")[0]]), found)
    np.testing.assert_array_equal(found["v"], codes["000"])
    reader = CacheReader(path)
    np.testing.assert_allclose(found["p"], np.exp(reader.values(reader.entry("000"), "soft")), rtol=1e-4, atol=1e-7)
