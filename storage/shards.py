"""Reads tiles straight out of shard files.

Zarr's own reader fetches a shard's index anew for every access and goes through an event loop; this one keeps checked
indexes and open files, both bounded, reads neighbouring tiles at once and decodes no tile that was not asked for.

Safe in threads, and after fork, forkserver and spawn: files are opened when they are first needed and read with pread,
which has no position to share; a pickled reader has neither files nor indexes.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from segkd.storage.chunks import CHECKSUM, decode_chunk, require, unwrap
from segkd.storage.errors import AFTER_DAMAGE, CacheDamagedError, CacheMismatchError
from segkd.storage.packing import EMPTY
from segkd.storage.watch import SealWatch

INDEX_BYTES = 1 << 26
"""What a reader keeps of shard indexes, in bytes: those of four million tiles, or of 90,000 shards of one."""
TABLE_BYTES = 3 << 26
"""What a reader keeps of decoded chunks of tables, in bytes: a million rows of 200."""
HELD = 640
"""Bytes that an index or a chunk takes in memory beside its content and its path: the objects that hold them."""
OPEN_FILES = 128
"""Files that a reader keeps open; a process is often allowed no more than 1024."""
GAP = 1 << 13
"""Bytes between two tiles that are read along with them: as quick as a second call."""
RUN = 1 << 20
"""Bytes that are read at once, at most, unless a single tile has more."""

_PLACE = struct.Struct("<QQ")
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class TileArray:
    """One array of tiles, as its specification describes it."""

    folder: str
    shard_tiles: int
    shape: tuple[int, int, int]
    """Of a tile: channels,t,t."""
    dtype: np.dtype[Any]
    codec: str
    watch: SealWatch | None = None
    """Of the generation's seal, if it has one."""

    def shard(self, tile: int) -> str:
        """The file that a tile stands in."""
        return f"{self.folder}/c.{tile // self.shard_tiles}.0.0.0"


@dataclass(frozen=True)
class _Index:
    """The checked index of one version of a shard file."""

    content: bytes
    version: tuple[int, ...]
    end: int
    """Where the index begins and the tiles end."""


class _File:
    """An open file, closed with the last reference to it: another thread may still read what was dropped."""

    __slots__ = ("descriptor", "size", "version")

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        status = os.fstat(self.descriptor)
        self.size = status.st_size
        self.version = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def read(self, offset: int, length: int) -> bytes:
        content = os.pread(self.descriptor, length, offset)
        while len(content) < length:
            more = os.pread(self.descriptor, length - len(content), offset + len(content))
            if not more:
                raise ValueError("it is cut off")
            content += more
        return content

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # as Python ends, ``os`` may be gone already
        if self.descriptor >= 0:
            close(self.descriptor)


class _Recent(Generic[Key, Value]):
    """The values used last, as many as fit."""

    def __init__(self, room: int, cost: Callable[[Key, Value], int]) -> None:
        self._room, self._cost = room, cost
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._used = 0
        self._lock, self._process = threading.Lock(), os.getpid()

    def get(self, key: Key) -> Value | None:
        with self._guard():
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: Key, value: Value) -> None:
        dropped = []  # let go of after the lock: what is dropped may close a file
        with self._guard():
            dropped.append(self._values.pop(key, None))
            self._values[key] = value
            self._used += self._cost(key, value) - (0 if dropped[0] is None else self._cost(key, dropped[0]))
            while self._used > self._room and len(self._values) > 1:
                name, oldest = self._values.popitem(last=False)
                self._used -= self._cost(name, oldest)
                dropped.append(oldest)

    def _guard(self) -> threading.Lock:
        # A thread of the parent may have held the lock at the moment of a fork, and is not here to release it.
        if self._process != os.getpid():
            self._lock, self._process = threading.Lock(), os.getpid()
        return self._lock


