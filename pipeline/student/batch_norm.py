"""Batch norm of a batch that mixes labelled and auxiliary crops: whose statistics normalise whom.

=========== ================ ================== =============================
mode        labelled crops   auxiliary crops    running statistics follow
=========== ================ ================== =============================
joint       those of all     those of all       all crops
labelled    of the labelled  of the labelled    the labelled crops
separate    of the labelled  of the auxiliary   the labelled crops
frozen      the running ones the running ones   nothing
=========== ================ ================== =============================

The affine parameters are shared and learn in every mode. Gradients are those of what is computed: in ``labelled`` the
auxiliary crops' loss also moves the labelled ones' statistics. The network keeps its layers, parameters and buffers; a
layer's own forward pass is called on each part of the batch, so whatever else it does (an activation, a message) it
does in every mode. A layer that is in eval mode by itself is left alone.

Shapes: features N,C,... with the labelled crops first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from segkd.storage.errors import ConfigError, NetworkError

BatchNormMode = Literal["joint", "labelled", "separate", "frozen"]


class BatchNorms:
    """The batch-norm layers of a network.

    Raises ConfigError where a mode other than joint could not do what it says: there is no layer that can be reached,
    or statistics are to be frozen that a layer does not keep.
    """

    def __init__(self, network: nn.Module, mode: BatchNormMode) -> None:
        self._mode = mode
        self._layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}
        if mode != "joint" and not self._layers:
            raise ConfigError(
                f'train.batch_norm is "{mode}", but the student has no batch-norm layer that it could act on (those '
                'of TorchScript and torch.export are out of reach); set it to "joint"'
            )
        for name, layer in self._layers.items():
            if mode == "frozen" and layer.running_mean is None:
                raise ConfigError(
                    f'train.batch_norm is "frozen", but the student\'s layer {name} keeps no running statistics; '
                    'choose "joint", "labelled" or "separate"'
                )

    @contextmanager
    def of_batch(self, labelled: int, crops: int) -> Iterator[None]:
        """Inside, the network's forward pass takes a batch of ``crops`` crops of which the first ``labelled`` are so.

        Raises NetworkError, inside, for a layer that gets something else than one row a crop.
        """
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                if not layer.training:
                    continue
                if self._mode == "frozen":
                    stack.enter_context(_lent(layer, training=False))
                elif self._mode != "joint" and labelled < crops:
                    forward = partial(self._in_parts, name, layer, layer.forward, labelled, crops)
                    stack.enter_context(_lent(layer, forward=forward))
            yield

    def _in_parts(
        self, name: str, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], labelled: int, crops: int, x: Tensor
    ) -> Tensor:
        if len(x) != crops:
            raise NetworkError(
                f"the student's batch-norm layer {name} got {len(x)} rows for {crops} crops, so which of them are "
                f'labelled is unknown; set train.batch_norm, now "{self._mode}", to "joint" or "frozen"'
            )
        known, others = x[:labelled], x[labelled:]
        normalised = forward(known)
        if self._mode == "separate":
            # Without a track of them a layer takes the batch's statistics and leaves its running ones alone.
            with _lent(layer, track_running_stats=False):
                return torch.cat([normalised, forward(others)])
        # What a layer in eval mode takes for its running statistics are those of the labelled crops.
        mean, variance = _moments(known.detach())
        exact = mean.dtype if layer.running_mean is None else layer.running_mean.dtype
        others = _Follow.apply(others, known, mean, variance + layer.eps)  # type: ignore[no-untyped-call]  # by torch
        with _lent(layer, training=False, running_mean=mean.to(exact), running_var=variance.to(exact)):
            return torch.cat([normalised, forward(others)])


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, C; in float32 at least."""
    dimensions = [0, *range(2, x.ndim)]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(dimensions, keepdim=True)
    # torch.var takes four times as long in the layout of convolutions on CPUs.
    return mean.flatten(), (x - mean).square().mean(dimensions)


class _Follow(torch.autograd.Function):
    """``others`` as they are, for a layer that normalises them by the statistics of ``known``, constants to it.

    The gradient is that of ``mean + (others - m(known)) * sqrt(squared / (v(known) + eps))``: as if the layer had
    computed mean m and variance v itself. ``mean`` and ``squared`` (C) are their values, with eps.
    """

    @staticmethod
    def forward(ctx: Any, others: Tensor, known: Tensor, mean: Tensor, squared: Tensor) -> Tensor:
        ctx.save_for_backward(others, known, mean, squared)
        return others.view_as(others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        others, known, mean, squared = ctx.saved_tensors
        dimensions = [0, *range(2, known.ndim)]
        count = known.numel() // known.shape[1]
        mean, squared = (value.view(-1, *[1] * (known.ndim - 2)) for value in (mean, squared))
        of_mean = -gradient.to(mean.dtype).sum(dimensions, keepdim=True)
        of_scale = (gradient * (others - mean)).sum(dimensions, keepdim=True)
        # d mean / d known = 1 / count; d (squared ** -1/2) / d known = -(known - mean) / count * squared ** -3/2.
        of_known = (of_mean - (known - mean) * (of_scale / squared)) / count
        return gradient, of_known.to(known.dtype), None, None


@contextmanager
def _lent(layer: nn.Module, **attributes: Any) -> Iterator[None]:
    """The layer with other attributes (or buffers) for a while."""
    held = {name: getattr(layer, name) for name in attributes}
    own = layer.__dict__.keys() | layer._buffers.keys()
    for name, value in attributes.items():
        setattr(layer, name, value)
    try:
        yield
    finally:
        for name, value in held.items():
            if name in own:
                setattr(layer, name, value)
            else:  # A method, which belongs to the class.
                delattr(layer, name)
