"""Bytes against coding error: our profiles and what others keep, on one teacher's outputs, in one run.

    OMP_NUM_THREADS=1 python benchmarks/rate_distortion.py [--config configs/camvid.toml] [--images 101] [--json]

The run file's teacher over its samples of role report, and a synthetic case of 150 classes (smooth random fields, said
so in the table). Every 6th of CamVid's report images served to choose the coder's constants, so the table is printed of
the others as well. Sizes are those of whole tiles with their crc32c, cut as the cache cuts such grids, and zstd has the
cache's level throughout; measures are the cache's own. "limit" is a slow coder on our codes, all of an image's planes
as one tall picture, without tiles: JPEG-XL, lossless at effort 9, where imagecodecs is installed, else LZMA.
For speed see reads.py and writes.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numcodecs.zstd import Zstd
from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.config import load
from segkd.pipeline.models.network import Grid
from segkd.pipeline.teacher.coded import code
from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.opened import open_run
from segkd.pipeline.teacher.targets import Output, SoftTargets
from segkd.storage.coding import from_float16, to_float16
from segkd.storage.context import decode as context_decode
from segkd.storage.context import encode as context_encode
from segkd.storage.geometry import Mapping
from segkd.storage.layout import PlannedSample, usual_tile
from segkd.storage.packing import ZSTD_LEVEL, cut_tile, encode_chunk
from segkd.storage.prediction import BEYOND

TUNED = 6
"""Every so-manieth report image served to choose the coder's constants."""
LIMIT = "JPEG-XL" if importlib.util.find_spec("imagecodecs") else "LZMA"
Codes = npt.NDArray[Any]
Kept = tuple[dict[str, int], Tensor]
"""Bytes of each coding that keeps the same, and the log-probabilities that a reader sees."""
Keep = Callable[["Image"], Kept]


@dataclasses.dataclass(frozen=True)
class Image:
    """One sample's output."""

    log_probs: Tensor
    mapping: Mapping
    size: tuple[int, int]
    tuned: bool = False
    """Whether it served to choose the coder's constants."""

    @property
    def output(self) -> Output:
        return Output(log_probs_NChw=self.log_probs, mapping=self.mapping, image_size=self.size)


def zstd(data: Codes, level: int = ZSTD_LEVEL) -> int:
    return len(Zstd(level).encode(np.ascontiguousarray(data).tobytes()))


@functools.cache
def tile_side(grid: tuple[int, int]) -> int:
    """In cells, of the tiles that stage 1 cuts samples of this grid into."""
    mapping = Grid(stride=1).mapping(*grid)
    return usual_tile([PlannedSample(id="any", role="train", image_size=grid, mapping=mapping)])


def tiles(codes: Codes) -> Iterator[Codes]:
    side = tile_side(codes.shape[1:])
    for y in range(0, codes.shape[1], side):
        for x in range(0, codes.shape[2], side):
            part = codes[:, y : y + side, x : x + side]
            yield np.pad(part, ((0, 0), (0, side - part.shape[1]), (0, side - part.shape[2])))


def tiled(codes: Codes, pack: Callable[[Codes], int] = zstd) -> int:
    return sum(pack(tile) + 4 for tile in tiles(codes))


def ours(config: CacheConfig, what: str, *, limit: bool = False) -> Keep:
    """The profile ``dense``, and ``plain`` as well where that keeps the same codes."""

    def keep(image: Image) -> Kept:
        spec = SoftTargets().spec(config, image.log_probs.shape[1], tile_side(image.mapping.shape))
        coded, decoded = code(SoftTargets(), spec, image.output, ["sample"])
        codes = coded.codes[0].numpy()
        sizes = {} if max(config.temperatures) > 1 else {f"plain {what}": tiled(codes)}
        sizes[f"dense {what}"] = tiled(codes, context)
        if limit:
            sizes[f"{LIMIT} of the codes {what}"] = slowest(codes)
        return sizes, decoded

    return keep


def foretold(config: CacheConfig, what: str) -> Keep:
    """The profile ``plain`` for temperatures above 1."""

    def keep(image: Image) -> Kept:
        side = tile_side(image.mapping.shape)
        spec = SoftTargets().spec(config, image.log_probs.shape[1], side)
        coded, decoded = code(SoftTargets(), spec, image.output, ["sample"])
        codes = coded.codes[0].numpy()
        if codes.dtype != np.int16:  # a sample that no rung serves
            return {f"plain {what}": tiled(codes)}, decoded
        count = len(list(tiles(codes)))
        cut = (cut_tile(codes, number, side, codes.dtype, BEYOND) for number in range(count))
        return {f"plain {what}": sum(len(encode_chunk(tile, spec.codec)) for tile in cut)}, decoded

    return keep


def context(tile: Codes) -> int:
    if tile.dtype != np.uint8:  # a sample that no rung serves
        return zstd(tile)
    packed = context_encode(tile)
    assert np.array_equal(context_decode(packed, tile.shape), tile), "the context coder must be lossless"
    return len(packed)


