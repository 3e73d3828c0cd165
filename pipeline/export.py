"""A trained network as a file that runs without segkd, checked against the network that it was made of.

Shapes: images N,3,H,W uint8 RGB; what it returns is :mod:`segkd.pipeline.models.deployed`'s.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.export import Dim, ExportedProgram

from segkd import __version__
from segkd.pipeline.data.sample import Classes
from segkd.pipeline.data.scene_materials import PHOTOGRAPHS, photograph
from segkd.pipeline.evaluation.prediction import require_8_bits
from segkd.pipeline.models.deployed import Deployed, Returns
from segkd.pipeline.models.layers import evaluating
from segkd.pipeline.models.predictor import Predictor
from segkd.pipeline.output import replacing
from segkd.pipeline.resample import pixel_tiles
from segkd.storage.errors import ConfigError, NetworkError, OutputExistsError

METADATA = "segkd"
"""Where a file says what it is: a key of an ONNX model's metadata, a file inside of a ``.pt2``."""

MOST_APART = 0.001
"""What a program and its network may differ by in the mean: nats that the label it chose is behind the best one, or
probability. Runtimes sum in orders of their own, and some pixels of resized images are rounded the other way."""

_ANY_NUMBER = ({0: Dim("batch", min=1)},)
"""The shape of a program's only input, as its exporters are told of it."""

