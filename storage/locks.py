"""Keeps processes apart that must not work on one folder together: the repair of a cache from whoever writes to it.

Units need no lock: attempts at one unit do not harm each other. A repair does what nobody else does, it takes finished
units out again, so while one is at work nobody else may publish or seal. The lock is the process's and ends with it: it
cannot be left behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from segkd.storage.errors import CacheError

_NOT_SUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def locked(folder: Path, *, alone: bool, wait: bool = False) -> Iterator[None]:
    """Holds an advisory lock on a folder, ``alone`` or together with others.

    Where it is held otherwise, waits for it or raises BlockingIOError. A file system that knows no such locks goes
    without.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def at_work(root: Path, *, alone: bool) -> Iterator[None]:
    """Holds the lock of a cache's folder: a repair ``alone``, those that write units together.

    Raises CacheError where it is held otherwise.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(root, alone=alone))
        except BlockingIOError as error:
            others = "another segkd cache repair or teacher-cache" if alone else "segkd cache repair"
            raise CacheError(
                f"{others} is at work on {root}; wait until it has ended, then run the same command again"
            ) from error
        yield
