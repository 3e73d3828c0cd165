"""Whether a cache is of the teacher that the run file names, without loading a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from segkd.pipeline.models.network import NetworkConfig, TeacherConfig
from segkd.pipeline.settings import to_dict
from segkd.pipeline.teacher.fingerprints import code_of, content_digest, portable
from segkd.storage.differences import difference, leaves
from segkd.storage.errors import CacheMismatchError
from segkd.storage.spec import CacheSpec


def require_named_teacher(spec: CacheSpec, teacher: TeacherConfig | None, cache: Path) -> None:
    """Raises CacheMismatchError where the run file states something else of the teacher than the cache does.

    The file that the reference names is compared by its content, if it is here: every checkpoint is called
    ``last.safetensors``. It does not have to be here any more; nor is anything compared that is left to defaults, which
    the teacher's module or checkpoint may have said otherwise.
    """
    if teacher is None:
        return
    defaults, stated = dict(leaves(to_dict(TeacherConfig(reference="")))), described_leaves(teacher)
    # A cache knows nothing of settings that are younger, and was made as if they stood at their defaults.
    kept = defaults | dict(leaves(spec.teacher))
    differing = [
        difference(key, kept.get(key), value)
        for key, value in stated.items()
        if value not in (defaults.get(key), kept.get(key)) and not is_file_of(value, kept.get(key))
    ]
    if not differing:
        code = code_of(teacher.reference)
        # Without a digest the file is not here, or there is none.
        if " sha256:" in code and content_digest(code) != spec.fingerprints["code"]:
            differing = [f"the content of {teacher.reference}"]
    if differing:
        raise CacheMismatchError(
            f"{cache} is of a teacher that differs in {', '.join(differing)}; "
            "name this teacher's cache in cache.path, or write it with segkd teacher-cache"
        )


def described_leaves(network: NetworkConfig) -> dict[str, Any]:
    """The leaves of a description as caches and records keep it, read from JSON."""
    return dict(leaves(json.loads(json.dumps(portable(network)))))


def is_file_of(value: Any, kept: Any) -> bool:
    """Whether a path names the file whose content a description knows; it may not be here."""
    return isinstance(kept, str) and kept.startswith(f"{Path(str(value)).name} sha256:")
