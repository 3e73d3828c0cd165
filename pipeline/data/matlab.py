"""Label maps in MATLAB files, as Pascal Context has them: an integer matrix ``LabelMap``. They cannot run code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segkd.storage.errors import DataError

_VARIABLE = "LabelMap"


def read_label_map(path: Path, max_pixels: int) -> npt.NDArray[np.integer[Any]]:
    """H,W. Raises DataError for a file that is damaged, too large, or holds no such matrix."""
    from scipy.io import loadmat, whosmat

    try:
        # The header first: it is small whatever the matrix is.
        shape = next((shape for name, shape, _ in whosmat(path) if name == _VARIABLE), None)
        if shape is None or len(shape) != 2:
            raise DataError(f"{path}: holds no matrix {_VARIABLE}; expected one of Pascal Context's label maps")
        if shape[0] * shape[1] > max_pixels:
            raise DataError(
                f"{path}: {shape[1]} x {shape[0]} pixels, more than the {max_pixels} that data.max_pixels allows; "
                "raise it if the label map is meant to be that large"
            )
        raw = loadmat(path, variable_names=[_VARIABLE])[_VARIABLE]
    except DataError:
        raise
    except Exception as error:  # whatever scipy's parser meets in damaged bytes: ValueError, TypeError, zlib.error ...
        raise DataError(
            f"{path}: cannot be read ({error or type(error).__name__}); restore the file or take it out of the data"
        ) from error
    if not np.issubdtype(raw.dtype, np.integer):
        raise DataError(f"{path}: {_VARIABLE} is of type {raw.dtype}, expected whole numbers; write it as uint16")
    label_map: npt.NDArray[np.integer[Any]] = raw
    return label_map
