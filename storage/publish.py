"""Files that appear whole or not at all, and the protocol by which a unit's objects become part of a cache.

A unit may be attempted by several workers, one after another or at once; there are no locks, leases or clocks. Each
attempt writes its objects under a name of its own and syncs them. Then it *decides*: it creates the unit's winner file,
which names the attempt and carries the commit record; the file system lets exactly one create it. Whoever finds a
winner file, its author or a later run, *promotes* it: moves the named attempt's objects to their places and writes the
commit record, which comes last. Promoting is idempotent, and a winner file is removed only after the commit record
stands, so a unit that is committed is never touched again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from segkd.storage.errors import CacheDamagedError, CacheError

COMMITS = "commits"
SEAL = f"{COMMITS}/seal.json"
ATTEMPTS = f"{COMMITS}/attempts"
"""Where everything stands that is not yet part of the cache; it goes with the seal."""


def record_name(unit: int) -> str:
    """Where a unit's commit record stands in the cache."""
    return f"{COMMITS}/{unit:08d}.json"


def canonical(document: Mapping[str, Any]) -> bytes:
    """JSON of which equal documents have equal bytes."""
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the file system's refusals into a CacheError that says what to do next."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "the disk is full; free some space",
            errno.EDQUOT: "the disk quota is used up; free some space",
            errno.EROFS: "the file system is read-only; remount it or choose another path",
            errno.EACCES: "permission is denied; check the folder's owner and mode",
            errno.EPERM: "the file system refuses; it must support hard links",
        }
        if error.errno not in remedies:
            raise
        raise CacheError(
            f"cannot write to {path}: {remedies[error.errno]}, then run the same command again: finished units are kept"
        ) from error


def write_synced(path: Path, content: bytes) -> None:
    """Writes a new file and waits until it is on the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_whole(path: Path, content: bytes, scratch: Path) -> bool:
    """Creates ``path`` with all of ``content``, or leaves what is there; says whether it was created here.

    The content is first written to a file in ``scratch``, a folder of the same file system, where a crash leaves it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = scratch / uuid.uuid4().hex
    try:
        write_synced(temporary, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        sync_folder(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


class UnitPublisher:
    """Publishes units into the cache folder ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.attempts = root / ATTEMPTS

    def committed(self, unit: int) -> bool:
        """Whether the unit's commit record stands."""
        return (self.root / record_name(unit)).exists()

    def recover(self, unit: int) -> bool:
        """Finishes what an interrupted worker had decided; says whether the unit is committed now."""
        if not self.committed(unit) and self._winner(unit).exists():
            self._promote(unit)
        return self.committed(unit)

    def publish(self, unit: int, objects: Mapping[str, bytes], statistics: Mapping[str, Any], samples: int) -> bool:
        """Commits a unit; False when another worker was first and its result stands."""
        if self.committed(unit):
            return False
        attempt = self.attempts / f"{unit:08d}-{uuid.uuid4().hex}"
        with explained(self.root):
            try:
                return self._publish(unit, attempt, objects, statistics, samples)
            except FileNotFoundError:
                # Whoever sealed the cache meanwhile has cleared all attempts away, this one too.
                if not self.committed(unit):
                    raise
                return False
            finally:
                shutil.rmtree(attempt, ignore_errors=True)

    def _publish(
        self, unit: int, attempt: Path, objects: Mapping[str, bytes], statistics: Mapping[str, Any], samples: int
    ) -> bool:
        attempt.mkdir(parents=True)
        for number, content in enumerate(objects.values()):
            write_synced(attempt / str(number), content)
        sync_folder(attempt)
        record = {
            "unit": unit,
            "samples": samples,
            "objects": {
                name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in objects.items()
            },
            "statistics": statistics,
        }
        decision = {"attempt": attempt.name, "order": list(objects), "record": record}
        won = create_whole(self._winner(unit), canonical(decision), self.attempts)
        if self.committed(unit):
            # Somebody committed, and removed the winner file, between the first look and this decision.
            if won:
                self._winner(unit).unlink(missing_ok=True)
            return False
        self._promote(unit)
        return won

    def seal(self, document: Mapping[str, Any]) -> None:
        """Writes the seal, unless it stands, and removes what interrupted attempts have left.

        For a cache whose units are all committed.
        """
        seal = self.root / SEAL
        with explained(self.root):
            try:
                if not seal.exists():
                    create_whole(seal, canonical(document), self.attempts)
            except FileNotFoundError:
                # Another worker has sealed the cache, and cleared all attempts away, meanwhile.
                if not seal.exists():
                    raise
        shutil.rmtree(self.attempts, ignore_errors=True)

    def _winner(self, unit: int) -> Path:
        return self.attempts / f"{unit:08d}.winner.json"

    def _promote(self, unit: int) -> None:
        try:
            decision = json.loads(self._winner(unit).read_bytes())
        except FileNotFoundError:
            return  # Promoted by another worker meanwhile.
        if self.committed(unit):
            return
        record, attempt = decision["record"], self.attempts / decision["attempt"]
        folders = set()
        for number, name in enumerate(decision["order"]):
            place = self.root / name
            place.parent.mkdir(parents=True, exist_ok=True)
            # FileNotFoundError: another worker moved this object.
            with contextlib.suppress(FileNotFoundError):
                (attempt / str(number)).replace(place)
            if not place.exists() or place.stat().st_size != record["objects"][name]["bytes"]:
                raise CacheDamagedError(
                    f"{place} is missing or cut off although unit {unit} was decided; "
                    f"remove {self._winner(unit)} and run the same command again"
                )
            folders.add(place.parent)
        for folder in folders:
            sync_folder(folder)
        create_whole(self.root / record_name(unit), canonical(record), self.attempts)
        self._winner(unit).unlink(missing_ok=True)
        shutil.rmtree(attempt, ignore_errors=True)
