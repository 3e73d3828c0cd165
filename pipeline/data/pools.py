"""Which samples a batch is made of: a pool for each role, drawn from in a new order every epoch."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segkd.pipeline.data.sample import Role, Sample
from segkd.storage.errors import CacheDamagedError, CacheMismatchError, ConfigError
from segkd.storage.reader import CacheReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """One crop of a batch, before it is cut: with the seed, nothing else decides what it shows."""

    sample: Sample
    epoch: int

    def generator(self, seed: int) -> np.random.Generator:
        """What the crop is drawn by: the same on every machine, in every process and in any batch."""
        words = np.frombuffer(hashlib.sha256(self.sample.id.encode()).digest(), "<u4")
        return np.random.default_rng([seed, self.epoch, *words])


class Pool:
    """The samples of one role, in an order that is a pure function of (seed, epoch). ``share``: how many a batch takes.

    Raises ConfigError where a batch takes some and there are none.
    """

    def __init__(self, samples: Sequence[Sample], role: Role, share: int, seed: int) -> None:
        self.samples = tuple(samples) if share else ()
        if share and not self.samples:
            raise ConfigError(
                f"a batch needs {share} samples of role {role}, but the data has none; "
                "give some samples this role, or ask for 0"
            )
        self._share = share
        self._entropy = (seed, list(Role).index(role))
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def draws(self, step: int) -> list[Draw]:
        """The pool's part of a batch: the next samples of one endless sequence of epochs."""
        return [self._draw(k) for k in range(step * self._share, (step + 1) * self._share)]

    def _draw(self, k: int) -> Draw:
        epoch, position = divmod(k, len(self.samples))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([*self._entropy, epoch]).permutation(len(self.samples))
        return Draw(self.samples[self._order[1][position]], epoch)

    def another(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Any other sample of the pool, which must have two."""
        assert len(self.samples) > 1
        while (other := self.samples[rng.integers(len(self.samples))]) == sample:
            pass
        return other


def certain(
    samples: Sequence[Sample], cache: CacheReader, least_confidence: float, most_entropy: float
) -> tuple[Sample, ...]:
    """The auxiliary samples that the teacher is certain enough of: whose cells have on average at least this largest
    probability, and at most this entropy in nats. The cache's rows say it; no target is read.

    A sample whose row is damaged stays: what becomes of it is not a question of certainty. Raises ConfigError where
    none is left, CacheMismatchError for a cache that keeps no class distributions.
    """
    if least_confidence <= 0 and most_entropy == math.inf:
        return tuple(samples)
    measured = [_measures(sample, cache) for sample in samples]
    # As the rows are: rounding a limit like them keeps what is just within it within it.
    least, most = np.float32(least_confidence), np.float32(most_entropy)
    kept = tuple(
        sample
        for sample, found in zip(samples, measured, strict=True)
        if found is None or (found[0] >= least and found[1] <= most)
    )
    if samples and not kept:
        confidences, entropies = zip(*(found for found in measured if found is not None), strict=True)
        raise ConfigError(
            f"train.least_confidence is {least_confidence:g} and train.most_entropy {most_entropy:g}, which none of "
            f"the {len(samples)} auxiliary samples satisfies: in the cache their confidence is "
            f"{min(confidences):.4g} to {max(confidences):.4g}, "
            f"their entropy {min(entropies):.4g} to {max(entropies):.4g} nats; "
            "set limits that some of them satisfy"
        )
    logger.info(
        "%d of %d auxiliary samples have a confidence of at least %g and an entropy of at most %g nats; "
        "the others are not drawn",
        len(kept),
        len(samples),
        least_confidence,
        most_entropy,
    )
    return kept


def _measures(sample: Sample, cache: CacheReader) -> tuple[float, float] | None:
    """Mean confidence and entropy; None where the cache has lost them."""
    try:
        measures = cache.entry(sample.id).measures
    except CacheDamagedError:
        return None
    if "soft.confidence" not in measures:
        raise CacheMismatchError(
            "train.least_confidence and train.most_entropy need the target 'soft', which the cache does not keep; "
            "write it again with that target, or leave both out"
        )
    return measures["soft.confidence"], measures["soft.entropy"]
