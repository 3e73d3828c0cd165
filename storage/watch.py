"""Tells an open reader that a generation's units are being written anew, or have been.

Repair takes a generation's seal away before it takes a unit out, and the seal comes back as another file when all units
are there; nothing else touches a seal, an added generation neither. So as long as a seal is the file that it was, every
file of its generation is the one that belongs to it, and a row may be used with a shard that is opened later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segkd.storage.errors import CacheChangedError, CacheDamagedError
from segkd.storage.publish import read_signed

Identity = tuple[int, ...]
"""What one file is told by: its device, inode, length and time of change."""


class SealWatch:
    """Watches the seal at ``path``, whose own SHA-256 was ``digest`` when the reader was opened.

    Picklable: on another machine the seal has another identity, and its content tells that it is the same one.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._path, self._digest = path, digest
        self._known: Identity | None = None

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever files of the generation are opened in here belong to the seal of the reader's opening.

        Raises CacheChangedError where that cannot be said, also in place of the failures that the change has led to.
        """
        before = self._require()
        try:
            yield
        except OSError:
            self._require()
            raise
        if self._require() != before:
            raise self._error()

    def _require(self) -> Identity:
        """What the seal is told by now, if it is the right one. A seal that was read is not read again."""
        try:
            identity = _identity(self._path)
            if identity == self._known:
                return identity
            if read_signed(self._path)["sha256"] == self._digest and _identity(self._path) == identity:
                self._known = identity
                return identity
        except (OSError, CacheDamagedError) as error:
            raise self._error() from error
        raise self._error()

    def _error(self) -> CacheChangedError:
        return CacheChangedError(
            f"{self._path} is no longer the seal that the cache was opened with: units are being written again, or "
            "have been; once segkd cache verify finds it whole, open it again (segkd train goes on from its checkpoint)"
        )


def _identity(path: Path) -> Identity:
    status = os.stat(path)  # noqa: PTH116  # twice as quick as the path's own, and it is called for every file opened
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
