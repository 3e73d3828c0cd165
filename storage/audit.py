"""Checks every byte of a cache against what its seals and commit records say.

A seal names the SHA-256 of every metadata file and of all commit records, a commit record the length and SHA-256 of
every object of its unit, and both carry their own. So each byte is covered once, and damage is told by file, and within
a damaged shard by tile, down to the samples that it concerns.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from segkd.storage.damage import NOBODY, Affected, AuditReport, Damage, affected, objects_of
from segkd.storage.errors import CacheDamagedError, CacheMismatchError, CacheNotFoundError
from segkd.storage.generation import GENERATIONS, METADATA, Generation, read_spec, there_is_a_cache
from segkd.storage.publish import CLOSED, COMMITS, SEAL, canonical, read_signed, record_name
from segkd.storage.spec import CacheSpec

BLOCK = 1 << 20
"""Bytes that are read at once."""
LOST = "is lost"
SHAPES: dict[str, dict[str, Any]] = {
    SEAL: {"units": int, "missing": list, "commits_sha256": str, "metadata_sha256": dict, "previous_sha256": object},
    CLOSED: {"missing": list},
}
RECORD = {"unit": int, "samples": int, "objects": dict}
"""What the audit takes for granted of a document: one that is signed may still be another one."""


def verify(path: str | Path, *, workers: int = 4, on_progress: Callable[[int, int], None] | None = None) -> AuditReport:
    """Checks every byte of the cache at ``path`` with ``workers`` threads; never raises for what it finds in a cache.

    ``on_progress(done, total)`` hears of each unit. Memory is bounded by ``workers`` blocks, a name a file and the list
    of damage. Raises CacheNotFoundError where there is no cache and CacheMismatchError for one of another format.
    """
    return _Audit(Path(path)).run(workers, on_progress or (lambda *_: None))


@dataclass
class _Checked:
    """What the check of one unit's objects gave."""

    generation: int
    unit: int
    samples: int
    files: int = 0
    bytes: int = 0
    wrong: dict[str, str] = field(default_factory=dict)
    """What is wrong by the object's name in the generation's folder."""


