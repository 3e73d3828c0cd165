"""A checkpoint to give away: the network to use, its weights in half precision, without what resuming needs.

    python examples/share_checkpoint.py runs/teacher/last.safetensors teacher.safetensors

It is an eighth as large as a run's last.safetensors and cannot be resumed, but is a checkpoint like any other: a
teacher, an init, something to evaluate and to predict with. What normalises stays in float32, whose range it may need.
It still says how it was trained: the run file, whose paths are as you wrote them, the ids and digests of the samples
that it has learned from, by which segkd finds out whose labels a teacher has seen, and its score on role select.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from segkd.pipeline.student.checkpoint import EMA, MODEL, load, part, save
from segkd.storage.errors import CheckpointError


def share(source: str | Path, target: str | Path) -> None:
    """Writes the averaged network of the checkpoint ``source``, or the only one that it has, to ``target``.

    Raises CheckpointError, also where ``target`` is there already.
    """
    if Path(target).exists():
        raise CheckpointError(f"{target} is there already; name another file")
    description, tensors = load(source)
    weights = part(tensors, EMA) or part(tensors, MODEL)
    held = {
        MODEL + name: value.to(torch.float16) if value.is_floating_point() and value.ndim > 1 else value
        for name, value in weights.items()
    }
    save(target, replace(description, scaler=None), held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a checkpoint that segkd train-student wrote")
    parser.add_argument("target", help="the file to write")
    arguments = parser.parse_args()
    try:
        share(arguments.source, arguments.target)
    except CheckpointError as error:
        parser.exit(1, f"{error}\n")
    before, after = (Path(path).stat().st_size for path in (arguments.source, arguments.target))
    print(f"{arguments.target}: {after / 1e6:.1f} MB of {before / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
