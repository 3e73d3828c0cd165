"""Opens a cache: its generations in order, every metadata file compared with the seal of its generation.

A changed character of a metadata file can change what is read, silently, so nothing is parsed before its digest is
compared. This reads a few small files a generation, whatever the number of samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from segkd.storage.errors import CacheNotFoundError, IncompleteCacheError, SegkdError
from segkd.storage.generation import GENERATIONS, METADATA, Generation, read_spec, there_is_a_cache
from segkd.storage.publish import SEAL, read_signed
from segkd.storage.shards import damaged
from segkd.storage.spec import CacheSpec


@dataclass(frozen=True)
class Opened:
    """A generation that a reader sees."""

    generation: Generation
    seal: Mapping[str, Any] | None
    """None for one that is not finished."""


def open_cache(root: Path, *, partial: bool) -> tuple[CacheSpec, list[Opened], bool]:
    """Specification, the generations that count and whether there are no others.

    An unfinished generation counts only if ``partial``, and if all of its metadata are written. Raises
    CacheNotFoundError, CacheMismatchError for another format, IncompleteCacheError where not even the first generation
    counts, and CacheDamagedError for a metadata file that is lost or not as its seal says.
    """
    if not there_is_a_cache(root):
        raise CacheNotFoundError(f"there is no cache at {root}; write one with segkd teacher-cache")
    seals = _seals(root)
    for seal in seals:
        _check_metadata(root, {} if seal is None else seal["metadata_sha256"])
    try:
        spec = read_spec(root)
        found = [Opened(Generation.open(root, spec, number), seal) for number, seal in enumerate(seals)]
    except SegkdError:
        raise
    except Exception as error:  # no digest vouches for the JSON of an unfinished cache, and it can be wrong in any way
        path = getattr(error, "filename", None) or root / METADATA
        raise damaged(path, error) from error
    for opened in found:
        _check_seal(opened)
    if not partial and (not found or found[0].seal is None):
        first = found[0].generation if found else None
        done, units = (len(first.committed()), first.plan.units) if first else (0, "its")
        raise IncompleteCacheError(
            f"{root} is not finished: {done} of {units} units are written; run segkd teacher-cache again to finish it"
        )
    unfinished = [number for number, opened in enumerate(found) if opened.seal is None]
    counting = found if partial or not unfinished else found[: unfinished[0]]
    counting = [opened for opened in counting if opened.seal is not None or opened.generation.begun]
    return spec, counting, bool(found) and not unfinished


def _seals(root: Path) -> list[dict[str, Any] | None]:
    """The seal of each generation that has begun, each following upon the one before."""
    seals: list[dict[str, Any] | None] = []
    while any((root / GENERATIONS / str(len(seals)) / name).exists() for name in (METADATA, SEAL)):
        path = root / GENERATIONS / str(len(seals)) / SEAL
        seal = read_signed(path) if path.exists() else None
        before = seals[-1] if seals else None
        if seal is not None and seals and (before is None or seal["previous_sha256"] != before["sha256"]):
            # Repair takes seals away from the last to the first, so a sealed one upon an unsealed one has lost that.
            raise damaged(path, ValueError("it does not follow upon the seal of the generation before"))
        seals.append(seal)
    return seals


def _check_metadata(root: Path, digests: Mapping[str, str]) -> None:
    for name, expected in digests.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise damaged(root / METADATA, ValueError(f"its seal names {name!r}, which is outside of the cache"))
        try:
            content = (root / name).read_bytes()
        except OSError as error:
            raise damaged(root / name, error) from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise damaged(root / name, ValueError("its digest is not that of the seal"))


def _check_seal(opened: Opened) -> None:
    """A seal must be that of its own place, and vouch for every file that opening relies on."""
    generation, seal = opened.generation, opened.seal
    if seal is None:
        return
    if seal["generation"] != generation.number or not seal["metadata_sha256"].keys() >= {*generation.metadata_names()}:
        raise damaged(generation.seal_path, ValueError("it is not the seal of this generation"))
