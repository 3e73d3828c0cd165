"""The context coder: one tile of uint8 codes as an adaptive binary arithmetic coder writes them, without loss.

Codes of distributions are mostly 0, change slowly from cell to cell, and are decided by where the boundaries between
top classes run. So the map of top classes (code 255) comes first, and then the other classes' levels, each under
probabilities that depend on the same class's levels to the west and north, on the top classes all around, and on how
much the cell has been given so far. Classes without a neighbour share one decision a cell, so what is empty costs
neither bytes nor time. Any other array of bytes is coded plane by plane against its neighbours, or kept as it is where
that is shorter. docs/format.md states every rule; the ideas are those of lossless image coders (LOCO-I: Weinberger et
al. 2000) and of adding models' logits (Mahoney 2005).
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from segkd.storage.errors import CacheMismatchError, ConfigError

Codes = npt.NDArray[np.uint8]

RAW, PLANES, MARKED, GRADED = 0, 1, 2, 4
# 3 was GRADED by another rule, before the format was settled: its tiles must not be read by this one.
TOP_CODE = 255
MOST_CLASSES = 65_535


@functools.cache
def kernels() -> tuple[ModuleType, ModuleType, ModuleType, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The compiled modules and the models that a tile starts from, mode 4's last; compiles what no process here has.

    Raises ConfigError without numba. Worth calling before workers fork, so that each need not compile or load them.
    """
    try:
        from segkd.storage import context_graded, context_kernel, context_marked
    except ImportError as error:
        raise ConfigError(
            f"the dense profile is coded with numba, which cannot be imported ({error}); pip install 'segkd[dense]'"
        ) from error
    initial, graded = context_kernel.initial_models(), context_graded.initial_grades()
    return context_kernel, context_marked, context_graded, initial, graded


def encode(codes_Chw: Codes) -> bytes:
    """The bytes of any uint8 array; never more than one byte longer than the array."""
    codes = np.ascontiguousarray(codes_Chw)
    if codes.dtype != np.uint8 or codes.ndim != 3 or not 0 < codes.shape[0] <= MOST_CLASSES:
        raise ValueError(f"the context coder takes uint8 arrays (classes, h, w), got {codes.dtype} {codes.shape}")
    raw = bytes([RAW]) + codes.tobytes()
    rows, columns = _extent(codes.any(axis=(0, 2))), _extent(codes.any(axis=(0, 1)))
    box = codes[:, :rows, :columns]
    present = np.flatnonzero(box.any(axis=(1, 2)))
    levels = np.ascontiguousarray(box[present])
    header = _varint(rows) + _varint(columns) + _write_classes(present, len(codes))
    state = _State(data=np.zeros(codes.size, np.uint8))
    tops = levels == TOP_CODE
    marked = len(present) > 0 and bool((tops.sum(axis=0) == 1).all())
    mode = PLANES
    if marked:
        framed = np.full((rows + 4, columns + 4), -1, np.int64)
        framed[2:-2, 2:-2] = tops.argmax(axis=0)
        levels[tops] = 0
        # Where most levels are 0 their places tell most; elsewhere it is their differences.
        mode = MARKED if 2 * np.count_nonzero(levels) < levels.size else GRADED
        reach = _reach(levels) if mode == MARKED else int(levels.max()) + 1
        header += _varint(reach)
        state.marked(False, mode, levels, framed, reach)
    else:
        state.planes(False, levels)
    payload = state.finish()
    if payload is None or 1 + len(header) + len(payload) >= len(raw):
        return raw
    return bytes([mode]) + header + payload


