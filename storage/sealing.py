"""The seal of a generation: with it a generation counts, and by it damage to anything small is told.

A seal is a pure function of the commit records and the metadata files, so it does not matter who writes it. Each names
the one before it, so that the seals of a cache are a chain.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from segkd.storage.errors import CacheError
from segkd.storage.generation import Generation, generations_of, read_spec
from segkd.storage.publish import UnitPublisher, explained, read_signed
from segkd.storage.statistics import Statistics


def seal_generation(generation: Generation) -> bool:
    """Seals a generation whose units are all committed, after the one before it; says whether it is sealed now."""
    if generation.number and not _before(generation).sealed:
        return False
    if generation.committed() != generation.units():
        return False
    document = None if generation.sealed else seal_document(generation)
    UnitPublisher(generation.root, generation.folder).seal(document)
    return True


def close_generation(generation: Generation) -> None:
    """Seals a generation as it stands: what is not committed by now is for a later generation to hold.

    For a list of samples that changed before the cache was finished. Raises CacheError if the generation before is not
    sealed.
    """
    publisher = UnitPublisher(generation.root, generation.folder)
    missing = [unit for unit in generation.units() if not publisher.recover(unit)]
    with explained(generation.root):
        if missing:
            publisher.close(missing)
        if not seal_generation(generation):
            raise CacheError(f"{generation.folder} cannot be closed before the generation that it adds to")


def seal_generations(root: Path) -> bool:
    """Seals what is complete, in order; says whether every generation of the cache is sealed now."""
    return all(seal_generation(generation) for generation in generations_of(root, read_spec(root)))


def seal_document(generation: Generation) -> dict[str, Any]:
    """The seal of a generation whose units are all committed."""
    statistics, commits = Statistics(), hashlib.sha256()
    totals = dict.fromkeys(("bytes", "samples", "pixels", "cells"), 0)
    roles: dict[str, int] = {}
    for unit in generation.units():
        path = generation.record_path(unit)
        record = read_signed(path)
        commits.update(path.read_bytes())
        statistics.merge(Statistics.from_dict(record["statistics"]))
        for name in ("samples", "pixels", "cells"):
            totals[name] += record[name]
        roles[record["role"]] = roles.get(record["role"], 0) + record["samples"]
        totals["bytes"] += sum(entry["bytes"] for entry in record["objects"].values())
    return {
        "generation": generation.number,
        "units": generation.plan.units,
        "missing": sorted(generation.missing),
        "roles": roles,
        **totals,
        "commits_sha256": commits.hexdigest(),
        "metadata_sha256": {
            name: hashlib.sha256((generation.root / name).read_bytes()).hexdigest()
            for name in generation.metadata_names()
        },
        "previous_sha256": read_signed(_before(generation).seal_path)["sha256"] if generation.number else None,
        "statistics": statistics.to_dict(),
    }


def _before(generation: Generation) -> Generation:
    return Generation.open(generation.root, generation.spec, generation.number - 1)
