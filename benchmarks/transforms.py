"""What other packings of dense's codes, and transform coding, would make of a teacher's outputs at T = 1 and 4.

    OMP_NUM_THREADS=1 python benchmarks/transforms.py [--config configs/camvid.toml] [--images 12] [--json]

Each image of the run file's teacher is searched for the coarsest levels, or quantiser's step, that keep 1e-3 nats over
the cells at both temperatures; what pixels cost then is stated. Bytes: zstd at the cache's level and a crc32c, in tiles
as the cache cuts them, of coefficients of as many whole blocks as fit them. "entropy" is zero-order, over a class of
codes or a band of coefficients, without tables, tiles and checksums: no packing of each number by itself gets below it.
"Filled" planes leave out the argmax: its probability is what the others leave, and its map is kept as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from rate_distortion import (
    REFERENCE,
    Codes,
    Image,
    context,
    native_float16,
    teacher_images,
    tile_side,
    tiled,
    tiles,
    zstd,
)
from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.config import load
from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.targets import SoftTargets, kl_divergence
from segkd.storage import prediction
from segkd.storage.chunks import CHECKSUM
from segkd.storage.coding import TOP, CompandedDistribution, PredictedDistribution
from segkd.storage.packing import cut_tile, encode_chunk

BOUND, TEMPERATURES, AIM = 1e-3, (1.0, 4.0), 7
ZERO, BEYOND = 0.37, 0.09
"""Quantiser with a dead zone: what is added before rounding down, and how far beyond their codes values are taken to
lie. They and the power 1/10.5 were chosen on 12 images of CamVid's, for filled planes in 15 x 15: of 22 combinations
the fewest bytes, by 0.2 %.
"""
ORDERS = ((0, 1, 2, 3, 4), (0, 4, 1, 2, 3))
"""Block by block and band by band: of the orders of halves,y,x,c,F that were tried those that zstd packs best."""
MEASURES = {"kl_cells": "KL cells", "kl_pixels": "pixels", "kl_cells_t4": "T=4 cells", "kl_pixels_t4": "pixels"}
Attempt = Callable[[float], tuple[Tensor, Tensor]]
"""From coarseness to codes and the log-probabilities that a reader would see."""
Row = dict[str, float]


def costs(image: Image, decoded: Tensor) -> Row:
    spec = SoftTargets().spec(CacheConfig(temperatures=TEMPERATURES), decoded.shape[1], 1)
    measured = SoftTargets().measure(spec, image.log_probs, decoded, image.output)
    agreement = float((decoded.argmax(1) == image.log_probs.argmax(1)).double().mean())
    return {**{name: float(measured[name]) for name in MEASURES}, "agreement": agreement}


def keeps(log_p: Tensor, decoded: Tensor) -> bool:
    both = [scores.double() for scores in (log_p, decoded)]
    return all(kl_divergence(*((x / t).log_softmax(1) for x in both)).mean() <= BOUND for t in TEMPERATURES)


def coarsest(attempt: Attempt, image: Image, least: float, most: float) -> tuple[Tensor, Row]:
    """The codes of the coarsest attempt within the bound, by bisection, and what it costs."""
    for _ in range(14):
        middle = math.sqrt(least * most)
        least, most = (middle, most) if keeps(image.log_probs, attempt(middle)[1]) else (least, middle)
    codes, decoded = attempt(least)
    return codes, costs(image, decoded)


def entropy(symbols: Codes) -> float:
    """Bytes by the zero-order entropy of each row's symbols."""
    counts = (np.unique(row, return_counts=True)[1] for row in symbols.reshape(len(symbols), -1))
    return sum(float((count * np.log2(count.sum() / count)).sum()) / 8 for count in counts)


