"""A network as a function from images to log-probabilities over the data's classes, on the network's own grid.

Teacher and student go through this one path: stage 1, validation, evaluation and prediction all see the same numbers.

Shapes: images H,W,3 uint8; log-probabilities N,C,h,w float32, C the data's classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from segkd.pipeline.models.network import Grid, NetworkConfig, Preprocessing, TeacherConfig, Views
from segkd.pipeline.models.preprocessing import placement, prepare
from segkd.pipeline.models.windows import blended, windows_of
from segkd.pipeline.resample import to_cells
from segkd.storage.errors import NetworkError, NonFiniteError
from segkd.storage.geometry import Affine, Mapping, flip

Precision = Literal["off", "bf16", "fp16"]
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
IGNORED_CLASS = "ignore"


def class_groups(config: NetworkConfig, classes: Sequence[str]) -> list[list[int]] | None:
    """For each class of the data the network's channels that mean it; None where the channels are those classes.

    Raises NetworkError where a channel means nothing, or a class has no channel.
    """
    names = tuple(config.classes or classes)
    unknown = sorted(set(config.class_map) - set(names))
    if unknown:
        raise NetworkError(f"class_map names {unknown[0]!r}, which the network does not have; its classes: {names}")
    groups: dict[str, list[int]] = {name: [] for name in classes}
    for channel, name in enumerate(names):
        meaning = config.class_map.get(name, name)
        if meaning == IGNORED_CLASS and meaning not in groups:
            continue
        if meaning not in groups:
            change = f"correct {name!r} in" if name in config.class_map else f"add {name!r} to"
            raise NetworkError(
                f"the network's class {name!r} means {meaning!r}, which is not a class of the data; "
                f'{change} its class_map, as one of {tuple(classes)} or "ignore"'
            )
        groups[meaning].append(channel)
    lost = [name for name, channels in groups.items() if not channels]
    if lost:
        raise NetworkError(f"no class of the network means {lost[0]!r}; add one to its class_map, or leave it out")
    ordered = list(groups.values())
    return None if ordered == [[channel] for channel in range(len(names))] else ordered


def kept_cells(
    grid: Grid, preprocessing: Preprocessing, height: int, width: int
) -> tuple[Mapping, tuple[range, range]]:
    """Where a network's kept cells of an image of ``height`` x ``width`` pixels lie in it, and which of its rows and
    columns they are: those whose centres lie inside the image, not in its padding."""
    size, y, x = placement(height, width, preprocessing)
    whole = grid.mapping(*size).through(y, x)
    rows, columns = whole.y.inside_image(height), whole.x.inside_image(width)
    return whole.part(rows, columns), (rows, columns)


@dataclass(frozen=True)
class View:
    """One way in which a network sees an image."""

    scale: float
    preprocessing: Preprocessing
    mirrored: bool

    def prepare(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """The network's input, 3,H',W'."""
        return prepare(image[:, ::-1] if self.mirrored else image, self.preprocessing)

    def kept_cells(self, grid: Grid, height: int, width: int) -> tuple[Mapping, tuple[range, range]]:
        """:func:`kept_cells`, placed in the image as it is and not as it is seen."""
        mapping, kept = kept_cells(grid, self.preprocessing, height, width)
        return mapping.through(Affine(), flip(width) if self.mirrored else Affine()), kept


def shown_by(config: NetworkConfig) -> Views:
    """How a network is shown images: a student plainly."""
    return config.views if isinstance(config, TeacherConfig) else Views()


def views_of(config: NetworkConfig) -> tuple[View, ...]:
    """All ways in which a network sees an image."""
    views = shown_by(config)
    return tuple(
        View(scale, config.preprocessing.enlarged(scale), mirrored)
        for scale in views.scales
        for mirrored in ((False, True) if views.flip else (False,))
    )


def require_windows_fit(config: NetworkConfig, grid: Grid) -> None:
    """Raises NetworkError where a window is no input that the network takes, and where its cells could be cells of the
    whole image and are not: then every answer would be blurred by bringing one to the other."""
    window = shown_by(config).window
    if window is None:
        return
    multiple = config.preprocessing.multiple_of
    if grid.convention != "corners" and multiple % grid.stride:  # between corners they never are
        raise NetworkError(
            f"teacher.views.window needs teacher.preprocessing.multiple_of to be a multiple of the stride, "
            f"{grid.stride}, so that windows have cells in common; it is {multiple}"
        )
    if any(side % multiple for side in window) or min(window) < grid.stride:
        raise NetworkError(
            f"teacher.views.window is {list(window)}; its sides must be multiples of "
            f"teacher.preprocessing.multiple_of, {multiple}, and at least the stride, {grid.stride}"
        )


