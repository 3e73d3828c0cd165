"""Segmentation metrics from one confusion matrix.

Shapes: labels and predictions of any one shape, class indices, 255 = ignore; C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.data.sample import IGNORE
from segkd.storage.errors import ConfigError, DataError

LabelMap = npt.NDArray[np.integer] | Tensor
"""Class indices as an array or a tensor, on any device."""

BAND_PIXELS = 3
"""Half the width of the band around label boundaries that the boundary mIoU looks at."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What a confusion matrix says, in percent; None where there is nothing to divide by."""

    iou: tuple[float | None, ...]
    """Per class ``TP / (TP + FP + FN)``. None: in neither labels nor predictions. A class predicted and never
    labelled has 0."""
    accuracy: tuple[float | None, ...]
    """Per class ``TP / (TP + FN)``, its recall. None: never labelled."""
    miou: float | None
    """Mean of ``iou`` over the classes that have one."""
    macc: float | None
    """Mean of ``accuracy`` over the classes that have one."""
    aacc: float | None
    """Share of all valid pixels that are right."""


class ConfusionMatrix:
    """Counts of (label, prediction) pairs over any number of images; two of them merge exactly by ``+``."""

    def __init__(self, num_classes: int) -> None:
        """Raises ConfigError unless there are 1 to 255 classes (255 is the ignored label)."""
        if not 1 <= num_classes <= IGNORE:
            raise ConfigError(f"a confusion matrix of {num_classes} classes; expected 1 to {IGNORE}")
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        """int64 ``(C, C)``: rows are labels, columns predictions."""

    def update(self, labels: LabelMap, predictions: LabelMap) -> None:
        """Count the pixels whose label is not 255.

        Raises DataError when the shapes differ, and when a label or the prediction at a valid pixel is no class.
        """
        if tuple(labels.shape) != tuple(predictions.shape):
            raise DataError(
                f"labels of shape {tuple(labels.shape)} against predictions of shape {tuple(predictions.shape)}; "
                "bring the predictions to the label's own size"
            )
        predicted = as_tensor(predictions)
        truth = as_tensor(labels).to(predicted.device)
        valid = truth != IGNORE
        pairs = truth[valid].long(), predicted[valid].long()
        for what, values in zip(("label", "prediction"), pairs, strict=True):
            if values.numel() and not 0 <= (worst := int(_farthest(values))) < self.num_classes:
                raise DataError(f"a {what} is {worst}; expected 0 to {self.num_classes - 1}, or {IGNORE} to ignore")
        size = self.num_classes
        self.counts += torch.bincount(pairs[0] * size + pairs[1], minlength=size**2).view(size, size).cpu().numpy()

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """The matrix of everything that either of the two has counted."""
        merged = ConfusionMatrix(self.num_classes)
        merged.counts = self.counts + other.counts
        return merged

    def compute(self) -> Measures:
        """All measures of what was counted so far."""
        right, labelled, predicted = self.counts.diagonal(), self.counts.sum(1), self.counts.sum(0)
        iou = _percent(right, labelled + predicted - right)
        accuracy = _percent(right, labelled)
        (overall,) = _percent(right.sum(keepdims=True), labelled.sum(keepdims=True))
        return Measures(iou=iou, accuracy=accuracy, miou=_mean(iou), macc=_mean(accuracy), aacc=overall)


def as_tensor(labels: LabelMap) -> Tensor:
    """The same values as a tensor; an array is copied, because torch cannot share one that is read-only."""
    return labels if isinstance(labels, Tensor) else torch.tensor(labels)


def boundary_band(labels_HW: LabelMap, width: int = BAND_PIXELS) -> Tensor:
    """The pixels within ``width`` pixels of a label boundary, bool ``(H, W)`` on the CPU.

    A pixel belongs to the band when a pixel with another label lies within Chebyshev distance ``width`` of it, so the
    band has ``width`` pixels on either side of an edge. Ignore counts as a label here, because in many data sets the
    edges *are* narrow lines of it; its own pixels are in no score anyway. The border of the image is no boundary.

    The confusion matrix restricted to this band gives the "trimap" mIoU (Kohli, Ladicky, Torr, "Robust higher order
    potentials for enforcing label consistency", IJCV 2009; Chen et al., "DeepLab", PAMI 2018, section 4.3). The
    distance is the one that erosion by a 3 x 3 square gives, as in Boundary IoU (Cheng et al., CVPR 2021), which
    differs in that it also takes the band of the prediction.
    """
    labels_1HW = as_tensor(labels_HW).cpu().float()[None]
    window = 2 * width + 1
    highest = F.max_pool2d(labels_1HW, window, stride=1, padding=width)
    lowest = -F.max_pool2d(-labels_1HW, window, stride=1, padding=width)
    return (highest != lowest)[0]


def _farthest(values: Tensor) -> Tensor:
    """The lowest value when it is negative, else the highest: the one to name when a range is left."""
    lowest, highest = values.aminmax()
    return torch.where(lowest < 0, lowest, highest)


def _percent(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> tuple[float | None, ...]:
    return tuple(100.0 * p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True))


def _mean(values: tuple[float | None, ...]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
