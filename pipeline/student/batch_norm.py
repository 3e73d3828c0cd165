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
        # In eval mode and with these statistics a layer normalises by nothing more, and does all else that it does.
        exact = torch.float32 if layer.running_mean is None else layer.running_mean.dtype
        mean = torch.zeros(x.shape[1], dtype=exact, device=x.device)
        with _lent(layer, training=False, running_mean=mean, running_var=torch.ones_like(mean) - layer.eps):
            return torch.cat([normalised, forward(_normalised_like(known, others, layer.eps))])


def _normalised_like(known: Tensor, others: Tensor, eps: float) -> Tensor:
    """``others`` normalised by each channel's mean and (biased) variance in ``known``; in float32 at least."""
    exact = torch.promote_types(known.dtype, torch.float32)
    variance, mean = torch.var_mean(known.to(exact), [0, *range(2, known.ndim)], correction=0, keepdim=True)
    return ((others.to(exact) - mean) * (variance + eps).rsqrt()).to(others.dtype)


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
