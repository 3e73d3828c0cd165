"""Knowledge may read only what the cache keeps its promise for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from segkd.cli.main import main
from segkd.pipeline.student.inputs import check_promise
from segkd.pipeline.student.knowledge.base import Knowledge, Need
from segkd.pipeline.student.knowledge.channel_wise import ChannelWise
from segkd.pipeline.student.knowledge.config import KnowledgeConfig
from segkd.pipeline.student.knowledge.dist import Dist
from segkd.pipeline.student.knowledge.first_order import FirstOrder
from segkd.pipeline.student.knowledge.pseudo_labels import PseudoLabels
from segkd.pipeline.student.knowledge.zero_order import ZeroOrder
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


def test_each_kind_declares_what_it_reads() -> None:
    assert ZeroOrder(temperature=4.0).needs() == (Need(target="soft", temperatures=(4.0,)),)
    assert Dist(temperature=2.0).needs() == (Need(target="soft", temperatures=(2.0,)),)
    assert ZeroOrder(class_weighted=True).needs() == (Need(target="soft", temperatures=(1.0,)),)
    # Cells weigh by the distribution as it is.
    weighted = ZeroOrder(temperature=4.0, class_weighted=True)
    assert weighted.needs() == (Need(target="soft", temperatures=(4.0, 1.0)),)
    assert FirstOrder().needs() == (Need(target="first_order"),)
    assert FirstOrder(form="logits").needs() == (Need(target="first_order_logits"),)
    assert FirstOrder(teacher_map="recomputed").needs() == (Need(target="soft", temperatures=(1.0,)),)
    assert FirstOrder(near="edges").needs() == (Need(target="first_order"), Need(target="soft"))
    assert PseudoLabels().needs() == (Need(target="soft"),)
    assert PseudoLabels(form="confidence").needs() == (Need(target="soft", temperatures=(1.0,)),)
    (need,) = ChannelWise().needs()
    assert need.exact


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_promised_temperatures_are_served(promised: CacheSpec, temperature: float) -> None:
    kinds = ZeroOrder(temperature=temperature), Dist(temperature=temperature), PseudoLabels(form="confidence")
    check_promise(promised, (*kinds, FirstOrder()), "cache.zarr")


@pytest.mark.parametrize("kind", [ZeroOrder(temperature=2.0), Dist(temperature=2.0)], ids=lambda kind: kind.name)
def test_another_temperature_is_refused(promised: CacheSpec, kind: Knowledge) -> None:
    with pytest.raises(CacheMismatchError) as caught:
        check_promise(promised, (FirstOrder(), kind), "cache.zarr")
    assert str(caught.value) == (
        f"knowledge.{kind.name} reads distributions at T = 2, but cache.zarr keeps its bound of 0.001 nats at "
        "T = 1, 4 only; write it again with 2 among cache.temperatures, or set loss.allow_unpromised = true"
    )


def test_the_argmax_is_kept_whatever_is_promised(promised: CacheSpec) -> None:
    warm = replace(promised.targets["soft"], parameters={"temperatures": [4.0]})
    spec = replace(promised, targets={**promised.targets, "soft": warm})
    check_promise(spec, (PseudoLabels(),), "cache.zarr")
    with pytest.raises(CacheMismatchError, match=r"knowledge\.pseudo_labels reads distributions at T = 1, but"):
        check_promise(spec, (PseudoLabels(form="confidence"),), "cache.zarr")


def test_codes_do_not_do_for_channel_wise(promised: CacheSpec) -> None:
    with pytest.raises(CacheMismatchError) as caught:
        check_promise(promised, (ChannelWise(),), "cache.zarr")
    assert str(caught.value) == (
        "knowledge.channel_wise compares where a class is likely however unlikely it is, and codes hold no small "
        'probabilities: cache.zarr is bounded at 0.001 nats; write it again with cache.profile = "exact", or set '
        "loss.allow_unpromised = true"
    )


def test_exact_distributions_serve_everything(promised: CacheSpec) -> None:
    exact = replace(promised.targets["soft"], coder=ExactDistribution(), fallback=False)
    spec = replace(promised, targets={**promised.targets, "soft": exact})
    check_promise(spec, (ZeroOrder(temperature=2.0), *KnowledgeConfig().kinds()), "cache.zarr")


def test_the_command_refuses_and_the_override_is_recorded(done: Path, tmp_path: Path) -> None:
    command = [
        "train-student",
        "-c",
        str(done),
        "-q",
        "-o",
        str(tmp_path / "student"),
        "-s",
        "knowledge.zero_order.temperature=3",
    ]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert "keeps its bound" in refused.output
    assert not (tmp_path / "student").exists()
    trained = CliRunner().invoke(main, [*command, "-s", "loss.allow_unpromised=true"])
    assert trained.exit_code == 0, trained.output
    kept = json.loads((tmp_path / "student" / "run.json").read_text())
    assert json.dumps(kept).count('"allow_unpromised": true') == 1
