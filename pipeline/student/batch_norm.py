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

Where processes share a batch, "all", "the labelled" and "the auxiliary" are those of all processes, on CPUs too.

Shapes: features N,C,... with the labelled crops first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm

from segkd.pipeline import processes
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
        if processes.count() > 1 and any(
            isinstance(module, ScriptModule | GraphModule) for module in network.modules()
        ):
            raise ConfigError(
                "the student is a program of TorchScript or torch.export, whose layers are out of reach, so that "
                "processes could not share their batch norm; train it in one process"
            )
        for name, layer in self._layers.items():
            if mode == "frozen" and layer.running_mean is None:
                raise ConfigError(
                    f'train.batch_norm is "frozen", but the student\'s layer {name} keeps no running statistics; '
                    'choose "joint", "labelled" or "separate"'
                )

    @property
    def layers(self) -> Iterable[_BatchNorm]:
        """Those that are within reach."""
        return self._layers.values()

    @contextmanager
    def of_batch(self, labelled: int, crops: int) -> Iterator[None]:
        """Inside, the network's forward pass takes a batch of ``crops`` crops of which the first ``labelled`` are so.

        The backward pass belongs inside, too: activation checkpointing goes forward again there.

        Raises NetworkError, inside, for a layer that gets something else than one row a crop.
        """
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                if not layer.training:
                    continue
                if self._mode == "frozen":
                    stack.enter_context(_lent(layer, training=False))
                elif processes.count() > 1 or (self._mode != "joint" and labelled < crops):
                    forward = partial(self._in_parts, name, layer, layer.forward, labelled, crops)
                    stack.enter_context(_lent(layer, forward=forward))
            yield

    def _in_parts(
        self, name: str, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], labelled: int, crops: int, x: Tensor
    ) -> Tensor:
        if self._mode == "joint":
            return _by_everyones(layer, forward, x)
        if len(x) != crops:
            raise NetworkError(
                f"the student's batch-norm layer {name} got {len(x)} rows for {crops} crops, so which of them are "
                f'labelled is unknown; set train.batch_norm, now "{self._mode}", to "joint" or "frozen"'
            )
        known, others = x[:labelled], x[labelled:]
        normalise = forward if processes.count() == 1 else partial(_by_everyones, layer, forward)
        normalised = normalise(known)
        if not len(others):
            return normalised
        if self._mode == "separate":
            # Without a track of them a layer takes the batch's statistics and leaves its running ones alone.
            with _lent(layer, track_running_stats=False):
                return torch.cat([normalised, normalise(others)])
        return torch.cat([normalised, _by(Moments.of(known.detach()), layer, forward, others, known)])


@dataclass(frozen=True)
class Moments:
    """Of each channel of a batch N,C,...; in float32 at least."""

    mean: Tensor
    """C."""
    variance: Tensor
    """C; biased: the mean square of what lies off the mean."""
    count: int
    """Values a channel."""

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of a batch of which each process has an equal share. A collective call where there are several."""
        dimensions, count, among = [0, *range(2, x.ndim)], x.numel() // x.shape[1], processes.count()
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(dimensions, keepdim=True)
        # torch.var takes four times as long in the layout of convolutions on CPUs.
        variance, mean = (x - mean).square().mean(dimensions), mean.flatten()
        if among > 1:
            # As Chan, Golub and LeVeque (1979) do it, who subtract no large numbers from each other.
            told_P2C = mean.new_zeros(among, 2, len(mean))
            told_P2C[processes.rank()] = torch.stack([mean, variance])
            means_PC, variances_PC = processes.total(told_P2C).unbind(1)
            mean = means_PC.mean(0)
            variance = (variances_PC + (means_PC - mean).square()).mean(0)
        return cls(mean, variance, count * among)


def _by(moments: Moments, layer: _BatchNorm, forward: Callable[[Tensor], Tensor], x: Tensor, known: Tensor) -> Tensor:
    """``x`` normalised by the moments of ``known``: what a layer in eval mode takes for its running statistics."""
    exact = moments.mean.dtype if layer.running_mean is None else layer.running_mean.dtype
    given = x, known, moments.mean, moments.variance + layer.eps, moments.count
    followed = _Follow.apply(*given)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with _lent(layer, training=False, running_mean=moments.mean.to(exact), running_var=moments.variance.to(exact)):
        return forward(followed)


def _by_everyones(layer: _BatchNorm, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer in training mode, of a batch that several processes share."""
    moments = Moments.of(x.detach())
    _keep_running(layer, moments)
    return _by(moments, layer, forward, x, x)


@torch.no_grad()
def _keep_running(layer: _BatchNorm, moments: Moments) -> None:
    """As torch does: the unbiased variance, and without momentum the mean of all batches so far."""
    if not layer.track_running_stats or layer.running_mean is None:
        return
    assert layer.running_var is not None
    rate = 0.0 if layer.momentum is None else layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        rate = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    unbiased = moments.variance * (moments.count / (moments.count - 1))
    layer.running_mean.lerp_(moments.mean.to(layer.running_mean.dtype), rate)
    layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), rate)


class _Follow(torch.autograd.Function):
    """``x`` as it is, for a layer that normalises it by the statistics of ``known``, constants to it.

    The gradient is that of ``mean + (x - m(known)) * sqrt(squared / (v(known) + eps))``: as if the layer had computed
    mean m and variance v itself. ``mean`` and ``squared`` (C) are their values, with eps; ``count`` is how many values
    a channel they are of, in all processes, whose losses all move them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, known: Tensor, mean: Tensor, squared: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(x, known, mean, squared)
        ctx.count = count
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, known, mean, squared = ctx.saved_tensors
        dimensions = [0, *range(2, known.ndim)]
        mean, squared = (value.view(-1, *[1] * (known.ndim - 2)) for value in (mean, squared))
        of_mean = -gradient.to(mean.dtype).sum(dimensions, keepdim=True)
        of_scale = (gradient * (x - mean)).sum(dimensions, keepdim=True)
        of_mean, of_scale = processes.total(torch.stack([of_mean, of_scale])).unbind()
        # d mean / d known = 1 / count; d (squared ** -1/2) / d known = -(known - mean) / count * squared ** -3/2.
        of_known = (of_mean - (known - mean) * (of_scale / squared)) / ctx.count
        return gradient, of_known.to(known.dtype), None, None, None


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
