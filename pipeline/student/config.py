"""How a network is trained: everything of a run but its data, network, losses and augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from segkd.pipeline.data.sources import View
from segkd.pipeline.evidence import Evidence, Row
from segkd.pipeline.models.predictor import Precision
from segkd.pipeline.sizes import parse_bytes
from segkd.pipeline.student.batch_norm import BatchNormMode
from segkd.storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Durations are in optimiser steps; samples are counted a step."""

    evidence: ClassVar[Evidence] = {
        "teacher_view=image": Row("price.md", "image"),
        "teacher_view=crop": Row("price.md", "crop"),
        "least_confidence": None,
        "most_entropy": None,
        "batch_norm=labelled": None,
        "batch_norm=separate": None,
        "batch_norm=frozen": None,
        "optimiser=sgd": Row("camvid-s.md", "sgd"),
        "learning_rate": Row("camvid-s.md", "rate-4e-3"),
        "backbone_rate": None,
        "weight_decay": Row("camvid-s.md", "decay-1e-1"),
        "momentum": None,
        "warmup": None,
        "power": None,
        "clip": None,
        "class_weights=log_frequency": Row("camvid-s.md", "unweighted"),
        "ema": None,
        "amp": None,
    }

    steps: int = 20_000
    """Length of the run, and of its learning-rate schedule."""
    labelled: int = 16
    """Samples of role train in a batch."""
    auxiliary: int = 0
    """Samples of role auxiliary in a batch; they are learned from through the teacher alone."""
    teacher_view: Literal["cache"] | View = "cache"
    """Where the teacher's knowledge comes from. ``cache``: from the cache. The others load the teacher beside the
    student, for comparison. ``image``: it sees the whole image, as it did when the cache was written; the difference to
    ``cache`` is the price of coding. ``crop``: it sees the student's crop, scaled and mirrored but neither recoloured
    nor mixed; the difference to ``image`` is the price of asking it only once."""
    least_confidence: float = 0.0
    """Auxiliary samples of which the teacher is less confident are not drawn: its largest class probability, a mean
    over the image's cells that the cache keeps. 0 draws all."""
    most_entropy: float = math.inf
    """Auxiliary samples of more entropy are not drawn: that of the teacher's class distribution in nats, a mean over
    the image's cells that the cache keeps. inf draws all."""
    batch_norm: BatchNormMode = "joint"
    """Whose statistics batch norm normalises by. ``joint``: those of the whole batch. ``labelled``: those of its
    labelled crops. ``separate``: labelled and auxiliary crops each by their own. ``frozen``: the running ones, for a
    student that starts from trained weights. Running statistics follow the whole batch in ``joint``, nothing in
    ``frozen``, else the labelled crops."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum."""
    learning_rate: float = 1e-3
    """The highest rate, reached after the warm-up."""
    backbone_rate: float = 1.0
    """Factor on the learning rate of parameters inside a module called ``backbone``."""
    weight_decay: float = 1e-2
    """On weights; biases and normalisation have none."""
    momentum: float = 0.9
    """SGD's momentum, AdamW's beta1."""
    warmup: int = 500
    """Steps over which the rate rises linearly from almost nothing."""
    power: float = 0.9
    """The rate falls as ``(1 - t) ** power`` over the steps after the warm-up."""
    clip: float = 0.0
    """Greatest norm of the gradient; 0 leaves it alone."""
    class_weights: tuple[float, ...] | Literal["log_frequency"] | None = None
    """Weights of the cross entropy, one a class, of which only the ratios count; "log_frequency" is ``1 / ln(1.02 +
    share of the labelled pixels)``. Knowledge that is ``class_weighted`` takes the same."""
    ema: float = 0.999
    """Decay of the averaged network that is validated and kept, reached as ``(1 + t) / (10 + t)``; 0 = no average."""
    amp: Precision = "off"
    """Mixed precision of the network; losses are always computed in float32."""
    seed: int = 0
    """Of the initialisation, of the batches and of dropout."""
    validate_every: int = 1000
    """Steps between validations on role select, there is one at the end too; 0 never validates."""
    checkpoint_every: int = 1000
    """Steps between writes of last.safetensors, there is one at the end too."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl: the loss, its terms without their weights, the norms of the gradient of all
    parameters before clipping (``total``) and of each weighted term at the logits, the learning rate, images a second,
    and under ``loss.ohem_threshold`` the share of the labelled pixels that are hard."""
    tensorboard: bool = False
    """Whether the same numbers also go to TensorBoard files in the output folder."""
    on_damage: Literal["fail", "skip"] = "fail"
    """What is done about samples whose part of the cache is damaged: stop, or go on without the teacher's knowledge of
    them; they are listed in metrics.jsonl."""
    workers: int = 0
    """Processes that prepare batches; 0 prepares them in the training process."""
    keep_decoded: Literal[0] | str = "256MB"
    """Memory for decoded images and label maps, which are kept for later epochs: of each process that prepares batches.
    0 keeps none. If only a third of them fits, a third of the decoding is saved."""
    threads: int = 0
    """Threads that torch computes with on the CPU; 0 leaves the number alone."""
    device: str = "auto"
    """Where the network is trained: cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    deterministic: bool = False
    """Whether torch may only use algorithms that give the same bits every time, on a GPU too; slower."""

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1,
            "labelled": 0,
            "auxiliary": 0,
            "warmup": 0,
            "seed": 0,
            "validate_every": 0,
            "checkpoint_every": 1,
            "log_every": 1,
            "workers": 0,
            "threads": 0,
        }
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be at least {low}")
        try:
            _ = self.kept_bytes
        except ConfigError as error:
            raise ConfigError(f"train.keep_decoded: {error}, or 0 without quotes") from None
        if self.seed >= 2**64:
            raise ConfigError(f"train.seed is {self.seed}; it must be less than 2^64")
        for name in ("backbone_rate", "weight_decay", "power", "clip"):
            self._check_finite(name, 0.0, math.inf, "0 or more")
        self._check_finite("learning_rate", math.ulp(0.0), math.inf, "more than 0")
        for name in ("momentum", "ema"):
            self._check_finite(name, 0.0, math.nextafter(1.0, 0.0), "at least 0 and less than 1")
        if self.labelled + self.auxiliary == 0:
            raise ConfigError("train.labelled and train.auxiliary are both 0; a batch needs samples: raise one of them")
        if self.batch_norm in ("labelled", "separate") and not self.labelled:
            raise ConfigError(
                f'train.batch_norm is "{self.batch_norm}" but train.labelled is 0, so there are no statistics of '
                'labelled crops to keep; choose "joint" or "frozen", or raise train.labelled'
            )
        self._check_finite("least_confidence", 0.0, 1.0, "between 0 (all samples) and 1")
        if not self.most_entropy >= 0:
            raise ConfigError(
                f"train.most_entropy is {self.most_entropy}; it must be 0 or more nats (inf: all samples)"
            )
        if self.teacher_view != "cache" and (self.least_confidence > 0 or self.most_entropy < math.inf):
            raise ConfigError(
                f'train.teacher_view is "{self.teacher_view}", but train.least_confidence and train.most_entropy '
                'choose samples by what the cache says of them; leave them out, or set train.teacher_view = "cache"'
            )
        if self.warmup >= self.steps:
            raise ConfigError(
                f"train.warmup is {self.warmup}, train.steps {self.steps}; the warm-up must be shorter: "
                "set train.warmup"
            )
        if isinstance(self.class_weights, tuple):
            self._check_class_weights(self.class_weights)

    @property
    def kept_bytes(self) -> int:
        """``keep_decoded`` as a number."""
        return 0 if self.keep_decoded == 0 else parse_bytes(self.keep_decoded)

    def _check_finite(self, name: str, low: float, high: float, expected: str) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise ConfigError(f"train.{name} is {value}; it must be {expected}")

    @staticmethod
    def _check_class_weights(weights: tuple[float, ...]) -> None:
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ConfigError(
                f"train.class_weights is {weights}; every weight must be 0 or more, and not all of them 0"
            )
