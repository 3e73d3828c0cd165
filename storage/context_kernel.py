"""The compiled part of the context coder: docs/format.md, "The context codec", states every rule that stands here.

Everything is integer arithmetic, so bytes and codes are the same on every machine. The functions are compiled when this
module is imported (a few seconds) and kept in numba's cache on disk; where no folder can be written they are compiled
in every process. They hold no state and start no threads, so they may be used from threads and forked workers.

Encoder and decoder are one function: ``decoding`` says whether a decision is read or written. No index into an array
depends on the compressed bytes without a bound, so damaged bytes decode to wrong codes, never to a crash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Int = Any
"""int64 in the compiled code, whatever mypy makes of it."""

FRESH = 1 << 27  # a model that has seen nothing
COUNT_LIMIT = 62  # a model's rate of learning stops falling here
# 65536 / (1 + exp(-x)) at x = -8, -7.5 ... 8.
_KNOTS = np.array(
    (22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11965, 17625, 24743, 32768, 40793, 47911, 53571,
     57724, 60565, 62428, 63615, 64357, 64816, 65097, 65269, 65374, 65438, 65476, 65500, 65514)
)  # fmt: skip


def _squash() -> Any:
    """Probability in 65,536ths of each logit -2048…2047, in 256ths: the knots with straight lines between them."""
    logit = np.arange(4096)
    low, part = logit >> 7, logit & 127
    return ((_KNOTS[low] * (128 - part) + _KNOTS[low + 1] * part) >> 7).astype(np.int32)


SQUASH = _squash()
# Its inverse: the least logit that reaches the middle of each 4,096th of probability.
STRETCH = (np.searchsorted(SQUASH, np.arange(4096) * 16 + 8) - 2048).clip(-2047, 2047).astype(np.int32)
RATE = (655_360 // (10 * np.arange(64) + 16)).astype(np.int32)  # 65,536 / (count + 1.6)

# Bins of predictions (16ths of a level) and of levels, and a value of each bin of levels.
_BOUNDS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
PREDICTION_BIN = np.searchsorted(_BOUNDS, np.arange(8192), side="right").astype(np.uint8)
LEVEL_BIN = np.searchsorted((1, 2, 3, 4, 6, 9, 14), np.arange(256), side="right").astype(np.uint8)
COARSE_BIN = np.searchsorted((1, 2, 5), np.arange(256), side="right").astype(np.uint8)
_LEVEL_OF_BIN = (0, 1, 2, 3, 4, 7, 11, 18)
_LEVEL_OF_COARSE_BIN = (0, 1, 3, 7)

NODES = np.array((1, 2, 3, 5, 9, 17, 33, 65, 129), np.int64)  # decision t of a number asks whether it reaches NODES[t]

# Where each family of models starts. The first two have 16 models a context: nine nodes, then leading bits.
NEIGHBOURS = 14 * 4 * 3 * 16
LEADING = NEIGHBOURS + 8 * 8 * 4 * 4 * 16
TRAILING = LEADING + 8 * 8 * 4
QUIET = TRAILING + 2 * 64
TOP = QUIET + 1024
MODELS = TOP + 2048

BRUIJN = 0x03F79D71B4CA8B09  # the position of a word's lowest bit, by multiplication
POSITION = np.zeros(64, np.int64)
for _bit in range(64):
    POSITION[((BRUIJN << _bit) & (2**64 - 1)) >> 58] = _bit


def initial_models() -> npt.NDArray[np.int32]:
    """The models a tile starts from: probability (22 bits) of "yes" and count (6 bits), int32.

    Numbers follow their predictions in every smooth map, so those models start near what that means, with the trust of
    two observations; all others start at one half with none.
    """
    reached = (40, 90, 100, 140, 186, 226, 260, 300, 340)  # 20ths of a bin of predictions where a node is even odds
    models = np.full(MODELS, FRESH, np.int32)

    def start(at: int, prediction_bin: int, extra: int) -> None:
        for node, even in enumerate(reached):
            logit = (15 * (20 * prediction_bin - even)) // 2 + extra
            models[at + node] = (int(SQUASH[min(max(logit, -1500), 1500) + 2048]) << 12) | 2

    for context in range(14 * 4 * 3):
        start(16 * context, context // 12, 160 * (context // 3 % 4) + 160 * (context % 3) - 30)
    for context in range(8 * 8 * 4 * 4):
        west, north = _LEVEL_OF_BIN[context >> 7], _LEVEL_OF_BIN[context >> 4 & 7]
        north_west, north_east = _LEVEL_OF_COARSE_BIN[context >> 2 & 3], _LEVEL_OF_COARSE_BIN[context & 3]
        prediction = max(10 * west + 10 * north - 6 * north_west + 2 * north_east, 0)
        start(NEIGHBOURS + 16 * context, int(PREDICTION_BIN[prediction]), 50)
    return models


def compiled(signature: str, *, inline: bool = False) -> Callable[[Any], Any]:
    """numba's compiler for one signature, with its cache on disk where there is a folder for it."""

    def compile_(function: Any) -> Any:
        try:
            return numba.njit(signature, cache=True, forceinline=inline, nogil=True)(function)
        except (RuntimeError, OSError):  # no folder can be written, or the disk is full
            return numba.njit(signature, forceinline=inline, nogil=True)(function)

    return compile_


