"""The compiled coding of cells with one top class each and hardly a level of 0: mode 3 of docs/format.md."""

from __future__ import annotations

from typing import Any

import numpy as np

from segkd.storage.context_kernel import NEIGHBOURS, STATE, Int, compiled, number

ROUGH_BIN = np.searchsorted((1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 18, 24), np.arange(32), side="right").astype(np.int64)


@compiled(f"void(boolean, uint8[:,:,::1], int64[:,::1], int64, {STATE})")
def code_grades(decoding: bool, levels: Any, tops: Any, reach: Int, models: Any, coder: Any, data: Any) -> None:
    """Codes the levels K,h,w of every class but a cell's top one against what neighbours and other classes foretell."""
    classes, height, width = levels.shape
    values, misses = np.zeros((2, width + 4, classes), np.int64), np.zeros((2, width + 4, classes), np.int64)
    for i in range(height):
        row, other = i & 1, 1 - (i & 1)
        for j in range(width):
            top, count, errors, missed = tops[i + 2, j + 2], 0, 0, 0
            for k in range(classes):
                if k == top:
                    values[row, j + 2, k], misses[row, j + 2, k] = reach, 0
                    if decoding:
                        levels[k, i, j] = 255
                    continue
                w, n, nw, ne = (
                    values[row, j + 1, k],
                    values[other, j + 2, k],
                    values[other, j + 1, k],
                    values[other, j + 3, k],
                )
                miss_w, miss_n = misses[row, j + 1, k], misses[other, j + 2, k]
                if i == 0:
                    n, nw, ne, miss_n = w, w, w, miss_w
                if j == 0:
                    w, nw, miss_w = n, n, miss_n
                if j == width - 1:
                    ne = n
                p: Int = 9 * w + 10 * n - 4 * nw + ne
                if count:
                    p += (13 if count < 3 else 16) * errors // (16 * count)
                p = min(max(p, 16 * min(w, n) - 48, 0), 16 * max(w, n) + 48, 4080)
                guess, part = (p + 8) >> 4, (p + 8) & 15
                up = part >= 8
                room: Int = min(guess, 255 - guess)
                off: Int = np.int64(levels[k, i, j]) - guess
                size = abs(off)
                folded = room + size
                if size <= room:
                    folded = 2 * size - (off > 0 if up else off < 0)
                rough: Int = abs(w - nw) + abs(n - nw) + abs(n - ne) + miss_w + miss_n
                rough = min(rough, 31)
                quarter = (part - 8) >> 1 if up else 3 - (part >> 1)
                wrong = min(2, 2 * missed // count) if count else 1
                near = np.int64(tops[i + 2, j + 3] == k or tops[i + 3, j + 2] == k)
                first = ((ROUGH_BIN[rough] * 4 + quarter) * 3 + wrong) * 16
                second = (min(guess, 31) * 4 + 2 * near + (count > 0)) * 8 + min(7, miss_w + miss_n)
                folded = number(
                    decoding, folded, 0, first, NEIGHBOURS + 16 * second, min(7, rough >> 1), models, coder, data
                )
                if decoding:
                    if folded > 2 * room:
                        off = folded - room if guess == room else room - folded
                    elif folded & 1:
                        off = (folded + 1) >> 1 if up else -((folded + 1) >> 1)
                    else:
                        off = -(folded >> 1) if up else folded >> 1
                    levels[k, i, j] = min(max(guess + off, 0), 254)
                level = np.int64(levels[k, i, j])
                values[row, j + 2, k], misses[row, j + 2, k] = level, abs(level - guess)
                count, errors, missed = count + 1, errors + 16 * level - p, missed + abs(level - guess)
