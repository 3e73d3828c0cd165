"""A loss may read only what the cache keeps its promise for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from segkd.cli.main import main
from segkd.pipeline.student.inputs import check_promise
from segkd.pipeline.student.losses import LossConfig, uses
from segkd.storage.coding import ExactDistribution
from segkd.storage.errors import CacheMismatchError
from segkd.storage.reader import CacheReader
from segkd.storage.spec import CacheSpec


@pytest.fixture(scope="module")
def promised(done: Path) -> CacheSpec:
    """The specification of a cache that is bounded at T = 1 and T = 4."""
    spec = CacheReader(done.parent / "cache.zarr").spec
    soft = replace(spec.targets["soft"], bound=1e-3, parameters={"temperatures": [1.0, 4.0]})
    return replace(spec, targets={**spec.targets, "soft": soft})


def test_each_term_declares_what_it_reads() -> None:
    both = uses(LossConfig(temperature=4.0, first_order_form="logits"))
    assert [(use.term, use.target, use.temperature) for use in both] == [
        ("zero_order", "soft", 4.0),
        ("first_order", "first_order_logits", None),
    ]
    assert uses(LossConfig(zero_order=0.0, first_order=0.0)) == ()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_promised_temperatures_are_served(promised: CacheSpec, temperature: float) -> None:
    check_promise(promised, LossConfig(temperature=temperature), "cache.zarr")


def test_another_temperature_is_refused(promised: CacheSpec) -> None:
    with pytest.raises(CacheMismatchError) as caught:
        check_promise(promised, LossConfig(temperature=2.0), "cache.zarr")
    assert str(caught.value) == (
        "loss.temperature is 2, but cache.zarr keeps its bound of 0.001 nats at T = 1, 4 only; "
        "write it again with 2 among cache.temperatures, or set loss.allow_unpromised = true"
    )
    # A term that is off reads nothing.
    check_promise(promised, LossConfig(zero_order=0.0, temperature=2.0), "cache.zarr")


def test_exact_distributions_serve_every_temperature(promised: CacheSpec) -> None:
    exact = replace(promised.targets["soft"], coder=ExactDistribution(), fallback=False)
    spec = replace(promised, targets={**promised.targets, "soft": exact})
    check_promise(spec, LossConfig(temperature=2.0), "cache.zarr")


def test_the_command_refuses_and_the_override_is_recorded(done: Path, tmp_path: Path) -> None:
    command = ["train-student", "-c", str(done), "-q", "-o", str(tmp_path / "student"), "-s", "loss.temperature=3"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert "keeps its bound" in refused.output
    assert not (tmp_path / "student").exists()
    trained = CliRunner().invoke(main, [*command, "-s", "loss.allow_unpromised=true"])
    assert trained.exit_code == 0, trained.output
    kept = json.loads((tmp_path / "student" / "run.json").read_text())
    assert json.dumps(kept).count('"allow_unpromised": true') == 1
