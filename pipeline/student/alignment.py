"""The student comes to the teacher's cells: its logits where the cache has targets.

Where the student's grid is coarser than the teacher's cells its logits are interpolated at their centres; where finer,
averaged over each cell's footprint. Targets are used as they were written.

Shapes: N crops with C,h,w student logits; S sources, each with a window of h,w teacher cells.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from segkd.pipeline.data.batch import Sources
from segkd.pipeline.resample import apply_weights
from segkd.storage.geometry import Axis, Mapping, box_weights


def align(logits_NChw: Tensor, student: Mapping, sources: Sources) -> Tensor:
    """Student logits (S,C,h,w), float32, at the window cells of every source.

    ``student`` places the student's grid in crop pixels. Cells outside the crop (a window's padding, say) get the
    logits of its border: what counts is for ``sources`` to say.
    """
    cells_y, cells_x = sources.counts_Shw.shape[1:]
    cell_to_crop = sources.cell_to_crop_S22.numpy()
    return apply_weights(
        logits_NChw.index_select(0, sources.crop_S.to(logits_NChw.device)),
        _weights(cell_to_crop[:, 0], cells_y, student.y),
        _weights(cell_to_crop[:, 1], cells_x, student.x),
    )


def _weights(cell_to_crop_S2: npt.NDArray[np.float64], cells: int, student: Axis) -> npt.NDArray[np.float64]:
    """What each student cell of an axis gives to each of the ``cells`` window cells: (S, cells, student cells)."""
    crop_to_student = student.affine.inverse()
    scale_S1, offset_S1 = cell_to_crop_S2[:, :1], cell_to_crop_S2[:, 1:]
    crop_pixels = scale_S1 * np.arange(cells, dtype=np.float64) + offset_S1
    centres = crop_to_student.scale * crop_pixels + crop_to_student.offset
    return box_weights(centres, np.abs(crop_to_student.scale * scale_S1[:, 0]), student.cells)
