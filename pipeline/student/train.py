"""Stage 2: train a network on labels and on what a cache keeps of a teacher, or on labels alone."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from segkd.pipeline import processes
from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.batch import Batch
from segkd.pipeline.data.stream import TrainStream, loader
from segkd.pipeline.device import find_device
from segkd.pipeline.evaluation.scores import score
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.models.references import described, load_network
from segkd.pipeline.progress import SILENT, Progress, Task
from segkd.pipeline.settings import to_dict
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.checkpoint import MODEL, Best, Description, independent
from segkd.pipeline.student.config import TrainConfig
from segkd.pipeline.student.folder import RunFolder
from segkd.pipeline.student.inputs import Inputs, open_inputs
from segkd.pipeline.student.resuming import continued, identity, last_checkpoint
from segkd.pipeline.student.runtime import StopRequest, leave_signals_to_parent, torch_settings
from segkd.pipeline.student.trainer import DIVERGED, Trainer
from segkd.pipeline.versions import versions
from segkd.storage.errors import ConfigError, NonFiniteError, SegkdError

logger = logging.getLogger(__name__)


class TrainingStopped(KeyboardInterrupt):
    """A signal stopped the run between two steps, after its checkpoint was written. The text says how to go on."""


def train(
    run: RunConfig,
    output: str | Path,
    *,
    distill: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Trains the run's student into the folder ``output`` and returns a summary.

    ``distill=False`` uses labels alone and no cache. ``resume`` goes on from the last checkpoint, as if there had been
    no interruption, or begins where there is none; ``overwrite`` replaces an earlier run. The random state of torch is
    set to the run's.

    Processes that share torch.distributed's default group train one network together, each on its part of every batch;
    all of them call this alike, and the first one writes. See :mod:`segkd.pipeline.processes`.

    Raises OutputExistsError, CheckpointError (also for a disk that is full or cannot be written to), what
    :func:`segkd.pipeline.student.inputs.open_inputs` and :meth:`Trainer.step` raise, ProcessError where one of several
    processes is gone, and TrainingStopped.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give the one that is meant")
    config = run.train
    folder = RunFolder(output, tensorboard=config.tensorboard)
    if not (resume or overwrite):
        folder.require_free()
    held = last_checkpoint(folder) if resume else None
    device = find_device(config.device)
    with torch_settings(config), folder:
        student = described(run.the_student())
        inputs = open_inputs(run, student, distill=distill, progress=progress)
        description = Description(
            network=independent(student),
            classes=inputs.source.classes,
            step=0,
            validated=0,
            best=None,
            run={"distill": distill, "fingerprints": inputs.fingerprints, **to_dict(run)},
            samples=inputs.seen,
        )
        if held is not None:
            description = continued(held[0], description, folder.last)
        if processes.count() > 1:
            processes.require_alike(identity(description))
        trainer = begin(student, inputs, config, device)
        if held is not None:
            trainer.restore(held[1], held[0].scaler, str(folder.last))
        with StopRequest() as stop:
            return _Training(inputs, trainer, folder, description, stop, progress).run()


def begin(student: NetworkConfig, inputs: Inputs, config: TrainConfig, device: torch.device) -> Trainer:
    """A network before its first step, as the seed makes it: sets the random state of torch."""
    torch.manual_seed(config.seed)
    return Trainer(
        load_network(student, len(inputs.source.classes)),
        config,
        inputs.objective,
        device=device,
        targets=inputs.targets,
        class_weights=inputs.class_weights,
    )


class _Clock:
    """Images a second, over the time that steps and the wait for their batches take. It runs from the beginning."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._seconds, self._steps = 0.0, 0
        self.start()

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Ends a step."""
        self._seconds += time.perf_counter() - self._began
        self._steps += 1

    def rate(self) -> float:
        """Since the last call."""
        rate = self._steps * self._images / self._seconds
        self._seconds, self._steps = 0.0, 0
        return rate


class _Training:
    """A run under way."""

    def __init__(
        self,
        inputs: Inputs,
        trainer: Trainer,
        folder: RunFolder,
        state: Description,
        stop: StopRequest,
        progress: Progress,
    ) -> None:
        self._inputs, self._trainer, self._folder = inputs, trainer, folder
        self._state, self._stop, self._progress = state, stop, progress
        self._config = trainer.config
        self._damaged: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """All steps that are left."""
        config, first = self._config, self._state.step
        for line in self._folder.records() if first else ():
            self._damaged |= line.get("damaged", {}) if line["step"] <= first else {}
        processes.wait()  # Until all have read what stands in the folder.
        if first < config.steps or self._validation_is_due():
            if processes.leads():
                self._folder.open(_run_document(self._state, self._inputs, self._trainer, self._versions(first)), first)
            self._save()  # Before anything is computed: a disk that cannot be written to shows now.
            self._validate_if_due()
            with self._progress.task("train", config.steps, unit="step", done=first) as task:
                self._take_steps(task)
        else:
            logger.info("%s: all %d steps were done before; nothing to do", self._folder.path, config.steps)
        best = self._state.best
        return {
            "output": str(self._folder.path),
            "steps": config.steps,
            "steps_done_before": first,
            "best": None if best is None else asdict(best),
            "damaged": sorted(self._damaged),
        }

    def _take_steps(self, task: Task) -> None:
        """The steps that are left, with all that is due after each."""
        config = self._config
        # Closed here and now, whatever happens: loader processes must not live until the garbage collector comes by.
        with closing(_batches(self._inputs.stream, self._state.step, config.steps, config.workers)) as batches:
            clock = _Clock(config.labelled + config.auxiliary)
            for batch in batches:
                index = self._state.step
                done = index + 1
                logs = done % config.log_every == 0 or done == config.steps
                record = self._trainer.step(batch, index, measure=logs)
                self._state = replace(self._state, step=done)
                clock.stop()
                self._note_damage(batch)
                if logs:
                    damaged = {"damaged_samples": len(self._damaged)} if config.on_damage == "skip" else {}
                    self._log({"step": done, **record, **damaged, "images_per_second": clock.rate()})
                task.advance(1, loss=f"{record['loss']:.3f}", **self._best_note())
                self._stop_if_asked()
                self._validate_if_due()
                if done % config.checkpoint_every == 0 or done == config.steps:
                    self._save()
                clock.start()

    def _versions(self, first: int) -> dict[str, str]:
        """What the run is made with; where it goes on with another version than it had, both."""
        held = self._folder.versions() if first else {}
        found = {}
        for name, version in versions().items():
            had = held.get(name, version).split(" then ")
            if had[-1] != version:
                logger.warning("%s: begun with %s %s, goes on with %s", self._folder.path, name, had[-1], version)
                had.append(version)
            found[name] = " then ".join(had)
        return found

    def _note_damage(self, batch: Batch) -> None:
        """Tells once of each sample that the cache has lost, in the run's folder too, where a resumed run finds it."""
        if self._config.on_damage == "fail":
            return
        new = {sample: why for sample, why in batch.damaged.items() if sample not in self._damaged}
        if processes.any_of_them(bool(new)):
            new = {sample: why for part in processes.everyones(new) for sample, why in part.items()}
            for sample, why in new.items():
                logger.warning("%s: the teacher's knowledge of it is left out: %s", sample, why)
            self._log({"step": self._state.step, "damaged": new})
            self._damaged |= new

    def _stop_if_asked(self) -> None:
        if processes.any_of_them(self._stop.signal is not None):
            self._save()
            raise TrainingStopped(
                f"{'a signal' if self._stop.signal is None else self._stop.signal.name} stopped the run after step "
                f"{self._state.step} of {self._config.steps}; "
                f"it is saved in {self._folder.last}: go on with the same command and --resume"
            )

    def _validation_is_due(self) -> bool:
        step, config = self._state.step, self._config
        at_a_turn = step == config.steps or (step > 0 and step % max(config.validate_every, 1) == 0)
        return bool(self._inputs.select) and at_a_turn and self._state.validated != step

    def _validate_if_due(self) -> None:
        """Scores the network on role select, and keeps it if it is the best so far."""
        if not self._validation_is_due():
            return
        if processes.count() > 1:
            self._save()  # Several do not stop in the middle of it, and may not be given the time to come to its end.
        state, inputs = self._state, self._inputs
        names = state.classes.names
        predictor = Predictor(
            self._trainer.product, state.network, names, device=self._trainer.device, precision=self._config.amp
        )
        processes.take_over(self._trainer.product.buffers())
        with self._progress.task("validate", -(-len(inputs.select) // processes.count())) as task:

            def on_sample(*_: object) -> None:
                task.advance()
                if processes.count() == 1:  # Several have samples of their own, and could not agree at each.
                    self._stop_if_asked()

            try:
                scores = score(
                    lambda sample, image: predictor.predict([image], [sample.id]),
                    inputs.source,
                    inputs.select,
                    on_sample=on_sample,
                )
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"step {state.step}: validation met NaN or +inf in the logits; {DIVERGED}"
                ) from error
        self._trainer.network.train()
        found = Best(step=state.step, scores=scores.to_dict())
        self._log({"step": state.step, "select": found.scores})
        improved = state.best is None or _miou(found) > _miou(state.best)
        self._state = replace(state, validated=state.step, best=found if improved else state.best)
        if improved and processes.leads():
            weights = {MODEL + name: value for name, value in self._trainer.product.state_dict().items()}
            checkpoint.save(self._folder.best, self._state, weights)

    def _log(self, record: Mapping[str, Any]) -> None:
        if processes.leads():
            self._folder.log(record)

    def _best_note(self) -> dict[str, str]:
        best = self._state.best
        return {} if best is None else {"best_miou": f"{_miou(best):.2f}"}

    def _save(self) -> None:
        """Returns once it is saved, in every process: one that ended before would take the others with it."""
        if processes.leads():
            state = replace(self._state, scaler=self._trainer.scaler_state())
            checkpoint.save(self._folder.last, state, self._trainer.tensors())
        processes.wait()


def _batches(stream: TrainStream, start: int, stop: int, workers: int) -> Generator[Batch]:
    """The loader's batches. What a worker process raised is raised again without its traceback in the message."""
    batches = loader(stream, start, stop, workers)
    batches.worker_init_fn = partial(leave_signals_to_parent, processes.count() > 1)
    try:
        yield from batches
    except Exception as error:
        # An exception that held on to the loader would leave its processes to the garbage collector, which takes
        # their queues down first and then waits for them in vain.
        traceback.clear_frames(error.__traceback__)
        _, caught, message = str(error).rpartition(f"{type(error).__name__}: ")
        if isinstance(error, SegkdError) and caught:
            raise type(error)(message.strip()) from error
        raise


def _run_document(state: Description, inputs: Inputs, trainer: Trainer, versions: Mapping[str, str]) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "configuration": state.run,
        "samples": state.samples.to_dict(),
        "pools": inputs.stream.pools,
        "classes": list(state.classes.names),
        "versions": dict(versions),
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
    }


def _miou(best: Best) -> float:
    return best.scores["miou"] or 0.0
