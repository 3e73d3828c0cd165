"""The direct reader of shards returns what zarr-python returns, and never anything else."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from segkd.storage import shards
from segkd.storage.chunks import decode_chunk, unwrap
from segkd.storage.errors import CacheDamagedError, CacheMismatchError
from segkd.storage.shards import ShardReader, TileArray

SHARD_TILES, SHARDS, LOST = 6, 4, (8, 15)
"""Tiles 8 and 15 are never written."""
REMEDY = "segkd cache verify lists all damage, segkd cache repair writes it again"


def write(path: Path, dtype: str = "u1", channels: int = 3, level: int = 3) -> tuple[TileArray, Any]:
    array = zarr.create_array(
        path,
        shape=(SHARD_TILES * SHARDS, channels, 8, 8),
        shards=(SHARD_TILES, channels, 8, 8),
        chunks=(1, channels, 8, 8),
        dtype=dtype,
        compressors=(ZstdCodec(level=level), Crc32cCodec()),
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    rng = np.random.default_rng(0)
    for tile in range(array.shape[0]):
        if tile not in LOST:
            array[tile] = rng.integers(0, 1 + 20 * (tile % 5), array.shape[1:]).astype(dtype)
    shape = (channels, 8, 8)
    return TileArray(folder=str(path), shard_tiles=SHARD_TILES, shape=shape, dtype=np.dtype(dtype), codec="zstd"), array


@pytest.fixture
def written(tmp_path: Path) -> tuple[TileArray, Any]:
    """An array as caches have them; zarr itself cannot write a tile without its shard, so two tiles are taken out."""
    described, array = write(tmp_path / "a")
    for tile in LOST:
        take_out(described, tile)
    return described, array


def take_out(array: TileArray, tile: int) -> None:
    def change(index: np.ndarray[Any, Any]) -> None:
        index[tile % SHARD_TILES] = 2**64 - 1

    with_index(array, tile, change)


def with_index(array: TileArray, tile: int, change: Any) -> None:
    """Rewrites the index of a tile's shard, with a checksum that is right."""
    file = Path(array.shard(tile))
    content = file.read_bytes()
    length = 16 * array.shard_tiles + 4
    index = np.frombuffer(content[-length:-4], "<u8").reshape(-1, 2).copy()
    change(index)
    file.write_bytes(content[:-length] + with_checksum(index.tobytes()))


