"""What differs between two JSON documents, said so that people can act on it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

LONG = 60
"""Characters of a value that a message has room for."""
_FILE = re.compile(r"(.*) sha256:[0-9a-f]{64}")


def leaves(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a JSON document's tables."""
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The leaves in which two documents differ, each with both values; None for one that is absent."""
    old, new = dict(leaves(before)), dict(leaves(after))
    keys = dict.fromkeys((*old, *new))
    return [difference(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def difference(key: str, before: Any, after: Any) -> str:
    """One leaf: its key and both values, or what of them differs where they are long or stand for a file's content."""
    files = [_FILE.fullmatch(value) if isinstance(value, str) else None for value in (before, after)]
    if files[0] and files[1] and files[0][1] == files[1][1]:
        return f"{key} (the content of {files[0][1]})"
    if isinstance(before, list) and isinstance(after, list) and max(len(repr(before)), len(repr(after))) > LONG:
        if len(before) != len(after):
            return f"{key} ({len(before):,} values, now {len(after):,})"
        place = next(place for place, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
        return difference(f"{key}[{place}]", before[place], after[place])
    return f"{key} ({_shortened(before)}, now {_shortened(after)})"


def _shortened(value: Any) -> str:
    file = _FILE.fullmatch(value) if isinstance(value, str) else None
    text = repr(file[1] if file else value)
    return text if len(text) <= LONG else f"{text[: LONG - 3]}..."
