"""Which auxiliary samples a teacher is certain enough of, by the rows of a cache alone."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkd.pipeline.data.pools import certain
from segkd.pipeline.data.sample import Role, Sample
from segkd.pipeline.student.config import TrainConfig
from segkd.storage.errors import CacheDamagedError, CacheMismatchError, ConfigError


@dataclass(frozen=True)
class Row:
    measures: dict[str, float]


class Rows:
    """A cache of rows and nothing else: whoever reads a target of it fails."""

    def __init__(self, *measured: tuple[float, float] | None) -> None:
        self.measured = measured

    @property
    def samples(self) -> tuple[Sample, ...]:
        numbers = range(len(self.measured))
        return tuple(Sample(id=str(k), role=Role.AUXILIARY, labelled=False) for k in numbers)

    def entry(self, sample_id: str) -> Row:
        found = self.measured[int(sample_id)]
        if found is None:
            raise CacheDamagedError("samples/c.0.0: lost")
        return Row({"soft.kl_cells": 0.0, "soft.confidence": found[0], "soft.entropy": found[1]})


def kept(rows: Any, least: float = 0.0, most: float = math.inf) -> list[int]:
    return [int(sample.id) for sample in certain(rows.samples, rows, least, most)]


ROWS = Rows((0.9, 0.2), (0.5, 1.5), (0.7, 0.1), (0.8, 0.9))
numbers = st.floats(0, 1, width=32)


@given(st.lists(st.tuples(numbers, numbers), min_size=1), numbers, numbers)
def test_a_sample_is_drawn_that_keeps_both_limits(
    measured: list[tuple[float, float]], least: float, most: float
) -> None:
    expected = [k for k, (confidence, entropy) in enumerate(measured) if confidence >= least and entropy <= most]
    if expected:
        assert kept(Rows(*measured), least, most) == expected
    else:
        with pytest.raises(ConfigError, match="which none of the"):
            kept(Rows(*measured), least, most)


def test_each_limit_alone_and_none() -> None:
    assert kept(ROWS) == [0, 1, 2, 3]
    assert kept(ROWS, least=0.75) == [0, 3]
    assert kept(ROWS, most=0.5) == [0, 2]
    assert kept(ROWS, 0.75, 0.5) == [0]
    assert kept(Rows(None, None)) == [0, 1], "without limits no row is looked at"


def test_a_limit_that_a_row_holds_in_single_precision_is_kept() -> None:
    """0.9 is 0.89999998 there, and 0.1 is 0.10000000149."""
    row = Rows((float(np.float32(0.9)), float(np.float32(0.1))))
    assert row.measured[0] is not None
    assert row.measured[0][0] < 0.9
    assert row.measured[0][1] > 0.1
    assert kept(row, 0.9, 0.1) == [0]


def test_a_sample_whose_row_is_lost_stays() -> None:
    assert kept(Rows((0.9, 0.2), None, (0.1, 0.2)), least=0.5) == [0, 1]


def test_how_many_remain_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="segkd"):
        kept(ROWS)
        assert not caplog.records
        kept(ROWS, 0.75, 1.0)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 auxiliary samples have a confidence of at least 0.75 and an entropy of at most 1 nats; "
        "the others are not drawn"
    ]


def test_none_left_says_what_the_cache_holds() -> None:
    with pytest.raises(ConfigError) as error:
        kept(ROWS, 0.95, 0.05)
    assert str(error.value) == (
        "train.least_confidence is 0.95 and train.most_entropy 0.05, which none of the 4 auxiliary samples satisfies: "
        "in the cache their confidence is 0.5 to 0.9, their entropy 0.1 to 1.5 nats; "
        "set limits that some of them satisfy"
    )


def test_a_cache_without_distributions_says_nothing_of_certainty() -> None:
    class Others(Rows):
        def entry(self, sample_id: str) -> Row:  # noqa: ARG002
            return Row({"first_order.mean_error": 0.0})

    with pytest.raises(CacheMismatchError) as error:
        kept(Others((0.9, 0.2)), 0.5)
    assert str(error.value) == (
        "train.least_confidence and train.most_entropy need the target 'soft', which the cache does not keep; "
        "write it again with that target, or leave both out"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"least_confidence": 1.5}, "train.least_confidence is 1.5; it must be between 0 (all samples) and 1"),
        ({"least_confidence": math.nan}, "train.least_confidence is nan; it must be between 0 (all samples) and 1"),
        ({"most_entropy": -1.0}, "train.most_entropy is -1.0; it must be 0 or more nats (inf: all samples)"),
        ({"most_entropy": math.nan}, "train.most_entropy is nan; it must be 0 or more nats (inf: all samples)"),
    ],
)
def test_limits_that_are_none(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(**setting)  # type: ignore[arg-type]
    assert str(error.value) == message
