"""Which settings have been measured, and where the figures are.

A dataclass of settings may state ``evidence``, a class variable. Its keys are the name of a setting (what its value
does), ``setting=value`` (what one of its values does) or "" (what the whole table does); its values the row that
measured it against another value, which may be the default, or None. The reference pages say "accuracy not measured"
of what has None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A row of a table in ``docs/results/``."""

    page: str
    """The page's file name."""
    row: str
    """The row's first cell."""


Evidence = Mapping[str, Row | None]


def evidence_of(settings: type) -> dict[str, Row | None]:
    """What a dataclass of settings and those that it inherits from state."""
    found: dict[str, Row | None] = {}
    for kind in reversed(settings.__mro__):
        found |= vars(kind).get("evidence", {})
    return found
