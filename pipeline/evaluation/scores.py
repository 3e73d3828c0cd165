"""How well a network, a teacher or a cached teacher labels the samples of a data set.

The protocol: log-probabilities (or logits) brought to each label's own size, argmax, one confusion matrix over all
samples, one scale.

Shapes: images H,W,3; log-probabilities 1,C,h,w on a native grid; labels H,W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segkd.pipeline import processes
from segkd.pipeline.data.sample import IGNORE, DataSource, Sample
from segkd.pipeline.evaluation.metrics import BAND_PIXELS, ConfusionMatrix, Measures, as_tensor, boundary_band
from segkd.pipeline.evaluation.pixels import check_output, label_map
from segkd.storage.errors import DataError
from segkd.storage.geometry import Mapping

Predict = Callable[[Sample, npt.NDArray[np.uint8]], tuple[Tensor, Mapping]]
"""A sample and its image ``(H, W, 3)`` -> log-probabilities or logits ``(1, C, h, w)`` and where their cells lie."""

OnSample = Callable[[Sample, ConfusionMatrix], None]
"""Hears of each sample that was scored, with its own confusion matrix."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """The scores of one network on one list of samples; all rates in percent, None = n/a."""

    classes: tuple[str, ...]
    samples: int
    """How many samples were scored."""
    confusion: ConfusionMatrix
    """Over all valid pixels."""
    boundary_confusion: ConfusionMatrix
    """Over the valid pixels near a label boundary, see :func:`segkd.pipeline.evaluation.metrics.boundary_band`."""

    @cached_property
    def _measures(self) -> Measures:
        return self.confusion.compute()

    @property
    def miou(self) -> float | None:
        """Mean IoU over the classes that occur in labels or predictions."""
        return self._measures.miou

    @property
    def macc(self) -> float | None:
        """Mean of the classes' accuracies, over the classes that occur in labels."""
        return self._measures.macc

    @property
    def aacc(self) -> float | None:
        """Accuracy over all valid pixels."""
        return self._measures.aacc

    @cached_property
    def boundary_miou(self) -> float | None:
        """Mean IoU in the band of 3 pixels on either side of the label boundaries."""
        return self.boundary_confusion.compute().miou

    @property
    def per_class(self) -> dict[str, float | None]:
        """IoU of each class."""
        return dict(zip(self.classes, self._measures.iou, strict=True))

    @property
    def per_class_accuracy(self) -> dict[str, float | None]:
        """Accuracy (recall) of each class."""
        return dict(zip(self.classes, self._measures.accuracy, strict=True))

    @property
    def pixels(self) -> int:
        """How many valid pixels were scored."""
        return int(self.confusion.counts.sum())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "miou": self.miou,
            "macc": self.macc,
            "aacc": self.aacc,
            "boundary_miou": self.boundary_miou,
            "per_class": self.per_class,
            "per_class_accuracy": self.per_class_accuracy,
            "samples": self.samples,
            "pixels": self.pixels,
        }

    def table(self) -> str:
        """For people: a line a class, then the means."""
        name_width = max(len(name) for name in (*self.classes, "mean"))
        shares = self.confusion.counts.sum(1) / max(self.pixels, 1)
        lines = [f"{'class':<{name_width}}     IoU     acc  pixels"]
        for name, iou, accuracy, share in zip(
            self.classes, self._measures.iou, self._measures.accuracy, shares, strict=True
        ):
            lines.append(f"{name:<{name_width}}  {_rate(iou)}  {_rate(accuracy)}  {share:6.1%}")
        lines.append(f"{'mean':<{name_width}}  {_rate(self.miou)}  {_rate(self.macc)}")
        lines.append(
            f"aAcc {_rate(self.aacc).strip()}, boundary mIoU ({BAND_PIXELS} px) {_rate(self.boundary_miou).strip()}; "
            f"{self.samples:,} samples, {self.pixels:,} valid pixels"
        )
        return "\n".join(lines)


def score(
    predict: Predict,
    source: DataSource,
    samples: Sequence[Sample],
    *,
    on_sample: OnSample | None = None,
) -> Scores:
    """Score ``predict`` on ``samples``, all of which need labels.

    ``on_sample`` is called after each sample with the sample's own confusion matrix: for progress, and for whoever
    resamples over samples. Several processes share the samples out and all return the scores of all: a collective
    call, see :mod:`segkd.pipeline.processes`.

    Raises DataError when there is nothing to score, when a sample has no labels or labels of another size than its
    image, and NetworkError when an output does not have the data's classes.
    """
    _check_labelled(samples)
    classes = source.classes
    total, boundary = ConfusionMatrix(len(classes)), ConfusionMatrix(len(classes))
    for sample in samples[processes.rank() :: processes.count()]:
        image_HW3, labels_HW = source.image(sample), as_tensor(source.labels(sample))
        height, width = image_HW3.shape[:2]
        if labels_HW.shape != (height, width):
            raise DataError(
                f"sample {sample.id!r}: the label map has {tuple(labels_HW.shape)} pixels, its image {(height, width)} "
                "(height, width); they must be of one size, run `segkd data check` to find all that are not"
            )
        log_probs_1Chw, mapping = predict(sample, image_HW3)
        check_output(log_probs_1Chw, len(classes), f"sample {sample.id!r}")
        predicted_HW = label_map(log_probs_1Chw, mapping, height, width).cpu()
        of_sample = ConfusionMatrix(len(classes))
        of_sample.update(labels_HW, predicted_HW)
        boundary.update(torch.where(boundary_band(labels_HW), labels_HW, IGNORE), predicted_HW)
        total += of_sample
        if on_sample is not None:
            on_sample(sample, of_sample)
    for matrix in (total, boundary):
        processes.total(torch.from_numpy(matrix.counts))
    return Scores(classes=classes.names, samples=len(samples), confusion=total, boundary_confusion=boundary)


def _check_labelled(samples: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("there is no sample to score; check the roles that the data give and the one asked for")
    bare = [sample.id for sample in samples if not sample.labelled]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(samples)} samples have no label map, the first is {bare[0]!r}; "
            "score a role that is labelled, or give the labels' place in [data]"
        )


def _rate(percent: float | None) -> str:
    return "   n/a" if percent is None else f"{percent:6.2f}"
