"""How far apart images are that differ, and how near those that are the same in other files; what comparing them costs.

    python benchmarks/contents.py --config configs/camvid.toml [--images 120] [--json]

Distances are the largest difference of two tones in parts of the lesser contrast, as `segkd train-student` compares
images; beside other numbers of tones, and a difference hash of 16 x 16 x 2 bits, whose distance is the share of bits
that differ. Neighbours are images that follow each other in one role.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from segkd.pipeline.config import load
from segkd.pipeline.data.contamination import find_twins
from segkd.pipeline.data.contents import GRID, Content, content_of, tones_of
from segkd.pipeline.data.matching import LEAST_CONTRAST, TOLERANCE, alike
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import LEARNED, SCORED, DataSource, with_role

Array = npt.NDArray[np.float32]
SCALED = Image.Resampling


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image as a JPEG of this quality shows it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def scaled(image: Image.Image, factor: float, how: Image.Resampling) -> Image.Image:
    """The image at another size."""
    return image.resize((round(image.width * factor), round(image.height * factor)), how)


CHANGES: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG 75": lambda image: jpeg(image, 75),
    "JPEG 50": lambda image: jpeg(image, 50),
    "JPEG 30": lambda image: jpeg(image, 30),
    "x 1/2": lambda image: scaled(image, 1 / 2, SCALED.BILINEAR),
    "x 1/3, cubic": lambda image: scaled(image, 1 / 3, SCALED.BICUBIC),
    "x 2, Lanczos": lambda image: scaled(image, 2, SCALED.LANCZOS),
    "x 0.7, JPEG 75": lambda image: jpeg(scaled(image, 0.7, SCALED.BILINEAR), 75),
    "x 1/4, JPEG 50": lambda image: jpeg(scaled(image, 1 / 4, SCALED.LANCZOS), 50),
    "128 x 128, JPEG 75": lambda image: jpeg(image.resize((128, 128), SCALED.BILINEAR), 75),
    "x 0.7, box": lambda image: scaled(image, 0.7, SCALED.BOX),
    "x 1/2, nearest": lambda image: scaled(image, 1 / 2, SCALED.NEAREST),
}


@dataclass(frozen=True)
class Hash:
    """A perceptual hash: numbers of an image, and the distances of one image's to those of many."""

    name: str
    of: Callable[[Image.Image], Array]
    distance: Callable[[Array, Array], Array]


def relative(one: Array, many: Array) -> Array:
    """The largest difference of tones in parts of the lesser contrast."""
    contrast = np.minimum(one.std(), many.std(axis=-1))
    found: Array = np.abs(many - one).max(axis=-1) / np.maximum(contrast, 1e-6)
    return found


def bits(image: Image.Image) -> Array:
    """Whether brightness rises to the right, and downwards."""
    tones = tones_of(image, GRID + 1).astype(np.int16)
    right, down = np.diff(tones[:GRID], axis=1) > 0, np.diff(tones[:, :GRID], axis=0) > 0
    return np.concatenate([right.ravel(), down.ravel()]).astype(np.float32)


def share(one: Array, many: Array) -> Array:
    """The share of bits that differ."""
    return np.asarray((many != one).mean(axis=-1), np.float32)


def tones(grid: int) -> Hash:
    return Hash(f"{grid} x {grid} tones", lambda image: tones_of(image, grid).ravel().astype(np.float32), relative)


HASHES = (tones(GRID), tones(8), tones(24), tones(32), Hash("difference hash, 512 bits", bits, share))


