"""A run's output folder.

``run.json``           the resolved configuration and what it ran on
``metrics.jsonl``      one JSON object a line: a logged step, a validation, or a sample that the cache has lost
``last.safetensors``   all that the run needs to go on
``best.safetensors``   the network that validated best, to use
``tensorboard/``       the same numbers for TensorBoard, where asked for
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from segkd.pipeline.student.checkpoint import write_atomically
from segkd.storage.errors import CheckpointError, ConfigError, OutputExistsError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = Mapping[str, Any]


class RunFolder:
    """Where the products of a run stand. A context manager, which closes what :meth:`open` has opened.

    Raises OutputExistsError for a path that is no folder, ConfigError where TensorBoard is wanted and not installed.
    """

    def __init__(self, path: str | Path, *, tensorboard: bool) -> None:
        self.path = Path(path)
        self.run = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.tensorboard = self.path / "tensorboard"
        self._writer_class = _summary_writer() if tensorboard else None
        self._writer: SummaryWriter | None = None
        if self.path.exists() and not self.path.is_dir():
            raise OutputExistsError(f"{self.path} is not a folder; name another output folder")

    @property
    def products(self) -> tuple[Path, ...]:
        """Everything that a run writes."""
        return self.run, self.metrics, self.last, self.best, self.tensorboard

    def require_free(self) -> None:
        """Raises OutputExistsError where a run stands."""
        held = [product.name for product in self.products if product.exists()]
        if held:
            raise OutputExistsError(
                f"{self.path} already holds a run ({', '.join(held)}); go on with --resume, "
                "replace it with --overwrite, or name another output folder"
            )

    def open(self, description: Record, step: int) -> None:
        """Makes the folder that of a run which has done ``step`` steps: from 0, nothing older is left in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if step == 0:
                for product in self.products:
                    shutil.rmtree(product) if product.is_dir() else product.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        write_atomically(self.run, (json.dumps(_as_json(description), indent=1, allow_nan=False) + "\n").encode())
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_atomically(self.metrics, "".join(kept).encode())
        if self._writer_class is not None:
            # What a killed run wrote after its last checkpoint is hidden.
            self._writer = self._writer_class(str(self.tensorboard), purge_step=step + 1)

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a kill cut off is left out."""
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    def versions(self) -> dict[str, str]:
        """What run.json says that the run was made with; nothing where there is none."""
        found: dict[str, str] = json.loads(self.run.read_text())["versions"] if self.run.exists() else {}
        return found

    def log(self, record: Record) -> None:
        """Adds a line, of which ``step`` is one entry."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise _cannot_write(self.metrics, error) from error
        if self._writer is not None:
            for name, value in numbers(record):
                self._writer.add_scalar(name, value, record["step"])

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()


def _as_json(value: Any) -> Any:
    """A record without infinity, for which JSON has no number: it says "inf", as TOML does."""
    if isinstance(value, Mapping):
        return {name: _as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def numbers(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics.jsonl by their path (``gradient/zero_order``), but for its step."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}{name}", value


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "train.tensorboard is true, but TensorBoard is not installed; pip install 'segkd[tensorboard]', "
            "or set train.tensorboard = false"
        ) from None
    return SummaryWriter


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror}; free some space or choose a folder that can be written to, "
        "then go on with --resume"
    )
