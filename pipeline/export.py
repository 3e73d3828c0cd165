"""A trained network as a file that runs without segkd, checked against the network that it was made of.

Shapes: images N,3,H,W uint8 RGB; what a program returns is :mod:`segkd.pipeline.models.deployed`'s.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from segkd.pipeline.data.images import MAX_PIXELS
from segkd.pipeline.data.sample import Classes
from segkd.pipeline.data.scene_materials import PHOTOGRAPHS, photograph
from segkd.pipeline.evaluation.prediction import require_8_bits
from segkd.pipeline.models.deployed import Deployed
from segkd.pipeline.models.layers import evaluating
from segkd.pipeline.models.network import Views
from segkd.pipeline.models.predictor import Predictor, shown_by
from segkd.pipeline.output import replacing
from segkd.pipeline.resample import pixel_tiles
from segkd.storage.errors import ConfigError, ExportError, NetworkError, OutputExistsError, SegkdError

METADATA = "segkd"
"""Where a file says what it is: a key of an ONNX model's metadata, a file inside of a ``.pt2``."""

MOST_APART = 0.001
"""What a program and its network may differ by in the mean: probability, summed over the classes of a cell, and nats
that the label of a pixel is behind the best one. Runtimes sum in orders of their own, and some pixels of resized images
are rounded the other way."""

LEAST_EQUAL = 0.99
"""The share of labels that must be the network's."""

_ANY_NUMBER = ({0: Dim("batch", min=1)},)
"""The shape of a program's only input, as its exporters are told of it."""