STATE = "int32[::1], int64[::1], uint8[::1]"
_U = np.uint64  # unsigned indexes spare the check for negative ones


@compiled(f"int64(boolean, int64, int64, int64, {STATE})", inline=True)
def decide(decoding: bool, bit: Int, first: Int, second: Int, models: Any, coder: Any, data: Any) -> Int:
    """Codes one yes or no by two models, their logits halved and added; both learn from it."""
    state_1, state_2 = np.int64(models[_U(first)]), np.int64(models[_U(second)])
    logit_1, logit_2 = np.int64(STRETCH[_U(state_1 >> 16)]), np.int64(STRETCH[_U(state_2 >> 16)])
    mixed: Int = ((logit_1 + logit_2) * 33) >> 6
    p = np.int64(SQUASH[_U(min(max(mixed, -2048), 2047) + 2048)])
    low, high = coder[0], coder[1]
    middle = low + (((high - low) * p) >> 16)
    if decoding:
        bit = np.int64(coder[2] <= middle)
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> 24 == 0:
        at = coder[3]
        if decoding:
            byte = np.int64(0)
            if at < data.shape[0]:
                byte = np.int64(data[_U(at)])
            coder[2] = ((coder[2] << 8) & 0xFFFFFFFF) | byte
        elif at < data.shape[0]:
            data[_U(at)] = low >> 24
        coder[3] = at + 1
        low, high = (low << 8) & 0xFFFFFFFF, ((high << 8) & 0xFFFFFFFF) | 255
    coder[0], coder[1] = low, high
    target = bit << 22
    count, value = state_1 & 63, state_1 >> 6
    value += ((target - value) * RATE[_U(count)]) >> 16
    models[_U(first)] = (value << 6) | (count + (count < COUNT_LIMIT))
    count, value = state_2 & 63, state_2 >> 6
    value += ((target - value) * RATE[_U(count)]) >> 16
    models[_U(second)] = (value << 6) | (count + (count < COUNT_LIMIT))
    return bit


@compiled(f"int64(boolean, int64, int64, int64, int64, int64, {STATE})", inline=True)
def number(
    decoding: bool,
    value: Int,
    node: Int,
    first: Int,
    second: Int,
    bin_: Int,
    models: Any,
    coder: Any,
    data: Any,
) -> Int:
    """Codes a number of at most 256 that is known to reach the nodes before ``node``."""
    while node < 9:
        reached = np.int64(value >= NODES[node])
        if not decide(decoding, reached, first + node, second + node, models, coder, data):
            break
        node += 1
    if node < 3:
        return node
    low, bits = NODES[node - 1], node - 2
    rest, read = value - low, 0
    for bit in range(bits - 1, -1, -1):
        if bit >= bits - 2:
            prefix = 1 if bit == bits - 1 else 2 + (read & 1)
            model_1 = LEADING + ((bits - 1) * 8 + bin_) * 4 + prefix
            model_2 = second + 10 + min(4, 2 * (bits - 1) + (bits - 1 - bit))
        else:
            model_1 = TRAILING + bits * 8 + bit
            model_2 = model_1 + 64
        read = 2 * read + decide(decoding, (rest >> bit) & 1, model_1, model_2, models, coder, data)
    return low + read


@compiled(f"void(boolean, uint8[:,:,::1], {STATE})")
def code_planes(decoding: bool, planes: Any, models: Any, coder: Any, data: Any) -> None:
    """Codes planes K,h,w of any bytes, each value against what its neighbours foretell."""
    classes, height, width = planes.shape
    for k in range(classes):
        for i in range(height):
            for j in range(width):
                w = np.int64(planes[k, i, j - 1]) if j else np.int64(0)
                n = np.int64(planes[k, i - 1, j]) if i else w
                if j == 0:
                    w = n
                nw = np.int64(planes[k, i - 1, j - 1]) if i and j else n
                ne = np.int64(planes[k, i - 1, j + 1]) if i and j + 1 < width else n
                guess: Int = min(max(w + n - nw, min(w, n)), max(w, n))
                rough: Int = abs(w - nw) + abs(n - nw) + abs(n - ne)
                room: Int = min(guess, 255 - guess)
                off = np.int64(planes[k, i, j]) - guess
                size = abs(off)
                folded = 2 * size - (off > 0) if size <= room else room + size
                first = (np.int64(PREDICTION_BIN[_U(16 * min(rough, 511))]) * 12 + 3 * min(3, guess)) * 16
                second = (np.int64(LEVEL_BIN[_U(abs(w - nw))]) * 8 + np.int64(LEVEL_BIN[_U(abs(n - nw))])) * 4
                second = (second + np.int64(COARSE_BIN[_U(abs(n - ne))])) * 4 + min(3, guess)
                folded = number(
                    decoding,
                    folded,
                    0,
                    first,
                    NEIGHBOURS + 16 * second,
                    min(7, rough >> 1),
                    models,
                    coder,
                    data,
                )
                if decoding:
                    if folded > 2 * room:
                        off = folded - room if guess == room else room - folded
                    else:
                        off = (folded + 1) >> 1 if folded & 1 else -(folded >> 1)
                    planes[k, i, j] = min(max(guess + off, 0), 255)