Answer = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Run = Callable[[npt.NDArray[np.uint8]], Answer]
"""Images N,3,H,W -> what a program returns for them."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, and how it compares."""

    path: str
    bytes: int
    size: tuple[int, int]
    """Height and width of the images."""
    returns: Returns
    classes: tuple[str, ...]
    equal: float
    """The share of pixels (or cells) whose label is the network's."""
    apart: float
    """How far they are apart, see :data:`MOST_APART`."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        what, unit = ("pixels", "nats") if self.returns == "labels" else ("cells", "of probability")
        return (
            f"{self.path}: {self.bytes / 1e6:,.2f} MB, images N,3,{self.size[0]},{self.size[1]} uint8 RGB -> "
            f"{self.returns}\non a photograph and on noise "
            f"its label is the checkpoint's in {self.equal:.3%} of {what}, and the mean difference "
            f"{self.apart:.2g} {unit}"
        )


def export(
    predictor: Predictor,
    classes: Classes,
    path: Path,
    *,
    size: tuple[int, int],
    returns: Returns = "labels",
    overwrite: bool = False,
) -> Export:
    """Writes a network on the CPU to ``path``, as its extension says (:data:`FORMATS`), for images of one ``size``.

    It is run before it appears there. Raises ConfigError for another extension, a missing package, a size that is none
    and too many classes, OutputExistsError, NonFiniteError, and NetworkError where the network cannot be exported or
    the program answers otherwise than it.
    """
    if path.suffix not in FORMATS:
        ending = path.suffix or "a name without extension"
        raise ConfigError(f"{path}: there is no export to {ending}; end it in {' or '.join(FORMATS)}")
    if min(size) < 1:
        raise ConfigError(f"size is {size[0]}x{size[1]}; height and width must be at least 1")
    require_8_bits(classes)
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name or allow it with --overwrite")
    write, load = FORMATS[path.suffix]
    pictures = probes(size)
    expected = [predictor.predict([picture])[0] for picture in pictures]
    document = {"version": __version__, "size": list(size), "returns": returns}
    document |= {"classes": list(classes.names), "palette": [list(colour) for colour in classes.palette]}
    program = _recorded(Deployed(predictor, size, returns).eval(), size, predictor.config.reference)
    with replacing(path) as partial:
        write(program, json.dumps(document), partial)
        answers = load(partial)(np.stack([picture.transpose(2, 0, 1) for picture in pictures]))
        equal, apart = _compared(predictor, size, returns, expected, answers)
        if not apart <= MOST_APART:  # a NaN is not
            raise NetworkError(
                f"{predictor.config.reference}: what was exported answers otherwise than the network, by {apart:.3g} "
                f"in the mean of a photograph and of noise ({MOST_APART} is allowed), so {path} was not written; "
                f"try {' or '.join(sorted(FORMATS.keys() - {path.suffix}))}"
            )
        written = partial.stat().st_size
    return Export(
        path=str(path), bytes=written, size=size, returns=returns, classes=classes.names, equal=equal, apart=apart
    )


def probes(size: tuple[int, int]) -> tuple[npt.NDArray[np.uint8], ...]:
    """What a program is tried on, H,W,3 each: a photograph, and noise."""
    side = min(max(size), 512)
    picture = Image.fromarray((photograph(next(iter(PHOTOGRAPHS)), side) * 255).astype(np.uint8))
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    return np.asarray(picture.resize((size[1], size[0]))), noise


def _compared(
    predictor: Predictor, size: tuple[int, int], returns: Returns, expected: list[Tensor], answers: Answer
) -> tuple[float, float]:
    """The share of equal labels, and how far answers are apart: means over the pictures."""
    equal, apart = [], []
    for log_probs_1Chw, answer in zip(expected, torch.from_numpy(answers), strict=True):
        if returns == "log-probabilities":
            equal.append((answer.argmax(0) == log_probs_1Chw[0].argmax(0)).double().mean())
            apart.append((answer.double().exp() - log_probs_1Chw[0].double().exp()).abs().mean())
            continue
        same, behind = torch.zeros(2, dtype=torch.float64)
        for rows, columns, values_1Ctu in pixel_tiles(log_probs_1Chw, predictor.mapping(*size), *size):
            best_1tu, label_1tu = values_1Ctu.max(1)
            chosen_1tu = answer[None, rows, columns].long()
            same += (chosen_1tu == label_1tu).sum()
            behind += (best_1tu - values_1Ctu.gather(1, chosen_1tu[:, None])[:, 0]).double().sum()
        equal.append(same / answer.numel())
        apart.append(behind / answer.numel())
    return float(torch.stack(equal).mean()), float(torch.stack(apart).mean())


def _recorded(network: Deployed, size: tuple[int, int], reference: str) -> ExportedProgram:
    """The network as a program for any number of images."""
    images_N3HW = torch.zeros(2, 3, *size, dtype=torch.uint8)
    try:
        with _quiet(), evaluating(network), torch.no_grad():
            return torch.export.export(network, (images_N3HW,), dynamic_shapes=_ANY_NUMBER)
    except Exception as error:  # whatever the user's network does
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise NetworkError(
            f"{reference} cannot be exported ({type(error).__name__}: {reason}); write it in operations on tensors "
            "alone, for any number of images and without a branch on their values"
        ) from error


def _write_program(program: ExportedProgram, document: str, path: Path) -> None:
    torch.export.save(program, path, extra_files={METADATA: document})


def _load_program(path: Path) -> Run:
    program = torch.export.load(path).module()

    def run(images: npt.NDArray[np.uint8]) -> Answer:
        with torch.inference_mode():
            answer: Answer = program(torch.from_numpy(images)).numpy()
        return answer

    return run


def _write_onnx(program: ExportedProgram, document: str, path: Path) -> None:
    _require_onnx()
    name = "labels" if json.loads(document)["returns"] == "labels" else "log_probabilities"
    with _quiet():
        model = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=[name],
            dynamic_shapes=_ANY_NUMBER,
        )
    assert model is not None, "dynamo's exporter returns a model"
    model.model.metadata_props[METADATA] = document
    model.save(str(path))


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: npt.NDArray[np.uint8]) -> Answer:
        answer: Answer = session.run(None, {session.get_inputs()[0].name: images})[0]
        return answer

    return run


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401  # what torch's exporter needs
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"an export to ONNX needs the package {error.name}, which is not installed; "
            "pip install 'segkd[onnx]', or end the name in .pt2"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell of packages that are not needed, and warn of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMATS: Mapping[str, tuple[Callable[[ExportedProgram, str, Path], None], Callable[[Path], Run]]] = MappingProxyType(
    {".onnx": (_write_onnx, _load_onnx), ".pt2": (_write_program, _load_program)}
)
"""How a program is written to a file and read from it, by extension."""