def slowest(codes: Codes) -> int:
    tall = np.ascontiguousarray(codes).reshape(-1, codes.shape[2])
    if LIMIT == "LZMA" or tall.dtype != np.uint8:
        return len(lzma.compress(tall.tobytes(), preset=9 | lzma.PRESET_EXTREME))
    imagecodecs: Any = importlib.import_module("imagecodecs")  # no dependency: compared with where it is installed
    return len(imagecodecs.jpegxl_encode(tall, lossless=True, effort=9))


def dense_pixels(image: Image) -> Kept:
    up = F.interpolate(image.log_probs, size=image.size, mode="bilinear", align_corners=False)
    return {"float32 at pixel size + zstd 3": zstd(up.numpy(), 3)}, image.log_probs


def native_float16(image: Image) -> Kept:
    half = image.log_probs.half()
    return {REFERENCE: tiled(half[0].numpy())}, half.float().log_softmax(1)


def probabilities_8bit(image: Image) -> Kept:
    codes = (image.log_probs.exp() * 255).round()
    return {"8-bit probabilities + zstd": tiled(codes[0].numpy().astype(np.uint8))}, codes.clamp_min(
        0.3
    ).log().log_softmax(1)


def tinyvit(count: int) -> Keep:
    """int16 indices and float16 probabilities of the largest; the rest is spread over the others."""

    def keep(image: Image) -> Kept:
        top = image.log_probs.exp().topk(count, 1)
        kept = top.values.half()
        size = tiled(top.indices[0].numpy().astype(np.int16)) + tiled(kept[0].numpy())
        left = (1 - kept.float().sum(1, keepdim=True)).clamp_min(1e-6) / (image.log_probs.shape[1] - count)
        p = left.expand_as(image.log_probs).scatter(1, top.indices, kept.float().clamp_min(1e-8))
        return {f"top-{count}, TinyViT's layout": size}, p.log().log_softmax(1)

    return keep


def distillkit(count: int | None, exact: int, degree: int | None, bits: int) -> Keep:
    """The largest log-probabilities, sorted: the first ones in float16, a polynomial through the others (none with
    degree None), residuals in few bits with a scale a cell; classes beyond them share what is left.
    """

    def keep(image: Image) -> Kept:
        values, order = image.log_probs.clamp_min(-30).sort(1, descending=True)
        classes = values.shape[1]
        kept = min(count or classes, classes)
        grid, rest, order = values.shape[2:], values[0, exact:kept].double().flatten(1), order[:, :kept]
        parts = [order[0].numpy().astype(np.uint8), values[0, :exact].half().numpy()]
        fitted = torch.zeros_like(rest)
        if degree is not None:
            x = torch.linspace(-1, 1, kept - exact, dtype=torch.float64)
            powers = torch.stack([x**k for k in range(degree + 1)], 1)
            fit = (torch.linalg.pinv(powers) @ rest).half()
            fitted = powers @ fit.double()
            parts.append(fit.reshape(-1, *grid).numpy())
        scale = (rest - fitted).abs().amax(0, keepdim=True).clamp_min(1e-6).half()
        steps = 2 ** (bits - 1) - 1
        codes = ((rest - fitted) / scale.double() * steps).round()
        parts += [scale.reshape(-1, *grid).numpy(), codes.reshape(-1, *grid).numpy().astype(np.int8)]
        back = (fitted + codes / steps * scale.double()).float().reshape(-1, *grid)
        known = torch.cat([values[0, :exact].half().float(), back])[None]
        left = (1 - known.double().exp().sum(1, keepdim=True)).clamp_min(1e-7) / max(classes - kept, 1)
        decoded = left.log().float().expand_as(image.log_probs).scatter(1, order, known).log_softmax(1)
        size = sum(tiled(part) for part in parts)
        return {f"DistillKit-like, {'all' if count is None else count} classes": size}, decoded

    return keep


def exact(image: Image) -> Kept:
    codes = to_float16(image.log_probs)
    return {"exact": tiled(codes[0].numpy())}, from_float16(codes)


REFERENCE = f"float16 on the grid + zstd {ZSTD_LEVEL}"
BOUNDS = (1e-4, 3e-4, 3e-3, 1e-2, 1e-1)
METHODS: tuple[Keep, ...] = (
    dense_pixels,
    native_float16,
    probabilities_8bit,
    tinyvit(3),
    tinyvit(4),
    # Every class, as if there were many more; then, of 3-11 classes, 1 or 2 in float16, no polynomial
    # or one up to the degree 3, and 4-8 bits, what took the fewest bytes for a mean KL of 1e-3 on an image of CamVid's.
    distillkit(None, 2, 3, 4),
    distillkit(5, 2, None, 6),
    exact,
    ours(CacheConfig(), "T=1", limit=True),
    foretold(CacheConfig(temperatures=(1.0, 4.0)), "T=1,4"),
    ours(CacheConfig(temperatures=(1.0, 4.0), profile="dense"), "T=1,4", limit=True),
    foretold(CacheConfig(temperatures=(2.0,)), "T=2"),
    ours(CacheConfig(temperatures=(2.0,), profile="dense"), "T=2"),
    *(ours(CacheConfig(max_kl=bound), f"T=1 at {bound:g}") for bound in BOUNDS),
)


