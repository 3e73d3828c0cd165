"""Format 1.0 stays what it is: a cache that was written once is read alike by every later version.

``tests/golden/cache.zarr`` was written by ``tests/golden/write.py`` with Python 3.11 and zarr 3.1.6; its values stand
in ``values.npz``, as they were read then. Nothing here needs torch, so it runs on any Python that zarr runs on.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import zarr

from segkd.storage.audit import verify
from segkd.storage.coding import EXACT
from segkd.storage.reader import CacheReader

GOLDEN = Path(__file__).parent / "golden"
TARGETS = ("soft", "first_order")


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    """``tests/golden/write.py``."""
    found = importlib.util.spec_from_file_location("golden_write", GOLDEN / "write.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["golden_write"] = module
    found.loader.exec_module(module)
    return module


def read_all(cache: CacheReader) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Every value of a cache, by sample and target."""
    return {f"{entry.id} {name}": cache.values(entry, name) for entry in cache.entries() for name in TARGETS}


def test_a_cache_of_long_ago_is_read_alike() -> None:
    cache = CacheReader(GOLDEN / "cache.zarr")
    assert cache.sealed
    assert sorted((entry.id, entry.role, entry.generation) for entry in cache.entries()) == [
        ("auxiliary/d", "auxiliary", 1),
        ("report/c", "report", 0),
        ("train/a", "train", 0),
        ("train/b", "train", 1),
    ]
    assert cache.entry("report/c").rungs["soft"] == EXACT
    assert cache.entry("auxiliary/d").mapping.shape == (9, 9)
    with np.load(GOLDEN / "values.npz") as expected:
        found = read_all(cache)
        assert sorted(found) == sorted(expected)
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-6)


def test_it_is_whole() -> None:
    assert verify(GOLDEN / "cache.zarr").damage == ()


def test_this_version_writes_what_was_written_then(tmp_path: Path, writer: ModuleType) -> None:
    """Array by array and attribute by attribute; the bytes of a chunk are zstd's, and may change with it."""
    writer.write(tmp_path / "cache.zarr")
    then, now = (zarr.open_group(folder, mode="r") for folder in (GOLDEN / "cache.zarr", tmp_path / "cache.zarr"))
    assert dict(then.attrs) == dict(now.attrs)
    for generation in ("generations/0", "generations/1"):
        assert dict(then[generation].attrs) == dict(now[generation].attrs)
        arrays = dict(then[generation].arrays())
        assert sorted(arrays) == sorted(dict(now[generation].arrays()))
        for name, array in arrays.items():
            assert array.metadata == now[f"{generation}/{name}"].metadata
            np.testing.assert_array_equal(array[:], now[f"{generation}/{name}"][:], err_msg=name)
