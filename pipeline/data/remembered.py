"""What was found out about files, in the user's cache folder, so that it need not be found out again.

A database that is absent, damaged, locked or not to be written to is no error: things are found out anew.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_VERSION = 1
"""Of what is kept: another one is another file."""
_AT_ONCE = 500
"""Keys of one query; SQLite's least limit is 999."""
_PATIENCE = 5.0
"""Seconds to wait for another process that writes."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it was seen: a later one of the same path, size and time is taken to be the same."""

    path: bytes
    """Absolute."""
    size: int
    mtime_ns: int


def stamp_of(file: Path) -> Stamp | None:
    """None for a file that cannot be asked; whoever reads it says why."""
    try:
        status = file.stat()
    except OSError:
        return None
    return Stamp(os.fsencode(os.path.abspath(file)), status.st_size, status.st_mtime_ns)  # noqa: PTH100


def cache_folder() -> Path | None:
    """The user's own folder for what can be made again, after the XDG base directory specification; None: no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "segkd"


class Memory:
    """Bytes by :class:`Stamp`, of all data sets of a user; processes may use it at the same time."""

    def __init__(self) -> None:
        folder = cache_folder()
        self.path = None if folder is None else folder / f"contents-{_VERSION}.sqlite"
        self._database: sqlite3.Connection | None = None
        with self._forgiving():
            self._database = self._open()

    def recall(self, stamps: Sequence[Stamp]) -> Mapping[Stamp, bytes]:
        """What is known of these files, as far as they are unchanged and the record is whole."""
        found: dict[Stamp, bytes] = {}
        by_path = {stamp.path: stamp for stamp in stamps}
        paths = list(by_path)
        for start in range(0, len(paths), _AT_ONCE):
            with self._forgiving():
                if self._database is None:
                    break
                part = paths[start : start + _AT_ONCE]
                query = (
                    f"SELECT path, size, mtime_ns, content, check_sum FROM files WHERE path IN ({_marks(len(part))})"
                )
                for path, size, mtime_ns, content, check_sum in self._database.execute(query, part):
                    stamp = Stamp(path, size, mtime_ns)
                    if by_path.get(path) == stamp and check_sum == _check_sum(stamp, content):
                        found[stamp] = content
        return found

    def keep(self, items: Sequence[tuple[Stamp, bytes]]) -> None:
        """Remembers contents, in place of what was known of the same paths."""
        rows = [
            (stamp.path, stamp.size, stamp.mtime_ns, content, _check_sum(stamp, content)) for stamp, content in items
        ]
        with self._forgiving():
            if self._database is not None:
                with self._database:
                    self._database.executemany(f"INSERT OR REPLACE INTO files VALUES ({_marks(5)})", rows)

    def close(self) -> None:
        """Gives the database back."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _open(self) -> sqlite3.Connection | None:
        if self.path is None:
            return None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=_PATIENCE)
        try:
            database.execute(
                "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, "
                "content BLOB, check_sum INTEGER) WITHOUT ROWID"
            )
        except sqlite3.Error:
            database.close()
            raise
        return database

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Goes on without the database where it fails; one that is damaged is removed, so that the next run has one."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self.close()
            # What is merely locked, read-only or full is an OperationalError.
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                with contextlib.suppress(OSError):
                    assert self.path is not None
                    self.path.unlink()


def _marks(count: int) -> str:
    return ", ".join("?" * count)


def _check_sum(stamp: Stamp, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(b"%b %d %d" % (stamp.path, stamp.size, stamp.mtime_ns)))