def measure(image: Image) -> dict[str, dict[str, float]]:
    """Bytes and errors of every coding of one image."""
    spec = SoftTargets().spec(CacheConfig(temperatures=(1.0, 4.0)), image.log_probs.shape[1], 1)
    rows: dict[str, dict[str, float]] = {}
    for keep in METHODS:
        sizes, decoded = keep(image)
        measured = SoftTargets().measure(spec, image.log_probs, decoded, image.output)
        errors = {key: float(value) for key, value in measured.items()}
        errors["agreement"] = float((decoded.argmax(1) == image.log_probs.argmax(1)).double().mean())
        rows |= {name: {"bytes": float(size), **errors} for name, size in sizes.items()}
    return rows


def summarised(case: str, images: list[dict[str, dict[str, float]]]) -> Iterator[dict[str, Any]]:
    reference = np.mean([rows[REFERENCE]["bytes"] for rows in images])
    for name in images[0]:
        rows = [image[name] for image in images]
        means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        yield {
            "case": case,
            "images": len(images),
            "coding": name,
            "ratio": float(reference / means["bytes"]),
            **means,
            "kl_max": max(max(row["kl_cells"], row["kl_pixels"]) for row in rows),
            "kl_t4_max": max(max(row["kl_cells_t4"], row["kl_pixels_t4"]) for row in rows),
        }


def teacher_images(path: str, count: int) -> list[Image]:
    run = load(path, ())
    opened = open_run(run)
    report = [planned for planned in opened.planned if planned.role == "report"]
    served = {planned.id for planned in report[::TUNED]} if Path(path).name == "camvid.toml" else set()
    # Evenly spread: neighbouring frames are alike, and the first ones take a quarter less than the mean.
    report = [report[k * len(report) // count] for k in range(count)] if count < len(report) else report
    images = []
    for planned in report:
        log_probs, mapping = opened.predictor.predict([opened.data.image(opened.samples[planned.id])], [planned.id])
        images.append(Image(log_probs, mapping, planned.image_size, planned.id in served))
    return images


def synthetic_images(count: int, classes: int = 150, height: int = 256, width: int = 384) -> list[Image]:
    """Smooth random fields of logits at three scales, as sharp as a good teacher's."""
    generator, mapping, images = torch.Generator().manual_seed(0), Grid(stride=4).mapping(height, width), []
    for _ in range(count):
        logits = torch.zeros(1, classes, *mapping.shape)
        for side, weight in ((4, 6.0), (12, 3.0), (32, 1.0)):
            noise = torch.randn(1, classes, side, side * 3 // 2, generator=generator) * weight
            logits += F.interpolate(noise, size=mapping.shape, mode="bicubic", align_corners=False)
        images.append(Image(logits.log_softmax(1), mapping, (height, width)))
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/camvid.toml", help="a run file with [data] and [teacher]")
    parser.add_argument("--images", type=int, default=101, help="of role report, evenly spread; a 25th of it synthetic")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, list[Image]] = {}
    if Path(load(arguments.config, ()).data.root).exists():
        cases[arguments.config] = teacher_images(arguments.config, arguments.images)
    else:
        print(f"{arguments.config}: skipped, its data are not here")
    cases["synthetic, 150 classes"] = synthetic_images(max(arguments.images // 25, 1))
    rows = []
    for case, images in cases.items():
        measured = []
        for number, image in enumerate(images):
            measured.append(measure(image))
            print(f"{case}: {number + 1} of {len(images)}", file=sys.stderr, flush=True)
        part = list(summarised(case, measured))
        others = [row for row, image in zip(measured, images, strict=True) if not image.tuned]
        if 0 < len(others) < len(images):
            part += summarised(f"{case}, without those that the coder was tuned on", others)
        rows += part
        if not arguments.json:
            show(part)
    if arguments.json:
        print(json.dumps({"threads": 1, "rows": rows}))


def show(rows: list[dict[str, Any]]) -> None:
    case = None
    for row in rows:
        if row["case"] != case:
            case = row["case"]
            print(f"\n{case}, {row['images']} images")
            print(
                f"{'coding':<33}{'bytes':>10}{'ratio':>7}{'KL cells':>10}{'pixels':>10}{'max':>10}"
                f"{'T=4 cells':>10}{'pixels':>10}{'max':>10}{'argmax':>8}"
            )
        errors = ("kl_cells", "kl_pixels", "kl_max", "kl_cells_t4", "kl_pixels_t4", "kl_t4_max")
        print(
            f"{row['coding']:<33}{row['bytes']:>10,.0f}{row['ratio']:>7.2f}"
            + "".join(f"{row[key]:>10.1e}" for key in errors)
            + f"{row['agreement']:>8.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
