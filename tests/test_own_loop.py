"""``examples/own_loop.py``: what it reads of a cache is what is there, wherever a crop lies."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segkd.pipeline.config import load
from segkd.storage.reader import CacheReader

SCRIPT = Path(__file__).parents[1] / "examples" / "own_loop.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_cells_of_a_crop_are_those_of_the_cache_at_the_same_pixels(
    done: Path, example: dict[str, Any], seed: int
) -> None:
    cache = CacheReader(load(done).cache.path)
    entry = cache.entry("a/0")
    whole = cache.values(entry, "soft")
    rng = np.random.default_rng(seed)
    y, x, (rows, columns), mirrored = example["draw_crop"](rng, *entry.image_size)
    size = example["SIZE"], example["SIZE"]
    # The corners of the crop are those of the square, perhaps mirrored.
    corners = [y(-0.5), y(size[0] - 0.5), *sorted((x(-0.5), x(size[1] - 0.5)))]
    assert corners == pytest.approx([rows.start - 0.5, rows.stop - 0.5, columns.start - 0.5, columns.stop - 0.5])
    assert (x.scale < 0) == mirrored
    log_probs, cells = example["soft_targets"](cache, entry, y, x, size)
    side, inside = rows.stop - rows.start, 0
    for row in range(entry.mapping.y.cells):
        for column in range(entry.mapping.x.cells):
            centre = entry.mapping.y.affine(row) - rows.start, entry.mapping.x.affine(column) - columns.start
            inside += all(-0.5 - 1e-6 <= at <= side - 0.5 + 1e-6 for at in centre)
    assert log_probs.shape[2] * log_probs.shape[3] == inside
    for i, j in np.ndindex(*log_probs.shape[2:]):
        cell = (
            entry.mapping.y.affine.inverse()(y(cells.y.affine(i))),
            entry.mapping.x.affine.inverse()(x(cells.x.affine(j))),
        )
        row, column = map(round, cell)
        assert cell == pytest.approx((row, column), abs=1e-6)
        np.testing.assert_array_equal(log_probs[0, :, i, j], whole[:, row, column])


def test_a_student_that_says_what_the_teacher_says_has_nothing_to_learn(done: Path, example: dict[str, Any]) -> None:
    cache = CacheReader(load(done).cache.path)
    entry = cache.entry("a/0")
    logits = torch.from_numpy(cache.values(entry, "soft"))[None] + 3.0
    same = example["Affine"]()
    log_probs, cells = example["soft_targets"](cache, entry, same, same, entry.image_size)
    assert example["distillation"](logits, log_probs, cells, entry.image_size).item() == pytest.approx(0, abs=1e-6)
    assert example["distillation"](logits.flip(3), log_probs, cells, entry.image_size).item() > 0.01


def test_it_runs(done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["own_loop.py", "--config", str(done), "--steps", "12", "--batch", "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out
    first, last = (float(value) for value in re.findall(r"([\d.]+) nats", said))
    assert last < first
