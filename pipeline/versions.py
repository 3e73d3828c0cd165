"""What a run was made with: versions, and segkd's own code."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import numpy as np
import torch

import segkd.pipeline
import segkd.storage
from segkd import __version__

_OF_NO_RUN = "ablation"
"""The part of the pipeline that no run computes with."""


def versions() -> dict[str, str]:
    """By name. ``code`` tells what no version does: two runs with other code are not the same run."""
    return {
        "segkd": __version__,
        "code": CODE,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _code_digest() -> str:
    """Twelve digits of the SHA-256 of all source files that a run can compute with."""
    digest = hashlib.sha256()
    for package in (segkd.pipeline, segkd.storage):
        (root,) = map(Path, package.__path__)
        for file in sorted(root.rglob("*.py")):
            place = file.relative_to(root)
            if place.parts[0] != _OF_NO_RUN:
                content = file.read_bytes()
                digest.update(f"{root.name}/{place.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


CODE = _code_digest()
"""Of the code as it was imported: files may change while a run lasts."""
