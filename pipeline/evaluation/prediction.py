"""Label maps and overlays of image files, whatever folders they lie in.

Shapes: images H,W,3 uint8 RGB; log-probabilities 1,C,h,w on a native grid; labels H,W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from segkd.pipeline.data.images import IMAGE_EXTENSIONS, UnreadableError, read_image
from segkd.pipeline.data.sample import IGNORE, Classes
from segkd.pipeline.evaluation.pictures import overlay, palette_table
from segkd.pipeline.evaluation.pixels import check_output, label_map
from segkd.pipeline.output import replacing
from segkd.storage.errors import ConfigError, DataError, OutputExistsError
from segkd.storage.geometry import Mapping

PredictImage = Callable[[npt.NDArray[np.uint8]], tuple[Tensor, Mapping]]
"""An image ``(H, W, 3)`` -> log-probabilities or logits ``(1, C, h, w)`` and where their cells lie in it."""


_KINDS = {"labels": ".png", "overlays": ".jpg"}
"""Folders of what is written, and the extension in each."""


@dataclass(frozen=True, kw_only=True)
class PredictionSummary:
    """What became of the images of one call."""

    written: int
    """Images whose label map (and overlay) was written."""
    skipped: dict[str, str]
    """Name -> reason of every image that could not be read."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"written": self.written, "skipped": self.skipped}


def images_below(folder: Path, *, output: Path | None = None) -> list[tuple[str, Path]]:
    """Name and path of every image in ``folder`` and its subfolders, sorted by name.

    A name is the path below ``folder`` without the extension: ``seq1/0001``. Left out are hidden ones, and what
    :func:`predict_images` has written to ``output`` where that lies in ``folder``. Raises DataError when there is no
    folder or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; give the folder that holds the images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file())
    below = [(path.relative_to(folder), path) for path in paths]
    written = [] if output is None else [(output / kind).resolve() for kind in _KINDS]
    root = folder.resolve()
    found = [
        (inner.with_suffix("").as_posix(), path)
        for inner, path in below
        if not _hidden(inner) and not any((root / inner).is_relative_to(place) for place in written)
    ]
    if not found:
        raise DataError(
            f"{folder}: no image in it or below; expected files ending in {' '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return sorted(found)


def predict_images(
    predict: PredictImage,
    images: Sequence[tuple[str, Path]],
    output: Path,
    classes: Classes,
    *,
    overlays: bool = True,
    overwrite: bool = False,
    on_error: Literal["fail", "skip"] = "fail",
    on_image: Callable[[str], None] | None = None,
) -> PredictionSummary:
    """Write ``output/labels/<name>.png`` and ``output/overlays/<name>.jpg`` for every ``(name, path)`` of ``images``.

    A label map is a palette PNG: its values are class indices and it shows in the classes' colours. Each file appears
    whole or not at all. ``on_image`` is called with the name of each image that is done, or skipped because it cannot
    be read and ``on_error`` is "skip". Before anything is written: raises OutputExistsError when a file would be
    overwritten and ``overwrite`` is not set, DataError for names that clash or leave ``output``, and ConfigError for
    more than 255 classes. Later: DataError for an unreadable image, NetworkError for an output of other classes, and
    OSError for a disk that is full or cannot be written to.
    """
    require_8_bits(classes)
    places = _places([name for name, _ in images], output, overlays=overlays)
    if not overwrite:
        _refuse_existing([path for paths in places for path in paths])
    written, skipped = 0, dict[str, str]()
    for (name, path), (labels_path, *overlay_paths) in zip(images, places, strict=True):
        try:
            image_HW3 = read_image(path)
        except DataError as error:
            if on_error == "fail":
                if not isinstance(error, UnreadableError):
                    raise
                remedy = "restore the file, or go on without it: --on-error skip --overwrite"
                raise UnreadableError(error.what, remedy) from error
            skipped[name] = str(error)
        else:
            log_probs_1Chw, mapping = predict(image_HW3)
            check_output(log_probs_1Chw, len(classes), str(path))
            labels_HW = label_map(log_probs_1Chw, mapping, *image_HW3.shape[:2]).cpu().numpy()
            for overlay_path in overlay_paths:
                with replacing(overlay_path) as partial:
                    Image.fromarray(overlay(image_HW3, labels_HW, classes.palette)).save(partial, quality=92)
            with replacing(labels_path) as partial:
                _palette_image(labels_HW, classes).save(partial)
            written += 1
        if on_image is not None:
            on_image(name)
    return PredictionSummary(written=written, skipped=skipped)


def require_8_bits(classes: Classes) -> None:
    """Raises ConfigError for more classes than a label map of 8 bits can hold."""
    if len(classes) > IGNORE:
        raise ConfigError(f"{len(classes)} classes do not fit into label maps of 8 bits; expected at most {IGNORE}")


def _hidden(inner: Path) -> bool:
    return any(part.startswith(".") for part in inner.parts)


def _places(names: Sequence[str], output: Path, *, overlays: bool) -> list[list[Path]]:
    """The files of each name: its label map and, if asked for, its overlay."""
    seen: set[str] = set()
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise DataError(
                f"the name {name!r} would be written outside {output}; names must be relative, without '..'"
            )
        if name in seen:
            raise DataError(f"two images are called {name!r} and would share one label map; rename one of them")
        seen.add(name)
    kinds = list(_KINDS.items())[: 2 if overlays else 1]
    return [[output / kind / f"{name}{suffix}" for kind, suffix in kinds] for name in names]


def _refuse_existing(paths: Sequence[Path]) -> None:
    existing = [path for path in paths if path.exists()]
    if existing:
        raise OutputExistsError(
            f"{existing[0]} exists, and so do {len(existing) - 1} more of {len(paths)} files to write; "
            "choose another folder or allow it with --overwrite"
        )


def _palette_image(labels_HW: npt.NDArray[np.uint8], classes: Classes) -> Image.Image:
    image = Image.fromarray(labels_HW)
    image.putpalette(palette_table(classes.palette).tobytes())
    return image
