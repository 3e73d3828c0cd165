"""Writes the caches of tests/golden, that every later version has to read alike: ``python write.py FOLDER``.

It needs the storage room alone, so that it also runs where there is no torch. Nothing is drawn at random: the values
are sums of sines, the same with every version of numpy but for their last bits, which no code depends on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from segkd.storage.coding import EXACT, Coder, CompandedDistribution, PredictedDistribution, UniformSteps, to_float16
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import PlannedSample, plan_units
from segkd.storage.spec import CacheSpec, TargetSpec
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter

CLASSES, TILE = ("sky", "road", "car"), 8
FIRST = {"train/a": (32, 48), "train/b": (64, 32), "report/c": (100, 36)}
"""Sizes of the images that the cache begins with."""
SECOND = {"train/b": (64, 32), "auxiliary/d": (33, 35)}
"""What comes later; the image of train/b is another one then."""
KEPT_EXACT = ("report/c",)
CODERS: dict[str, tuple[Coder, str, int]] = {
    "cache": (CompandedDistribution(levels=(12.0, 24.0)), "zstd", 7),
    "foretold": (PredictedDistribution(temperature=3.5, levels=(24.0, 300.0), side=TILE), "residuals", 1),
}
"""Each cache's coder of distributions, its codec, and the rung of all samples: of 24 levels, or of 300."""


def values(sample_id: str, generation: int, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Log-probabilities C,h,w of a sample."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    phase = sum(sample_id.encode()) + 7 * generation
    logits = np.stack([6 * np.sin(0.3 * y + 0.2 * (k + 1) * x + phase + 2 * k) for k in range(len(CLASSES))])
    log_probs = logits - np.log(np.exp(logits).sum(0))
    return log_probs.astype(np.float32)


def first_order(log_probs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Some map of values between 0 and 1, 1,h,w."""
    return np.abs(np.gradient(np.exp(log_probs[:1]), axis=2)).astype(np.float32)


def spec(name: str) -> CacheSpec:
    coder, codec, _ = CODERS[name]
    soft = TargetSpec(
        name="soft",
        channels=len(CLASSES),
        coder=coder,
        bound=1e-3,
        measures=("kl_cells",),
        bounded=("kl_cells",),
        parameters={"temperatures": [1.0]},
        fallback=True,
        codec=codec,
    )
    local = TargetSpec(
        name="first_order",
        channels=1,
        coder=UniformSteps(reach=(1.0,)),
        bound=0.01,
        measures=("largest_error",),
        bounded=("largest_error",),
        parameters={"features": "softmax"},
    )
    targets = {"soft": soft, "first_order": local}
    return CacheSpec(classes=CLASSES, targets=targets, tile=TILE, fingerprints={"teacher": "golden"}, teacher={})


def coded(sample: PlannedSample, generation: int, cache: CacheSpec, on: int) -> CodedSample:
    """What stage 1 would hand over, but for a rung that is the same for all, and measures that are made up."""
    log_probs = values(sample.id, generation, sample.mapping.shape)
    soft, local = (cache.targets[name].coder for name in ("soft", "first_order"))
    exact = sample.id in KEPT_EXACT
    rung = EXACT if exact else on
    return CodedSample(
        image_digest=sample.id.encode().ljust(16, b"."),
        codes={
            "soft": to_float16(log_probs[None])[0] if exact else soft.encode(log_probs[None], np.array([rung]))[0],
            "first_order": local.encode(first_order(log_probs)[None], np.array([0]))[0],
        },
        rungs={"soft": rung, "first_order": 0},
        measures={"soft": {"kl_cells": 2.0**-12}, "first_order": {"largest_error": 2.0**-9}},
    )


def write(folder: Path, name: str) -> None:
    """Both generations of the cache ``name``, sealed."""
    cache = spec(name)
    for generation, (sizes, removed) in enumerate(((FIRST, ()), (SECOND, ("train/b",)))):
        samples = [
            PlannedSample(
                id=sample_id,
                role=sample_id.split("/")[0],
                image_size=size,
                mapping=Mapping(*(network_axis(pixels, -(-pixels // 4)) for pixels in size)),
            )
            for sample_id, size in sizes.items()
        ]
        plan = plan_units(samples, unit_samples=2, tile=TILE, cell_bytes=cache.cell_bytes)
        writer = CacheWriter(folder, cache, plan, generation=generation, removed=removed)
        for unit in writer.pending():
            writer.write(unit, [coded(sample, generation, cache, CODERS[name][2]) for sample in plan.of(unit)])
        assert writer.seal()


if __name__ == "__main__":
    for name in CODERS:
        write(Path(sys.argv[1]) / f"{name}.zarr", name)
