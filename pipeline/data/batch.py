"""The batch of a training step: crops, and the teacher's knowledge of every image that a crop was cut from.

A crop is made of one or more *sources* (one image each; several under CutMix). The sources of all crops of a batch
stand in one flat list of length S; ``crop_S`` says to which crop each belongs.

Shapes: N crops of H,W pixels; S sources, each with a window of h,w teacher cells (padded to the largest of the batch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a teacher beside the student is to look at for one source, and which of its cells the window is."""

    image: npt.NDArray[np.uint8]
    """H,W,3: a whole image, or a crop of one."""
    rows: range
    columns: range
    sample: str
    whole: bool
    """Whether it is the sample's whole image, which looks alike whenever it comes."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The teacher's side of the images behind a batch's crops: codes from a cache, or what to ask it about."""

    crop_S: Tensor
    """int64, on the CPU: the crop that each source belongs to."""
    cell_to_crop_S22: Tensor
    """float64, on the CPU: ``[[scale_y, offset_y], [scale_x, offset_x]]`` from window cell to crop pixel."""
    counts_Shw: Tensor
    """bool: the cell's centre lies in the image, in the crop and in the source's region of it."""
    counts_first_Shw: Tensor
    """bool: the cell counts, and so do all of its neighbours that exist in the image."""
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    """Per target its codes ``(S, channels, h, w)`` as they stand in the cache; zero outside the window. float32 values
    where only some of the samples are kept exactly: the coder decodes either."""
    rungs: Mapping[str, Tensor] = field(default_factory=dict)
    """Per target int64 ``(S,)``: the rung of its coding ladder that each sample was written with."""
    looks: tuple[Look, ...] = ()
    """Without a cache, what the teacher is to look at for each source."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training step's input."""

    images_N3HW: Tensor
    """float32 RGB, normalised as the student's description says; at its scale, which may be another than the crop's."""
    labels_NHW: Tensor
    """int64, 255 = ignore; all 255 where a sample's label may not be used."""
    labelled_N: Tensor
    """bool: whether the crop comes from a sample of role train. Such crops come first."""
    sources: Sources | None
    """None when nothing is distilled."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Samples whose knowledge is left out because the cache is damaged there: id -> what is wrong."""

    def to(self, device: torch.device) -> Batch:
        """The same batch with everything that the loss computes with on ``device``."""
        sources = self.sources
        if sources is not None:
            sources = replace(
                sources,
                counts_Shw=sources.counts_Shw.to(device, non_blocking=True),
                counts_first_Shw=sources.counts_first_Shw.to(device, non_blocking=True),
                codes={name: codes.to(device, non_blocking=True) for name, codes in sources.codes.items()},
                rungs={name: rungs.to(device, non_blocking=True) for name, rungs in sources.rungs.items()},
            )
        return Batch(
            images_N3HW=self.images_N3HW.to(device, non_blocking=True),
            labels_NHW=self.labels_NHW.to(device, non_blocking=True),
            labelled_N=self.labelled_N.to(device, non_blocking=True),
            sources=sources,
            damaged=self.damaged,
        )