def decode(data: bytes | memoryview, shape: tuple[int, int, int], *, stop: int | None = None) -> Codes:
    """The array of ``shape`` (classes, h, w) that these bytes were made of.

    With ``stop`` only the rows before it need be right; the others are 0 where that saves work.
    Damaged bytes raise ValueError or give a wrong array; a checksum around them is what tells the two apart. Whole ones
    of another version of the coder raise CacheMismatchError.
    """
    data = memoryview(data).cast("B")
    if not len(data):
        raise ValueError("no bytes to decode")
    mode = data[0]
    if mode == RAW:
        if len(data) - 1 != math.prod(shape):
            raise ValueError(f"{len(data) - 1} bytes cannot be an array of shape {shape}")
        return np.frombuffer(data, np.uint8, offset=1).reshape(shape).copy()
    if mode not in (PLANES, MARKED, GRADED):
        raise CacheMismatchError(
            f"a tile is coded in mode {mode} of the context coder, which this version of segkd does not know; "
            "read the cache with the version that wrote it, or write it again"
        )
    rows, at = _read_varint(data, 1)
    columns, at = _read_varint(data, at)
    present, at = _read_classes(data, at, shape[0])
    if rows > shape[1] or columns > shape[2] or (mode != PLANES and not len(present)):
        raise ValueError(f"a box of {rows}×{columns} cells and {len(present)} classes does not fit the shape {shape}")
    needed = rows if stop is None else min(rows, stop)
    levels = np.zeros((len(present), rows if mode == PLANES else needed, columns), np.uint8)
    if mode != PLANES:
        reach, at = _read_varint(data, at)
        framed = np.full((rows + 4, columns + 4), -1, np.int64)
        _State(data=np.frombuffer(data, np.uint8, offset=at).copy()).marked(
            True, mode, levels, framed, min(reach, 2 * 255**2)
        )
    else:
        _State(data=np.frombuffer(data, np.uint8, offset=at).copy()).planes(True, levels)
    codes = np.zeros(shape, np.uint8)
    if len(present) == shape[0]:
        codes[:, : levels.shape[1], :columns] = levels
    else:
        codes[present, : levels.shape[1], :columns] = levels
    return codes


class _State:
    """What coder and models know in the course of one tile."""

    def __init__(self, *, data: Codes) -> None:
        self._kernel, self._marked, self._graded, self._models, self._grades = kernels()
        start = int.from_bytes(data[:4].tobytes().ljust(4, b"\0"), "big")
        self._coder = np.array([0, 0xFFFFFFFF, start, 4], np.int64)
        self._data = data

    def marked(self, decoding: bool, mode: int, levels: Codes, tops: npt.NDArray[np.int64], reach: int) -> None:
        self._coder[3] = 4 if decoding else 0
        models = self._grades if mode == GRADED else self._models
        state = models.copy(), self._coder, self._data
        self._marked.code_tops(decoding, tops, len(levels), *state)
        code = self._marked.code_levels if mode == MARKED else self._graded.code_grades
        code(decoding, levels, tops, min(reach, 255) if mode == GRADED else reach, *state)

    def planes(self, decoding: bool, levels: Codes) -> None:
        self._coder[3] = 4 if decoding else 0
        self._kernel.code_planes(decoding, levels, self._models.copy(), self._coder, self._data)

    def finish(self) -> bytes | None:
        """What was written, with the one byte that ends it; None where it did not fit."""
        low, _, _, length = (int(value) for value in self._coder)
        if length >= len(self._data):
            return None
        return self._data[:length].tobytes() + bytes([(low >> 24) + 1])


def _reach(levels_Khw: Codes) -> int:
    """The square of the whole probability's level: the most that a cell's other classes leave room for."""
    squares = levels_Khw.astype(np.int64) ** 2
    return min(int((squares.sum(axis=0) + squares.max(axis=0)).max()), 2 * 255**2)


def _extent(used: Any) -> int:
    places = np.flatnonzero(used)
    return int(places[-1]) + 1 if len(places) else 0


def _varint(number: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 35, 7):
        if at >= len(data):
            break
        number |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return number, at
    raise ValueError("the header ends early or holds a number of more than 35 bits")


def _write_classes(present: npt.NDArray[np.intp], classes: int) -> bytes:
    """How many classes are not empty, then which: nothing where all are, else a bitmap or gaps."""
    count = len(present)
    out = _varint(count)
    if count in (0, classes):
        return out
    if _as_bitmap(count, classes):
        bitmap = np.zeros(classes, np.uint8)
        bitmap[present] = 1
        return out + np.packbits(bitmap, bitorder="little").tobytes()
    return out + b"".join(_varint(int(gap) - 1) for gap in np.diff(present, prepend=-1))


def _read_classes(data: memoryview, at: int, classes: int) -> tuple[npt.NDArray[Any], int]:
    count, at = _read_varint(data, at)
    if count > classes:
        raise ValueError(f"{count} classes are not empty of {classes}")
    if count in (0, classes):
        return np.arange(count), at
    if _as_bitmap(count, classes):
        end = at + -(-classes // 8)
        bits = np.unpackbits(np.frombuffer(data[at:end], np.uint8), bitorder="little")[:classes]
        present = np.flatnonzero(bits)
    else:
        places, end = [-1], at
        for _ in range(count):
            gap, end = _read_varint(data, end)
            places.append(places[-1] + 1 + gap)
        present = np.array(places[1:])
    if len(present) != count or present[-1] >= classes:
        raise ValueError(f"the list of classes that are not empty does not name {count} of {classes}")
    return present, end


def _as_bitmap(count: int, classes: int) -> bool:
    return -(-classes // 8) <= count
