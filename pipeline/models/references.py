"""References: the one place that turns a network's description into a network.

Code runs where the reference names code (``module:callable``, ``file.py:callable``, ``.pt2``, ``.pt``): the user names
it, and nothing else does. Whoever reads a reference out of a file must hold it against :data:`BUILT_IN`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn

from segkd.pipeline.models.deeplab import deeplab_mobilenetv1, deeplabv2_resnet101, deeplabv3plus_mobilenetv2
from segkd.pipeline.models.enet import ENet
from segkd.pipeline.models.fast_scnn import FastSCNN
from segkd.pipeline.models.foreign import ForeignNetwork, RecordedNetwork, check_grid
from segkd.pipeline.models.layers import Network
from segkd.pipeline.models.network import Described, NetworkConfig, TeacherConfig
from segkd.pipeline.models.predictor import Precision, Predictor
from segkd.pipeline.models.weights import warm_start
from segkd.pipeline.run_file import joined, relative_to_here
from segkd.pipeline.settings import parse, to_dict
from segkd.storage.errors import NetworkError

logger = logging.getLogger(__name__)

BUILT_IN: Mapping[str, Callable[..., Network]] = MappingProxyType(
    {
        "deeplabv2-resnet101": deeplabv2_resnet101,
        "deeplab-mobilenetv1": deeplab_mobilenetv1,
        "deeplabv3plus-mobilenetv2": deeplabv3plus_mobilenetv2,
        "fast-scnn": FastSCNN,
        "enet": ENet,
    }
)
"""The networks written for this project, by reference: callables of ``num_classes`` and their own arguments."""

DESCRIPTION = "SEGKD_NETWORK"
"""The dict by which a Python module may describe its network: keys and tables of :class:`TeacherConfig`."""


def load_network(config: NetworkConfig, num_classes: int) -> Network:
    """The network that ``config`` describes, on the CPU, with ``config.init`` applied.

    It maps images N,3,H,W to logits N,C,h,w on the grid that it declares. ``config`` is complete: see
    :func:`described`. Raises NetworkError, with the user's own exception as its cause where there is one.
    """
    loaded = _resolve(config, num_classes)
    if config.init is not None:
        logger.info(warm_start(loaded, config.init).describe())
    if isinstance(loaded, Network):
        _check_declared(loaded, config)
        network = loaded
    else:
        network = ForeignNetwork(loaded, config, num_classes)
    if network.num_classes != num_classes:
        raise NetworkError(
            f"{config.reference} has {network.num_classes} classes, expected {num_classes}; state its own classes in "
            "its order (classes = [...]), or build it for those of the data"
        )
    return network


def described_predictor(
    config: NetworkConfig, classes: Sequence[str], *, device: torch.device, precision: Precision = "off"
) -> Predictor:
    """The network that a run file describes, over the data's classes. Raises NetworkError, ConfigError."""
    config = described(config)
    network = load_network(config, len(config.classes or classes))
    return Predictor(network, config, classes, device=device, precision=precision)


def described(config: Described) -> Described:
    """``config`` completed by what the network says of itself.

    A Python module may say it in a dict :data:`DESCRIPTION`; a checkpoint knows its preprocessing and classes. What the
    run file states wins: every setting that differs from its default. Tables are completed key by key. Raises
    NetworkError, and ConfigError for a description with an unknown key or a wrong value.
    """
    if Path(config.reference).suffix == ".safetensors":
        description = _description_of_checkpoint(config.reference)
    elif ":" in config.reference:
        description = getattr(_import(config.reference), DESCRIPTION, {})
    else:
        return config
    if not isinstance(description, Mapping):
        raise NetworkError(f"{config.reference}: {DESCRIPTION} is a {type(description).__name__}, expected a dict")
    defaults = to_dict(TeacherConfig(reference=""))
    complete = joined(description, _stated(to_dict(config), defaults))
    # What a module says of itself as a teacher does not keep it from being a student.
    found = parse(TeacherConfig, complete, place=f"{config.reference}, as described by itself and the run file")
    return type(config)(**{field.name: getattr(found, field.name) for field in fields(config)})


