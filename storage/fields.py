"""Takes values out of a cache's JSON: until the cache is sealed, nothing vouches that it is as it was written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from segkd.storage.errors import AFTER_DAMAGE, CacheDamagedError

MANY = 1 << 53
"""No count is larger: beyond, JSON of other programs is not exact."""
_NAME = re.compile(r"[A-Za-z0-9_]+")


class Fields:
    """A JSON object that stands in ``file`` at ``place``, such as ``targets[0]``; empty for all of it.

    Raises CacheDamagedError, naming the file, the key, what stands there and what was expected, for anything else. So
    does every method for its key; keys that nobody asks for are left aside.
    """

    def __init__(self, table: object, file: str, place: str = "") -> None:
        self._file, self._place = file, place
        if not isinstance(table, Mapping):
            raise self.wrong("", table, "an object")
        self._table = table

    def wrong(self, key: str, found: object, expected: str) -> CacheDamagedError:
        """The error for what stands at ``key``."""
        place = ".".join(filter(None, (self._place, key))) or "it"
        shown = f"{found!r:.40}" if len(repr(found)) <= 40 else f"{found!r:.40}..."
        return CacheDamagedError(
            f"{self._file} cannot be read ({place} is {shown}, expected {expected}); {AFTER_DAMAGE}"
        )

    def within(self, key: str) -> Fields:
        """The object at ``key``."""
        return Fields(self._table.get(key), self._file, ".".join(filter(None, (self._place, key))))

    def each(self, key: str) -> list[Fields]:
        """The objects in the list at ``key``."""
        found = self._table.get(key)
        if not isinstance(found, list):
            raise self.wrong(key, found, "a list")
        return [Fields(table, self._file, f"{key}[{number}]") for number, table in enumerate(found)]

    def table(self, key: str) -> dict[str, Any]:
        """The object at ``key``, whatever is in it."""
        return dict(self.within(key)._table)

    def texts(self, key: str) -> dict[str, str]:
        """An object of strings."""
        found = self.table(key)
        if not all(isinstance(value, str) for value in found.values()):
            raise self.wrong(key, found, "strings")
        return found

    def text(self, key: str) -> str:
        """A string."""
        found = self._table.get(key)
        if not isinstance(found, str):
            raise self.wrong(key, found, "a string")
        return found

    def name(self, key: str) -> str:
        """A string that may name a folder or a column."""
        found = self._table.get(key)
        if not isinstance(found, str) or not _NAME.fullmatch(found):
            raise self.wrong(key, found, "a name of letters, digits and underscores")
        return found

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of different strings, one at least."""
        found = self._table.get(key)
        if (
            not isinstance(found, list)
            or not found
            or not all(isinstance(value, str) for value in found)
            or len({*found}) < len(found)
        ):
            raise self.wrong(key, found, "a list of different strings")
        return tuple(found)

    def flag(self, key: str) -> bool:
        """True or false."""
        found = self._table.get(key)
        if not isinstance(found, bool):
            raise self.wrong(key, found, "true or false")
        return found

    def whole(self, key: str, least: int, most: int) -> int:
        """A whole number of ``least`` to ``most``."""
        found = self._table.get(key)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
            raise self.wrong(key, found, f"a whole number of {least:,} to {most:,}")
        return found

    def wholes(self, key: str, least: int, most: int) -> dict[str, int]:
        """An object of such numbers."""
        numbers = self.within(key)
        return {name: numbers.whole(name, least, most) for name in numbers._table}

    def number(self, key: str) -> float:
        """A finite number of at least 0, as JSON has it."""
        found = self._table.get(key)
        if not isinstance(found, int | float) or isinstance(found, bool) or not 0 <= found < math.inf:
            raise self.wrong(key, found, "a number of at least 0")
        return found