def residuals(codes: Codes, *, median: bool) -> Codes:
    """Codes c,h,w less the one above, or less JPEG-LS's median (MED) of three neighbours, modulo 256; the argmax has
    128, and for its neighbours the code above it.
    """
    held = np.where(codes == TOP, 0, codes).astype(np.int16)
    for y in range(1, codes.shape[1]):
        held[:, y] = np.where(codes[:, y] == TOP, held[:, y - 1], held[:, y])
    padded = np.pad(held, ((0, 0), (1, 0), (1, 0)))
    up, left, corner = padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, :-1, :-1]
    foretold = np.clip(up + left - corner, np.minimum(up, left), np.maximum(up, left)) if median else up
    return np.where(codes == TOP, 128, held - foretold).astype(np.uint8)


def folded(numbers: Codes) -> Codes:
    """0, -1, 1, -2 … as 0, 1, 2, 3 …"""
    return np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)


def two_to_a_byte(tile: Codes) -> int:
    """zstd of column differences from -7 to 6 and the argmax in four bits, and of the others after an escape."""
    found = residuals(tile, median=False).view(np.int8).astype(np.int16)
    top, small = found == -128, folded(found)
    four = np.select([top, small < 14], [14, small], 15).astype(np.uint8).reshape(-1, 2)
    return zstd(np.concatenate([16 * four[:, 0] + four[:, 1], found[~top & (small >= 14)].astype(np.uint8)]))


def packings(image: Image) -> Iterator[tuple[str, Row]]:
    """The codes of ``dense`` in other bytes."""
    coder = CompandedDistribution.for_bound(BOUND, image.log_probs.shape[1], TEMPERATURES)
    rungs = torch.zeros(1, dtype=torch.int64)

    def attempt(coarseness: float) -> tuple[Tensor, Tensor]:
        one = dataclasses.replace(coder, levels=(1 / coarseness,))
        codes = one.encode(image.log_probs, rungs)
        return codes, one.decode(codes, rungs)

    found, measured = coarsest(attempt, image, 1 / coder.levels[-1], 1 / coder.levels[0])
    codes = found[0].numpy()
    yield "codes and zstd", {"bytes": tiled(codes), "entropy": entropy(codes), **measured}
    for name, median in (("column differences", False), ("MED residuals", True)):
        size = sum(zstd(residuals(tile, median=median)) + CHECKSUM for tile in tiles(codes))
        yield name, {"bytes": size, "entropy": entropy(residuals(codes, median=median)), **measured}
    yield "column differences, two to a byte", {"bytes": tiled(codes, two_to_a_byte), **measured}
    yield "dense, with contexts", {"bytes": tiled(codes, context), **measured}


def softened(image: Image) -> Iterator[tuple[str, Row]]:
    """Levels of sqrt(q), q being softened by the temperature of ``plain``'s coder: by themselves, and foretold."""
    side, rungs = tile_side(image.mapping.shape), torch.zeros(1, dtype=torch.int64)
    coder = PredictedDistribution.for_bound(BOUND, TEMPERATURES, side)
    roots = ((image.log_probs / coder.temperature).log_softmax(1) / 2).exp()
    top = image.log_probs.argmax(1, keepdim=True)

    def alone(coarseness: float) -> tuple[Tensor, Tensor]:
        codes = (roots / coarseness + 0.5).floor().scatter(1, top, TOP)
        values = (codes * prediction.UNIT).scatter(1, top, prediction.ARGMAX).short()
        return codes, dataclasses.replace(coder, levels=(1 / coarseness,)).decode(values, rungs)

    def foretold(coarseness: float) -> tuple[Tensor, Tensor]:
        one = dataclasses.replace(coder, levels=(1 / coarseness,))
        codes = one.encode(image.log_probs, rungs)
        return codes, one.decode(codes, rungs)

    limits = 1 / coder.levels[-1], 1 / coder.levels[0]
    found, measured = coarsest(alone, image, *limits)
    codes = found[0].numpy().astype(np.uint8)
    yield "levels of softened roots", {"bytes": tiled(codes), "entropy": entropy(codes), **measured}
    size = sum(zstd(residuals(tile, median=True)) + CHECKSUM for tile in tiles(codes))
    yield "their MED residuals", {"bytes": size, "entropy": entropy(residuals(codes, median=True)), **measured}
    found, measured = coarsest(foretold, image, *limits)
    values = found[0].numpy()
    cut = [
        cut_tile(values, number, side, values.dtype, prediction.BEYOND) for number in range(len(list(tiles(values))))
    ]
    size = sum(len(encode_chunk(tile, "residuals")) for tile in cut)
    kept = np.concatenate([prediction.residuals(tile.astype(np.int16)).reshape(len(tile), -1) for tile in cut], axis=1)
    yield "plain, foretold", {"bytes": size, "entropy": entropy(kept), **measured}


