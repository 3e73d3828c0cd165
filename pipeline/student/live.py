"""A teacher that stands beside the student, as reference: what the cache costs is the difference to it.

It goes through what stage 1 does, from the image to the values of each target, and leaves out coding alone. It looks at
one image at a time, so that what it says does not depend on what else a batch, or a resumed run, shows it.

Shapes: S sources, each with a window of h,w teacher cells; a target's values channels,h,w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.batch import Look, Sources
from segkd.pipeline.data.sample import Classes, DataSource
from segkd.pipeline.data.sources import Looks, View
from segkd.pipeline.device import find_device
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.models.references import described_predictor
from segkd.pipeline.teacher.fingerprints import fingerprints
from segkd.pipeline.teacher.targets import TARGETS, Output
from segkd.storage.errors import ConfigError

REMEMBERED = 2 << 30
"""Bytes of answers about whole images that are kept, on the device: those that were given first."""


class LiveTeacher:
    """The ``targets`` of a batch's sources, asked of a network. ``fingerprints`` say which, as a cache would."""

    def __init__(self, predictor: Predictor, targets: Sequence[str], fingerprints: Mapping[str, str]) -> None:
        self.predictor = predictor
        self.targets = tuple(targets)
        self.fingerprints = fingerprints
        self._remembered: dict[str, dict[str, Tensor]] = {}
        self._left = REMEMBERED

    def looks(self, source: DataSource, view: View) -> Looks:
        """What it is to look at, for a stream of ``source``'s images.

        Raises ConfigError for crops where the teacher has every image resized: crops would be enlarged to that size.
        """
        preprocessing = self.predictor.config.preprocessing
        if view == "crop" and preprocessing.resize is not None:
            raise ConfigError(
                f"teacher.preprocessing.resize is {list(preprocessing.resize)}, to which every crop would be enlarged; "
                'describe the teacher by preprocessing.scale, or set train.teacher_view = "image"'
            )
        return Looks(source, self.predictor.grid, preprocessing, view)

    def __call__(self, sources: Sources) -> dict[str, Tensor]:
        """Float32 values (S,channels,h,w) of each target; 0 outside a source's window.

        Raises NonFiniteError, naming the sample, and NetworkError as :meth:`Predictor.infer` does.
        """
        height, width = sources.counts_Shw.shape[1:]
        given: dict[str, list[Tensor]] = {name: [] for name in self.targets}
        for look in sources.looks:
            for name, values in self.values(look).items():
                window = values[:, look.rows.start : look.rows.stop, look.columns.start : look.columns.stop]
                padding = (0, width - window.shape[2], 0, height - window.shape[1])
                given[name].append(torch.nn.functional.pad(window, padding))
        return {name: torch.stack(windows) for name, windows in given.items()}

    def values(self, look: Look) -> dict[str, Tensor]:
        """The values of what is looked at, on all of the teacher's cells."""
        if look.whole and look.sample in self._remembered:
            return self._remembered[look.sample]
        values = self.answer(look)
        size = sum(value.nbytes for value in values.values())
        if look.whole and size <= self._left:
            self._remembered[look.sample] = values
            self._left -= size
        return values

    def answer(self, look: Look) -> dict[str, Tensor]:
        """The same, asked anew."""
        log_probs, mapping = self.predictor.predict([look.image], [look.sample])
        height, width = look.image.shape[:2]
        output = Output(log_probs_NChw=log_probs, mapping=mapping, image_size=(height, width))
        return {name: TARGETS[name]().values(output)[0] for name in self.targets}


def open_live_teacher(run: RunConfig, classes: Classes, targets: Sequence[str]) -> LiveTeacher:
    """The teacher of the run file, on the device of the training, with the precision of stage 1.

    Raises ConfigError, CheckpointError, NetworkError.
    """
    predictor = described_predictor(
        run.the_teacher(), classes.names, device=find_device(run.train.device), precision=run.cache.precision
    )
    found = fingerprints(predictor, classes, ())
    del found["coding"]  # there is none
    return LiveTeacher(predictor, targets, found)
