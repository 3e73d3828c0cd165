"""One optimiser step, and the state that steps leave behind.

Where several processes train a network, each has its own copy and a share of every batch. Gradients are averaged over
them before they are used, so that the copies stay alike, and what is measured is of the whole batch.

Shapes: N crops of H,W pixels; logits N,C,h,w on the student's grid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segkd.pipeline import processes
from segkd.pipeline.data.batch import Batch, Sources
from segkd.pipeline.models.layers import Network
from segkd.pipeline.models.predictor import AUTOCAST_DTYPES
from segkd.pipeline.student.batch_norm import BatchNorms
from segkd.pipeline.student.checkpoint import EMA, MODEL, load_weights, part
from segkd.pipeline.student.config import TrainConfig
from segkd.pipeline.student.ema import Ema
from segkd.pipeline.student.losses import Objective, loss_terms, total_loss
from segkd.pipeline.student.ohem import mine_hard_pixels
from segkd.pipeline.student.optim import make_optimiser, set_learning_rate
from segkd.storage import geometry
from segkd.storage.errors import NetworkError, NonFiniteError

logger = logging.getLogger(__name__)

DIVERGED = 'lower train.learning_rate, set train.clip or a longer train.warmup, or train.amp = "off"'
"""What to do about numbers that are not finite."""
OPTIMISER, RNG = "optimiser.", "rng."


Targets = Callable[[Sources], Mapping[str, Tensor]]
"""What the teacher's targets of a batch's sources are, (S,channels,h,w) each, by name."""


class Trainer:
    """A network in training. ``targets`` gives those of batches that have sources."""

    def __init__(
        self,
        network: Network,
        config: TrainConfig,
        objective: Objective,
        *,
        device: torch.device,
        targets: Targets | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        self.network = network.to(device).train()
        # Whatever a network draws its weights by.
        processes.take_over([*network.parameters(), *network.buffers()])
        self.config, self.objective, self.device = config, objective, device
        self._batch_norms = BatchNorms(network, config.batch_norm)
        self._looked = False
        self._targets = targets
        self._class_weights = None if class_weights is None else class_weights.to(device)
        self._optimiser = make_optimiser(network, config)
        # Groups order parameters in their own way; this is the order in which torch numbers their states.
        names = {parameter: name for name, parameter in network.named_parameters()}
        self._parameters = {names[p]: p for group in self._optimiser.param_groups for p in group["params"]}
        self._ema = Ema(network, config.ema) if config.ema else None
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")

    @property
    def product(self) -> nn.Module:
        """The network to validate and keep: the average where there is one."""
        return self.network if self._ema is None else self._ema.network

    def step(self, batch: Batch, step: int, *, measure: bool = False) -> dict[str, Any]:
        """Takes optimiser step ``step`` (from 0) and returns the measured numbers; with ``measure`` also the norm of
        each weighted term's gradient at the logits.

        Raises NonFiniteError, before anything is changed but batch norm's statistics, for a loss or a gradient that is
        NaN or infinite; what the network raises, such as NetworkError for a batch too small for its batch norm.
        """
        self._seed_dropout(step)
        rate = set_learning_rate(self._optimiser, step, self.config)
        labelled = int(batch.labelled_N.sum())
        batch = batch.to(self.device)
        (height, width), fed = batch.labels_NHW.shape[-2:], batch.images_N3HW.shape[-2:]
        student = self.network.grid.mapping_in((height, width), (fed[0], fed[1]))
        objective = self.objective.at(step, self.config.steps)
        with self._batch_norms.of_batch(labelled, len(batch.images_N3HW)):
            logits_NChw = self._forward(batch.images_N3HW)
            decoded = self._decoded(batch)
            batch, mined = self._mined(batch, logits_NChw, student)
            loss, terms = total_loss(logits_NChw, student, batch, decoded, objective, self._class_weights)
            norm = self._backward(loss)
        self._look_for_own_statistics()
        loss, terms = _averages(loss.detach(), terms)
        self._require_finite(step, loss, norm, terms)
        # An fp16 step that overflowed is skipped, and has no norm that JSON could hold.
        gradient = {"total": norm.item() if norm.isfinite() else None}
        if measure:
            gradient |= self._term_gradients(logits_NChw, student, batch, decoded, objective)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self._ema is not None:
            self._ema.update(step)
        measured = {name: term.item() for name, term in terms.items()}
        return {"loss": loss.item(), **measured, **mined, "learning_rate": rate, "gradient": gradient}

    def _seed_dropout(self, step: int) -> None:
        """Of several processes each drops something else, whichever checkpoint it goes on from."""
        if processes.count() > 1:
            entropy = np.random.SeedSequence([self.config.seed, step, processes.rank()])
            torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def _look_for_own_statistics(self) -> None:
        """Warns once where processes have filled buffers by their own shares: only batch norm's are told of all."""
        if processes.count() == 1 or self._looked:
            return
        self._looked = True
        shared = {id(buffer) for layer in self._batch_norms.layers for buffer in layer.buffers()}
        own = {name: buffer for name, buffer in self.network.named_buffers() if id(buffer) not in shared}
        first = [buffer.clone() for buffer in own.values()]
        processes.take_over(first)
        unlike = [name for (name, buffer), leading in zip(own.items(), first, strict=True) if not buffer.equal(leading)]
        differing = sorted({name for names in processes.everyones(unlike) for name in names})
        if differing:
            logger.warning(
                "%s of the student differ from process to process, as each fills them by its own crops; the first "
                "process's are validated and kept, and a run of one process would have others",
                ", ".join(differing),
            )

    def _forward(self, images_N3HW: Tensor) -> Tensor:
        """Logits of a batch."""
        amp = self.config.amp
        # The fastest layout for convolutions, on CPUs too; their outputs keep it.
        images_N3HW = images_N3HW.contiguous(memory_format=torch.channels_last)
        mixed = torch.autocast(self.device.type, AUTOCAST_DTYPES.get(amp), enabled=amp in AUTOCAST_DTYPES)
        with mixed:
            logits_NChw: Tensor = self.network(images_N3HW)
        if not logits_NChw.requires_grad:
            raise NetworkError(
                f"the student's logits ({str(logits_NChw.dtype).removeprefix('torch.')}) carry no gradient, so nothing "
                "can be learned; return floating-point logits and leave out argmax, detach() and no_grad()"
            )
        return logits_NChw

    def _mined(self, batch: Batch, logits_NChw: Tensor, student: geometry.Mapping) -> tuple[Batch, dict[str, float]]:
        """Under ``loss.ohem_threshold`` the batch with the labels of hard pixels alone, and their share for the log."""
        loss, labelled = self.objective.loss, batch.labelled_N
        if not (loss.cross_entropy and loss.ohem_threshold):
            return batch, {}
        labels_NHW = batch.labels_NHW.clone()
        labels_NHW[labelled], *pixels = mine_hard_pixels(
            logits_NChw[labelled],
            student,
            labels_NHW[labelled],
            loss.ohem_threshold,
            loss.ohem_min_kept,
            self._class_weights,
        )
        kept, all_of_them = processes.total(torch.tensor(pixels)).tolist()
        return replace(batch, labels_NHW=labels_NHW), {"hard_pixels": kept / max(all_of_them, 1)}

    def _decoded(self, batch: Batch) -> Mapping[str, Tensor]:
        """The teacher's targets, where anything is learned of them."""
        if batch.sources is None or self._targets is None or not self.objective.knowledge:
            return {}
        return self._targets(batch.sources)

    def _backward(self, loss: Tensor) -> Tensor:
        """Gradients, clipped; returns their norm before clipping."""
        self._optimiser.zero_grad()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        parameters = self._parameters.values()
        _average_gradients(parameters)
        self._scaler.unscale_(self._optimiser)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        return norm

    def _require_finite(self, step: int, loss: Tensor, norm: Tensor, terms: Mapping[str, Tensor]) -> None:
        # An infinite gradient is how fp16's scaler notices that its scale is too high; it skips the step by itself.
        finite = loss.isfinite() if self._scaler.is_enabled() else loss.isfinite() & norm.isfinite()
        if not finite:
            values = ", ".join(f"{name} {term.item():.4g}" for name, term in terms.items())
            raise NonFiniteError(
                f"step {step + 1}: the loss or its gradient is not finite ({values}, gradient norm {norm.item():.4g}); "
                f"{DIVERGED}"
            )

    def _term_gradients(
        self,
        logits_NChw: Tensor,
        student: geometry.Mapping,
        batch: Batch,
        decoded: Mapping[str, Tensor],
        objective: Objective,
    ) -> dict[str, float]:
        """At the logits, because a backward pass through the network for each term would cost as much as the step."""
        leaf_NChw = logits_NChw.detach().float().requires_grad_()
        terms = loss_terms(leaf_NChw, student, batch, decoded, objective, self._class_weights)
        squares = {}
        for name, weight in objective.weights.items():
            (gradient_NChw,) = torch.autograd.grad(weight * terms[name], leaf_NChw, retain_graph=True)
            # The loss is the mean over the processes, and each has its part of the logits.
            squares[name] = (gradient_NChw.norm() / processes.count()).square()
        norms = processes.total(torch.stack(list(squares.values()))).sqrt()
        return dict(zip(squares, norms.tolist(), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """All that later steps depend on, except :meth:`scaler_state`."""
        held = {MODEL + name: value for name, value in self.network.state_dict().items()}
        if self._ema is not None:
            held |= {EMA + name: value for name, value in self._ema.network.state_dict().items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                held[f"{OPTIMISER}{key}.{name}"] = value
        held[f"{RNG}cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            held[f"{RNG}cuda"] = torch.cuda.get_rng_state(self.device)
        return held

    def scaler_state(self) -> dict[str, Any] | None:
        """JSON-ready; None without fp16."""
        return self._scaler.state_dict() or None

    def restore(self, tensors: Mapping[str, Tensor], scaler: Mapping[str, Any] | None, path: str) -> None:
        """Puts back what :meth:`tensors` and :meth:`scaler_state` gave; ``path`` names the checkpoint in messages.

        Whatever draws random numbers must come before this. Raises CheckpointError for tensors that do not fit.
        """
        load_weights(self.network, part(tensors, MODEL), path)
        if self._ema is not None:
            load_weights(self._ema.network, part(tensors, EMA), path)
        states: dict[int, dict[str, Tensor]] = {}
        numbers = {name: number for number, name in enumerate(self._parameters)}
        for name, value in part(tensors, OPTIMISER).items():
            key, _, parameter = name.partition(".")
            states.setdefault(numbers[parameter], {})[key] = value.clone()
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": states, "param_groups": groups})
        if scaler is not None:
            self._scaler.load_state_dict(dict(scaler))
        torch.set_rng_state(tensors[f"{RNG}cpu"])
        if self.device.type == "cuda" and f"{RNG}cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{RNG}cuda"], self.device)


def _average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Over the processes, in one message: students are small."""
    if processes.count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = processes.total(torch.cat([gradient.flatten() for gradient in gradients])) / processes.count()
    averages = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, average in zip(gradients, averages, strict=True):
        gradient.copy_(average.view_as(gradient))


def _averages(loss: Tensor, terms: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its terms, averaged over the processes."""
    loss, *values = (processes.total(torch.stack([loss, *terms.values()])) / processes.count()).unbind()
    return loss, dict(zip(terms, values, strict=True))
