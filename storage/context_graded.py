"""The compiled coding of cells with one top class each and hardly a level of 0: mode 4 of docs/format.md.

numba's cache looks at the file of a function only: after a change in context_kernel.py, whose functions are inlined
here, remove the caches in storage/__pycache__.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from segkd.storage.context_kernel import FRESH, MODELS, NEIGHBOURS, SQUASH, STATE, Int, compiled, number

_U = np.uint64  # unsigned indexes spare the check for negative ones

ROUGH_BIN = np.searchsorted((1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 18, 24), np.arange(32), side="right").astype(np.int64)
MOST = 255  # levels of a cell that are averaged
SHARE = (65_536 // np.arange(1, MOST + 2)).astype(np.int64)
CLASSES, AROUND = 7, 9  # what the learned part of a prediction sees: misses of classes before, and what is around
INPUTS = CLASSES + AROUND
MOST_SEEN = 64  # of each, in 16ths of a level
LARGEST = np.int32(1 << 18)  # a weight's


def initial_grades() -> npt.NDArray[np.int32]:
    """The models a tile starts from, as in ``initial_models``: wide where neighbours or other classes were off."""
    models = np.full(MODELS, FRESH, np.int32)

    def start(at: int, logits: tuple[int, ...]) -> None:
        for node, logit in enumerate(logits):
            models[at + node] = (int(SQUASH[min(max(logit, -1500), 1500) + 2048]) << 12) | 4

    for context in range(13 * 4 * 3):
        wide = 46 * (context // 12) + 86 * (context % 3)
        start(16 * context, (wide - 230, wide - 450, wide - 510, wide - 680))
    for context in range(8 * 8 * 4 * 4):
        wide = 70 * (context % 8)
        start(NEIGHBOURS + 16 * context, (wide, wide - 150, wide - 210, wide - 490))
    return models


@compiled("int64(int32[::1], int32[::1], int64)", inline=True)
def _learned(weights: Any, inputs: Any, k: Int) -> Int:
    """What class ``k``'s weights add to its prediction."""
    added = np.int32(0)
    for q in range(INPUTS):
        added += weights[_U(k * INPUTS + q)] * inputs[_U(k + q)]
    return np.int64(added) >> 17


@compiled("void(int64, int32[::1], int32[::1], int64)", inline=True)
def _learn(gap: Int, weights: Any, inputs: Any, k: Int) -> None:
    """Moves class ``k``'s weights by what the prediction was off times what they saw."""
    step = np.int32(min(max(gap, -32), 32))
    for q in range(INPUTS):
        moved = weights[_U(k * INPUTS + q)] + step * inputs[_U(k + q)]
        weights[_U(k * INPUTS + q)] = min(max(moved, -LARGEST), LARGEST)


@compiled("int32(int64)", inline=True)
def _seen(difference: Int) -> Int:
    """A difference in 16ths of a level as weights see it."""
    return np.int32(min(max(difference, -MOST_SEEN), MOST_SEEN))


@compiled("void(int64, int64, int64, int64, int32, int32, int32, int32, int64, int32[::1], int64)", inline=True)
def _look_around(
    w: Int, n: Int, nw: Int, ne: Int, gap_w: Int, gap_n: Int, gap_nw: Int, gap_ne: Int, won: Int, inputs: Any, at: Int
) -> None:
    """Fills in, from ``at`` on, the neighbours' differences and misses, and of how many of two it is the top."""
    inputs[_U(at)], inputs[_U(at + 1)], inputs[_U(at + 2)] = (
        _seen(16 * (w - nw)),
        _seen(16 * (n - nw)),
        _seen(16 * (ne - n)),
    )
    inputs[_U(at + 3)] = 16
    inputs[_U(at + 4)], inputs[_U(at + 5)], inputs[_U(at + 6)], inputs[_U(at + 7)] = gap_w, gap_n, gap_nw, gap_ne
    inputs[_U(at + 8)] = MOST_SEEN * won


@compiled("int64(int64, boolean, int64)", inline=True)
def _fold(off: Int, up: bool, room: Int) -> Int:
    """A distance from the guess as a number, the likelier side first."""
    size = abs(off)
    if size > room:
        return room + size
    return 2 * size - np.int64(off > 0 if up else off < 0)


