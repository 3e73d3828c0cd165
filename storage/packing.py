"""From codes to the bytes of shards and chunks, exactly as zarr would write them, by several threads.

Zarr goes through an array of the whole unit and an event loop; this goes from a tile's codes to its bytes. What comes
out does not depend on the number of threads. Shapes: codes channels,h,w of one sample; tiles channels,t,t.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from segkd.storage import context, prediction
from segkd.storage.context_codec import ContextCodec
from segkd.storage.errors import ConfigError
from segkd.storage.layout import tile_shape

ZSTD_LEVEL = 15
"""A quarter of level 19's time for 2 % more bytes, see ``benchmarks/packing.py``; every level decodes alike."""
EMPTY = (1 << 64) - 1
"""Offset and length of a tile that is not there, in a shard's index."""


def zarr_codecs(codec: str) -> dict[str, Any]:
    """What :func:`encode_chunk` does with this codec, as ``zarr.create_array`` is told. Raises ConfigError."""
    if codec not in ENCODERS:
        raise ConfigError(f"the codec {codec!r} is none of {', '.join(sorted(ENCODERS))}; choose one of these")
    if codec == "context":
        context.kernels()
        return {"serializer": ContextCodec(), "compressors": (Crc32cCodec(),), "filters": None}
    # A crc32c over the compressed bytes also covers zstd's own header, which zstd's checksum does not.
    return {"compressors": (ZstdCodec(level=ZSTD_LEVEL, checksum=False), Crc32cCodec()), "filters": None}


def stored_dtype(dtype: np.dtype[Any], codec: str) -> np.dtype[Any]:
    """What codes of a type stand in their Zarr array as."""
    return np.dtype(np.int8) if codec == "residuals" else dtype


def encode_chunk(chunk: npt.NDArray[np.generic], codec: str = "zstd") -> bytes:
    """A chunk's bytes: what the codec makes of it, and a crc32c of that. :mod:`segkd.storage.chunks` reads them."""
    return _checksummed(ENCODERS[codec](chunk))


def _zstd(chunk: npt.NDArray[np.generic]) -> bytes:
    plain = np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("<"))
    return bytes(Zstd(ZSTD_LEVEL).encode(plain.tobytes()))


def _residuals(chunk: npt.NDArray[np.int16]) -> bytes:
    return _zstd(prediction.residuals(chunk))


ENCODERS: dict[str, Callable[[npt.NDArray[Any]], bytes]] = {
    "zstd": _zstd,
    "residuals": _residuals,
    "context": context.encode,
}
"""How an array becomes bytes, by each codec that a specification may name."""


def pack_shards(
    samples: Iterable[tuple[int, npt.NDArray[np.generic]]],
    *,
    tile: int,
    shard_tiles: int,
    dtype: np.dtype[np.generic],
    codec: str,
    executor: Executor,
) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of the shards that hold ``samples``: of each its first tile's number and its codes."""
    jobs = [
        (first + number, codes, number)
        for first, codes in samples
        for number in range(int(np.prod(tile_shape((codes.shape[1], codes.shape[2]), tile))))
    ]
    beyond = prediction.BEYOND if codec == "residuals" else 0
    encoded = executor.map(lambda job: encode_chunk(cut_tile(job[1], job[2], tile, dtype, beyond), codec), jobs)
    shards: dict[int, dict[int, bytes]] = {}
    for (place, *_), content in zip(jobs, encoded, strict=True):
        shard, number = divmod(place, shard_tiles)
        shards.setdefault(shard, {})[number] = content
    for shard, tiles in shards.items():
        yield shard, _shard(tiles, shard_tiles)


def cut_tile(
    codes: npt.NDArray[np.generic], number: int, tile: int, dtype: np.dtype[np.generic], beyond: int = 0
) -> npt.NDArray[np.generic]:
    """One of the tiles that codes channels,h,w are cut into, row by row, with ``beyond`` where the grid has ended."""
    channels, height, width = codes.shape
    row, column = divmod(number, tile_shape((height, width), tile)[1])
    part = codes[:, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
    cut = np.full((channels, tile, tile), beyond, dtype)
    cut[:, : part.shape[1], : part.shape[2]] = part
    return cut


def threads() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shard(tiles: dict[int, bytes], shard_tiles: int) -> bytes:
    """The tiles one after another, then the index: offset and length of every tile of the shard, with a crc32c."""
    index = np.full((shard_tiles, 2), EMPTY, "<u8")
    offset = 0
    for number, content in sorted(tiles.items()):
        index[number] = offset, len(content)
        offset += len(content)
    return b"".join([*(content for _, content in sorted(tiles.items())), _checksummed(index.tobytes())])


def _checksummed(content: bytes) -> bytes:
    return content + struct.pack("<I", google_crc32c.value(content))
