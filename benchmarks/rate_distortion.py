"""Bytes against coding error: our profiles and what others keep, on one teacher's outputs, in one run.

    python benchmarks/rate_distortion.py [--config configs/camvid.toml] [--images 101] [--json]

The run file's teacher over its samples of role report, and a synthetic case of 150 classes (smooth random fields, said
so in the table). Sizes are those of whole 64 x 64 tiles with their crc32c, as the cache stores them; measures are the
cache's own. "limit" is JPEG-XL of our codes, lossless at effort 9, where imagecodecs is installed, else LZMA.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import time
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
from segkd.pipeline.teacher.config import CacheConfig
from segkd.pipeline.teacher.opened import open_run
from segkd.pipeline.teacher.targets import TARGETS, Output, SoftTargets, code
from segkd.storage.coding import from_float16, to_float16
from segkd.storage.context import decode as context_decode
from segkd.storage.context import encode as context_encode
from segkd.storage.geometry import Mapping

TILE = 64
Codes = npt.NDArray[Any]
Kept = tuple[int, Tensor]
"""Bytes, and the log-probabilities that a reader sees."""


@dataclasses.dataclass(frozen=True)
class Image:
    """One sample's output."""

    log_probs: Tensor
    mapping: Mapping
    size: tuple[int, int]


def zstd(data: Codes, level: int = 19) -> int:
    return len(Zstd(level).encode(np.ascontiguousarray(data).tobytes()))


def tiles(codes: Codes) -> Iterator[Codes]:
    for y in range(0, codes.shape[1], TILE):
        for x in range(0, codes.shape[2], TILE):
            part = codes[:, y : y + TILE, x : x + TILE]
            yield np.pad(part, ((0, 0), (0, TILE - part.shape[1]), (0, TILE - part.shape[2])))


def tiled(codes: Codes, pack: Callable[[Codes], int] = zstd) -> int:
    return sum(pack(tile) + 4 for tile in tiles(codes))


def ours(config: CacheConfig, pack: Callable[[Codes], int]) -> Callable[[Image], Kept]:
    def keep(image: Image) -> Kept:
        target, spec = TARGETS["soft"](), TARGETS["soft"]().spec(config, image.log_probs.shape[1])
        output = Output(log_probs_NChw=image.log_probs, mapping=image.mapping, image_size=image.size)
        coded, decoded = code(target, spec, output, ["sample"])
        return tiled(coded.codes[0].numpy(), pack), decoded

    return keep


def context(tile: Codes) -> int:
    packed = context_encode(tile)
    assert np.array_equal(context_decode(packed, tile.shape), tile), "the context coder must be lossless"
    return len(packed)


def limit(tile: Codes) -> int:
    try:
        import imagecodecs

        return sum(len(imagecodecs.jpegxl_encode(plane, lossless=True, effort=9)) for plane in tile)
    except ImportError:
        return len(lzma.compress(tile.tobytes(), preset=9 | lzma.PRESET_EXTREME))


def dense_pixels(image: Image) -> Kept:
    up = F.interpolate(image.log_probs, size=image.size, mode="bilinear", align_corners=False)
    return zstd(up.numpy(), 3), image.log_probs


def native_float16(image: Image) -> Kept:
    half = image.log_probs.half()
    return tiled(half[0].numpy(), lambda t: zstd(t, 9)), half.float().log_softmax(1)


def probabilities_8bit(image: Image) -> Kept:
    codes = (image.log_probs.exp() * 255).round()
    return tiled(codes[0].numpy().astype(np.uint8)), codes.clamp_min(0.3).log().log_softmax(1)


def tinyvit(count: int) -> Callable[[Image], Kept]:
    """int16 indices and float16 probabilities of the largest; the rest is spread over the others."""

    def keep(image: Image) -> Kept:
        top = image.log_probs.exp().topk(count, 1)
        kept = top.values.half()
        size = tiled(top.indices[0].numpy().astype(np.int16)) + tiled(kept[0].numpy())
        left = (1 - kept.float().sum(1, keepdim=True)).clamp_min(1e-6) / (image.log_probs.shape[1] - count)
        p = left.expand_as(image.log_probs).scatter(1, top.indices, kept.float().clamp_min(1e-8))
        return size, p.log().log_softmax(1)

    return keep


def distillkit(image: Image, exact: int = 2, degree: int = 3, bits: int = 4) -> Kept:
    """Sorted log-probabilities: the first ones in float16, a polynomial through the others, residuals in few bits."""
    values, order = image.log_probs.clamp_min(-30).sort(1, descending=True)
    n = values.shape[1] - exact
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    powers = torch.stack([x**k for k in range(degree + 1)], 1)
    rest = values[0, exact:].double().flatten(1)
    fit = (torch.linalg.pinv(powers) @ rest).half()
    residual = rest - powers @ fit.double()
    scale = residual.abs().amax(0, keepdim=True).clamp_min(1e-6).half()
    steps = 2 ** (bits - 1) - 1
    codes = (residual / scale.double() * steps).round()
    size = sum(
        tiled(part)
        for part in (
            order[0].numpy().astype(np.uint8),
            values[0, :exact].half().numpy(),
            fit.unflatten(1, values.shape[2:]).numpy(),
            scale.unflatten(1, values.shape[2:]).numpy(),
            codes.unflatten(1, values.shape[2:]).numpy().astype(np.int8),
        )
    )
    back = (powers @ fit.double() + codes / steps * scale.double()).float().unflatten(1, values.shape[2:])
    sorted_back = torch.cat([values[0, :exact].half().float(), back])[None]
    return size, torch.empty_like(values).scatter(1, order, sorted_back).log_softmax(1)


