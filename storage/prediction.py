"""Values foretold from their neighbours, coarse grids before fine ones: what is kept is how far off that was.

Every cell of a tile but the first lies halfway between cells of a grid that is twice as coarse: between two of a
column, two of a row, or four. They are foretold in this order, each from the neighbours that are known by then; one
outside the tile is taken to be like the one on the other side. It is integer arithmetic, alike on every machine, in a
few passes over whole planes rather than from cell to cell.

Shapes: values …,t,t of tiles, with any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace, device

from segkd.storage.coding_exact import Array

UNIT = 32
"""Parts of a level that values are counted in, for a mean of levels is hardly a level."""
LARGEST = (1 << 13) - 1
"""The largest value, and the largest that is foretold: four of them fit 16 bits."""
ARGMAX = -1
"""The value of a cell's argmax, whose probability is what the others leave."""
BEYOND = -2
"""The value of cells beyond a sample's grid, where that ends within a tile."""
ARGMAX_KEPT = -128
"""What is kept at the argmax of the first row, and below it where it is another than that of the cell above.

Elsewhere it is levels, up to 127 either way: 0 at the argmax and beyond the grid.
"""

Settle = Callable[[Any, slice, slice], Any]
"""From what is foretold at some rows and columns of a tile to the values there, which others are foretold from."""


def coarse_to_fine(settle: Settle, start: Array, side: int, rows: int) -> Array:
    """The values …,rows,side of the first ``rows`` rows of a tile, group by group as ``settle`` tells them.

    ``start``: what the first cell is foretold to be, …,1,1.
    """
    return _grid(array_namespace(start), settle, start, side, 1, rows)


def _grid(xp: Any, settle: Settle, start: Array, side: int, stride: int, rows: int) -> Array:
    """Every ``stride``-th cell of every ``stride``-th row, ``rows`` such rows."""
    columns = -(-side // stride)
    if columns == 1:
        return settle(start, slice(0, 1), slice(0, 1))
    odd = columns // 2
    even = columns - odd
    # How many rows of each group the wanted ones need: the last group's need those of the groups before.
    upper, lower = (rows + 1) // 2, rows // 2
    right_rows = min(even, lower + 1)
    below_rows = min(odd, right_rows)
    known_rows = min(even, below_rows + 1)

    def settled(foretold: Array, row: int, column: int) -> Array:
        lines = slice(row * stride, 2 * stride * foretold.shape[-2], 2 * stride)
        return settle(foretold, lines, slice(column * stride, None, 2 * stride))

    known = _grid(xp, settle, start, side, 2 * stride, known_rows)
    grid = _reflected(xp, _reflected(xp, known, -2, below_rows + 1), -1, odd + 1)
    below = settled(_half(grid[..., :-1, :even] + grid[..., 1:, :even]), 1, 0)
    level = grid[..., :-1] + grid[..., 1:]
    beside = _reflected(xp, below, -1, odd + 1)
    beside = beside[..., :-1] + beside[..., 1:]
    around = xp.concat([beside[..., :1, :], beside, beside[..., -1:, :]], axis=-2)
    around = _quarter(around[..., :right_rows, :] + around[..., 1 : right_rows + 1, :])
    right = settled(_quarter(3 * ((level[..., :right_rows, :] + 1) >> 1) + around), 0, 1)
    around = _reflected(xp, right, -2, lower + 1)
    nearest = _quarter(beside[..., :lower, :] + around[..., :-1, :] + around[..., 1:, :])
    corners = _quarter(level[..., :lower, :] + level[..., 1 : lower + 1, :])
    middle = settled((nearest + ((nearest - corners) >> 1)).clip(0, LARGEST), 1, 1)

    found = xp.empty((*start.shape[:-2], rows, columns), dtype=middle.dtype, device=device(start))
    found[..., ::2, ::2] = known[..., :upper, :]
    found[..., 1::2, ::2] = below[..., :lower, :]
    found[..., ::2, 1::2] = right[..., :upper, :]
    found[..., 1::2, 1::2] = middle
    return found


def _reflected(xp: Any, values: Array, axis: int, length: int) -> Array:
    """With the last row or column once more where there are fewer than ``length``: it is the one on the other side."""
    if values.shape[axis] == length:
        return values
    last = values[..., -1:, :] if axis == -2 else values[..., -1:]
    return xp.concat([values, last], axis=axis)


def _half(total: Array) -> Array:
    total += 1
    total >>= 1
    return total


def _quarter(total: Array) -> Array:
    total += 2
    total >>= 2
    return total


def residuals(values: npt.NDArray[np.int16]) -> npt.NDArray[np.int8]:
    """What is kept of values channels,t,t, so that :func:`restored` gives them back."""
    kept = np.zeros(values.shape, np.int8)

    def settle(foretold: npt.NDArray[Any], rows: slice, columns: slice) -> npt.NDArray[Any]:
        here = values[:, rows, columns].astype(np.int32)
        off = here - foretold
        assert bool(((off % UNIT == 0) & (abs(off) <= 127 * UNIT) | (here < 0)).all()), "no coder gives such values"
        kept[:, rows, columns] = np.where(here < 0, 0, off // UNIT)
        return np.where(here < 0, foretold, here)

    side = values.shape[1]
    coarse_to_fine(settle, np.zeros((len(values), 1, 1), np.int32), side, side)
    argmax = values == ARGMAX
    argmax[:, 1:] &= ~argmax[:, :-1]
    kept[argmax] = ARGMAX_KEPT
    return kept


def restored(kept: npt.NDArray[np.int8], rows: int | None = None) -> npt.NDArray[np.int16]:
    """The values of residuals channels,t,t, of their first ``rows`` rows alone if that is given.

    What they are beyond a sample's grid is of no use.
    """
    side = kept.shape[1]
    rows = side if rows is None else rows
    steps = kept.astype(np.int16)
    steps *= UNIT
    marks = np.flatnonzero(kept == ARGMAX_KEPT)
    steps.reshape(-1)[marks] = 0

    def settle(foretold: npt.NDArray[Any], rows: slice, columns: slice) -> npt.NDArray[Any]:
        foretold += steps[:, rows, columns]
        return foretold

    start = np.zeros((len(kept), 1, 1), np.int16)
    values: npt.NDArray[np.int16] = coarse_to_fine(settle, start, side, rows)
    # The argmax of a cell is marked at the last row, up to the cell's own, that has a mark in its column.
    planes, cells = np.divmod(marks, side * side)
    marked, plane_of = np.zeros((2, side * side), np.int64)
    marked[cells], plane_of[cells] = cells // side, planes
    marked = np.maximum.accumulate(marked.reshape(side, side)[:rows], axis=0)
    plane = plane_of[marked * side + np.arange(side)].reshape(-1)
    values.reshape(len(values), -1)[plane, np.arange(rows * side)] = ARGMAX
    return values
