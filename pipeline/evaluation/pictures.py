"""Pictures of images, label maps and maps of numbers, and contact sheets of them.

Shapes: pictures H,W,3 uint8 RGB; labels H,W class indices, 255 = ignore; log-probabilities 1,C,h,w on a native grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping as MappingOf
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from segkd.pipeline.data.sample import IGNORE, Classes
from segkd.pipeline.evaluation.pixels import confidence_map, label_map
from segkd.pipeline.resample import to_pixels
from segkd.storage.geometry import Mapping

Picture = npt.NDArray[np.uint8]
Colours = npt.NDArray[np.uint8] | npt.NDArray[np.float64]
Palette = Sequence[tuple[int, int, int]]

IGNORE_COLOUR = (0, 0, 0)
TILE = 360
"""The longer side of a picture on a sheet, in pixels."""

_INFERNO = np.array(
    [(0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
     (249, 201, 50), (252, 255, 164)], np.float64)  # fmt: skip
"""Nine evenly spaced colours of matplotlib's perceptually uniform map "inferno" (CC0)."""

_GAP, _CAPTION, _TEXT_SIZE, _SWATCH = 12, 22, 14, 14
_PAPER, _INK, _OUTLINE, _WRONG = (255, 255, 255), (40, 40, 40), (170, 170, 170), (214, 39, 40)


def palette_table(palette: Palette) -> Picture:
    """The colour of every label value, ``(256, 3)``; black where ``palette`` has none, as for ignore.

    Raises ValueError for more than 256 colours.
    """
    table = np.tile(np.array(IGNORE_COLOUR, np.uint8), (256, 1))
    table[: len(palette)] = np.asarray(palette, np.uint8).reshape(-1, 3)
    return table


def colourise(labels_HW: npt.NDArray[np.uint8], palette: Palette) -> Picture:
    """Each label in its class's colour, ignored pixels in black."""
    picture: Picture = palette_table(palette)[labels_HW]
    return picture


def overlay(image_HW3: Picture, labels_HW: npt.NDArray[np.uint8], palette: Palette, alpha: float = 0.5) -> Picture:
    """The image, tinted by the classes' colours with opacity ``alpha``; ignored pixels stay as they are."""
    return _blend(image_HW3, colourise(labels_HW, palette), np.where(labels_HW == IGNORE, 0.0, alpha))


def heat(map_HW: npt.NDArray[np.floating], vmax: float) -> Picture:
    """Numbers from 0 (black) to ``vmax`` (pale yellow), lighter all the way; what lies beyond is clipped."""
    share = np.clip(map_HW / vmax, 0.0, 1.0) if vmax > 0 else np.zeros(map_HW.shape)
    channels = [np.interp(share, np.linspace(0.0, 1.0, len(_INFERNO)), channel) for channel in _INFERNO.T]
    picture: Picture = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return picture


def difference(
    image_HW3: Picture, labels_HW: npt.NDArray[np.uint8], predicted_HW: npt.NDArray[np.uint8]
) -> tuple[Picture, float]:
    """Where a prediction is wrong, in red over the faded image, and the wrong share of the valid pixels in percent.

    Ignored pixels are paper-white. Without any valid pixel the share is 0.
    """
    # Greys end well below the white of ignored pixels.
    faded = np.repeat(90.0 + 0.45 * image_HW3.mean(axis=-1, keepdims=True), 3, axis=-1)
    valid = labels_HW != IGNORE
    wrong = valid & (labels_HW != predicted_HW)
    shown = _blend(faded, np.asarray(_WRONG, np.float64), np.where(wrong, 0.85, 0.0))
    shown[~valid] = _PAPER
    return shown, 100.0 * float(wrong.sum()) / max(int(valid.sum()), 1)


def show_sample(
    image_HW3: Picture,
    labels_HW: npt.NDArray[np.uint8] | None,
    log_probs_1Chw: Tensor,
    mapping: Mapping,
    first_order_hw: Tensor | None,
    classes: Classes,
) -> Image.Image:
    """A sample and the teacher's knowledge of it: image, labels, argmax, confidence and first-order map, at the pixels.

    What is None is left out. ``mapping`` says where the cells of both maps lie in the image.
    """
    height, width = image_HW3.shape[:2]
    predicted_HW = label_map(log_probs_1Chw, mapping, height, width).cpu().numpy()
    confidence_HW = confidence_map(log_probs_1Chw, mapping, height, width).cpu().numpy()
    known = [("image", image_HW3)]
    maps = [("confidence, 0 to 1", heat(confidence_HW, 1.0))]
    if labels_HW is not None:
        shown, wrong = difference(image_HW3, labels_HW, predicted_HW)
        known.append(("labels", overlay(image_HW3, labels_HW, classes.palette, 0.8)))
        maps.insert(0, (f"teacher against labels, {wrong:.1f} % differ", shown))
    if first_order_hw is not None:
        first_HW = to_pixels(first_order_hw[None, None], mapping, height, width)[0, 0].cpu().numpy()
        maps.append((f"first-order map, 0 to {first_HW.max():.2f}", heat(first_HW, float(first_HW.max()))))
    known.append(("teacher's argmax", overlay(image_HW3, predicted_HW, classes.palette, 0.8)))
    return sheet([known, maps], _legend_of(classes, labels_HW, predicted_HW))