def exact(image: Image) -> Kept:
    codes = to_float16(image.log_probs)
    return tiled(codes[0].numpy()), from_float16(codes)


def methods() -> dict[str, Callable[[Image], Kept]]:
    both = CacheConfig(temperatures=(1.0, 4.0))
    rows = {
        "float32 at pixel size + zstd": dense_pixels,
        "float16 on the grid + zstd": native_float16,
        "8-bit probabilities + zstd": probabilities_8bit,
        "top-3, TinyViT's layout": tinyvit(3),
        "top-4, TinyViT's layout": tinyvit(4),
        "DistillKit-like residuals": distillkit,
        "exact": exact,
        "plain T=1": ours(CacheConfig(), zstd),
        "dense T=1": ours(CacheConfig(), context),
        "limit T=1": ours(CacheConfig(), limit),
        "plain T=1,4": ours(both, zstd),
        "dense T=1,4": ours(both, context),
        "limit T=1,4": ours(both, limit),
    }
    for bound in (1e-4, 3e-4, 3e-3, 1e-2, 3e-2, 1e-1):
        rows[f"plain T=1 at {bound:g}"] = ours(CacheConfig(max_kl=bound), zstd)
        rows[f"dense T=1 at {bound:g}"] = ours(CacheConfig(max_kl=bound), context)
    return rows


def measure(case: str, images: list[Image]) -> Iterator[dict[str, Any]]:
    spec = SoftTargets().spec(CacheConfig(temperatures=(1.0, 4.0)), images[0].log_probs.shape[1])
    reference = 0.0
    for name, keep in methods().items():
        sizes, rows, seconds = [], [], 0.0
        for image in images:
            began = time.perf_counter()
            size, decoded = keep(image)
            seconds += time.perf_counter() - began
            output = Output(log_probs_NChw=image.log_probs, mapping=image.mapping, image_size=image.size)
            measured = SoftTargets().measure(spec, image.log_probs, decoded, output)
            agreement = (decoded.argmax(1) == image.log_probs.argmax(1)).double().mean()
            rows.append({**{key: float(value) for key, value in measured.items()}, "agreement": float(agreement)})
            sizes.append(size)
        reference = float(np.mean(sizes)) if name.startswith("float16") else reference
        yield {
            "case": case,
            "coding": name,
            "bytes": float(np.mean(sizes)),
            "ratio": reference / float(np.mean(sizes)),
            **{key: float(np.mean([row[key] for row in rows])) for key in rows[0]},
            "kl_max": max(max(row["kl_cells"], row["kl_pixels"]) for row in rows),
            "kl_t4_max": max(max(row["kl_cells_t4"], row["kl_pixels_t4"]) for row in rows),
            "encode_ms": 1000 * seconds / len(images),
            "decode_ms": decode_ms(name, images[0]),
        }


def decode_ms(name: str, image: Image) -> float | None:
    """From one tile's bytes to float32 log-probabilities, the median; for our profiles."""
    profile, *_ = name.split()
    if profile not in ("plain", "dense"):
        return None
    bound = float(name.split(" at ")[1]) if " at " in name else 1e-3
    config = CacheConfig(max_kl=bound, temperatures=(1.0, 4.0) if "T=1,4" in name else (1.0,))
    spec = TARGETS["soft"]().spec(config, image.log_probs.shape[1])
    output = Output(log_probs_NChw=image.log_probs, mapping=image.mapping, image_size=image.size)
    coded, _ = code(TARGETS["soft"](), spec, output, ["sample"])
    tile, rungs = next(tiles(coded.codes[0].numpy())), coded.rungs.numpy()
    packed = context_encode(tile) if profile == "dense" else Zstd(19).encode(tile.tobytes())
    times = []
    for _ in range(30):
        began = time.perf_counter()
        codes = (
            context_decode(packed, tile.shape)
            if profile == "dense"
            else np.frombuffer(Zstd(19).decode(packed), np.uint8).reshape(tile.shape)
        )
        spec.coder.decode(codes[None], rungs)
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


def teacher_images(path: str, count: int) -> list[Image]:
    run = load(path, ())
    opened = open_run(run)
    report = [planned for planned in opened.planned if planned.role == "report"]
    # Evenly spread: neighbouring frames are alike, and the first ones take a quarter less than the mean.
    report = [report[k * len(report) // count] for k in range(count)] if count < len(report) else report
    images = []
    for planned in report:
        log_probs, mapping = opened.predictor.predict([opened.data.image(opened.samples[planned.id])], [planned.id])
        images.append(Image(log_probs, mapping, planned.image_size))
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
        if not arguments.json:
            print(f"\n{case}, {len(images)} images")
            print(
                f"{'coding':<30}{'bytes':>10}{'ratio':>7}{'KL cells':>10}{'pixels':>10}{'max':>10}{'T=4 cells':>10}"
                f"{'max':>10}{'argmax':>8}{'enc ms':>8}{'dec ms':>8}"
            )
        for row in measure(case, images):
            rows.append(row)
            if not arguments.json:
                decode = "" if row["decode_ms"] is None else f"{row['decode_ms']:.2f}"
                print(
                    f"{row['coding']:<30}{row['bytes']:>10,.0f}{row['ratio']:>7.1f}{row['kl_cells']:>10.1e}"
                    f"{row['kl_pixels']:>10.1e}{row['kl_max']:>10.1e}{row['kl_cells_t4']:>10.1e}{row['kl_t4_max']:>10.1e}"
                    f"{row['agreement']:>8.4f}{row['encode_ms']:>8.0f}{decode:>8}",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps({"threads": 1, "rows": rows}))


if __name__ == "__main__":
    main()