def _stated(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    return {
        key: _stated(value, defaults[key]) if isinstance(value, dict) and isinstance(defaults.get(key), dict) else value
        for key, value in settings.items()
        if key not in defaults or value != defaults[key]
    }


def _description_of_checkpoint(path: str) -> dict[str, Any]:
    # A checkpoint is made of a network, so that module imports this one.
    from segkd.pipeline.student import checkpoint

    description, _ = checkpoint.load(path)
    network = to_dict(description.network)
    return {
        "preprocessing": network["preprocessing"],
        "classes": network["classes"] or list(description.classes.names),
    }


def _resolve(config: NetworkConfig, num_classes: int) -> nn.Module:
    reference = config.reference
    if reference in BUILT_IN:
        return _construct(BUILT_IN[reference], config, num_classes)
    load = _FILES.get(Path(reference).suffix)
    if load is None and ":" in reference:
        return _construct(_callable(reference), config, num_classes)
    if load is None:
        near = get_close_matches(reference, BUILT_IN, 1)
        raise NetworkError(
            f"{reference!r} is no network; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"Expected one of {', '.join(BUILT_IN)}, or module:callable, file.py:callable, a .pt2 (torch.export), "
            ".pt (TorchScript) or .safetensors (checkpoint) file; a .pth holds weights only and is an init"
        )
    if config.arguments:
        raise NetworkError(
            f"{reference} is complete and takes no arguments, got {sorted(config.arguments)}; remove them"
        )
    if not Path(reference).is_file():
        raise NetworkError(f"{reference}: there is no such file; check the network's reference")
    return load(reference)


def _load_checkpoint(path: str) -> nn.Module:
    from segkd.pipeline.student.checkpoint import network_from_checkpoint

    network, _, _ = network_from_checkpoint(path)
    return network


def _load_exported(path: str) -> nn.Module:
    try:
        return RecordedNetwork(torch.export.load(path).module())
    except Exception as error:
        raise NetworkError(
            f"{path}: not a program that this PyTorch ({torch.__version__}) can read "
            f"({type(error).__name__}: {error}); save it with torch.export.save"
        ) from error


def _load_script(path: str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # PyTorch calls TorchScript deprecated; files of it are what users have.
            warnings.simplefilter("ignore", DeprecationWarning)
            network: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise NetworkError(
            f"{path}: not a TorchScript file ({reason}); weights alone belong in init as .pth, "
            "with the network's own reference"
        ) from error
    # Freezing takes the mode away.
    return network if hasattr(network, "training") else RecordedNetwork(network)


_FILES: Mapping[str, Callable[[str], nn.Module]] = {
    ".safetensors": _load_checkpoint,
    ".pt2": _load_exported,
    ".pt": _load_script,
}


def _callable(reference: str) -> Callable[..., Any]:
    name = reference.rpartition(":")[2]
    module = _import(reference)
    found: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(found):
        known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        near = get_close_matches(name, known, 1)
        raise NetworkError(
            f"{reference}: there is nothing to call by the name {name!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'no callable'}")
        )
    return found


def _import(reference: str) -> ModuleType:
    """The module of ``module:callable`` or ``file.py:callable``. Raises NetworkError with the cause."""
    origin = reference.rpartition(":")[0]
    is_file = origin.endswith(".py")
    if is_file and not Path(origin).is_file():
        raise NetworkError(
            f"{reference}: there is no file {origin}; check the network's reference{relative_to_here(origin)}"
        )
    try:
        return _import_file(Path(origin)) if is_file else importlib.import_module(origin)
    except Exception as error:
        raise NetworkError(f"{reference}: importing it failed: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    """A file as a module of a name of its own; ``sys.path`` stays as it is."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"segkd_reference_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _construct(factory: Callable[..., Any], config: NetworkConfig, num_classes: int) -> nn.Module:
    """The module that a callable returns; it gets ``num_classes`` if it has a parameter of that name."""
    reference, arguments = config.reference, config.arguments
    signature = inspect.signature(factory)
    if "num_classes" in signature.parameters:
        arguments = {"num_classes": num_classes, **arguments}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise NetworkError(
            f"{reference} cannot be built with arguments {sorted(arguments)}: {error}; it takes {signature}"
        ) from None
    try:
        network = factory(**arguments)
    except NetworkError:
        raise
    except Exception as error:
        called = f" (called with num_classes = {arguments['num_classes']})" if "num_classes" in arguments else ""
        raise NetworkError(
            f"{reference}: building the network failed: {type(error).__name__}: {error}{called}"
        ) from error
    if not isinstance(network, nn.Module):
        raise NetworkError(
            f"{reference} returned an object of type {type(network).__name__}, expected a torch.nn.Module; "
            "name a callable that builds one"
        )
    return network


def _check_declared(network: Network, config: NetworkConfig) -> None:
    """Raise NetworkError where a description contradicts a network that says all about itself."""
    check_grid(network.grid, config)
    for key, value, default in (("output", config.output, None), ("produces", config.produces, "logits")):
        if value != default:
            raise NetworkError(
                f"{config.reference} returns logits as a tensor, its description says {key} = {value!r}; remove {key}"
            )
