"""Files that appear whole or not at all, and the protocol by which a unit's objects become part of a cache.

A unit may be attempted by several workers, one after another or at once; there are no locks, leases or clocks. Each
attempt writes its objects under a name of its own and syncs them. Then it *decides*: it creates the unit's winner file,
which names the attempt and carries the commit record; the file system lets exactly one create it. Whoever finds a
winner file, its author or a later run, *promotes* it: moves the named attempt's objects to their places and writes the
commit record, which comes last. Promoting is idempotent, and a winner file is removed only after the commit record
stands, so a unit that is committed is never touched again. Until then the attempt that it names is the unit: only
promoting removes that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from segkd.storage.errors import AFTER_DAMAGE, CacheDamagedError, CacheError

logger = logging.getLogger("segkd")

COMMITS = "commits"
"""The folder of the commit records, in that of their generation."""
SEAL = f"{COMMITS}/seal.json"
CLOSED = f"{COMMITS}/closed.json"
"""Names the units that a generation was closed without; only in one whose list changed before it was finished."""
ATTEMPTS = f"{COMMITS}/attempts"
"""Where everything stands that is not yet part of the generation; it goes with the seal."""


def record_name(unit: int) -> str:
    """Where a unit's commit record stands in its generation's folder."""
    return f"{COMMITS}/{unit:08d}.json"


def canonical(document: Mapping[str, Any]) -> bytes:
    """JSON of which equal documents have equal bytes."""
    return (json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n").encode()


def signed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its own SHA-256, so that damage to it can be told and located."""
    return {**document, "sha256": hashlib.sha256(canonical(document)).hexdigest()}


_NO_LINKS = "the file system refuses; it must support hard links"


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
            errno.EPERM: _NO_LINKS,
            errno.ENOSYS: _NO_LINKS,
            errno.EOPNOTSUPP: _NO_LINKS,
        }
        if error.errno not in remedies:
            raise
        raise CacheError(
            f"cannot write to {path}: {remedies[error.errno]}, then run the same command again: finished units are kept"
        ) from error


def read_document(path: Path) -> dict[str, Any]:
    """A JSON file of a cache. Raises CacheDamagedError for one that is cut off or overwritten."""
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise CacheDamagedError(f"{path} cannot be read ({error}); {AFTER_DAMAGE}") from error
    return document


def read_signed(path: Path) -> dict[str, Any]:
    """A commit record or a seal. Raises CacheDamagedError unless each of its bytes is as it was written."""
    document = read_document(path)
    expected = signed({name: value for name, value in document.items() if name != "sha256"})
    if path.read_bytes() != canonical(expected):
        raise CacheDamagedError(f"{path} cannot be read (its digest differs); {AFTER_DAMAGE}")
    return document


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


def remove_synced(path: Path) -> None:
    """Removes a file, if it is there, and waits until its folder says so on the disk."""
    if path.exists():
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


def create_whole(path: Path, content: bytes, scratch: Path) -> bool:
    """Creates ``path`` with all of ``content``, or leaves what is there; says whether it was created here.

    The content is first written to a file in ``scratch``, a folder of the same file system, where a crash leaves it.
    """
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = scratch / uuid.uuid4().hex
    try:
        write_synced(temporary, content)
        os.link(temporary, path)
    except (FileExistsError, FileNotFoundError):
        # Not found: whoever has sealed the cache meanwhile has cleared the scratch folder away.
        if not path.exists():
            raise
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