class Predictor:
    """A loaded network, what it is fed and how its classes are read."""

    def __init__(
        self,
        network: nn.Module,
        config: NetworkConfig,
        classes: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        precision: Precision = "off",
    ) -> None:
        self.config = config
        self.classes = tuple(classes)
        self.device = torch.device(device)
        self.precision = precision
        self.network = network.to(self.device).eval()
        self.grid: Grid = network.grid  # type: ignore[assignment]  # nn.Module types every attribute as Tensor | Module
        self.views = views_of(config)
        self._shown = shown_by(config)
        require_windows_fit(config, self.grid)
        self._plain = View(1.0, config.preprocessing, mirrored=False)
        self._groups = class_groups(config, classes)
        used = {*range(len(classes))} if self._groups is None else {*itertools.chain(*self._groups)}
        self.ignored = [channel for channel in range(len(config.classes or classes)) if channel not in used]
        """The network's channels of classes that ``class_map`` ignores."""

    def mapping(self, height: int, width: int) -> Mapping:
        """Where the cells of an answer lie in an image of ``height`` x ``width`` pixels."""
        return kept_cells(self.grid, self.config.preprocessing, height, width)[0]

    def blind_scale(self, height: int, width: int) -> float | None:
        """The scale of a view in which no cell lies in an image of that size but in its padding; None without any.

        The plain image is among them in any case: on its cells the answers are.
        """
        blind = (view for view in (self._plain, *self.views) if 0 in view.kept_cells(self.grid, height, width)[0].shape)
        return next((view.scale for view in blind), None)

    def seen(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of all that the network is given for an image of that size, one after the other: of each
        view, window by window."""
        inputs = (placement(height, width, view.preprocessing)[0] for view in self.views)
        windows = (window for size in inputs for window in windows_of(size, self._shown, self.grid.stride))
        return [(window.height, window.width) for window in windows]

    def prepare(self, image: npt.NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """The network's inputs for an image, 3,H',W' for each of its views."""
        return tuple(view.prepare(image) for view in self.views)

    def predict(self, images: Sequence[npt.NDArray[np.uint8]], names: Sequence[str] = ()) -> tuple[Tensor, Mapping]:
        """Log-probabilities of images of one size, and where their cells lie in each image. Raises as :meth:`infer`."""
        height, width = images[0].shape[:2]
        return self.infer(batched([self.prepare(image) for image in images]), (height, width), names)

    @torch.inference_mode()
    def ignored_cells(self, image: npt.NDArray[np.uint8]) -> float:
        """The share of its cells in which :attr:`ignored` channels have more than half of the probability: the mean of
        its views."""
        shares = []
        for view in self.views:
            rows, columns = view.kept_cells(self.grid, *image.shape[:2])[1]
            logits_1Chw = self.logits(view.prepare(image)[None]).float()
            ignored_hw = logits_1Chw.softmax(1)[0, self.ignored].sum(0)
            shares.append((ignored_hw[rows.start : rows.stop, columns.start : columns.stop] > 0.5).double().mean())
        return float(torch.stack(shares).mean())

    @torch.inference_mode()
    def infer(
        self, prepared: Sequence[Tensor], image_size: tuple[int, int], names: Sequence[str] = ()
    ) -> tuple[Tensor, Mapping]:
        """:meth:`predict` for inputs that :meth:`prepare` has made already: N,3,H',W' for each view.

        Raises NonFiniteError, naming the image, for a NaN or +inf (-inf is legal) and for a cell in which no class is
        left, and NetworkError where the output is not what the description says and where a view has no cell.
        """
        mapping = self.mapping(*image_size)
        plainly = self.views == (self._plain,)
        if (scale := self.blind_scale(*image_size)) is not None:
            raise NetworkError(no_cell(names[0] if names else "an image", image_size, scale))
        total_NChw: Tensor | None = None
        for view, inputs_N3HW in zip(self.views, prepared, strict=True):
            seen, kept = view.kept_cells(self.grid, *image_size)
            log_probs_NChw = self._answer(inputs_N3HW, kept, names)
            if plainly:
                return log_probs_NChw, mapping
            probs_NChw = to_cells(log_probs_NChw, seen, mapping).exp()
            total_NChw = probs_NChw if total_NChw is None else total_NChw + probs_NChw
        assert total_NChw is not None, "there is at least one view"
        return (total_NChw / total_NChw.sum(1, keepdim=True)).log(), mapping

    def _answer(self, prepared_N3HW: Tensor, kept: tuple[range, range], names: Sequence[str]) -> Tensor:
        """Log-probabilities of one view's inputs in its kept rows and columns."""
        rows, columns = kept
        logits = self.logits(prepared_N3HW)
        logits = logits[..., rows.start : rows.stop, columns.start : columns.stop]
        if (name := _first_bad(logits.isnan() | (logits == torch.inf), names)) is not None:
            raise NonFiniteError(
                f"{self.config.reference} returned NaN or +inf for {name}; check its weights and preprocessing"
                + ("" if self.precision == "off" else f", or run without {self.precision} precision")
            )
        log_probs = self.over_classes(logits.float().log_softmax(1))
        if (name := _first_bad(log_probs.isnan(), names)) is not None:
            raise NonFiniteError(
                f"{self.config.reference} gives probability 0 to every class of the data in a cell of {name}; "
                "take its logits rather than its probabilities, or map to a class the ignored one that holds all there"
            )
        return log_probs

    def logits(self, inputs_N3HW: Tensor) -> Tensor:
        """The network's logits on the grid of the inputs; where they are seen in windows, log-probabilities."""
        size = (inputs_N3HW.shape[-2], inputs_N3HW.shape[-1])
        windows = windows_of(size, self._shown, self.grid.stride)
        if len(windows) == 1:
            return self._forward(inputs_N3HW)
        return blended(self._forward, inputs_N3HW, self.grid, windows)

    def _forward(self, inputs_N3HW: Tensor) -> Tensor:
        """The network's logits under the chosen precision. Raises NetworkError for another shape than described."""
        inputs_N3HW = inputs_N3HW.to(self.device, non_blocking=True)
        with torch.autocast(
            self.device.type, AUTOCAST_DTYPES.get(self.precision), enabled=self.precision in AUTOCAST_DTYPES
        ):
            # The fastest layout for convolutions, on CPUs too.
            logits: Tensor = self.network(inputs_N3HW.contiguous(memory_format=torch.channels_last))
        channels = len(self.config.classes or self.classes)
        if logits.shape[1] != channels:
            raise NetworkError(
                f"{self.config.reference} returned {logits.shape[1]} classes, its description has {channels}; "
                "state the network's own classes in its order (classes = [...])"
            )
        expected = tuple(self.grid.cells(size) for size in inputs_N3HW.shape[-2:])
        if logits.shape[-2:] != expected:
            raise NetworkError(
                f"{self.config.reference} returned {logits.shape[-2]}x{logits.shape[-1]} cells for an input of "
                f"{inputs_N3HW.shape[-2]}x{inputs_N3HW.shape[-1]} pixels; stride {self.grid.stride} means "
                f"{expected[0]}x{expected[1]}; correct the network's stride"
            )
        return logits

    def over_classes(self, log_probs_NChw: Tensor) -> Tensor:
        """Log-probabilities over the network's channels as those over the data's classes."""
        if self._groups is None:
            return log_probs_NChw
        merged = torch.stack([log_probs_NChw[:, channels].logsumexp(1) for channels in self._groups], 1)
        # Ignored classes take their share with them: what is left is a distribution again.
        return merged.log_softmax(1)


def no_cell(name: str, size: tuple[int, int], scale: float) -> str:
    """What is wrong with an image in which a network has no cell, and what can be done."""
    remedy = (
        "leave the image out, or give the network a resize"
        if scale == 1
        else f"leave {scale:g} out of teacher.views.scales, or leave the image out"
    )
    at = "" if scale == 1 else f" at {scale:g} times its size"
    return f"{name}: no cell of the network lies in its {size[0]}x{size[1]} pixels{at}; {remedy}"


def batched(prepared: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The inputs of several images of one size, 3,H',W' for each view, as a batch for each view."""
    return [torch.stack(of_view) for of_view in zip(*prepared, strict=True)]


def _first_bad(bad_NChw: Tensor, names: Sequence[str]) -> str | None:
    """The first image of a batch of which a value is bad."""
    bad_N = bad_NChw.flatten(1).any(1)
    if not bad_N.any():
        return None
    first = int(bad_N.nonzero()[0])
    return names[first] if names else f"image {first} of the batch"
