"""Colour and blur perturbation of a student's input; the labels and the teacher's targets do not depend on it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

Matrix = npt.NDArray[np.float64]

# NTSC luma and two chroma axes: a rotation of the chroma plane changes the hue and leaves the luma alone.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)

# The ranges at strength 1.
_TONE = 0.4
_HUE = 0.1
_GREY = 0.2
_BLUR = 0.5
_SIGMA = (0.3, 1.5)


def jitter(image: npt.NDArray[np.uint8], rng: np.random.Generator, strength: float) -> npt.NDArray[np.uint8]:
    """A perturbed copy of an H,W,3 RGB image. A pure function of the image, the generator's state and ``strength``.

    At strength 1 brightness, contrast and saturation vary by 40 % and the hue by a tenth of its circle; one image
    in five turns grey and every second one is blurred by up to 1.5 pixels. Ranges and probabilities grow with the
    strength; 0 changes nothing.
    """
    if strength == 0:
        return image
    picture = Image.fromarray(image)
    # Of each channel by itself: numpy takes several times as long for the mean over the other two axes.
    mean = np.ascontiguousarray(image.reshape(-1, 3).T).mean(1)
    matrix, offset = _colour_map(rng, strength, mean)
    picture = picture.convert("RGB", tuple(np.column_stack([matrix, offset]).ravel().tolist()))
    if rng.random() < _BLUR * strength:
        low, high = _SIGMA
        picture = picture.filter(ImageFilter.GaussianBlur(low + (high - low) * min(strength, 1.0) * rng.random()))
    return np.asarray(picture)


def _colour_map(rng: np.random.Generator, strength: float, mean: npt.NDArray[np.float64]) -> tuple[Matrix, Matrix]:
    """All colour changes as one, ``colour -> matrix @ colour + offset``; contrast is about the image's mean luma."""
    tone = min(_TONE * strength, 0.9)
    brightness, contrast, saturation = rng.uniform(1 - tone, 1 + tone, 3)
    angle = 2 * math.pi * rng.uniform(-_HUE, _HUE) * strength
    if rng.random() < _GREY * strength:
        saturation = 0.0
    cosine, sine = saturation * math.cos(angle), saturation * math.sin(angle)
    chroma = _FROM_YIQ @ np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) @ _TO_YIQ
    pivot = brightness * float(_TO_YIQ[0] @ mean)
    return brightness * contrast * chroma, np.full(3, (1 - contrast) * pivot)