class UnitPublisher:
    """Publishes units of one generation, whose folder is ``folder``, into the cache ``root``."""

    def __init__(self, root: Path, folder: Path, names: Callable[[int], Collection[str]] | None = None) -> None:
        """``names``: the objects that a unit may have, where the plan is known; a decision may name no others."""
        self.root = root
        self.folder = folder
        self.names = names
        self.attempts = folder / ATTEMPTS

    def committed(self, unit: int) -> bool:
        """Whether the unit's commit record stands."""
        return (self.folder / record_name(unit)).exists()

    def recover(self, unit: int) -> bool:
        """Finishes what an interrupted worker had decided; says whether the unit is committed now."""
        if not self.committed(unit):
            with explained(self.root):
                self._promote(unit)
        return self.committed(unit)

    def publish(
        self, unit: int, objects: Mapping[str, bytes], content: Mapping[str, Any], absent: Sequence[str] = ()
    ) -> bool:
        """Commits a unit; False when another worker was first and its result stands.

        ``objects`` by their names in the generation's folder; ``content`` stands in the commit record beside them;
        ``absent`` names what the unit might have had: a withdrawn predecessor's leftovers.
        """
        if self.committed(unit):
            return False
        attempt = self.attempts / f"{unit:08d}-{uuid.uuid4().hex}"
        with explained(self.root):
            try:
                return self._publish(unit, attempt, objects, content, absent)
            except FileNotFoundError:
                # Whoever sealed the cache meanwhile has cleared all attempts away, this one too.
                if not self.committed(unit):
                    raise
                return False
            finally:
                decision = self._decision(unit)
                if decision is None or decision["attempt"] != attempt.name:
                    shutil.rmtree(attempt, ignore_errors=True)

    def _publish(
        self,
        unit: int,
        attempt: Path,
        objects: Mapping[str, bytes],
        content: Mapping[str, Any],
        absent: Sequence[str],
    ) -> bool:
        attempt.mkdir(parents=True)
        for number, data in enumerate(objects.values()):
            write_synced(attempt / str(number), data)
        sync_folder(attempt)
        record = {
            **content,
            "unit": unit,
            "objects": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in objects.items()
            },
        }
        decision = {"attempt": attempt.name, "order": list(objects), "absent": list(absent), "record": record}
        won = create_whole(self._winner(unit), canonical(signed(decision)), self.attempts)
        if self.committed(unit):
            # Somebody committed, and removed the winner file, between the first look and this decision.
            if won:
                self._winner(unit).unlink(missing_ok=True)
            return False
        self._promote(unit)
        return won

    def withdraw(self, unit: int, names: Sequence[str]) -> None:
        """Takes a unit out of a generation without a seal: its record, then its objects, whose names are given.

        Whenever this is interrupted, the unit is as it was, or is not committed and will be written again.
        """
        decision = self._decision(unit)
        # A worker that died just before it removed this file had committed the unit.
        remove_synced(self._winner(unit))
        if decision is not None:
            shutil.rmtree(self.attempts / decision["attempt"], ignore_errors=True)
        for name in (record_name(unit), *names):
            remove_synced(self.folder / name)

    def close(self, missing: Sequence[int]) -> None:
        """Notes for good that the generation does without these units, unless that is noted already."""
        create_whole(self.folder / CLOSED, canonical(signed({"missing": sorted(missing)})), self.attempts)

    def seal(self, document: Mapping[str, Any] | None) -> None:
        """Writes the seal, unless it stands (None), and removes what interrupted attempts have left.

        For a generation whose units are all committed.
        """
        with explained(self.root):
            if document is not None:
                create_whole(self.folder / SEAL, canonical(signed(document)), self.attempts)
        shutil.rmtree(self.attempts, ignore_errors=True)

    def _winner(self, unit: int) -> Path:
        return self.attempts / f"{unit:08d}.winner.json"

    def _decision(self, unit: int) -> dict[str, Any] | None:
        """What the unit's winner file says; None without one.

        It is created whole, so one that is not as it was written is damage and decides nothing: it is removed.
        """
        try:
            decision = read_signed(self._winner(unit))
            if self._is_of(unit, decision):
                return decision
        except FileNotFoundError:
            return None
        except CacheDamagedError:
            pass
        logger.warning("%s is damaged and is left aside; unit %d is pending", self._winner(unit), unit)
        remove_synced(self._winner(unit))
        return None

    def _is_of(self, unit: int, decision: Mapping[str, Any]) -> bool:
        """Whether a decision names an attempt at the unit and objects of it alone: its names become paths."""
        try:
            attempt, record, order = decision["attempt"], decision["record"], decision["order"]
            sizes = [record["objects"][name]["bytes"] for name in order]
            return (
                re.fullmatch(rf"{unit:08d}-[0-9a-f]{{32}}", attempt) is not None
                and not (self.attempts / attempt).is_symlink()
                and record["unit"] == unit
                and set(order) == set(record["objects"])
                and all(isinstance(size, int) for size in sizes)
                and all(self._may_have(unit, name) for name in (*order, *decision["absent"]))
            )
        except (KeyError, TypeError, AttributeError):
            return False

    def _may_have(self, unit: int, name: str) -> bool:
        if self.names is not None and name not in self.names(unit):
            return False
        array, _, chunk = name.partition("/")
        return (
            re.fullmatch(r"[\w-]+", array) is not None
            and array not in (COMMITS, "units", "removed")
            and re.fullmatch(r"c(\.[0-9]+)+", chunk) is not None
            and (array != "samples" or chunk == f"c.{unit}.0")
            and not (self.folder / array).is_symlink()
        )

    def _promote(self, unit: int) -> None:
        decision = self._decision(unit)
        # Without a decision there is nothing to promote, or another worker has done it meanwhile.
        if decision is None or self.committed(unit):
            return
        record, attempt = decision["record"], self.attempts / decision["attempt"]
        folders: set[Path] = set()
        for number, name in enumerate(decision["order"]):
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            # FileNotFoundError: another worker moved this object.
            with contextlib.suppress(FileNotFoundError):
                (attempt / str(number)).replace(place)
            if not place.exists() or place.stat().st_size != record["objects"][name]["bytes"]:
                raise CacheDamagedError(
                    f"{place} is missing or cut off although unit {unit} was decided; "
                    f"remove {self._winner(unit)} and run the same command again"
                )
            folders.update(folder for folder in place.parents if folder.is_relative_to(self.root))
        for name in decision["absent"]:
            remove_synced(self.folder / name)
        for folder in folders:
            sync_folder(folder)
        create_whole(self.folder / record_name(unit), canonical(signed(record)), self.attempts)
        self._winner(unit).unlink(missing_ok=True)
        shutil.rmtree(attempt, ignore_errors=True)
