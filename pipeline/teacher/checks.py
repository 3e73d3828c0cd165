"""What a teacher says of itself before it is cached: how sure it is of its answers, and whether it is fed as trained.

Shapes: images H,W,3 uint8 RGB; log-probabilities 1,C,h,w on the teacher's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from segkd.pipeline.data.sample import DataSource, Role, Sample, with_role
from segkd.pipeline.evaluation.metrics import ConfusionMatrix
from segkd.pipeline.evaluation.scores import score
from segkd.pipeline.models.network import Preprocessing
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.resample import LOWEST, to_cells
from segkd.pipeline.teacher.targets import kl_divergence
from segkd.storage.errors import NetworkError
from segkd.storage.geometry import Affine, flip, resize, shift

Pixels = npt.NDArray[np.uint8]
View = Callable[[Pixels], tuple[Pixels, Affine, Affine]]
"""An image -> another view of it, and per axis (y, x) the view's pixels -> the image's."""

LABELS_OF = (Role.SELECT, Role.TRAIN)
"""Whose labels the checks read: those of report are for final figures, those of auxiliary for no network at all."""

CLEARLY = 3.0
"""Points of mIoU by which a variant must beat the description, and a constant answer, before it is believed: on eight
CamVid images the wrong order of channels costs 10 points, and a right description is beaten on none of them."""


def mirrored(image_HW3: Pixels) -> tuple[Pixels, Affine, Affine]:
    """The image seen in a mirror."""
    return np.ascontiguousarray(image_HW3[:, ::-1]), Affine(), flip(image_HW3.shape[1])


def scaled(factor: float) -> View:
    """The image at another size."""

    def view(image_HW3: Pixels) -> tuple[Pixels, Affine, Affine]:
        height, width = image_HW3.shape[:2]
        rows, columns = (max(round(factor * pixels), 1) for pixels in (height, width))
        resized = Image.fromarray(image_HW3).resize((columns, rows), Image.Resampling.BILINEAR)
        return np.asarray(resized), resize(height, rows), resize(width, columns)

    return view


def middle_quarter(image_HW3: Pixels) -> tuple[Pixels, Affine, Affine]:
    """The middle of the image: half of its height and of its width."""
    rows, columns = (range(side // 4, side // 4 + -(-side // 2)) for side in image_HW3.shape[:2])
    part = image_HW3[rows.start : rows.stop, columns.start : columns.stop]
    return np.ascontiguousarray(part), shift(rows.start), shift(columns.start)


VIEWS: dict[str, View] = {
    "flip": mirrored,
    "scale 1/2": scaled(0.5),
    "scale 2": scaled(2.0),
    "quarter crop": middle_quarter,
}
"""The ways in which a teacher is asked the same thing again."""


def self_disagreement(predictor: Predictor, images: Iterable[tuple[str, Pixels]]) -> dict[str, float | None]:
    """Per view KL(teacher || teacher on the view) in nats: the mean over the cells that both see, then over the images.

    ``images``: name and pixels. None for a view that the network cannot be given on any image, for its size or for lack
    of memory, and for the mirror where the teacher sees both sides anyway. The bound on what coding may cost is to stay
    an order below: then the teacher itself is the noise.
    """
    found: dict[str, list[float]] = {name: [] for name in VIEWS}
    for name, image_HW3 in images:
        teacher, mapping = predictor.predict([image_HW3], [name])
        for kind, view in VIEWS.items():
            if view is mirrored and any(seen.mirrored for seen in predictor.views):
                continue
            seen_HW3, y, x = view(image_HW3)
            try:
                again, seen = predictor.predict([seen_HW3], [name])
            except (NetworkError, torch.OutOfMemoryError):
                continue
            rows, columns = (
                axis.inside(*sorted((back(-0.5), back(pixels - 0.5))))
                for axis, back, pixels in zip((mapping.y, mapping.x), (y, x), seen_HW3.shape[:2], strict=True)
            )
            if not (rows and columns and min(seen.shape)):
                continue
            here, there = mapping.part(rows, columns), seen.through(y, x)
            brought = to_cells(again, there, here)
            kept = teacher[..., rows.start : rows.stop, columns.start : columns.stop].clamp_min(LOWEST)
            found[kind].append(float(kl_divergence(kept, brought).mean(dtype=torch.float64)))
    return {kind: sum(values) / len(values) if values else None for kind, values in found.items()}


def ignored_cells(predictor: Predictor, images: Iterable[tuple[str, Pixels]]) -> float:
    """The share of the cells in which classes that ``class_map`` ignores have more than half of the probability.

    ``images``: name and pixels; the mean of their shares. What the other classes have there is little, and is what is
    cached all the same, scaled up to 1. Pixels that the data exclude are not left out: the teacher knows nothing of
    them.
    """
    if not predictor.ignored:
        return 0.0
    shares = [predictor.ignored_cells(image_HW3) for _, image_HW3 in images]
    return sum(shares) / len(shares)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Another description of the teacher, and how it does on the same labels."""

    setting: str
    """What to write into the run file to have it."""
    miou: float | None
    """In percent."""
    better: int
    """Images of which it labels more pixels rightly than the description does."""
    worse: int
    """Images of which it labels fewer."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The teacher's scores on a few labelled images: as it is described, and as it might have been meant."""

    samples: int
    miou: float | None
    """As described, in percent."""
    constant: float
    """The mIoU of always answering the most frequent class, in percent: what any teacher must be better than."""
    variants: tuple[Variant, ...]

    @property
    def suspect(self) -> Variant | None:
        """The best variant that clearly beats the description: in mIoU, and on most of the images where they differ.

        Among teachers that know nothing of these labels none is: they differ by luck.
        """
        least = max(self.miou or 0.0, self.constant) + CLEARLY
        clear = [
            variant
            for variant in self.variants
            if (variant.miou or 0.0) >= least and variant.better > 3 * variant.worse
        ]
        return max(clear, key=lambda variant: variant.miou or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "suspect": None if self.suspect is None else self.suspect.setting}