def companded(log_p: Tensor, power: float) -> Tensor:
    """``p ** power / power``; with a power of 0 what differs from its limit by a constant a cell."""
    clamped = log_p.clamp_min(-40)
    return (power * log_p).exp() / power if power else clamped - clamped.mean(1, keepdim=True)


def expanded(values: Tensor, power: float, top: Tensor | None) -> Tensor:
    """Log-probabilities of companded values; of the class ``top``, if given, what the others leave, and the largest."""
    logs = ((values * power).clamp_min(1e-3).log() / power if power else values).log_softmax(1)
    if top is None:
        return logs
    p = ((values * power).clamp_min(1e-3) ** (1 / power)).masked_fill(top, 0)
    left = torch.maximum(1 - p.sum(1, keepdim=True), 1.001 * p.amax(1, keepdim=True))
    return torch.where(top, left, p).log().log_softmax(1)


def filled(values: Tensor, known: Tensor) -> Tensor:
    """Values 1,c,h,w that are not known by diffusion from those that are, from coarse grids to fine ones."""
    if bool(known.all()) or values[0, 0].numel() == 1:
        return values
    share = F.avg_pool2d(known.float(), 2, ceil_mode=True)
    coarse = filled(F.avg_pool2d(values * known, 2, ceil_mode=True) / share.clamp_min(1e-6), share > 0)
    found = torch.where(known, values, F.interpolate(coarse, size=values.shape[2:], mode="bilinear"))
    for _ in range(20):
        p = F.pad(found, (1, 1, 1, 1), mode="replicate")
        mean = (p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]) / 4
        found = torch.where(known, values, mean)
    return found


def dct(side: int) -> Tensor:
    """The orthonormal DCT-II, frequencies by places."""
    n = torch.arange(side, dtype=torch.float64)
    matrix = math.sqrt(2 / side) * (math.pi * n[:, None] * (2 * n + 1) / (2 * side)).cos()
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def mean_and_rest(classes: int) -> Tensor:
    """Householder's reflection that takes the mean over the classes, up to its scale, into the first of them."""
    normal = torch.eye(classes)[0] - 1 / math.sqrt(classes)
    return torch.eye(classes) - 2 * torch.outer(normal, normal) / normal.square().sum()


