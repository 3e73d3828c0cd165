"""What every network is to the rest of the project: logits on its own grid, where that grid lies, what it is fed.

Shapes: images N,3,H,W; logits N,C,h,w.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from segkd.pipeline.evidence import Evidence, Row
from segkd.storage.errors import ConfigError
from segkd.storage.geometry import Axis, Convention, Mapping, network_axis, resize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The native grid that a network declares."""

    stride: int
    """Input pixels a cell; an axis of n pixels has ceil(n / stride) cells."""
    convention: Convention = "span"
    """Where the cells lie, see :func:`segkd.storage.geometry.network_axis`."""

    def cells(self, pixels: int) -> int:
        """Cells along an axis of ``pixels`` input pixels."""
        return -(-pixels // self.stride)

    def axis(self, pixels: int) -> Axis:
        """The grid's axis in the pixels of the network's input."""
        return network_axis(pixels, self.cells(pixels), convention=self.convention, stride=self.stride)

    def mapping(self, height: int, width: int) -> Mapping:
        """The grid in an input of ``height`` x ``width`` pixels."""
        return Mapping(self.axis(height), self.axis(width))

    def mapping_in(self, crop: tuple[int, int], fed: tuple[int, int]) -> Mapping:
        """The same cells in the pixels of a crop (H, W) that the network was fed at the size ``fed`` (H', W')."""
        return self.mapping(*fed).through(resize(crop[0], fed[0]), resize(crop[1], fed[1]))


@runtime_checkable
class SegmentationNetwork(Protocol):
    """A built-in network is an ``nn.Module`` with this in addition."""

    grid: Grid
    num_classes: int

    def __call__(self, images_N3HW: Tensor) -> Tensor:
        """Logits N,C,h,w on the native grid."""
        ...


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a network's input is made of an RGB uint8 image by: resize, channel order, range, normalise, pad."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted, in the network's own channel order and range."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divided by, in the network's own channel order and range."""
    range: Literal["0-1", "0-255"] = "0-1"
    """The range of pixel values before ``mean`` and ``std``."""
    channels: Literal["RGB", "BGR"] = "RGB"
    """The order that the network was trained with."""
    resize: tuple[int, int] | None = None
    """Height and width that every image is brought to; none keeps its size. Training crops are not: see ``scale``."""
    scale: float = 1.0
    """Factor on the sides of images, and of training crops: 0.5 works at half resolution. Labels keep their size."""
    multiple_of: int = 1
    """Right and lower padding brings both sides to a multiple of this; padded cells are not kept."""
    pad: Literal["mean", "edge"] = "mean"
    """What padding holds: the mean (0 after normalising) or the border pixel."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ConfigError(f"mean is {list(self.mean)} and std {list(self.std)}; std must be above 0, both finite")
        if min(self.multiple_of, *(self.resize or (1,))) < 1:
            raise ConfigError(f"multiple_of is {self.multiple_of} and resize {self.resize}; all must be at least 1")
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"scale is {self.scale}; it must be a finite number above 0 (1 keeps the size)")
        if self.resize is not None and self.scale != 1:
            raise ConfigError(f"resize is {list(self.resize)} and scale {self.scale}; keep one of them")

    def enlarged(self, factor: float) -> Preprocessing:
        """The same, but that the sides of images are ``factor`` times as long."""
        if self.resize is None:
            return replace(self, scale=self.scale * factor)
        height, width = (max(1, round(side * factor)) for side in self.resize)
        return replace(self, resize=(height, width))

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """The size that an image, or a training crop, of ``height`` x ``width`` pixels is brought to by ``scale``."""
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Any network, as a run file describes it."""

    reference: str
    """A built-in name, ``module:callable``, ``file.py:callable``, ``net.pt2``, ``scripted.pt`` or a checkpoint."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the constructor, such as ``width = 0.25``."""
    init: str | None = None
    """Weights to start from (``.pth``, ``.safetensors``): the backbone's keys or a whole network's."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """What it is fed."""
    stride: int | None = None
    """Native stride of a network that does not declare its grid."""
    align_corners: bool = False
    """Whether the logits of such a network are meant to be brought to pixels with ``align_corners=True``."""
    output: str | int | None = None
    """Key, attribute or position of the logits where the network returns a dict, an object or a tuple."""
    produces: Literal["logits", "probabilities"] = "logits"
    """What comes out."""
    classes: tuple[str, ...] | None = None
    """Its classes in channel order; none: those of the data."""
    class_map: dict[str, str] = field(default_factory=dict)
    """Its classes -> classes of the data, many to one; a class of the same name needs no entry. "ignore" drops one
    (``background = "ignore"``), and the others share what it had, in proportion, even where that is nearly all;
    ``segkd plan`` warns where that is in many cells."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of an image that a teacher is shown. What it says of each is brought to the cells of the plain image,
    and the mean of these probabilities is the teacher's word. That takes time in stage 1, and none where a student
    learns from the cache."""

    evidence: ClassVar[Evidence] = {
        "flip": Row("views.md", "flip"),
        "scales": Row("views.md", "scales 1, 1.5"),
        "window": Row("views.md", "windows of 192×256"),
        "overlap": None,
    }

    flip: bool = False
    """Whether it sees each image mirrored left to right, too."""
    scales: tuple[float, ...] = (1.0,)
    """Factors on the sides of the image that it sees. The cells are those of the factor 1 in any case."""
    window: tuple[int, int] | None = None
    """Height and width of what it sees at once, in pixels of its input, for large images, or for a teacher that was
    trained on crops of that size: a larger input is seen in windows that slide over it, each answer weighted by a
    raised cosine. A multiple of ``preprocessing.multiple_of``, which is to be one of the stride. None: whole images."""
    overlap: float = 0.25
    """The share of its sides that a window has in common with the next one, at least."""

    def __post_init__(self) -> None:
        if not self.scales or not all(1 / 16 <= scale <= 16 for scale in self.scales):
            raise ConfigError(f"scales is {list(self.scales)}; it must name at least one factor, from 1/16 to 16")
        if len(set(self.scales)) < len(self.scales):
            raise ConfigError(f"scales is {list(self.scales)}; they must differ")
        if self.window is not None and min(self.window) < 1:
            raise ConfigError(f"window is {list(self.window)}; height and width must be at least 1")
        if not 0 <= self.overlap <= 0.9:
            raise ConfigError(f"overlap is {self.overlap:g}; it must be 0 to 0.9")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(NetworkConfig):
    """A network, and how it is asked."""

    views: Views = field(default_factory=Views)
    """The views of each image over which its answers are averaged."""


Described = TypeVar("Described", bound=NetworkConfig)
"""A network's description, of one kind or the other."""