def other_preprocessings(preprocessing: Preprocessing) -> dict[str, Preprocessing]:
    """The descriptions that are mistaken for this one without any error, by the setting that leads to each."""
    channels: Literal["RGB", "BGR"] = "BGR" if preprocessing.channels == "RGB" else "RGB"
    pixel_range: Literal["0-1", "0-255"] = "0-255" if preprocessing.range == "0-1" else "0-1"
    others = {
        f'channels = "{channels}"': replace(preprocessing, channels=channels),
        f'range = "{pixel_range}"': replace(preprocessing, range=pixel_range),
    }
    mean, std = preprocessing.mean[::-1], preprocessing.std[::-1]
    if (mean, std) != (preprocessing.mean, preprocessing.std):
        setting = f"mean = {list(mean)}, std = {list(std)}"
        others[setting] = replace(preprocessing, mean=mean, std=std)
        others[f'channels = "{channels}", {setting}'] = replace(preprocessing, channels=channels, mean=mean, std=std)
    return others


def fit(predictor: Predictor, source: DataSource, samples: Sequence[Sample]) -> Fit:
    """Scores the teacher on labelled ``samples`` as described and with the mistakes that are silent.

    They are the channels' order, the order of mean and std, the range of the pixel values, classes that are numbered
    from one too low or too high, and classes in another order. Raises DataError, NetworkError, NonFiniteError.
    """
    described, counts = _scored(predictor, source, samples)
    variants = []
    for setting, preprocessing in other_preprocessings(predictor.config.preprocessing).items():
        other = Predictor(
            predictor.network,
            replace(predictor.config, preprocessing=preprocessing),
            predictor.classes,
            device=predictor.device,
            precision=predictor.precision,
        )
        variants.append(_variant(f"preprocessing: {setting}", counts, _scored(other, source, samples)[1]))
    for offset in (1, -1):
        shifted = [np.roll(matrix, offset, axis=1) for matrix in counts]
        setting = f"classes: each of the teacher's channels is class {offset:+d} of its list"
        variants.append(_variant(setting, counts, shifted))
    variants += reordered(counts, source.classes.names)
    labelled = np.sum(counts, axis=(0, 2))
    constant = 100 * float(labelled.max()) / max(float(labelled.sum()), 1) / max(int((labelled > 0).sum()), 1)
    return Fit(samples=len(samples), miou=described, constant=constant, variants=tuple(variants))


def reordered(counts: Sequence[npt.NDArray[np.int64]], names: Sequence[str]) -> list[Variant]:
    """The teacher with its classes in the order that fits the labels best; none where that is the order it has.

    ``counts``: each image's confusion matrix. An image is scored in the order that fits the *other* images, as any
    teacher fits the labels somewhat better in an order that was chosen by them.
    """
    total: npt.NDArray[np.int64] = np.sum(counts, axis=0)
    order = _best_order(total)
    moved = [
        f"its {names[teacher]} is {names[data]}"
        for data, teacher in enumerate(order)
        if teacher != data and total[data, teacher]
    ]
    if not moved:
        return []
    scored = [matrix[:, _best_order(total - matrix)] for matrix in counts]
    told = ", ".join(moved[:4]) + (", …" if len(moved) > 4 else "")
    return [_variant(f"classes in another order: {told}", counts, scored)]


def _best_order(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """For each of the data's classes the teacher's class that answers for it, so that mIoU is greatest."""
    union = counts.sum(1)[:, None] + counts.sum(0) - counts
    # Where it makes no difference a class is what it is called.
    fit = counts / np.maximum(union, 1) + 1e-9 * np.eye(len(counts))
    order: npt.NDArray[np.intp] = linear_sum_assignment(fit, maximize=True)[1]
    return order


def labelled_samples(source: DataSource) -> tuple[Sample, ...]:
    """The samples whose labels the checks may read."""
    return tuple(sample for sample in with_role(source, *LABELS_OF) if sample.labelled)


def _scored(
    predictor: Predictor, source: DataSource, samples: Sequence[Sample]
) -> tuple[float | None, list[npt.NDArray[np.int64]]]:
    """mIoU over all samples, and each sample's own confusion matrix."""
    counts: list[npt.NDArray[np.int64]] = []
    scores = score(
        lambda sample, image: predictor.predict([image], [sample.id]),
        source,
        samples,
        on_sample=lambda _, confusion: counts.append(confusion.counts),
    )
    return scores.miou, counts


def _variant(
    setting: str, described: Sequence[npt.NDArray[np.int64]], other: Sequence[npt.NDArray[np.int64]]
) -> Variant:
    total = ConfusionMatrix(len(other[0]))
    total.counts = np.sum(other, axis=0)
    right = [(ours.trace(), theirs.trace()) for ours, theirs in zip(described, other, strict=True)]
    return Variant(
        setting=setting,
        miou=total.compute().miou,
        better=sum(int(theirs > ours) for ours, theirs in right),
        worse=sum(int(theirs < ours) for ours, theirs in right),
    )
