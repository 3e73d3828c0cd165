"""``segkd train-student``: stage 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from segkd.cli.options import json_option, overwrite_option, progress, resumable, run_options, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


@click.command("train-student", short_help="Stage 2: train a student from a cache, or on labels alone.")
@click.option(
    "-o", "--output", metavar="FOLDER", help="Where checkpoints and logs go.  [default: runs/NAME of NAME.toml]"
)
@click.option("--no-distill", is_flag=True, help="Train on labels alone, without a cache; any network, teachers too.")
@click.option(
    "--init", metavar="FILE", help="Weights to start from, as student.init of the run file; says which it took."
)
@click.option(
    "--on-damage",
    type=click.Choice(["fail", "skip"]),
    help="Samples whose part of the cache is damaged: stop, or go on without the teacher's knowledge of them.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint as if nothing had happened.")
@overwrite_option
@run_options()
@json_option
@verbosity_options
def train_student(
    run: RunConfig,
    output: str | None,
    no_distill: bool,
    init: str | None,
    on_damage: Literal["fail", "skip"] | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Stage 2: train the student of the run file from labels and from what the cache keeps of the teacher.

    Writes last.safetensors, best.safetensors (by the validation on role select), metrics.jsonl and run.json.
    """
    from segkd.pipeline.student.train import train

    if init is not None:
        run = replace(run, student=replace(run.the_student(), init=init))
    if on_damage is not None:
        run = replace(run, train=replace(run.train, on_damage=on_damage))
    config = click.get_current_context().params["config"]
    folder = output or str(Path("runs") / Path(config or "student.toml").stem)
    with resumable(f"Go on with --resume; checkpoints are in {folder}."):
        summary = train(run, folder, distill=not no_distill, resume=resume, overwrite=overwrite, progress=progress())
    best = summary["best"]
    text = f"{summary['output']}: {summary['steps']:,} steps"
    if best is not None:
        miou = best["scores"]["miou"]
        text += f", best at step {best['step']:,}: mIoU {'n/a' if miou is None else f'{miou:.2f}'} on role select"
    if summary["damaged"]:
        text += (
            f"\n  without the teacher's knowledge of {len(summary['damaged']):,} samples that are damaged in "
            f"{run.cache.path}: {', '.join(summary['damaged'][:10])}{' …' if len(summary['damaged']) > 10 else ''}; "
            "segkd cache repair writes them again"
        )
    show(summary, text, as_json=as_json)
