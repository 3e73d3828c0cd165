"""A second decoder of the context codec, slow and written from docs/format.md alone: the page must suffice for one."""

from collections.abc import Iterator
from math import isqrt
from operator import mul

import numpy as np
import pytest

from segkd.storage.context import GRADED, MARKED, PLANES, RAW, encode

KNOTS = [
    22, 36, 60, 98, 162, 267, 439, 720, 1179, 1921, 3108, 4971, 7812, 11965, 17625, 24743, 32768, 40793, 47911, 53571,
    57724, 60565, 62428, 63615, 64357, 64816, 65097, 65269, 65374, 65438, 65476, 65500, 65514,
]  # fmt: skip
SQUASH = [(KNOTS[x >> 7] * (128 - (x & 127)) + KNOTS[(x >> 7) + 1] * (x & 127)) >> 7 for x in range(4096)]
STRETCH = [
    max(-2047, min(2047, next((d for d in range(-2048, 2048) if SQUASH[d + 2048] >= 16 * i + 8), 2048)))
    for i in range(4096)
]
BOUNDS = [1, 2, 3, 5, 9, 17, 33, 65, 129]


def bin_p(x: int) -> int:
    return sum(bound <= x for bound in (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512))


def bin_l(x: int) -> int:
    return sum(bound <= x for bound in (1, 2, 3, 4, 6, 9, 14))


def bin_s(x: int) -> int:
    return sum(bound <= x for bound in (1, 2, 5))


