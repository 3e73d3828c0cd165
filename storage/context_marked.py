"""The compiled coding of cells with one top class each: the map of top classes, then the others' levels.

Part of the context coder (context.py); the rules stand in docs/format.md. numba's cache looks at the file of a function
only: after a change in context_kernel.py, whose functions are inlined here, remove the caches in storage/__pycache__.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from segkd.storage.context_kernel import (
    BRUIJN,
    COARSE_BIN,
    LEVEL_BIN,
    NEIGHBOURS,
    POSITION,
    PREDICTION_BIN,
    QUIET,
    STATE,
    TOP,
    Int,
    compiled,
    decide,
    number,
)

_U = np.uint64  # unsigned indexes spare the check for negative ones


@compiled(f"void(boolean, int64[:,::1], int64, {STATE})")
def code_tops(decoding: bool, tops: Any, classes: Int, models: Any, coder: Any, data: Any) -> None:
    """Codes the map of top classes; ``tops`` has a frame of two cells of -1 around the cells."""
    bits = 0
    while (1 << bits) < classes:
        bits += 1
    for i in range(2, tops.shape[0] - 2):
        for j in range(2, tops.shape[1] - 2):
            w, n, nw, ne = tops[i, j - 1], tops[i - 1, j], tops[i - 1, j - 1], tops[i - 1, j + 1]
            ww, nn = tops[i, j - 2], tops[i - 2, j]
            if i == 2:
                n, nw, ne, nn = w, w, w, w
            if j == 2:
                w, nw, ww = n, n, n
            if j == tops.shape[1] - 3:
                ne = n
            if w < 0:
                w, n, nw, ne, ww, nn = 0, 0, 0, 0, 0, 0
            nn = n if nn < 0 else nn
            ww = w if ww < 0 else ww
            same = np.int64(n == w) + 2 * (nw == w) + 4 * (ne == w) + 8 * (ww == w)
            first = TOP + same + 16 * (nn == n) + 32 * (nw == n) + 64 * (ne == n) + 128 * (nn == w)
            second = TOP + 1024 + (same & 7) + 8 * min(w, 31)
            top, found = w, np.int64(0)
            for step in range(3):
                if step == 1:
                    top = n
                if step == 2:
                    top = ne
                if (step > 0 and top == w) or (step == 2 and top == n):
                    continue
                found = decide(
                    decoding,
                    np.int64(tops[i, j] == top),
                    first + 256 * step,
                    second + 256 * step,
                    models,
                    coder,
                    data,
                )
                if found:
                    break
            if not found:
                top = 0
                for bit in range(bits - 1, -1, -1):
                    model_1 = TOP + 768 + min((1 << (bits - 1 - bit)) - 1 + top, 127)
                    model_2 = TOP + 896 + 8 * min(w, 15) + min(7, bit)
                    bit_value = (tops[i, j] >> bit) & 1
                    top = 2 * top + decide(decoding, bit_value, model_1, model_2, models, coder, data)
                top = min(top, classes - 1)
            tops[i, j] = top


@compiled("int64(int64)")
def _root(square: Int) -> Int:
    """The integer square root, at most 254; 0 of a negative number."""
    root = 0
    for bit in range(7, -1, -1):
        if (root + (1 << bit)) ** 2 <= square:
            root += 1 << bit
    return min(root, 254)


@compiled("void(int64[:,::1], int64, int64, int64[::1], uint8[::1], uint64[::1])", inline=True)
def _look_ahead(tops: Any, i: Int, j: Int, ahead: Any, boundary: Any, awake: Any) -> None:
    """Wakes the classes that are top in cells to come, and says how near: 3 in both next ones, 2 in one, 1 beyond."""
    ahead[0], ahead[1], ahead[2] = tops[i + 2, j + 3], tops[i + 3, j + 2], tops[i + 3, j + 3]
    ahead[3], ahead[4], ahead[5] = tops[i + 3, j + 1], tops[i + 2, j + 4], tops[i + 4, j + 2]
    for q in range(5, -1, -1):
        if ahead[q] >= 0:
            awake[ahead[q] >> 6] |= _U(1) << _U(ahead[q] & 63)
            boundary[_U(ahead[q])] = 1 if q > 1 else 2
    if ahead[0] == ahead[1] and ahead[0] >= 0:
        boundary[_U(ahead[0])] = 3


@compiled("void(int64, int64, int64, int64, uint8[::1], uint64[:,::1])", inline=True)
def _keep(level: Int, k: Int, here: Int, classes: Int, ring: Any, lit: Any) -> None:
    """Lets later cells see that class ``k`` has a level here."""
    ring[here * classes + k] = level
    lit[here, k >> 6] |= _U(1) << _U(k & 63)


@compiled("boolean(uint64[::1], int64)", inline=True)
def _is_awake(awake: Any, k: Int) -> bool:
    return bool((awake[k >> 6] >> _U(k & 63)) & _U(1))


@compiled(
    "UniTuple(int64, 3)(boolean, uint8[:,:,::1], int64, int64, int64, uint64[::1], int64, int64, int64, int64,"
    f" int64, uint8[::1], uint64[:,::1], {STATE})",
    inline=True,
)
def _code_quiet(
    decoding: bool,
    levels: Any,
    i: Int,
    j: Int,
    top: Int,
    awake: Any,
    seen: Int,
    count: Int,
    hits: Int,
    around: Int,
    here: Int,
    ring: Any,
    lit: Any,
    models: Any,
    coder: Any,
    data: Any,
) -> tuple[Int, Int, Int]:
    """Codes the levels of classes that no neighbour wakes: whether any is not 0, then which and what.

    Returns that, and by how much the cell's sums of levels and of their squares grow.
    """
    classes = levels.shape[0]
    left, hit, found, added, squares = classes - 1 - seen, np.int64(0), 0, 0, 0
    if not left:
        return hit, added, squares
    if not decoding:
        for k in range(classes):
            if levels[k, i, j] and not _is_awake(awake, k):
                hit = np.int64(1)
                break
    first: Int = QUIET + (min(seen, 7) * 5 + hits) * 3 + min(2, count)
    second: Int = QUIET + 128 + 4 * min(31, around) + min(3, count)
    hit = decide(decoding, hit, first, second, models, coder, data)
    if not hit:
        return hit, added, squares
    for k in range(classes):
        if k == top or _is_awake(awake, k):
            continue
        left -= 1
        level: Int = np.int64(levels[k, i, j])
        lights: Int = np.int64(1)
        if found or left:
            first = QUIET + 256 + 2 * min(k, 127) + (found > 0)
            second = QUIET + 512 + 2 * min(left, 31) + (found > 0)
            lights = decide(decoding, np.int64(level > 0), first, second, models, coder, data)
        if lights:
            found += 1
            second = QUIET + 592 + 16 * min(found, 3)
            level = min(number(decoding, level, 1, QUIET + 576, second, 0, models, coder, data), 254)
            added, squares = added + level, squares + level * level
            _keep(level, k, here, classes, ring, lit)
            if decoding:
                levels[k, i, j] = level
    return hit, added, squares


@compiled(f"void(boolean, uint8[:,:,::1], int64[:,::1], int64, {STATE})")
def code_levels(decoding: bool, levels: Any, tops: Any, reach: Int, models: Any, coder: Any, data: Any) -> None:
    """Codes the levels K,h,w of every class but a cell's top one, given the map of tops.

    The top classes' own levels must be 0 and come out as 255. ``tops`` may have more rows than are decoded.
    """
    classes, height, width = levels.shape
    words, pitch, one = (classes + 63) >> 6, width + 4, _U(1)
    # Rings of three rows with a frame of two cells: levels (the top class's from what is left), which are not 0, and
    # per cell the sum of levels and whether a quiet class was not 0.
    ring = np.zeros(3 * pitch * classes, np.uint8)
    lit = np.zeros((3 * pitch, words), np.uint64)
    sums, hits = np.zeros(3 * pitch, np.int64), np.zeros(3 * pitch, np.int64)
    awake, boundary, ahead = np.zeros(words, np.uint64), np.zeros(classes, np.uint8), np.zeros(6, np.int64)
    for i in range(height):
        row, north_row, far_row = (i % 3) * pitch, ((i + 2) % 3) * pitch, ((i + 1) % 3) * pitch
        ring[row * classes : (row + pitch) * classes] = 0
        lit[row : row + pitch] = _U(0)
        for j in range(width):
            here, n = row + j + 2, north_row + j + 2
            w, nw, ne = here - 1, n - 1, n + 1
            top = tops[i + 2, j + 2]
            for q in range(words):
                awake[q] = lit[w, q] | lit[n, q] | lit[nw, q] | lit[ne, q] | lit[here - 2, q] | lit[far_row + j + 2, q]
            _look_ahead(tops, i, j, ahead, boundary, awake)
            awake[top >> 6] &= ~(one << _U(top & 63))
            if i == 0:
                n, nw, ne = w, w, w
            if j == 0:
                w, nw = n, n
            if j == width - 1:
                ne = n
            around = sums[w] + sums[n]
            seen, count, total, squares = 0, 0, 0, 0
            for q in range(words):
                word = awake[q]
                while word:
                    k = q * 64 + POSITION[((word & (~word + one)) * _U(BRUIJN)) >> _U(58)]
                    word &= word - one
                    seen += 1
                    west, north = np.int64(ring[_U(w * classes + k)]), np.int64(ring[_U(n * classes + k)])
                    north_west, north_east = np.int64(ring[_U(nw * classes + k)]), np.int64(ring[_U(ne * classes + k)])
                    predicted: Int = max(10 * west + 10 * north - 6 * north_west + 2 * north_east, 0)
                    filled = 0
                    if count:
                        filled = 1 if 2 * total < around else 2
                    case = np.int64(boundary[_U(k)]) * 3 + filled
                    first: Int = (np.int64(PREDICTION_BIN[_U(predicted)]) * 12 + case) * 16
                    second: Int = (np.int64(LEVEL_BIN[_U(west)]) * 8 + np.int64(LEVEL_BIN[_U(north)])) * 4
                    second = (second + np.int64(COARSE_BIN[_U(north_west)])) * 4 + np.int64(COARSE_BIN[_U(north_east)])
                    level: Int = number(
                        decoding,
                        np.int64(levels[k, i, j]),
                        0,
                        first,
                        NEIGHBOURS + 16 * second,
                        min(7, predicted >> 6),
                        models,
                        coder,
                        data,
                    )
                    if level:
                        level = min(level, 254)
                        count, total, squares = count + 1, total + level, squares + level * level
                        _keep(level, k, here, classes, ring, lit)
                        if decoding:
                            levels[k, i, j] = level
            for q in range(6):
                if ahead[q] >= 0:
                    boundary[_U(ahead[q])] = 0
            near = hits[w] + hits[n] + hits[nw] + hits[ne]
            hits[here], more, squares_more = _code_quiet(
                decoding, levels, i, j, top, awake, seen, count, near, around, here, ring, lit, models, coder, data
            )
            sums[here] = total + more
            _keep(_root(reach - squares - squares_more), top, here, classes, ring, lit)
            if decoding:
                levels[top, i, j] = 255
