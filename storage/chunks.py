"""A chunk's bytes read back: its checksum is compared, then its codec undone.

Every chunk of a cache, a tile or a table, ends in a crc32c over all that stands before it, the codec's own header
included, so whatever is decoded is what was written. :mod:`segkd.storage.packing` makes these bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import decompress

from segkd.storage import context, prediction
from segkd.storage.errors import CacheMismatchError

CHECKSUM = 4
"""Bytes of a crc32c."""

Decoder = Callable[[bytes, tuple[int, ...], "np.dtype[np.generic]", "int | None"], npt.NDArray[np.generic]]


def unwrap(content: bytes) -> bytes:
    """What stands before the checksum. Raises ValueError for bytes that do not end in their own."""
    body = content[:-CHECKSUM]
    if len(content) <= CHECKSUM:
        raise ValueError(f"{len(content)} bytes are too few")
    if google_crc32c.value(body) != int.from_bytes(content[-CHECKSUM:], "little"):
        raise ValueError("its checksum differs")
    return body


def decode_chunk(
    content: bytes, shape: tuple[int, ...], dtype: np.dtype[np.generic], codec: str = "zstd", *, stop: int | None = None
) -> npt.NDArray[np.generic]:
    """The array that a chunk's bytes were made of; it may be read-only.

    With ``stop`` only the rows of a tile before it need be right, which spares work for some codecs.
    Raises ValueError for bytes that are not those that were written. ``codec`` is one that :func:`require` let pass.
    """
    return DECODERS[codec](unwrap(content), shape, dtype, stop)


def require_known(codec: str) -> None:
    """Raises CacheMismatchError for a codec that this version lacks."""
    if codec not in DECODERS:
        raise CacheMismatchError(
            f"the cache is packed with the codec {codec!r}; this version of segkd reads {sorted(DECODERS)}; "
            "install a newer one"
        )


def require(codec: str) -> None:
    """Raises CacheMismatchError for a codec that this version lacks, ConfigError for one that lacks its compiler.

    Compiled code is loaded here, so that workers that are forked later have it from the start.
    """
    require_known(codec)
    if codec == "context":
        context.kernels()


def _zstd(
    body: bytes,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
    stop: int | None,  # noqa: ARG001  # it undoes all or nothing
) -> npt.NDArray[np.generic]:
    # The zstandard package's binding was 10 % faster than numcodecs', which zarr brings: no reason for a dependency.
    try:
        plain = decompress(body)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    expected = math.prod(shape) * dtype.itemsize
    if len(plain) != expected:
        raise ValueError(f"it decodes to {len(plain)} bytes, expected {expected}")
    return np.frombuffer(plain, dtype.newbyteorder("<")).reshape(shape)


def _residuals(
    body: bytes,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],  # noqa: ARG001  # values are int16 alone
    stop: int | None,
) -> npt.NDArray[np.generic]:
    kept: npt.NDArray[np.int8] = _zstd(body, shape, np.dtype(np.int8), None).view(np.int8)
    return prediction.restored(kept, stop)


def _context(
    body: bytes,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],  # noqa: ARG001  # the codec knows uint8 alone
    stop: int | None,
) -> npt.NDArray[np.generic]:
    classes, height, width = shape
    return context.decode(body, (classes, height, width), stop=stop)


DECODERS: dict[str, Decoder] = {"zstd": _zstd, "residuals": _residuals, "context": _context}
"""How the bytes of each codec that a specification may name become an array of a shape and type."""