class Reader:
    """Decisions and numbers; models come into being when they are first asked for."""

    def __init__(self, data: bytes, *, graded: bool = False) -> None:
        self.rest: Iterator[int] = iter(data)
        self.low, self.high, self.code = 0, 2**32 - 1, 0
        for _ in range(4):
            self.code = self.code << 8 | next(self.rest, 0)
        self.models: dict[tuple, list[int]] = {}
        self.fresh = self.fresh_graded if graded else self.fresh_marked

    def model(self, name: tuple) -> list[int]:
        if name not in self.models:
            self.models[name] = self.fresh(*name)
        return self.models[name]

    @staticmethod
    def fresh_graded(family: str, *place: int) -> list[int]:
        if family == "SLOPE" and place[-1] < 4:
            z = 46 * place[0] + 86 * place[2] - (230, 450, 510, 680)[place[-1]]
        elif family == "NEAR" and place[-1] < 4:
            z = 70 * ((4 * place[2] + place[3]) % 8) - (0, 150, 210, 490)[place[-1]]
        else:
            return [2**21, 0]
        return [64 * SQUASH[z + 2048], 4]

    @staticmethod
    def fresh_marked(family: str, *place: int) -> list[int]:
        if family == "SLOPE" and place[-1] < 9:
            place_bin, offset = place[0], 160 * (place[1] + place[2]) - 30
        elif family == "NEAR" and place[-1] < 9:
            west, north = ((0, 1, 2, 3, 4, 7, 11, 18)[k] for k in place[:2])
            north_west, north_east = ((0, 1, 3, 7)[k] for k in place[2:4])
            place_bin, offset = bin_p(max(10 * west + 10 * north - 6 * north_west + 2 * north_east, 0)), 50
        else:
            return [2**21, 0]
        even = (40, 90, 100, 140, 186, 226, 260, 300, 340)[place[-1]]
        z = max(-1500, min(1500, (15 * (20 * place_bin - even) >> 1) + offset))
        return [64 * SQUASH[z + 2048], 2]

    def decide(self, first: tuple, second: tuple) -> int:
        models = [self.model(first), self.model(second)]
        d = 33 * sum(STRETCH[q >> 10] for q, _ in models) >> 6
        p = SQUASH[max(-2048, min(2047, d)) + 2048]
        middle = self.low + ((self.high - self.low) * p >> 16)
        yes = self.code <= middle
        if yes:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 24 == self.high >> 24:
            self.low, self.high = self.low << 8 & 0xFFFFFFFF, self.high << 8 & 0xFFFFFFFF | 255
            self.code = self.code << 8 & 0xFFFFFFFF | next(self.rest, 0)
        for model in models:
            model[0] += (2**22 * yes - model[0]) * (655360 // (10 * model[1] + 16)) >> 16
            model[1] = min(model[1] + 1, 62)
        return int(yes)

    def number(self, a: tuple, b: tuple, g: int, start: int = 0) -> int:
        """Contexts are a family's name and a place; in QUIET the place itself goes up."""

        def at(context: tuple, t: int) -> tuple:
            return (*context[:-1], context[-1] + t) if context[0] == "QUIET" else (*context, t)

        t = start
        while t < 9 and self.decide(at(a, t), at(b, t)):
            t += 1
        if t < 3:
            return t
        count, read = t - 2, 0
        for done in range(count):
            if done == 0:
                pair = ("LEADING", count - 1, g, 1), at(b, 10 + min(4, 2 * count - 2))
            elif done == 1:
                pair = ("LEADING", count - 1, g, 2 + read), at(b, 10 + min(4, 2 * count - 1))
            else:
                pair = ("TRAILING", 0, count, count - 1 - done), ("TRAILING", 1, count, count - 1 - done)
            read = 2 * read + self.decide(*pair)
        return BOUNDS[t - 1] + read


def around(i: int, j: int, columns: int) -> list[tuple[int, int]]:
    """The cells that count as W, N, NW, NE."""
    w, n, nw, ne = (i, j - 1), (i - 1, j), (i - 1, j - 1), (i - 1, j + 1)
    if i == 0:
        n = nw = ne = w
    if j == 0:
        w = nw = n
    if j == columns - 1:
        ne = n
    return [w, n, nw, ne]


def read_tops(reader: Reader, classes: int, rows: int, columns: int) -> dict[tuple[int, int], int]:
    tops: dict[tuple[int, int], int] = {}
    for i in range(rows):
        for j in range(columns):
            w, n, nw, ne = (tops.get(cell, 0) for cell in around(i, j, columns))
            ww = n if j == 0 else tops.get((i, j - 2), w)
            nn = w if i == 0 else tops.get((i - 2, j), n)
            same = [n == w, nw == w, ne == w, ww == w, nn == n, nw == n, ne == n, nn == w]
            a = sum(1 << place for place, equal in enumerate(same) if equal)
            b = (a & 7) + 8 * min(w, 31)
            for step, top in enumerate((w, n, ne)):
                if top in (w, n, ne)[:step]:
                    continue
                if reader.decide(("TOP", 0, step, a), ("TOP", 1, step, b)):
                    break
            else:
                top, length = 0, (classes - 1).bit_length()
                for bit in reversed(range(length)):
                    depth = length - 1 - bit
                    first = ("TOP", 0, 3, min(2**depth - 1 + top, 127))
                    second = ("TOP", 0, 3, 128 + 8 * min(w, 15) + min(7, bit))
                    top = 2 * top + reader.decide(first, second)
            tops[i, j] = top
    return tops


def read_marked(reader: Reader, classes: int, rows: int, columns: int, reach: int) -> np.ndarray:
    tops = read_tops(reader, classes, rows, columns)
    out = np.zeros((classes, rows, columns), np.uint8)
    levels = {cell: [0] * classes for cell in tops}
    hits, sums, nothing = dict.fromkeys(tops, 0), dict.fromkeys(tops, 0), [0] * classes
    for i, j in tops:
        top, near = tops[i, j], around(i, j, columns)
        south_east = {"E": (i, j + 1), "S": (i + 1, j)}, [(i + 1, j + 1), (i + 1, j - 1), (i, j + 2), (i + 2, j)]
        ahead = [tops.get(cell) for cell in south_east[0].values()], [tops.get(cell) for cell in south_east[1]]
        seen = [(i, j - 1), (i - 1, j), (i - 1, j - 1), (i - 1, j + 1), (i, j - 2), (i - 2, j)]
        awake = {k for cell in seen if cell in tops for k in range(classes) if levels[cell][k] or tops[cell] == k}
        awake = (awake | set(ahead[0]) | set(ahead[1])) - {None, top}
        cell, sigma = levels[i, j], sums.get(near[0], 0) + sums.get(near[1], 0)
        done: list[int] = []
        for k in sorted(awake):
            w, n, nw, ne = (levels.get(place, nothing)[k] for place in near)
            x = max(10 * w + 10 * n - 6 * nw + 2 * ne, 0)
            beta = 1 + ahead[0].count(k) if k in ahead[0] else int(k in ahead[1])
            phi = 0 if not any(done) else 1 if 2 * sum(done) < sigma else 2
            a, b = ("SLOPE", bin_p(x), beta, phi), ("NEAR", bin_l(w), bin_l(n), bin_s(nw), bin_s(ne))
            cell[k] = reader.number(a, b, min(7, x >> 6))
            done.append(cell[k])
        left = [k for k in range(classes) if k not in awake and k != top]
        if left:
            c = sum(level > 0 for level in done)
            total = sum(hits.get(place, 0) for place in near)
            first = ("QUIET", (5 * min(len(awake), 7) + total) * 3 + min(2, c))
            second = ("QUIET", 128 + 4 * min(31, sigma) + min(3, c))
            hits[i, j] = reader.decide(first, second)
        if hits[i, j]:
            found = 0
            for r, k in zip(reversed(range(len(left))), left, strict=True):
                f = int(found > 0)
                first, second = ("QUIET", 256 + 2 * min(k, 127) + f), ("QUIET", 512 + 2 * min(r, 31) + f)
                if (not found and not r) or reader.decide(first, second):
                    found += 1
                    cell[k] = reader.number(("QUIET", 576), ("QUIET", 592 + 16 * min(3, found)), 0, start=1)
        sums[i, j] = sum(cell)
        out[:, i, j] = cell
        out[top, i, j] = 255
        cell[top] = min(254, isqrt(max(reach - sum(level**2 for level in cell), 0)))
    return out


def read_graded(reader: Reader, classes: int, rows: int, columns: int, reach: int) -> np.ndarray:
    tops = read_tops(reader, classes, rows, columns)
    out = np.zeros((classes, rows, columns), np.uint8)
    levels, misses, gaps, nothing = {}, {}, {}, [0] * classes
    weights = [[0] * 16 for _ in range(classes)]
    for i, j in tops:
        top, near = tops[i, j], around(i, j, columns)
        cell, miss, gap, errors = ([0] * classes for _ in range(4))
        m = e = s = 0
        for k in range(classes):
            if k == top:
                cell[k] = reach
                continue
            w, n, nw, ne = (levels.get(place, nothing)[k] for place in near)
            mu = sum(misses.get(place, nothing)[k] for place in near[:2])
            plain = 9 * w + 10 * n - 4 * nw + ne
            x = [errors[k - q] if k >= q else 0 for q in range(7, 0, -1)]
            x += [16 * (w - nw), 16 * (n - nw), 16 * (ne - n), 16]
            x += [gaps.get(place, nothing)[k] for place in near]
            x = [min(max(value, -64), 64) for value in x]
            x.append(64 * [tops.get((i, j - 1)), tops.get((i - 1, j))].count(k))
            p = plain + (e * (65536 // (m + 1)) >> 16)
            p += sum(map(mul, weights[k], x)) >> 17
            p = min(max(p, 16 * min(w, n) - 96, 0), 16 * max(w, n) + 96, 4080)
            guess, part = divmod(p + 8, 16)
            rho = min(31, abs(w - nw) + abs(n - nw) + abs(n - ne) + mu)
            rough = sum(bound <= rho for bound in (1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 18, 24))
            quarter = (part - 8) // 2 if part >= 8 else 3 - part // 2
            wrong = min(2, 2 * s // m) if m else 1
            ahead = int(k in (tops.get((i, j + 1)), tops.get((i + 1, j))))
            b = (min(guess, 31) * 4 + 2 * ahead + (m > 0)) * 8 + min(7, mu)
            a, b = ("SLOPE", rough, quarter, wrong), ("NEAR", b >> 7, b >> 4 & 7, b >> 2 & 3, b & 3)
            room, folded = min(guess, 255 - guess), reader.number(a, b, min(7, rho >> 1))
            sign = 1 if part >= 8 else -1
            choices = (v for v in range(255) if folded == grade_fold(v - guess, room, sign))
            cell[k] = next(choices)
            miss[k] = abs(cell[k] - guess)
            errors[k] = 16 * cell[k] - plain
            if m < 255:
                m, e, s = m + 1, e + errors[k], s + miss[k]
            d, gap[k] = min(max(16 * cell[k] - p, -32), 32), 16 * cell[k] - p
            weights[k] = [
                min(max(weight + d * value, -(2**18)), 2**18) for weight, value in zip(weights[k], x, strict=True)
            ]
        levels[i, j], misses[i, j], gaps[i, j] = cell, miss, gap
        out[:, i, j] = cell
        out[top, i, j] = 255
    return out


def grade_fold(delta: int, room: int, sign: int) -> int:
    return 2 * abs(delta) - (delta * sign > 0) if abs(delta) <= room else room + abs(delta)


def read_planes(reader: Reader, classes: int, rows: int, columns: int) -> np.ndarray:
    out = np.zeros((classes, rows, columns), np.uint8)
    for k in range(classes):
        for i in range(rows):
            for j in range(columns):
                places = around(i, j, columns)
                w, n, nw, ne = (0 if min(place) < 0 else int(out[k][place]) for place in places)
                guess = min(max(w + n - nw, min(w, n)), max(w, n))
                room, rho = min(guess, 255 - guess), abs(w - nw) + abs(n - nw) + abs(n - ne)
                a = ("SLOPE", bin_p(16 * min(rho, 511)), min(3, guess), 0)
                b = ("NEAR", bin_l(abs(w - nw)), bin_l(abs(n - nw)), bin_s(abs(n - ne)), min(3, guess))
                folded = reader.number(a, b, min(7, rho >> 1))
                choices = (value for value in range(256) if fold(value - guess, room) == folded)
                out[k, i, j] = next(choices)
    return out


def fold(delta: int, room: int) -> int:
    return 2 * abs(delta) - (delta > 0) if abs(delta) <= room else room + abs(delta)


def read(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    rest = iter(data)
    mode = next(rest)
    if mode == RAW:
        return np.array(list(rest), np.uint8).reshape(shape)

    def leb128() -> int:
        number, shift = 0, 0
        while True:
            byte = next(rest)
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    rows, columns, count = leb128(), leb128(), leb128()
    present = list(range(count))
    if 0 < count < shape[0] and -(-shape[0] // 8) <= count:
        bitmap = [next(rest) for _ in range(-(-shape[0] // 8))]
        present = [k for k in range(shape[0]) if bitmap[k // 8] >> k % 8 & 1]
    elif 0 < count < shape[0]:
        present = list(np.cumsum([leb128() + 1 for _ in range(count)]) - 1)
    out = np.zeros(shape, np.uint8)
    if mode in (MARKED, GRADED):
        reach = leb128()
        graded = mode == GRADED
        read_levels, reader = read_graded if graded else read_marked, Reader(bytes(rest), graded=graded)
        out[present, :rows, :columns] = read_levels(reader, count, rows, columns, reach)
    else:
        out[present, :rows, :columns] = read_planes(Reader(bytes(rest)), count, rows, columns)
    return out


def patches(seed: int, shape: tuple[int, int, int], levels: int) -> np.ndarray:
    """Marked cells in patches, levels that fade away from their borders, and noise."""
    rng = np.random.default_rng(seed)
    top = np.kron(rng.integers(0, shape[0], (4, 4)), np.ones((8, 8), int))[: shape[1], : shape[2]]
    codes = np.minimum(rng.geometric(0.7, shape) - 1, levels)
    codes[:, :, 7::8] += rng.integers(0, levels, shape)[:, :, 7::8]
    codes = np.where(rng.random(shape) < 0.3, codes, codes // 4).clip(0, 254).astype(np.uint8)
    np.put_along_axis(codes, top[None], 255, axis=0)
    return codes


def grades(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Marked cells whose other levels are hardly ever 0 and change slowly."""
    codes = np.indices(shape).sum(axis=0) // 2 + patches(seed, shape, 6) % 16
    top = patches(seed, shape, 6) == 255
    return np.where(top, 255, codes + 1).astype(np.uint8)


def chequered(shape: tuple[int, int, int]) -> np.ndarray:
    """Marked cells whose other levels are 1 and 254 by turns: predictions, weights and guesses meet their limits."""
    k, i, j = np.indices(shape)
    return np.where(k == (i // 4 + j // 7) % shape[0], 255, np.where((i + j) % 2, 1, 254)).astype(np.uint8)


@pytest.mark.parametrize(
    ("codes", "mode"),
    [
        pytest.param(patches(0, (6, 20, 17), 20), MARKED, id="marked"),
        pytest.param(np.pad(patches(1, (4, 10, 9), 250), ((2, 9), (0, 6), (0, 7))), MARKED, id="padded, few classes"),
        pytest.param(np.pad(patches(2, (2, 12, 1), 200), ((0, 70), (0, 4), (0, 15))), MARKED, id="a column, gaps"),
        pytest.param(patches(3, (2, 1, 30), 9), MARKED, id="a row"),
        pytest.param(np.full((1, 9, 9), 255, np.uint8), MARKED, id="one class"),
        pytest.param(grades(7, (6, 20, 17)), GRADED, id="graded"),
        pytest.param(np.pad(grades(8, (3, 11, 1)), ((0, 2), (0, 3), (0, 2))), GRADED, id="a graded column"),
        pytest.param(np.maximum(patches(9, (5, 9, 9), 250), 1), GRADED, id="rough grades"),
        pytest.param(chequered((3, 20, 20)), GRADED, id="as rough as can be"),
        pytest.param(grades(10, (300, 2, 3)), GRADED, id="more grades than are averaged"),
        pytest.param(patches(4, (140, 9, 8), 40), MARKED, id="many classes"),
        pytest.param(np.indices((3, 24, 20)).sum(axis=0).astype(np.uint8), PLANES, id="slope"),
        pytest.param(np.where(patches(5, (3, 16, 16), 9) == 255, 250, 3).astype(np.uint8), PLANES, id="two values"),
        pytest.param((patches(6, (3, 16, 16), 60) // 4).astype(np.uint8), PLANES, id="rough"),
        pytest.param(np.zeros((3, 4, 5), np.uint8), PLANES, id="nothing"),
        pytest.param(np.arange(60, dtype=np.uint8).reshape(3, 4, 5) * 37, RAW, id="raw"),
    ],
)  # fmt: skip
def test_a_decoder_made_from_the_page_reads_what_is_written(codes: np.ndarray, mode: int) -> None:
    data = encode(codes)
    assert data[0] == mode
    np.testing.assert_array_equal(read(data, codes.shape), codes)