def comparison(
    image_HW3: Picture,
    labels_HW: npt.NDArray[np.uint8] | None,
    predictions: MappingOf[str, npt.NDArray[np.uint8]],
    classes: Classes,
) -> Image.Image:
    """What several networks make of one image, and, where there are labels, how each differs from them below it."""
    rows = [[("image", image_HW3)]]
    rows[0] += [(name, overlay(image_HW3, labels, classes.palette, 0.8)) for name, labels in predictions.items()]
    if labels_HW is not None:
        below = [("labels", overlay(image_HW3, labels_HW, classes.palette, 0.8))]
        for predicted_HW in predictions.values():
            shown, wrong = difference(image_HW3, labels_HW, predicted_HW)
            below.append((f"{wrong:.1f} % wrong", shown))
        rows.append(below)
    return sheet(rows, _legend_of(classes, labels_HW, *predictions.values()))


def sheet(
    rows: Sequence[Sequence[tuple[str, Picture]]], legend: Sequence[tuple[str, tuple[int, int, int]]] = ()
) -> Image.Image:
    """Captioned pictures in rows and columns, each scaled to a longer side of 360 pixels, with a legend of colours."""
    tiles = [[(caption, _scaled(picture)) for caption, picture in row] for row in rows]
    columns = max(len(row) for row in tiles)
    widths = [
        max(
            max(tile.width, _text_width(caption))
            for row in tiles
            if column < len(row)
            for caption, tile in [row[column]]
        )
        for column in range(columns)
    ]
    width = sum(widths) + _GAP * (columns + 1)
    lines = _legend_lines(legend, width - 2 * _GAP)
    heights = [_CAPTION + max(tile.height for _, tile in row) + _GAP for row in tiles]
    paper = Image.new("RGB", (width, _GAP + sum(heights) + len(lines) * _CAPTION + (_GAP if lines else 0)), _PAPER)
    draw = ImageDraw.Draw(paper)
    top = _GAP
    for row, height in zip(tiles, heights, strict=True):
        left = _GAP
        for (caption, tile), column_width in zip(row, widths, strict=False):
            _write(draw, left, top, caption)
            paper.paste(tile, (left, top + _CAPTION))
            left += column_width + _GAP
        top += height
    for line in lines:
        for left, name, colour in line:
            box = (_GAP + left, top + 2, _GAP + left + _SWATCH, top + 2 + _SWATCH)
            draw.rectangle(box, fill=colour, outline=_OUTLINE)
            _write(draw, box[2] + 6, top, name)
        top += _CAPTION
    return paper


def _blend(below: Colours, above: Colours, alpha_HW: npt.NDArray[np.floating]) -> Picture:
    alpha = alpha_HW[..., None]
    blended: Picture = np.rint(below * (1.0 - alpha) + above * alpha).astype(np.uint8)
    return blended


def _scaled(picture: Picture) -> Image.Image:
    height, width = picture.shape[:2]
    factor = TILE / max(height, width)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    # A box averages where it shrinks and repeats where it enlarges, so that label maps keep hard edges.
    return Image.fromarray(picture).resize(size, Image.Resampling.BOX)


def _legend_of(classes: Classes, *label_maps: npt.NDArray[np.uint8] | None) -> list[tuple[str, tuple[int, int, int]]]:
    """Name and colour of the classes that occur."""
    occurring = np.unique(np.concatenate([np.unique(labels) for labels in label_maps if labels is not None]))
    return [(classes.names[label], classes.palette[label]) for label in occurring.tolist() if label != IGNORE]


def _legend_lines(
    legend: Sequence[tuple[str, tuple[int, int, int]]], width: int
) -> list[list[tuple[int, str, tuple[int, int, int]]]]:
    """Entries set from left to right: ``(left, name, colour)``, in as many lines as they need."""
    lines: list[list[tuple[int, str, tuple[int, int, int]]]] = []
    left = width
    for name, colour in legend:
        needed = _SWATCH + 6 + _text_width(name) + 18
        if left + needed > width:
            lines.append([])
            left = 0
        lines[-1].append((left, name, colour))
        left += needed
    return lines


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_TEXT_SIZE)


def _text_width(text: str) -> int:
    return math.ceil(_font().getlength(text))


def _write(draw: ImageDraw.ImageDraw, left: int, top: int, text: str) -> None:
    draw.text((left, top), text, fill=_INK, font=_font())