def distances(source: DataSource, changed: int) -> dict[str, dict[str, list[float]]]:
    """By hash: quantiles between roles and of neighbours, and of every change to ``changed`` images."""
    samples = source.samples
    scored = np.array([sample.role in SCORED for sample in samples])
    follows = [k for k in range(1, len(samples)) if samples[k - 1].role is samples[k].role]
    step = max(len(samples) // changed, 1)
    hashes: dict[str, list[Array]] = {item.name: [] for item in HASHES}
    apart: dict[str, dict[str, list[Array]]] = {item.name: {name: [] for name in CHANGES} for item in HASHES}
    for number, sample in enumerate(samples):
        image = Image.fromarray(source.image(sample))
        others = {name: change(image) for name, change in CHANGES.items()} if number % step == 0 else {}
        for item in HASHES:
            mine = item.of(image)
            hashes[item.name].append(mine)
            for name, other in others.items():
                apart[item.name][name].append(item.distance(mine, item.of(other)[None])[0])
    found = {}
    for item in HASHES:
        values = np.array(hashes[item.name])
        between = np.concatenate([item.distance(one, values[~scored]) for one in values[scored]])
        near = np.array([item.distance(values[k], values[k - 1][None])[0] for k in follows])
        found[item.name] = {
            "learned from and scored on": quantiles(between),
            "neighbours in a role": quantiles(near),
            **{name: quantiles(np.array(list_)) for name, list_ in apart[item.name].items()},
        }
    return found


QUANTILES = (0.0, 0.001, 0.01, 0.5, 0.99, 1.0)


def quantiles(values: Array) -> list[float]:
    return [float(value) for value in np.quantile(values, QUANTILES)]


def twins(source: DataSource) -> dict[str, Any]:
    """What training would say of these data, and milliseconds an image that its content takes besides decoding."""
    images = [(sample.id, source.image(sample)) for sample in with_role(source, *LEARNED, *SCORED)]
    began = time.perf_counter()
    contents = {name: content_of(image) for name, image in images}
    milliseconds = 1e3 * (time.perf_counter() - began) / len(images)
    found = find_twins(source.samples, contents)
    counts = {"contaminated": len(found.contaminated), "shared": len(found.shared), "copies": len(found.copies)}
    contrast = min(np.frombuffer(content.tones, np.uint8).std() for content in contents.values())
    return {**counts, "least_contrast": float(contrast), "content_ms": milliseconds}


def seconds(sizes: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """What finding twins takes in lists of these lengths, of made-up tones."""
    rng = np.random.default_rng(0)

    def made(count: int) -> list[Content]:
        # Smooth, as real images are, of all brightnesses and contrasts.
        coarse = rng.normal(rng.uniform(60, 190, (count, 1, 1)), rng.uniform(20, 70, (count, 1, 1)), (count, 4, 4))
        fine = coarse.repeat(GRID // 4, 1).repeat(GRID // 4, 2) + rng.normal(0, 10, (count, GRID, GRID))
        return [Content(rng.bytes(16), np.clip(item, 0, 255).astype(np.uint8).tobytes()) for item in fine]

    rows = []
    for first, second in sizes:
        lists = made(first), made(second)
        began = time.perf_counter()
        found = alike(*lists)
        rows.append(
            {"first": first, "second": second, "seconds": time.perf_counter() - began, "found": float(len(found))}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="run file of the data; none: the built-in scenes")
    parser.add_argument("--images", type=int, default=120, help="images that are re-encoded and scaled")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    arguments = parser.parse_args()
    run = load(arguments.config, [] if arguments.config else ["data.reader=scenes"])
    source = open_data(run.data)
    found = distances(source, arguments.images)
    result = twins(source)
    sizes = seconds([(1_500, 12_000), (1_500, 100_000), (100_000, 12_000)])
    if arguments.json:
        print(json.dumps({"distances": found, "twins": result, "seconds": sizes}))
        return
    for name, rows in found.items():
        print(f"\n{name:<28}" + "".join(f"{label:>9}" for label in ("least", "0.1 %", "1 %", "median", "99 %", "most")))
        for row, values in rows.items():
            print(f"  {row:<26}" + "".join(f"{value:9.3f}" for value in values))
    print(
        f"\nat {TOLERANCE} of the contrast: {result['contaminated']} contaminated, {result['shared']} shared by select "
        f"and report, {result['copies']} copies; least contrast {result['least_contrast']:.1f}, "
        f"{LEAST_CONTRAST:g} are needed"
    )
    print(f"{result['content_ms']:.2f} ms an image for digest and tones, beside decoding, one thread")
    for size in sizes:
        print(f"{size['first']:>9,.0f} images in {size['second']:>9,.0f} others: {size['seconds']:6.2f} s, one thread")


if __name__ == "__main__":
    main()