class ShardReader:
    """Reads tiles and tables of one cache. Its caches are bounded by the constants of this module."""

    def __init__(self) -> None:
        self._files: _Recent[str, _File] = _Recent(OPEN_FILES, lambda *_: 1)
        self._indexes: _Recent[str, _Index] = _Recent(
            INDEX_BYTES, lambda path, index: HELD + len(path) + len(index.content)
        )
        self._tables: _Recent[str, npt.NDArray[Any]] = _Recent(
            TABLE_BYTES, lambda path, table: HELD + len(path) + table.nbytes
        )

    def __reduce__(self) -> tuple[type[ShardReader], tuple[()]]:
        return ShardReader, ()

    def tiles(self, array: TileArray, stops: Mapping[int, int]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Number and codes channels,t,t of each tile, in the order of the files; the codes may be read-only.

        ``stops`` has, by number, the row from which on a tile's codes need not be right.
        Raises CacheDamagedError for a shard or a tile that is lost or not as it was written, CacheChangedError for a
        shard of another version than that of the array's watch, CacheMismatchError for a tile that another version of
        segkd has coded, ConfigError where the codec lacks its compiler.
        """
        require(array.codec)  # Here, because a compiler that is not installed is no damage.
        shards: dict[int, list[int]] = {}
        for number in sorted(stops):
            shards.setdefault(number // array.shard_tiles, []).append(number)
        for group in shards.values():
            path = array.shard(group[0])
            try:
                yield from self._tiles_of(path, array, {number: stops[number] for number in group})
            except CacheMismatchError:  # a ValueError, but not of damage
                raise
            except (OSError, ValueError) as error:
                raise damaged(path, error) from error

    def table(
        self,
        path: str | Path,
        rows: int,
        dtype: np.dtype[Any],
        *,
        keep: bool = True,
        watch: SealWatch | None = None,
    ) -> npt.NDArray[Any]:
        """The rows of a table that has this chunk in a file of its own; ``keep`` them for the next time.

        Raises CacheDamagedError for a chunk that is lost or not as it was written, CacheChangedError for one of another
        version than that of ``watch``.
        """
        path = str(path)
        table = self._tables.get(path)
        if table is None:
            try:
                with _unchanged(watch):
                    content = Path(path).read_bytes()
                packed = decode_chunk(content, (rows, dtype.itemsize), np.dtype(np.uint8))
            except (OSError, ValueError) as error:
                raise damaged(path, error) from error
            table = packed.view(dtype)[:, 0]
            if keep:
                self._tables.put(path, table)
        return table

    def _tiles_of(
        self, path: str, array: TileArray, stops: Mapping[int, int]
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        file = self._files.get(path)
        if file is None:
            with _unchanged(array.watch):
                file = _File(path)
            self._files.put(path, file)
        index = self._index(path, file, array.shard_tiles)
        places = []
        for number in stops:
            position = number % array.shard_tiles
            offset, length = _PLACE.unpack_from(index.content, position * _PLACE.size)
            if length == EMPTY or offset == EMPTY:
                raise ValueError(f"its tile {position} is lost")
            if offset + length > index.end:
                raise ValueError(f"its tile {position} would lie beyond its end")
            places.append((offset, length, number))
        for run in _runs(sorted(places)):
            begin = run[0][0]
            content = file.read(begin, max(offset + length for offset, length, _ in run) - begin)
            for offset, length, number in run:
                part = content[offset - begin : offset - begin + length]
                try:
                    yield number, decode_chunk(part, array.shape, array.dtype, array.codec, stop=stops[number])
                except CacheMismatchError:
                    raise
                except ValueError as error:
                    raise ValueError(f"tile {number % array.shard_tiles}: {error}") from error

    def _index(self, path: str, file: _File, shard_tiles: int) -> _Index:
        index = self._indexes.get(path)
        if index is None or index.version != file.version:
            length = shard_tiles * _PLACE.size + CHECKSUM
            if file.size < length:
                raise ValueError("it is cut off")
            try:
                content = unwrap(file.read(file.size - length, length))
            except ValueError as error:
                raise ValueError(f"index: {error}") from error
            index = _Index(content, file.version, file.size - length)
            self._indexes.put(path, index)
        return index


def _unchanged(watch: SealWatch | None) -> AbstractContextManager[None]:
    return nullcontext() if watch is None else watch.unchanged()


def damaged(path: str | Path, error: Exception) -> CacheDamagedError:
    """The error for a file of a cache that is not as it was written."""
    lost = isinstance(error, FileNotFoundError)
    reason = "it is lost" if lost else getattr(error, "strerror", None) or str(error)
    return CacheDamagedError(f"{path} cannot be read ({reason}); {AFTER_DAMAGE}")


def _runs(places: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Tiles by offset, length and number, sorted, in groups that are worth one read each."""
    run: list[tuple[int, int, int]] = []
    for place in places:
        if run and (place[0] > run[-1][0] + run[-1][1] + GAP or place[0] + place[1] - run[0][0] > RUN):
            yield run
            run = []
        run.append(place)
    if run:
        yield run
