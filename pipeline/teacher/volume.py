"""From what a few samples took to the bytes and files of the whole cache."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from segkd.pipeline.teacher.opened import Opened
from segkd.pipeline.teacher.trial import Trial, shard_index_bytes
from segkd.storage.coding import EXACT
from segkd.storage.generation import generation_documents, root_documents, target_arrays
from segkd.storage.layout import Plan


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Bytes and files of a cache that is still to be written."""

    bytes: int
    """All of them: targets, shard indexes, tables, commit records, metadata."""
    targets: Mapping[str, int]
    """Bytes of each target array, shard indexes included."""
    files: int
    uncertainty: float
    """Two standard errors of ``bytes``, relative, by how the trial's units differ; 0 where all samples were tried."""


def foretell(opened: Opened, plan: Plan, tried: Trial) -> Volume:
    """The bytes of the whole cache: what the trial's cells took, for all cells, and exactly what the plan adds."""
    cells = sum(math.prod(sample.mapping.shape) for sample in opened.planned)
    shards: Counter[str] = Counter()
    targets = {}
    for array, (target, exact) in target_arrays(opened.spec).items():
        share = exact_share(tried, target)
        # A shard without a single sample of its kind has no file.
        kind = share if exact else 1 - share
        present = plan.spec.shards * (1 - (1 - kind) ** (len(plan.samples) / plan.spec.shards))
        shards[array] = math.ceil(present)
        targets[array] = round(
            tried.payload[array] / tried.cells * cells + present * shard_index_bytes(plan.spec.shard_tiles)
        )
    documents = [*root_documents(opened.spec).values(), *generation_documents(opened.spec, plan, 0, ()).values()]
    records = tried.record_bytes / tried.units * len(plan.units) + tried.seal_bytes
    tables = tried.table_bytes / tried.samples * len(plan.samples)
    left_out = 1 - tried.samples / len(plan.samples)
    total = sum(targets.values()) + tables + records + sum(map(len, documents))
    return Volume(
        bytes=round(total),
        targets=targets,
        files=shards.total() + 2 * len(plan.units) + 1 + len(documents),
        uncertainty=2 * tried.spread_of_units / math.sqrt(tried.units) * math.sqrt(max(left_out, 0)),
    )


def exact_share(tried: Trial, target: str) -> float:
    """The share of the samples that no rung of the target serves."""
    return tried.statistics.rungs[target].get(EXACT, 0) / tried.samples
