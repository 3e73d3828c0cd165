"""A training loop of one's own: plain PyTorch with its own network, crops and optimiser, and a cache for the teacher.

    make demo                                                    # or any run file whose cache is written
    python examples/own_loop.py --config configs/demo.toml --steps 200

The run file says here where the images are and where the cache is. In a project of yours only :func:`soft_targets` and
:func:`distillation` are needed, and an id for each image; docs/reading.md has more about them.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkd.pipeline.config import load
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import DataSource, Role, Sample, with_role
from segkd.pipeline.resample import to_cells
from segkd.storage.geometry import Affine, Mapping, flip, network_axis, resize, shift
from segkd.storage.reader import CacheReader
from segkd.storage.table import Entry

SIZE = 128
"""Side of a crop, in pixels."""


def soft_targets(
    cache: CacheReader, entry: Entry, y: Affine, x: Affine, size: tuple[int, int]
) -> tuple[Tensor, Mapping]:
    """What the teacher says of a crop: log-probabilities 1,C,h,w, and where these cells lie in the crop's pixels.

    ``y`` and ``x`` lead from a pixel of the crop to one of the image; ``size`` is the crop's height and width. Cells
    whose centres lie in the crop, that is; where there is none, h or w is 0. Nothing else is read.
    """
    placed = entry.mapping.through(y.inverse(), x.inverse())
    rows, columns = placed.y.inside_image(size[0]), placed.x.inside_image(size[1])
    codes = cache.window(entry, "soft", rows, columns)
    log_probs = cache.decode("soft", codes[None], np.array([entry.rungs["soft"]]))
    return torch.from_numpy(log_probs), placed.part(rows, columns)


def distillation(logits: Tensor, log_probs: Tensor, cells: Mapping, size: tuple[int, int]) -> Tensor:
    """Mean over the teacher's cells of KL(teacher || student), nats, for logits 1,C,h',w' that span the crop.

    The student's logits are brought to the teacher's cells, interpolated or averaged; the targets stay as they are.
    """
    axes = (network_axis(pixels, count) for pixels, count in zip(size, logits.shape[2:], strict=True))
    student = to_cells(logits.log_softmax(1), Mapping(*axes), cells)
    return F.kl_div(student, log_probs, reduction="none", log_target=True).sum(1).mean()


def draw_crop(rng: np.random.Generator, height: int, width: int) -> tuple[Affine, Affine, tuple[slice, slice], bool]:
    """A square of the image, brought to SIZE pixels a side and perhaps mirrored: crop pixel -> image pixel."""
    side = int(rng.integers(max(1, min(height, width) // 2), min(height, width) + 1))
    top, left = (int(rng.integers(0, length - side + 1)) for length in (height, width))
    mirrored = bool(rng.integers(2))
    scaled = resize(side, SIZE)
    x = flip(SIZE).then(scaled) if mirrored else scaled
    return scaled.then(shift(top)), x.then(shift(left)), (slice(top, top + side), slice(left, left + side)), mirrored


def to_tensor(source: DataSource, sample: Sample, place: tuple[slice, slice], mirrored: bool) -> Tensor:
    """1,3,SIZE,SIZE in 0 to 1: the crop of the sample's image."""
    pixels = torch.from_numpy(source.image(sample)[place].copy()).permute(2, 0, 1)[None].float() / 255
    image = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
    return image.flip(3) if mirrored else image


def small_network(classes: int) -> nn.Sequential:
    """Logits at an eighth of the crop's size."""
    widths = (3, 32, 64, 128)
    layers = [
        layer
        for before, after in itertools.pairwise(widths)
        for layer in (nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Conv2d(128, 128, 3, 1, 2, dilation=2), nn.ReLU(), nn.Conv2d(128, classes, 1))


def main() -> None:
    """Trains a small network from the teacher's word alone, and says how far from it it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="run file whose data are cached")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    run = load(options.config)
    source, cache = open_data(run.data), CacheReader(run.cache.path)
    samples = [sample for sample in with_role(source, Role.TRAIN, Role.AUXILIARY) if sample.role in run.cache.roles]
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    student = small_network(len(source.classes))
    optimiser = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for step in range(1, options.steps + 1):
        crops: list[Tensor] = []
        targets: list[tuple[Tensor, Mapping]] = []
        while len(crops) < options.batch:
            sample = samples[rng.integers(len(samples))]
            entry = cache.entry(sample.id)
            y, x, place, mirrored = draw_crop(rng, *entry.image_size)
            log_probs, cells = soft_targets(cache, entry, y, x, (SIZE, SIZE))
            if log_probs.numel():
                crops.append(to_tensor(source, sample, place, mirrored))
                targets.append((log_probs, cells))
        logits = student(torch.cat(crops))
        terms = [
            distillation(logits[k : k + 1], log_probs, cells, (SIZE, SIZE))
            for k, (log_probs, cells) in enumerate(targets)
        ]
        loss = torch.stack(terms).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimiser.step()
        if step % 20 == 0 or step in (1, options.steps):
            print(f"step {step}: KL(teacher || student) {loss.item():.3f} nats a cell", flush=True)


if __name__ == "__main__":
    main()
