"""From an image to a network's input, and from the input's pixels back to the image's.

Shapes: image H,W,3 uint8 RGB; input 3,H',W' float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from segkd.pipeline.models.network import Preprocessing
from segkd.storage.geometry import Affine, resize


def normalise(images_N3HW: Tensor, preprocessing: Preprocessing) -> Tensor:
    """RGB values 0-255, of any dtype, in the range, order and normalisation that the network expects: float32."""
    images = images_N3HW.float()
    if preprocessing.channels == "BGR":
        images = images.flip(-3)
    if preprocessing.range == "0-1":
        images = images / 255
    mean = torch.tensor(preprocessing.mean, device=images.device)[:, None, None]
    std = torch.tensor(preprocessing.std, device=images.device)[:, None, None]
    return (images - mean) / std


def resized(image: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The image at H', W' pixels: bilinear, antialiased where it shrinks."""
    if size == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def placement(height: int, width: int, preprocessing: Preprocessing) -> tuple[tuple[int, int], Affine, Affine]:
    """The size H', W' of the input that an image becomes, and per axis (y, x) its pixels -> the image's."""
    scaled = preprocessing.resize or preprocessing.scaled(height, width)
    padded = (scaled[0] + -scaled[0] % preprocessing.multiple_of, scaled[1] + -scaled[1] % preprocessing.multiple_of)
    return padded, resize(height, scaled[0]), resize(width, scaled[1])


def prepare(image: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    """The network's input for ``image``; :func:`placement` says where its pixels lie."""
    image = resized(image, preprocessing.resize or preprocessing.scaled(*image.shape[:2]))
    # A copy in any case: torch takes no array that cannot be written to.
    tensor = normalise(torch.from_numpy(image.transpose(2, 0, 1).copy()), preprocessing)
    return padded(tensor[None], preprocessing)[0]


def padded(normalised_N3HW: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalised images with the right and lower padding that the network needs."""
    bottom, right = (-side % preprocessing.multiple_of for side in normalised_N3HW.shape[-2:])
    if not (bottom or right):
        return normalised_N3HW
    # After normalising, the mean is 0.
    mode = "replicate" if preprocessing.pad == "edge" else "constant"
    return F.pad(normalised_N3HW, (0, right, 0, bottom), mode=mode)