Answer = Sequence[npt.NDArray[Any]]
"""What a program returns: labels N,H,W uint8, where they are wanted, and log-probabilities N,C,h,w."""
Run = Callable[[npt.NDArray[np.uint8]], Answer]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How a program's answers to a photograph and to noise compare with its network's: means of both."""

    probability: float
    """By how much the classes' probabilities differ in a cell, summed."""
    equal: float | None
    """The share of pixels whose label is the network's; None where labels are not returned."""
    behind: float | None
    """Nats that the label of a pixel is behind the best one."""
    classes: int
    """How many classes the network saw in them: of others nothing was tried."""

    @property
    def close(self) -> bool:
        """Whether that is near enough. A NaN is not."""
        labels = self.equal is None or self.behind is None or (self.equal >= LEAST_EQUAL and self.behind <= MOST_APART)
        return self.probability <= MOST_APART and labels

    def text(self) -> str:
        """For people."""
        labels = "" if self.equal is None else f"the label of {self.equal:.3%} of pixels is the checkpoint's, "
        return (
            f"on a photograph and on noise {labels}probabilities differ by {self.probability:.2g}; "
            f"they show {self.classes} class{'es' if self.classes > 1 else ''}"
        )


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, and how it compares."""

    path: str
    bytes: int
    size: tuple[int, int]
    """Height and width of the images."""
    returns: tuple[str, ...]
    classes: tuple[str, ...]
    agreement: Agreement

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        return (
            f"{self.path}: {self.bytes / 1e6:,.2f} MB, images N,3,{self.size[0]},{self.size[1]} uint8 RGB -> "
            f"{' and '.join(self.returns)}\n{self.agreement.text()}"
        )


def export(
    predictor: Predictor,
    classes: Classes,
    path: Path,
    *,
    size: tuple[int, int],
    labels: bool = True,
    overwrite: bool = False,
) -> Export:
    """Writes a network on the CPU to ``path``, as its extension says (:data:`FORMATS`), for images of one ``size``.

    It is run before it appears there. Raises ConfigError for another extension, a missing package, views, a size that
    is none and too many classes, OutputExistsError, what the network raises, and ExportError where it cannot be
    exported or the program answers otherwise than it.
    """
    _require_possible(predictor, classes, path, size, overwrite=overwrite)
    pictures, reference = probes(size), predictor.config.reference
    expected = [predictor.predict([picture])[0] for picture in pictures]
    _require_steady(predictor, pictures, expected)
    returns = ("labels", "log_probabilities") if labels else ("log_probabilities",)
    about = {"version": __version__, "size": list(size), "returns": list(returns)}
    about |= {"classes": list(classes.names), "palette": [list(colour) for colour in classes.palette]}
    program = _recorded(Deployed(predictor, size, labels=labels).eval(), size, reference)
    write, load = FORMATS[path.suffix]
    with replacing(path) as partial:
        with _told(f"{reference} cannot be written as {path.suffix}", f"try {_others(path.suffix)}"):
            write(program, about, partial)
            answer = load(partial)(np.stack([picture.transpose(2, 0, 1) for picture in pictures]))
        agreement = compared(predictor, size, expected, answer)
        if not agreement.close:
            raise ExportError(
                f"{reference}: what was exported answers otherwise than the network ({agreement.text()}), so {path} "
                f"was not written; try {_others(path.suffix)}"
            )
        written = partial.stat().st_size
    return Export(path=str(path), bytes=written, size=size, returns=returns, classes=classes.names, agreement=agreement)


def probes(size: tuple[int, int]) -> tuple[npt.NDArray[np.uint8], ...]:
    """What a program is tried on, H,W,3 each: a photograph, and noise."""
    side = min(max(size), 512)
    picture = Image.fromarray((photograph(next(iter(PHOTOGRAPHS)), side) * 255).astype(np.uint8))
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    return np.asarray(picture.resize((size[1], size[0]))), noise


def compared(predictor: Predictor, size: tuple[int, int], expected: Sequence[Tensor], answer: Answer) -> Agreement:
    """A program's answers beside the network's: ``expected`` are log-probabilities 1,C,h,w, one a picture."""
    *labels, log_probs_NChw = (torch.from_numpy(values) for values in answer)
    expected_NChw = torch.cat(list(expected)).double().exp()
    difference_Nhw = (log_probs_NChw.double().exp() - expected_NChw).abs().sum(1)
    same, behind = torch.zeros(2, dtype=torch.float64)
    for labels_NHW in labels:
        for rows, columns, values_NCtu in pixel_tiles(torch.cat(list(expected)), predictor.mapping(*size), *size):
            best_Ntu, label_Ntu = values_NCtu.max(1)
            chosen_Ntu = labels_NHW[:, rows, columns].long()
            same += (chosen_Ntu == label_Ntu).sum()
            behind += (best_Ntu - values_NCtu.gather(1, chosen_Ntu[:, None])[:, 0]).double().sum()
    pixels = len(expected) * size[0] * size[1]
    return Agreement(
        probability=float(difference_Nhw.mean()),
        equal=float(same) / pixels if labels else None,
        behind=float(behind) / pixels if labels else None,
        classes=len({*expected_NChw.argmax(1).flatten().tolist()}),
    )


def _require_possible(
    predictor: Predictor, classes: Classes, path: Path, size: tuple[int, int], *, overwrite: bool
) -> None:
    """Raises ConfigError and OutputExistsError for what can be told before any work is done."""
    if path.suffix not in FORMATS:
        ending = path.suffix or "a name without extension"
        raise ConfigError(f"{path}: there is no export to {ending}; end it in {' or '.join(FORMATS)}")
    if path.suffix == ".onnx":
        _require_onnx()
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise ConfigError(
            f"size is {size[0]}x{size[1]}; height and width must be at least 1, and their product at most {MAX_PIXELS}"
        )
    if shown_by(predictor.config) != Views():
        raise ConfigError(
            "a teacher that is shown several views, or windows, is no single program; leave out its views"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in predictor.network.modules()):
        raise ConfigError(
            f"{predictor.config.reference} is TorchScript, which torch.export does not take: deploy that, or name the "
            "Python code that it was made of (file.py:callable)"
        )
    require_8_bits(classes)
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder; name a file")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name or allow it with --overwrite")


def _require_steady(
    predictor: Predictor, pictures: Sequence[npt.NDArray[np.uint8]], expected: Sequence[Tensor]
) -> None:
    """Raises ExportError for a network whose answer to an image is not always the same: no program could be checked."""
    together_NChw = predictor.predict(pictures)[0].exp()
    if not (together_NChw - torch.cat(list(expected)).exp()).abs().sum(1).mean() <= MOST_APART:
        raise ExportError(
            f"{predictor.config.reference} answers the same image in two ways, alone and with another; look for "
            "dropout that is always on, state that it keeps, and statistics of the batch"
        )


def _others(suffix: str) -> str:
    return " or ".join(sorted(FORMATS.keys() - {suffix}))


def _recorded(network: Deployed, size: tuple[int, int], reference: str) -> ExportedProgram:
    """The network as a program for any number of images, without a word of where it was made."""
    images_N3HW = torch.zeros(2, 3, *size, dtype=torch.uint8)
    remedy = "write it in operations on tensors alone, for any number of images and without a branch on their values"
    with _told(f"{reference} cannot be exported", remedy), evaluating(network), torch.no_grad():
        program = torch.export.export(network, (images_N3HW,), dynamic_shapes=_ANY_NUMBER)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


@contextmanager
def _told(what: str, remedy: str) -> Iterator[None]:
    """Whatever an exporter raises as an ExportError of one line, and nothing of what exporters tell besides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except SegkdError as error:
        if not isinstance(error, NetworkError):
            raise
        raise ExportError(f"{what} ({_reason(error.__cause__ or error)}); {remedy}") from error
    except Exception as error:  # whatever a network does, and whatever a format lacks
        raise ExportError(f"{what} ({_reason(error)}); {remedy}") from error
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """An exception in one line. Some put what matters in the second."""
    if "specialized it to be a constant" in str(error):
        return "it takes one number of images alone"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"


def _write_program(program: ExportedProgram, about: Mapping[str, Any], path: Path) -> None:
    program.example_inputs = None  # images of zeros, as large as the network
    written = io.BytesIO()
    # Not to the path, whose disk may be full: torch would end the process.
    torch.export.save(program, written, extra_files={METADATA: json.dumps(about)})
    path.write_bytes(written.getvalue())


def _load_program(path: Path) -> Run:
    program = torch.export.load(path).module()

    def run(images: npt.NDArray[np.uint8]) -> Answer:
        with torch.inference_mode():
            return [values.numpy() for values in program(torch.from_numpy(images))]

    return run


def _write_onnx(program: ExportedProgram, about: Mapping[str, Any], path: Path) -> None:
    model = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=about["returns"],
        dynamic_shapes=_ANY_NUMBER,
    )
    assert model is not None, "dynamo's exporter returns a model"
    model.model.metadata_props[METADATA] = json.dumps(about)
    model.save(path, external_data=False)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: npt.NDArray[np.uint8]) -> Answer:
        answer: Answer = session.run(None, {"images": images})
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


Write = Callable[[ExportedProgram, Mapping[str, Any], Path], None]
FORMATS: Mapping[str, tuple[Write, Callable[[Path], Run]]] = MappingProxyType(
    {".onnx": (_write_onnx, _load_onnx), ".pt2": (_write_program, _load_program)}
)
"""How a program is written to a file and read from it, by extension."""