def with_checksum(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")


def present() -> list[int]:
    return [tile for tile in range(SHARD_TILES * SHARDS) if tile not in LOST]


def read(reader: ShardReader, array: TileArray, tiles: Sequence[int]) -> dict[int, Any]:
    return dict(reader.tiles(array, dict.fromkeys(tiles, array.shape[-1])))


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4"])
@pytest.mark.parametrize(("gap", "run"), [(1 << 13, 1 << 20), (0, 300), (0, 0)])
def test_any_tiles_are_those_that_zarr_reads(
    tmp_path: Path, dtype: str, gap: int, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, array = write(tmp_path / "a", dtype)
    monkeypatch.setattr(shards, "GAP", gap)
    monkeypatch.setattr(shards, "RUN", run)
    reader, expected = ShardReader(), array[:]

    @settings(max_examples=30)
    @given(st.lists(st.sampled_from(present()), unique=True))
    def compare(tiles: list[int]) -> None:
        found = read(reader, described, tiles)
        assert sorted(found) == sorted(tiles)
        for tile, codes in found.items():
            assert codes.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(codes, expected[tile])

    compare()


def test_neighbouring_tiles_are_one_read_and_indexes_are_kept(
    written: tuple[TileArray, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: (reads.append(arguments[1]), pread(*arguments))[1])
    reader = ShardReader()
    read(reader, written[0], range(SHARD_TILES))
    assert len(reads) == 2  # the index and all tiles
    read(reader, written[0], [2, 3])
    assert len(reads) == 3
    assert reads[2] < reads[1]


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described, array = write(tmp_path / "a")
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    index = shards.HELD + len(described.shard(0)) + 16 * SHARD_TILES
    monkeypatch.setattr(shards, "INDEX_BYTES", 2 * index + 1)
    reader, before = ShardReader(), open_files()
    expected = array[:]
    for tile in np.random.default_rng(0).permutation(present()).tolist():
        np.testing.assert_array_equal(read(reader, described, [tile])[tile], expected[tile])
        assert len(reader._files._values) <= 2
        assert len(reader._indexes._values) <= 2
        assert reader._indexes._used == len(reader._indexes._values) * index
        assert open_files() <= before + 2


def test_what_holds_a_small_table_is_counted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, body = np.dtype([("number", "<i4")]), zstd(bytes(4))
    for number in range(9):
        content = body + google_crc32c.value(body).to_bytes(4, "little")
        (tmp_path / f"c.{number}.0").write_bytes(content)
    monkeypatch.setattr(shards, "TABLE_BYTES", 4 * 700 + 4 * len(str(tmp_path)))
    reader = ShardReader()
    for number in range(9):
        reader.table(tmp_path / f"c.{number}.0", 1, dtype)
    assert len(reader._tables._values) == 4
    assert reader._tables._used == 4 * (shards.HELD + len(str(tmp_path / "c.0.0")) + 4)


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def damage(array: TileArray, kind: str) -> str:
    """Damages the shard of tile 7; what is then said of it."""
    file = Path(array.shard(7))
    content = bytearray(file.read_bytes())
    match kind:
        case "lost shard":
            file.unlink()
            return "it is lost"
        case "truncated":
            file.write_bytes(content[:50])
            return "it is cut off"
        case "shortened":
            file.write_bytes(content[:-3])
            return "index: its checksum differs"
        case "index":
            content[-9] ^= 1
            file.write_bytes(content)
            return "index: its checksum differs"
        case "tile":
            content[int(np.frombuffer(content[-16 * SHARD_TILES - 4 : -4], "<u8")[2]) + 3] ^= 64
            file.write_bytes(content)
            return "tile 1: its checksum differs"
        case "lost tile":
            take_out(array, 7)
            return "its tile 1 is lost"
        case "beyond":
            with_index(array, 7, lambda index: index.__setitem__((1, 0), len(content)))
            return "its tile 1 would lie beyond its end"
        case "overflow":
            with_index(array, 7, lambda index: index.__setitem__((1, 0), 2**64 - 2))
            return "its tile 1 would lie beyond its end"
        case _:
            with_index(array, 7, lambda index: index.__setitem__((1, 1), 3))
            return "tile 1: 3 bytes are too few"


KINDS = ("lost shard", "truncated", "shortened", "index", "tile", "lost tile", "beyond", "overflow", "no bytes")


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_with_its_file_tile_and_remedy(written: tuple[TileArray, Any], kind: str) -> None:
    described, _ = written
    reason = damage(described, kind)
    with pytest.raises(CacheDamagedError) as caught:
        read(ShardReader(), described, [6, 7])
    assert str(caught.value) == f"{described.shard(7)} cannot be read ({reason}); {REMEDY}"


def test_every_single_byte_of_a_shard_is_covered(written: tuple[TileArray, Any]) -> None:
    described, array = written
    expected, file = array[:], Path(described.shard(0))
    content = file.read_bytes()
    for place in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        file.write_bytes(damaged)
        refused = 0
        for tile in range(SHARD_TILES):
            try:
                np.testing.assert_array_equal(read(ShardReader(), described, [tile])[tile], expected[tile])
            except CacheDamagedError:
                refused += 1
        assert refused in (1, SHARD_TILES)


def test_a_chunk_of_another_length_or_content_is_refused() -> None:
    content = bytes([1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"^4 bytes are too few$"):
        unwrap(content)
    whole = content + google_crc32c.value(content).to_bytes(4, "little")
    assert unwrap(whole) == content
    with pytest.raises(ValueError, match=r"(?i)zstd"):
        decode_chunk(whole, (4,), np.dtype("u1"))
    body = zstd(b"12345")
    checked = body + google_crc32c.value(body).to_bytes(4, "little")
    with pytest.raises(ValueError, match=r"^it decodes to 5 bytes, expected 8$"):
        decode_chunk(checked, (4,), np.dtype("<f2"))


def zstd(content: bytes) -> bytes:
    return bytes(Zstd(1).encode(content))


def test_a_shard_that_was_written_again_is_read_afresh(
    written: tuple[TileArray, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repair replaces files; an index that is kept must not be used with the next version of its file."""
    described, array = written
    monkeypatch.setattr(shards, "OPEN_FILES", 1)
    reader = ShardReader()
    read(reader, described, [0])
    other, changed = write(tmp_path / "b", level=19)
    changed[:SHARD_TILES] = array[:SHARD_TILES][::-1] + 1
    expected = changed[2]
    Path(other.shard(0)).replace(described.shard(0))
    read(reader, described, [18])  # which closes the first file
    np.testing.assert_array_equal(read(reader, described, [2])[2], expected)


def test_a_table_is_read_kept_and_checked(tmp_path: Path) -> None:
    dtype = np.dtype([("id", "S5"), ("number", "<i4")])
    rows = np.array([(b"a", 1), (b"bb", 2), (b"", 0)], dtype)
    body = zstd(rows.tobytes())
    path = tmp_path / "c.0.0"
    path.write_bytes(body + google_crc32c.value(body).to_bytes(4, "little"))
    reader = ShardReader()
    np.testing.assert_array_equal(reader.table(path, 3, dtype, keep=False), rows)
    assert not reader._tables._values
    np.testing.assert_array_equal(reader.table(path, 3, dtype), rows)
    path.unlink()
    np.testing.assert_array_equal(reader.table(path, 3, dtype), rows)
    with pytest.raises(CacheDamagedError) as caught:
        ShardReader().table(path, 3, dtype)
    assert str(caught.value) == f"{path} cannot be read (it is lost); {REMEDY}"


def test_threads_may_share_a_reader_whose_caches_are_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described, array = write(tmp_path / "a")
    monkeypatch.setattr(shards, "OPEN_FILES", 1)
    monkeypatch.setattr(shards, "INDEX_BYTES", 1)
    reader, expected = ShardReader(), array[:]

    def many(seed: int) -> None:
        for tile in np.random.default_rng(seed).choice(present(), 200).tolist():
            np.testing.assert_array_equal(read(reader, described, [tile])[tile], expected[tile])

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(many, range(4)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_does_not_inherit_a_lock_that_is_held(written: tuple[TileArray, Any]) -> None:
    described, array = written
    reader = ShardReader()
    read(reader, described, [0])
    for kept in (reader._files, reader._indexes, reader._tables):
        kept._lock.acquire()
    process = os.fork()
    if process == 0:
        found = read(reader, described, [1, 7])
        os._exit(0 if all(np.array_equal(codes, array[tile]) for tile, codes in found.items()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_a_pickled_reader_has_nothing_open(written: tuple[TileArray, Any]) -> None:
    reader = ShardReader()
    read(reader, written[0], [0])
    again = pickle.loads(pickle.dumps(reader))
    assert not again._files._values
    assert not again._indexes._values
    assert list(read(again, written[0], [0])) == [0]


def test_a_whole_tile_of_another_coder_is_no_damage(tmp_path: Path) -> None:
    array = TileArray(folder=str(tmp_path), shard_tiles=1, shape=(3, 8, 8), dtype=np.dtype("u1"), codec="context")
    tile = with_checksum(b"\x03\x01\x01")
    Path(array.shard(0)).write_bytes(tile + with_checksum(np.array([0, len(tile)], "<u8").tobytes()))
    with pytest.raises(CacheMismatchError, match="coded in mode 3 of the context coder, which this version") as caught:
        read(ShardReader(), array, [0])
    assert not isinstance(caught.value, CacheDamagedError)
