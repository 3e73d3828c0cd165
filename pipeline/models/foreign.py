"""Networks from elsewhere: their output picked out, turned into logits and held against their description.

Shapes: images N,3,H,W; logits N,C,h,w.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting

from segkd.pipeline.models.layers import SINGLE_VALUE, Network, evaluating
from segkd.pipeline.models.network import Grid, NetworkConfig
from segkd.storage.errors import NetworkError, ProcessError

PROBE_SIZE = (256, 256)
"""Height and width of the image that shows a network's stride, where its preprocessing does not fix a size."""

_TOLERANCE = 0.01
"""By how much probabilities in half precision may leave 0 to 1, or their sum 1."""


class ForeignNetwork(Network):
    """Any module that takes images, with the grid, output and kind of values that its description states."""

    def __init__(self, network: nn.Module, config: NetworkConfig, num_classes: int) -> None:
        """A grid that neither network nor description states is inferred by a pass over a black image.

        Raises NetworkError where the description contradicts the network.
        """
        declared = getattr(network, "grid", None)
        if isinstance(declared, Grid):
            check_grid(declared, config)
        elif config.stride is not None:
            declared = Grid(stride=config.stride, convention="corners" if config.align_corners else "span")
        else:
            declared = _infer_grid(network, config)
        super().__init__(declared, num_classes)
        self.network = network
        self.config = config
        self.training = network.training
        self._looked_at = False

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """Raise NetworkError where the network fails, or its output is not what the description says."""
        try:
            output_NChw = _output(self.network, self.config, images_N3HW)
        except (NetworkError, ProcessError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise NetworkError(
                f"{self.config.reference} failed on images of shape {tuple(images_N3HW.shape)} ({_reason(error)}); set "
                "preprocessing.multiple_of or resize to the sizes that it takes, or repair the network"
            ) from error
        classes, *cells = output_NChw.shape[1:]
        if classes != self.num_classes:
            raise NetworkError(
                f"{self.config.reference} returned {classes} classes, expected {self.num_classes}; state its own "
                "classes in its order (classes = [...]), and in class_map what they mean"
            )
        sizes = images_N3HW.shape[-2:]
        expected = [self.grid.cells(size) for size in sizes]
        if cells != expected:
            raise NetworkError(
                f"{self.config.reference} returned {_by(cells)} cells for an input of {_by(sizes)} pixels; stride "
                f"{self.grid.stride} means {_by(expected)}; correct stride, or set preprocessing.multiple_of to what "
                "the network needs"
            )
        if self.config.produces == "probabilities":
            return _log_probabilities(output_NChw, self.config)
        if not self._looked_at:  # once: on a GPU every look waits for it
            _require_no_probabilities(output_NChw, self.config)
            self._looked_at = True
        return output_NChw


class RecordedNetwork(nn.Module):
    """A program of ``torch.export`` or a frozen TorchScript: it was recorded in one mode and stays in it."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program
        self.training = False

    def train(self, mode: bool = True) -> RecordedNetwork:  # noqa: ARG002  # the signature is nn.Module's
        """Keeps the recorded mode: the program itself refuses to change it."""
        return self

    def forward(self, images_N3HW: Tensor) -> Any:
        """Raise NetworkError for an input of a shape that the program was not exported for."""
        try:
            return self.program(images_N3HW)
        except AssertionError as error:
            raise NetworkError(
                f"the program was not exported for inputs of shape {tuple(images_N3HW.shape)} ({error}); export it "
                "with dynamic batch, height and width, or set preprocessing.resize to its size and the batch to its own"
            ) from error


def check_grid(grid: Grid, config: NetworkConfig) -> None:
    """Raise NetworkError where a description contradicts the grid that the network declares."""
    if config.stride not in (None, grid.stride):
        raise NetworkError(
            f"{config.reference} declares stride {grid.stride}, its description says stride = {config.stride}; "
            "remove stride"
        )
    if config.align_corners and grid.convention != "corners":
        raise NetworkError(
            f'{config.reference} declares that its cells lie by "{grid.convention}", its description says '
            "align_corners = true; remove align_corners"
        )


def _output(network: nn.Module, config: NetworkConfig, images_N3HW: Tensor) -> Tensor:
    """What the network returns for images: the chosen part of it, N,C,h,w. Raises NetworkError."""
    # A network in half or double precision takes images of its own kind.
    weights = next((weights for weights in network.parameters() if weights.is_floating_point()), images_N3HW)
    try:
        returned = network(images_N3HW.to(weights.dtype))
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise NetworkError(SINGLE_VALUE) from error
        raise
    picked = _pick(returned, config)
    if picked.ndim != 4 or picked.shape[0] != images_N3HW.shape[0]:  # len() would fix a program's number of images
        raise NetworkError(
            f"{config.reference} returned a tensor of shape {tuple(picked.shape)}, expected "
            f"({images_N3HW.shape[0]}, classes, height, width); choose the logits with output, or wrap the network"
        )
    return picked


def _pick(returned: Any, config: NetworkConfig) -> Tensor:
    if config.output is None and isinstance(returned, Tensor):
        return returned
    picked = None
    if config.output is not None and not isinstance(returned, Tensor):
        by_name = isinstance(config.output, str) and not isinstance(returned, Mapping)
        try:
            picked = getattr(returned, str(config.output)) if by_name else returned[config.output]
        except (AttributeError, LookupError, TypeError):
            picked = None
    if not isinstance(picked, Tensor):
        chosen = "no output is chosen" if config.output is None else f"output = {config.output!r} is no tensor of it"
        raise NetworkError(f"{config.reference} returned {_describe(returned)}, and {chosen}; {_remedy(returned)}")
    return picked


def _describe(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return "a tensor"
    if isinstance(returned, Mapping):
        return f"a mapping with keys {sorted(map(str, returned))}"
    if isinstance(returned, tuple | list):
        return f"a {type(returned).__name__} of {len(returned)}"
    return f"an object of type {type(returned).__name__}"


def _remedy(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return "remove output"
    if isinstance(returned, Mapping):
        return "set output to the key of the logits"
    if isinstance(returned, tuple | list):
        return "set output to the position of the logits, counted from 0"
    return "set output to the attribute that holds the logits"


def _log_probabilities(output_NChw: Tensor, config: NetworkConfig) -> Tensor:
    """The logarithm in float32, -inf for 0. A NaN stays one. Raises NetworkError for what are no probabilities."""
    values = output_NChw.float()
    total = values.sum(1)
    # A program is recorded for all values, and cannot ask what they are.
    if not is_exporting() and ((values < -_TOLERANCE).any(1) | ((total - 1).abs() > _TOLERANCE)).any():
        raise NetworkError(
            f'{config.reference} is described by produces = "probabilities", but its values reach from '
            f"{values.min():.3g} to {values.max():.3g} and add up to {total.min():.3g} to {total.max():.3g} over the "
            'classes; set produces = "logits"'
        )
    return values.clamp_min(0).log()


def _require_no_probabilities(output_NChw: Tensor, config: NetworkConfig) -> None:
    """Raises NetworkError for values that are distributions in every cell: a softmax of them has the same argmax and
    looks like a teacher that is sure of nothing."""
    values = output_NChw.detach().float()
    distributions = (values >= -_TOLERANCE).all() & ((values.sum(1) - 1).abs() <= _TOLERANCE).all()
    if values.shape[1] > 1 and bool(distributions):
        raise NetworkError(
            f"{config.reference} returned values that add up to 1 over the classes, and none below 0: probabilities, "
            'not logits; set produces = "probabilities"'
        )


def _infer_grid(network: nn.Module, config: NetworkConfig) -> Grid:
    """The grid that one pass over a black image shows. Raises NetworkError."""
    multiple = config.preprocessing.multiple_of
    height, width = (-(-size // multiple) * multiple for size in config.preprocessing.resize or PROBE_SIZE)
    parameter = next(network.parameters(), None)
    image = torch.zeros(1, 3, height, width, device=None if parameter is None else parameter.device)
    try:
        with evaluating(network), torch.no_grad():
            cells = _output(network, config, image).shape[-2:]
    except NetworkError:
        raise
    except Exception as error:
        raise NetworkError(
            f"{config.reference} failed on a black image of {height}x{width} pixels, from which its stride was to be "
            f"read ({_reason(error)}); state stride, or the size that it needs in preprocessing"
        ) from error
    stride = max(round(height / cells[0]), 1)
    grid = Grid(stride=stride, convention="corners" if config.align_corners else "span")
    if tuple(cells) != (grid.cells(height), grid.cells(width)):
        raise NetworkError(
            f"{config.reference} returned {_by(cells)} cells for {height}x{width} pixels, which is not "
            "ceil(size / stride) for one stride of both axes; set preprocessing.multiple_of or resize to what the "
            "network needs, or wrap it"
        )
    return grid


def _reason(error: Exception) -> str:
    """An exception in one line: TorchScript's have their reason in the last."""
    return f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"


def _by(sizes: Any) -> str:
    return "x".join(map(str, sizes))
