"""Format 1.0 stays what it is: a cache that was written once is read alike by every later version.

``tests/golden/*.zarr`` were written by ``tests/golden/write.py`` with Python 3.11 and zarr 3.1.6; their values stand
beside them, as they were read then. Nothing here needs torch, so it runs on any Python that zarr runs on.
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
each = pytest.mark.parametrize("name", ["cache", "foretold"])


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


@each
def test_a_cache_of_long_ago_is_read_alike(name: str) -> None:
    cache = CacheReader(GOLDEN / f"{name}.zarr")
    assert cache.sealed
    assert sorted((entry.id, entry.role, entry.generation) for entry in cache.entries()) == [
        ("auxiliary/d", "auxiliary", 1),
        ("report/c", "report", 0),
        ("train/a", "train", 0),
        ("train/b", "train", 1),
    ]
    assert cache.entry("report/c").rungs["soft"] == EXACT
    assert cache.entry("auxiliary/d").mapping.shape == (9, 9)
    with np.load(GOLDEN / f"{name}.npz") as expected:
        found = read_all(cache)
        assert sorted(found) == sorted(expected)
        for map_, values in found.items():
            # Logarithms of two libraries differ in the last bit, which the temperature of foretold values multiplies.
            np.testing.assert_allclose(values, expected[map_], rtol=0, atol=1e-6 if name == "cache" else 1e-5)


@each
def test_it_is_whole(name: str) -> None:
    assert verify(GOLDEN / f"{name}.zarr").damage == ()


@each
def test_this_version_writes_what_was_written_then(tmp_path: Path, writer: ModuleType, name: str) -> None:
    """Array by array and attribute by attribute; the bytes of a chunk are zstd's, and may change with it."""
    writer.write(tmp_path / "now.zarr", name)
    then, now = (zarr.open_group(folder, mode="r") for folder in (GOLDEN / f"{name}.zarr", tmp_path / "now.zarr"))
    assert dict(then.attrs) == dict(now.attrs)
    for generation in ("generations/0", "generations/1"):
        assert dict(then[generation].attrs) == dict(now[generation].attrs)
        arrays = dict(then[generation].arrays())
        assert sorted(arrays) == sorted(dict(now[generation].arrays()))
        for key, array in arrays.items():
            assert array.metadata == now[f"{generation}/{key}"].metadata
            np.testing.assert_array_equal(array[:], now[f"{generation}/{key}"][:], err_msg=key)