@compiled("int64(int64, int64, boolean, int64)", inline=True)
def _unfold(folded: Int, guess: Int, up: bool, room: Int) -> Int:
    """The level, at most 254, of a folded distance."""
    if folded > 2 * room:
        off = folded - room if guess == room else room - folded
    elif folded & 1:
        off = (folded + 1) >> 1 if up else -((folded + 1) >> 1)
    else:
        off = -(folded >> 1) if up else folded >> 1
    return min(max(guess + off, 0), 254)


@compiled(f"void(boolean, uint8[:,:,::1], int64[:,::1], int64, {STATE})")
def code_grades(decoding: bool, levels: Any, tops: Any, reach: Int, models: Any, coder: Any, data: Any) -> None:
    """Codes the levels K,h,w of every class but a cell's top one against what neighbours and other classes foretell."""
    classes, height, width = levels.shape
    pitch = (width + 4) * classes
    values, misses, gaps = np.zeros(2 * pitch, np.int32), np.zeros(2 * pitch, np.int32), np.zeros(2 * pitch, np.int32)
    weights, inputs = np.zeros(classes * INPUTS, np.int32), np.zeros(classes + INPUTS, np.int32)
    for i in range(height):
        for j in range(width):
            here = (i & 1) * pitch + (j + 2) * classes
            at_w, at_n = here - classes, (1 - (i & 1)) * pitch + (j + 2) * classes
            at_nw, at_ne = at_n - classes, at_n + classes
            if i == 0:
                at_n, at_nw, at_ne = at_w, at_w, at_w
            if j == 0:
                at_w, at_nw = at_n, at_n
            if j == width - 1:
                at_ne = at_n
            top, east, south = tops[i + 2, j + 2], tops[i + 2, j + 3], tops[i + 3, j + 2]
            west, north = tops[i + 2, j + 1], tops[i + 1, j + 2]
            count, errors, missed = 0, 0, 0
            for k in range(classes):
                if k == top:
                    values[_U(here + k)], misses[_U(here + k)], gaps[_U(here + k)] = reach, 0, 0
                    inputs[_U(k + CLASSES)] = 0
                    if decoding:
                        levels[_U(k), _U(i), _U(j)] = 255
                    continue
                w, n = np.int64(values[_U(at_w + k)]), np.int64(values[_U(at_n + k)])
                nw, ne = np.int64(values[_U(at_nw + k)]), np.int64(values[_U(at_ne + k)])
                miss = np.int64(misses[_U(at_w + k)]) + np.int64(misses[_U(at_n + k)])
                plain: Int = 9 * w + 10 * n - 4 * nw + ne
                p: Int = plain + ((errors * SHARE[_U(count)]) >> 16)
                at, won = k + CLASSES, np.int64(west == k) + np.int64(north == k)
                seen_w, seen_n = gaps[_U(at_w + k)], gaps[_U(at_n + k)]
                seen_nw, seen_ne = gaps[_U(at_nw + k)], gaps[_U(at_ne + k)]
                _look_around(w, n, nw, ne, seen_w, seen_n, seen_nw, seen_ne, won, inputs, at)
                p += _learned(weights, inputs, k)
                p = min(max(p, 16 * min(w, n) - 96, 0), 16 * max(w, n) + 96, 4080)
                guess, part = (p + 8) >> 4, (p + 8) & 15
                up, room = part >= 8, min(guess, 255 - guess)
                rough: Int = min(abs(w - nw) + abs(n - nw) + abs(n - ne) + miss, 31)
                quarter = (part - 8) >> 1 if up else 3 - (part >> 1)
                wrong = np.int64(2 * missed >= count) + np.int64(missed >= count) if count else np.int64(1)
                first = ((ROUGH_BIN[_U(rough)] * 4 + quarter) * 3 + wrong) * 16
                second = (min(guess, 31) * 4 + 2 * np.int64(east == k or south == k) + (count > 0)) * 8 + min(7, miss)
                level = np.int64(levels[_U(k), _U(i), _U(j)])
                folded = _fold(level - guess, up, room)
                folded = number(
                    decoding, folded, 0, first, NEIGHBOURS + 16 * second, min(7, rough >> 1), models, coder, data
                )
                if decoding:
                    level = _unfold(folded, guess, up, room)
                    levels[_U(k), _U(i), _U(j)] = level
                gap, error, off = 16 * level - p, 16 * level - plain, abs(level - guess)
                _learn(gap, weights, inputs, k)
                values[_U(here + k)], misses[_U(here + k)], gaps[_U(here + k)] = level, off, _seen(gap)
                inputs[_U(at)] = _seen(error)
                if count < MOST:
                    count, errors, missed = count + 1, errors + error, missed + off
