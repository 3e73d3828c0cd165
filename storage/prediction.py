"""Values foretold from their neighbours, coarse grids before fine ones: what is kept is how far off that was.

Every cell of a tile but the first lies halfway between cells of a grid that is twice as coarse: between two of a
column, between two of a row, or in the middle of four, between which there are then four cells of the other two kinds.
They are foretold in this order, by the mean of the two, two and four; one outside the tile is taken to be like the one
on the other side. It is integer arithmetic, alike on every machine, in a few passes over whole planes.

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
VALUES = 256 * UNIT
"""Values are 0 to this, less one: four of them fit 16 bits, and 8 bits tell by how many levels two of them differ."""
ARGMAX = -1
"""The value of a cell's argmax, whose probability is what the others leave."""
BEYOND = -2
"""The value of cells beyond a sample's grid, where that ends within a tile."""
ARGMAX_KEPT = -128
"""What is kept at the argmax of the first row, and below it where it is another than that of the cell above.

Elsewhere it is levels, modulo 256 and never this: 0 at the argmax and beyond the grid.
"""

Settle = Callable[[Any, slice, slice], Any]
"""From what is foretold at some rows and columns of a tile, which it may write into, to the values there. Others are
foretold from these."""


def coarse_to_fine(settle: Settle, start: Array, side: int, rows: int, columns: int) -> Array:
    """The values …,rows,columns of a tile's first rows and columns, group by group as ``settle`` tells them.

    ``settle`` is also asked about cells further on, as far as the wanted ones depend on them. ``start``: what the first
    cell is foretold to be, …,1,1.
    """
    return _grid(array_namespace(start), settle, start, side, 1, rows, columns)


def _grid(xp: Any, settle: Settle, start: Array, side: int, stride: int, rows: int, columns: int) -> Array:
    """Every ``stride``-th cell of every ``stride``-th row, ``rows`` such rows and ``columns`` such columns."""
    cells = -(-side // stride)
    if cells == 1:
        return settle(start, slice(0, 1), slice(0, 1))
    # How many of each kind the wanted ones need: what lies between two needs both.
    odd_rows, odd_columns = rows // 2, columns // 2
    even_rows, even_columns = (min((cells + 1) // 2, odd + 1) for odd in (odd_rows, odd_columns))

    def settled(total: Array, shift: int, row: int, column: int) -> Array:
        total += shift  # half of the divisor
        total >>= shift
        lines, places = (
            slice(first * stride, 2 * stride * count, 2 * stride)
            for first, count in zip((row, column), total.shape[-2:], strict=True)
        )
        return settle(total, lines, places)

    known = _grid(xp, settle, start, side, 2 * stride, even_rows, even_columns)
    lines = _lengthened(xp, known, -2, odd_rows + 1)
    below = settled(lines[..., :-1, :] + lines[..., 1:, :], 1, 1, 0)
    lines = _lengthened(xp, known, -1, odd_columns + 1)
    beside = settled(lines[..., :-1] + lines[..., 1:], 1, 0, 1)
    lines = _lengthened(xp, below, -1, odd_columns + 1)
    total = lines[..., :-1] + lines[..., 1:]
    lines = _lengthened(xp, beside, -2, odd_rows + 1)
    total += lines[..., :-1, :]
    total += lines[..., 1:, :]
    middle = settled(total, 2, 1, 1)

    found = xp.empty((*start.shape[:-2], rows, columns), dtype=middle.dtype, device=device(start))
    found[..., ::2, ::2] = known[..., : rows - odd_rows, : columns - odd_columns]
    found[..., 1::2, ::2] = below[..., : columns - odd_columns]
    found[..., ::2, 1::2] = beside[..., : rows - odd_rows, :]
    found[..., 1::2, 1::2] = middle
    return found


def _lengthened(xp: Any, values: Array, axis: int, length: int) -> Array:
    """With the last row or column once more where there are fewer than ``length``: it is the one on the other side."""
    if values.shape[axis] == length:
        return values
    last = values[..., -1:, :] if axis == -2 else values[..., -1:]
    return xp.concat([values, last], axis=axis)


def residuals(values: npt.NDArray[np.int16]) -> npt.NDArray[np.int8]:
    """What is kept of values channels,t,t, so that :func:`restored` gives them back."""
    kept = np.zeros(values.shape, np.int8)

    def settle(foretold: npt.NDArray[Any], rows: slice, columns: slice) -> npt.NDArray[Any]:
        here = values[:, rows, columns].astype(np.int32)
        off = np.where(here < 0, 0, here - foretold)
        levels = (off // UNIT).astype(np.int8)  # modulo 256
        assert bool(((off % UNIT == 0) & (levels != ARGMAX_KEPT)).all()), "no coder gives such values"
        kept[:, rows, columns] = levels
        return np.where(here < 0, foretold, here)

    side = values.shape[1]
    coarse_to_fine(settle, np.zeros((len(values), 1, 1), np.int32), side, side, side)
    argmax = values == ARGMAX
    argmax[:, 1:] &= ~argmax[:, :-1]
    kept[argmax] = ARGMAX_KEPT
    return kept


def restored(kept: npt.NDArray[np.int8], rows: int | None = None) -> npt.NDArray[np.int16]:
    """The values of residuals channels,t,t, of their first ``rows`` rows alone if that is given.

    What they are beyond a sample's grid is of no use.
    """
    side = kept.shape[1]
    count = side if rows is None else rows
    steps = kept.astype(np.int16)
    steps *= UNIT
    marks = np.flatnonzero(kept == ARGMAX_KEPT)
    steps.reshape(-1)[marks] = 0

    def settle(foretold: npt.NDArray[Any], rows: slice, columns: slice) -> npt.NDArray[Any]:
        foretold += steps[:, rows, columns]
        foretold &= VALUES - 1
        return foretold

    start = np.zeros((len(kept), 1, 1), np.int16)
    values: npt.NDArray[np.int16] = coarse_to_fine(settle, start, side, count, side)
    # A cell has the argmax of the last mark in its column, down to its own row.
    planes, cells = np.divmod(marks, side * side)
    last, plane_of = np.zeros((2, side * side), np.intp)
    last[cells], plane_of[cells] = cells, planes
    argmax = plane_of.take(np.maximum.accumulate(last.reshape(side, side)[:count], axis=0).reshape(-1))
    argmax *= count * side
    argmax += np.arange(count * side)
    values.reshape(-1)[argmax] = ARGMAX
    return values
