"""Image files: their upright size, their pixels, the raw values of label maps, their digest.

Upright means as EXIF's orientation says, for images and label maps alike. Every file is bounded in pixels before it is
decoded. All functions raise DataError, which names the file.

Shapes: images H,W,3 uint8 RGB; raw labels H,W (values) or H,W,3 (colours).
"""

from __future__ import annotations

import hashlib
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from segkd.pipeline.data.matlab import read_label_map
from segkd.storage.errors import DataError
from segkd.storage.table import DIGEST_BYTES

MAX_PIXELS = 200_000_000
"""The bound on an image's pixels unless a run file says otherwise."""
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
LABEL_EXTENSIONS = frozenset({".png", ".bmp", ".tif", ".tiff"})
"""Formats that keep every value as it was written; JPEG does not."""

_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error)
"""What Pillow's decoders raise for damaged files."""
_UNREAD = re.compile(r" \(\d+ bytes not processed\)$")
"""What Pillow says of its own buffer when a file is cut off."""
_COLOUR_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA"})
_VALUE_MODES = frozenset({"1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N"})
_DEEP = re.compile(r"\b(RGB[AX]?|LA|L);16")
"""Decoders that keep the upper byte of 16-bit channels, in a mode that looks like 8 bits."""


class UnreadableError(DataError):
    """A file that is no image, or not whole."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what

    def __reduce__(self) -> tuple[type[UnreadableError], tuple[str, str]]:
        return UnreadableError, (self.what, str(self).removeprefix(f"{self.what}; "))


def read_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """H, W of the upright image, from the file's header alone."""
    with _opened(path, max_pixels) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """H,W,3 RGB. Grey and palette images are converted, an alpha channel is dropped if all is opaque."""
    with _opened(path, max_pixels) as image:
        return np.array(_rgb(image, path))


def read_raw_labels(
    path: Path, kind: Literal["values", "colours"], max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.integer[Any]]:
    """A label map as it stands in its file.

    ``values``: H,W of a single-channel image of any integer depth, or of a palette image, whose indices count and
    whose colours do not. ``colours``: H,W,3 of a colour image, palette images included. A MATLAB file has values.
    """
    if path.suffix == ".mat" and kind == "values":
        return read_label_map(path, max_pixels)
    with _opened(path, max_pixels) as image:
        if image.format == "JPEG":
            raise DataError(f"{path}: a label map in JPEG, which does not keep values; make label maps as PNG")
        if kind == "values":
            if image.mode not in _VALUE_MODES:
                raise DataError(
                    f"{path}: a label map of mode {image.mode}, expected one channel of class values; "
                    "if its colours are the classes, map them in [data.label_colours]"
                )
            raw = np.array(_upright(image))
            return raw.astype(np.uint8) if raw.dtype == bool else raw
        if image.mode in _VALUE_MODES - {"P"}:
            raise DataError(
                f"{path}: a label map of one channel (mode {image.mode}), expected the colours of "
                "[data.label_colours]; map its values in [data.label_values] instead"
            )
        return np.array(_rgb(image, path))


def digest(path: Path) -> bytes:
    """What a cache keeps of the SHA-256 of the file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()[:DIGEST_BYTES]
    except OSError as error:
        raise _unreadable(path, error) from error


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read, of bounded size; whatever goes wrong inside becomes a DataError."""
    # Pillow's own bound is one of the process, and half of it a warning that threads cannot silence safely.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise DataError(
                    f"{path}: {image.width} x {image.height} pixels, more than the {max_pixels} that data.max_pixels "
                    "allows; raise it if the image is meant to be that large"
                )
            yield image
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> DataError:
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image of a known format"
    else:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        reason = _UNREAD.sub("", reason)
    return UnreadableError(
        f"{path}: cannot be read ({reason})",
        "restore the file, or leave it out: segkd data check --list-broken writes a list for data.skip",
    )


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation (1 to 8) as the header has it."""
    # Pillow turns TIFFs upright by itself, and would decode a whole PNG in search of an orientation behind its pixels.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def is_turned(path: Path) -> bool:
    """Whether an image's EXIF data say that it is to be turned or mirrored."""
    with _opened(path, sys.maxsize) as image:
        return _orientation(image) != 1


def _upright(image: Image.Image) -> Image.Image:
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    """The upright image in RGB. Raises DataError for one that could only be brought to it by guessing."""
    # Until its pixels are decoded a tile names its decoder's raw mode, the only trace of 16-bit colour.
    deep = any(_DEEP.search(str(tile)) for tile in getattr(image, "tile", ()))
    if deep or image.mode not in _COLOUR_MODES:
        found = "16 bits a channel" if deep or image.mode.startswith("I;16") else f"pixels of mode {image.mode}"
        raise DataError(
            f"{path}: an image with {found}, expected 8-bit RGB, grey or palette; "
            "convert it, with the range of brightness that the networks are to see"
        )
    upright = _upright(image)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        if upright.getchannel("A").getextrema() != (255, 255):
            raise DataError(
                f"{path}: an image with transparent pixels, expected opaque ones; "
                "flatten it onto the background that the networks are to see"
            )
    return upright.convert("RGB")