class _Audit:
    """An audit under way: the constructor checks what stands above the units, :meth:`run` checks these."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not there_is_a_cache(root):
            raise CacheNotFoundError(f"there is no cache at {root}; write one with segkd teacher-cache")
        self.damage: dict[str, Damage] = {}
        self.known: set[str] = set()
        """Every file that belongs to the cache, by its name in it."""
        self._replaced_from: dict[int, set[str]] = {}
        self.files = self.bytes = self.pending = 0
        self.numbers = self._begun()
        self.seals = {number: self._signed(number, SEAL) for number in self.numbers}
        self._check_metadata()
        self.spec = self._read_spec()
        self.generations = {number: self._open(number) for number in self.numbers}
        self._check_chain()

    def run(self, workers: int, on_progress: Callable[[int, int], None]) -> AuditReport:
        total = sum(map(self._units, self.numbers))
        with ThreadPoolExecutor(workers) as executor:
            for done, checked in enumerate(_in_order(executor, self._jobs(), 2 * workers), 1):
                self.files += checked.files
                self.bytes += checked.bytes
                if checked.wrong:
                    self._note_objects(checked)
                on_progress(done, total)
        return AuditReport(
            path=str(self.root),
            sealed=all(map(self._is_sealed, self.numbers)),
            units=total,
            pending=self.pending,
            files=self.files,
            bytes=self.bytes,
            damage=tuple(self.damage[name] for name in sorted(self.damage)),
            strays=tuple(self._strays()),
        )

    def _begun(self) -> list[int]:
        """The generations that there are, or must have been; one that holds nothing but attempts has not begun."""
        found = [int(folder.name) for folder in (self.root / GENERATIONS).glob("*") if folder.name.isdecimal()]
        begun = [n for n in found if any((self._folder(n) / name).exists() for name in (METADATA, SEAL))]
        return list(range(max(begun, default=0) + 1))

    def _folder(self, number: int) -> Path:
        return self.root / GENERATIONS / str(number)

    def _is_sealed(self, number: int) -> bool:
        return (self._folder(number) / SEAL).exists()

    def _note(
        self,
        name: str,
        wrong: str,
        number: int | None = None,
        unit: int | None = None,
        found: Affected = NOBODY,
    ) -> None:
        damage = Damage(file=name, wrong=wrong, generation=number, unit=unit, affected=found)
        self.damage.setdefault(name, damage)

    def _signed(self, number: int, name: str) -> dict[str, Any] | None:
        """A seal or commit record; None where there is none, and where it is damaged, which is noted."""
        full = _name(number, name)
        self.known.add(full)
        try:
            document = read_signed(self.root / full)
            if not all(isinstance(document.get(key), kind) for key, kind in SHAPES.get(name, RECORD).items()):
                raise CacheDamagedError
            self.bytes += (self.root / full).stat().st_size
            self.files += 1
        except FileNotFoundError:
            return None
        except (CacheDamagedError, OSError) as error:
            self._note(full, _reason(error), number)
            return None
        return document

    def _check_metadata(self) -> None:
        for number, seal in self.seals.items():
            for name, expected in ({} if seal is None else seal["metadata_sha256"]).items():
                if name in self.known or not _is_inside(name):
                    continue
                self.known.add(name)
                size, wrong = _compare(self.root / name, {"sha256": expected})
                self.files += 1
                self.bytes += size
                if wrong:
                    self._note(name, wrong, number)

    def _read_spec(self) -> CacheSpec | None:
        self.known.add(METADATA)
        if METADATA in self.damage:
            return None
        try:
            return read_spec(self.root)
        except CacheMismatchError:
            raise
        except Exception as error:  # no digest vouches for the JSON of an unfinished cache
            self._note(METADATA, _reason(error))
            return None

    def _open(self, number: int) -> Generation | None:
        name = _name(number, METADATA)
        self.known.add(name)
        # A cache of which there is only the root has no generation yet.
        begun = self.numbers != [0] or self._is_sealed(number) or self._recorded(number)
        if begun and not (self.root / name).exists():
            self._note(name, LOST, number)
        if self.spec is None or name in self.damage:
            return None
        try:
            generation = Generation.open(self.root, self.spec, number)
            self.known.update(generation.metadata_names())
            return generation if generation.plan.units >= 0 else None
        except FileNotFoundError:
            return None
        except Exception as error:
            self._note(name, _reason(error), number)
            return None

    def _check_chain(self) -> None:
        for number in self.numbers[1:]:
            seal, before, name = self.seals[number], self.seals[number - 1], _name(number - 1, SEAL)
            if self._is_sealed(number) and not self._is_sealed(number - 1):
                self._note(name, LOST, number - 1)
            elif seal is not None and before is not None and seal["previous_sha256"] != before["sha256"]:
                self._note(_name(number, SEAL), f"does not follow upon {name}", number)

    def _units(self, number: int) -> int:
        """Units of the generation's plan, as far as anything tells."""
        seal, generation = self.seals[number], self.generations[number]
        if seal is not None:
            return int(seal["units"])
        return generation.plan.units if generation is not None else max(self._recorded(number), default=-1) + 1

    def _missing(self, number: int) -> set[int]:
        """The units that the generation was closed without, as its seal says too."""
        closed, seal = self._signed(number, CLOSED), self.seals[number]
        missing = set() if closed is None else set(closed["missing"])
        if seal is not None and missing != set(seal["missing"]):
            self._note(_name(number, CLOSED), LOST if closed is None else "is not that of the seal", number)
            missing = set(seal["missing"])
        return missing

    def _recorded(self, number: int) -> list[int]:
        """The units of which there is a commit record, in order."""
        stems = (path.stem for path in (self._folder(number) / COMMITS).glob("*.json"))
        return sorted(
            int(stem) for stem in stems if stem.isdecimal() and record_name(int(stem)).endswith(f"/{stem}.json")
        )

    def _jobs(self) -> Iterator[Callable[[], _Checked]]:
        """A check for every unit, in order; damage to commit records is noted on the way."""
        for number in self.numbers:
            seal, recorded = self.seals[number], self._recorded(number)
            planned = set(range(self._units(number))) - self._missing(number)
            if self._is_sealed(number):
                recorded = sorted(planned)
            self.pending += len(planned - set(recorded))
            digest, readable = hashlib.sha256(), True
            for unit in recorded:
                record = self._record(number, unit)
                if record is None:
                    readable = False
                    continue
                digest.update(canonical(record))
                self.known.update(_name(number, object_) for object_ in record["objects"])
                yield partial(self._check_unit, number, record)
            if readable and seal is not None and digest.hexdigest() != seal["commits_sha256"]:
                self._note(_name(number, SEAL), "is not the seal of these commit records", number)

    def _record(self, number: int, unit: int) -> dict[str, Any] | None:
        """A unit's commit record. Without one, nothing but the tiles' own checksums tells whether the unit is whole."""
        name, generation = _name(number, record_name(unit)), self.generations[number]
        record = self._signed(number, record_name(unit))
        if record is not None and record["unit"] == unit and all(map(_is_inside, record["objects"])):
            return record
        objects = [] if generation is None else objects_of(generation, unit)
        self.known.update(_name(number, object_) for object_ in objects)
        wrong = self.damage.pop(name).wrong if name in self.damage else LOST if record is None else "is another unit's"
        self._note(name, wrong, number, unit, self._affected(number, unit, objects, 0))
        return None

    def _check_unit(self, number: int, record: Mapping[str, Any]) -> _Checked:
        checked = _Checked(number, record["unit"], record["samples"])
        for name, expected in record["objects"].items():
            size, wrong = _compare(self._folder(number) / name, expected)
            checked.files += 1
            checked.bytes += size
            if wrong:
                checked.wrong[name] = wrong
        return checked

    def _note_objects(self, checked: _Checked) -> None:
        for name, wrong in checked.wrong.items():
            found = self._affected(checked.generation, checked.unit, [name], checked.samples)
            self._note(_name(checked.generation, name), wrong, checked.generation, checked.unit, found)

    def _affected(self, number: int, unit: int, objects: Iterable[str], samples: int) -> Affected:
        """The samples that are lost with a unit's objects and that no later generation has replaced."""
        generation = self.generations[number]
        if generation is None:
            return Affected((), samples)
        found = affected(generation, unit, objects)
        ids = tuple(name for name in found.ids if name not in self._replaced(number))
        return replace(found, ids=ids, replaced=len(found.ids) - len(ids))

    def _replaced(self, number: int) -> set[str]:
        if number not in self._replaced_from:
            names: set[str] = set()
            for later in self.numbers[number + 1 :]:
                generation = self.generations[later]
                with contextlib.suppress(Exception):  # a damaged list is noted; without it more samples are told of
                    names |= generation.removed if generation is not None and self._is_sealed(later) else set()
            self._replaced_from[number] = names
        return self._replaced_from[number]

    def _strays(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.root):
            folders.sort()
            for file in sorted(files):
                name = (Path(folder) / file).relative_to(self.root).as_posix()
                if name not in self.known:
                    yield os.fsencode(name).decode(errors="replace")


def _compare(path: Path, expected: Mapping[str, Any]) -> tuple[int, str | None]:
    """Bytes read of a file, and what is wrong with it: its length, where that is known, and its SHA-256."""
    try:
        size = path.stat().st_size
        if size != expected.get("bytes", size):
            return 0, f"has {size:,} bytes, {expected['bytes']:,} were written"
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except FileNotFoundError:
        return 0, LOST
    except OSError as error:
        return 0, _reason(error)
    return size, None if digest.hexdigest() == expected["sha256"] else "its SHA-256 is not that of what was written"


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return LOST
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return "is not as it was written"


def _name(number: int, name: str) -> str:
    return f"{GENERATIONS}/{number}/{name}"


def _is_inside(name: str) -> bool:
    """Whether a name stays in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _in_order(executor: ThreadPoolExecutor, jobs: Iterable[Callable[[], _Checked]], depth: int) -> Iterator[_Checked]:
    """The jobs' results in order, with at most ``depth`` under way."""
    waiting: deque[Future[_Checked]] = deque()
    for job in jobs:
        waiting.append(executor.submit(job))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
