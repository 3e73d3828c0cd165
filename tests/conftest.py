"""What all tests share."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the checkout itself on the path, where a top-level `storage` would be found; users have none.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
