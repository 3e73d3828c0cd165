"""What is wrong with a data set: one complaint a mistake, however many files it is true of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from segkd.pipeline.data.names import listing

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Complaint:
    """Something about the data. An error keeps them from being used, a warning does not."""

    severity: Severity
    message: str
    """What is wrong, with the first file, line or sample of which it is true."""
    others: tuple[str, ...] = ()
    """The others."""

    def __str__(self) -> str:
        return self.message + (f"; so it is with {listing(self.others, most=5)}" if self.others else "")

    def to_dict(self) -> dict[str, Any]:
        """For JSON: with all of the others."""
        return {"severity": self.severity, "message": self.message, "others": list(self.others)}


def of_all(severity: Severity, files: Sequence[str], what: str) -> Iterator[Complaint]:
    """One complaint of all files, if there are any: it is often one mistake."""
    if files:
        yield Complaint(severity, f"{files[0]}: {what}", tuple(files[1:]))


def of_lines(absent: Sequence[tuple[str, str]], what: str, remedy: str = "") -> Iterator[Complaint]:
    """One complaint of all places in lists that name what is not there, each with what it names."""
    if absent:
        place, name = absent[0]
        others = tuple(f"{place} ({name})" for place, name in absent[1:])
        yield Complaint("error", f"{place}: there is no {what} {name}{remedy}", others)
