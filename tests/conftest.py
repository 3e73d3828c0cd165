"""What all tests share."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the checkout itself on the path, where a top-level `storage` would be found; users have none.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

# How long an example takes is a fact about the machine, not about the code.
settings.register_profile("segkd", deadline=None)
settings.load_profile("segkd")