def transformed(image: Image, side: int, power: float, *, fill: bool) -> Row:
    """A DCT of blocks of side x side cells; of filled planes, of their mean over the classes and the rest."""
    height, width = image.log_probs.shape[2:]
    tops = image.log_probs.argmax(1)
    values, top, over_classes = companded(image.log_probs, power), None, torch.eye(image.log_probs.shape[1])
    if fill:
        top = F.one_hot(tops, len(over_classes)).movedim(3, 1).bool()
        values, over_classes = filled(values, ~top), mean_and_rest(len(over_classes))
    padded = F.pad(values, (0, -width % side, 0, -height % side), mode="replicate")[0]
    blocks = padded.reshape(-1, padded.shape[1] // side, side, padded.shape[2] // side, side)
    matrices = (over_classes, dct(side), dct(side))
    coefficients = torch.einsum("kc,fv,gw,cyvxw->yxkfg", *matrices, blocks)

    def attempt(step: float) -> tuple[Tensor, Tensor]:
        codes = coefficients.sign() * (coefficients.abs() / step + ZERO).floor()
        kept = (codes + BEYOND * codes.sign()) * step
        cells = torch.einsum("kc,fv,gw,yxkfg->cyvxw", *matrices, kept).reshape(padded.shape)
        return codes, expanded(cells[None, :, :height, :width], power, top)

    codes, measured = coarsest(attempt, image, 0.02, 8)
    zigzag = sorted(range(side * side), key=lambda band: (band // side + band % side, band))
    bands = codes.flatten(-2)[..., zigzag].numpy().astype(np.int32)
    tops_bytes = tiled(tops.numpy().astype(np.uint8)) if fill else 0
    size = packed(bands, -(-tile_side((height, width)) // side)) + tops_bytes
    return {"bytes": size, "entropy": entropy(np.moveaxis(bands, -1, 0)) + tops_bytes, **measured}


def packed(bands: Codes, count: int) -> int:
    """Bytes of coefficients y,x,c,F in tiles of count x count blocks: signs folded, low bytes and then high ones."""
    halves = np.stack([folded(bands) & 255, folded(bands) >> 8]).astype(np.uint8)
    places = itertools.product(range(0, len(bands), count), range(0, bands.shape[1], count))
    cut = [halves[:, y : y + count, x : x + count] for y, x in places]
    return min(sum(zstd(tile.transpose(order)) + CHECKSUM for tile in cut) for order in ORDERS)


def measure(image: Image) -> dict[str, Row]:
    sizes, half = native_float16(image)
    rows: dict[str, Row] = {REFERENCE: {"bytes": sizes[REFERENCE], **costs(image, half)}}
    rows |= {**dict(packings(image)), **dict(softened(image))}
    for fill, side, root in itertools.product((False, True), (8, 15, 16), (0, 12, 10.5, 8)):
        if root or not fill:
            what = f"p^(1/{root:g})" if root else "log p"
            name = f"DCT {side}x{side} of {what}{', filled' if fill else ''}"
            rows[name] = transformed(image, side, 1 / root if root else 0, fill=fill)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/camvid.toml", help="a run file with [data] and [teacher]")
    parser.add_argument("--images", type=int, default=12, help="of role report, evenly spread")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not Path(load(arguments.config, ()).data.root).exists():
        print(json.dumps({"skipped": arguments.config, "reason": "its data are not here"}))
        return
    images = []
    for image in teacher_images(arguments.config, arguments.images):
        images.append(measure(image))
        print(f"{len(images)} of {arguments.images}", file=sys.stderr, flush=True)
    rows = {
        name: {key: float(np.mean([image[name][key] for image in images])) for key in row}
        for name, row in images[0].items()
    }
    if arguments.json:
        named = [{"coding": name, **row} for name, row in rows.items()]
        print(json.dumps({"source": arguments.config, "images": len(images), "threads": 1, "rows": named}))
        return
    reference = rows[REFERENCE]["bytes"]
    print(f"{arguments.config}, {len(images)} images; 1/{AIM} of {REFERENCE} is {reference / AIM:,.0f} bytes an image")
    heads = "".join(f"{head:>10}" for head in MEASURES.values())
    print(f"{'coding':<35}{'bytes':>9}{'ratio':>7}{'entropy':>9}{'ratio':>7}{heads}{'argmax':>8}")
    for name, row in rows.items():
        sizes = (row["bytes"], row.get("entropy"))
        cells = "".join(f"{size:>9,.0f}{reference / size:>7.2f}" if size else " " * 16 for size in sizes)
        print(f"{name:<35}{cells}{''.join(f'{row[key]:>10.2e}' for key in MEASURES)}{row['agreement']:>8.4f}")


if __name__ == "__main__":
    main()
