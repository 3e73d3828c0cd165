"""``segkd train-student``: stage 2."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from segkd.cli.options import json_option, overwrite_option, progress, resumable, run_options, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


logger = logging.getLogger("segkd")


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
@click.option(
    "--teacher",
    metavar="REFERENCE",
    help="For comparison: load this teacher beside the student instead of reading a cache. The run file's [teacher] "
    "describes it where it names the same one.",
)
@click.option(
    "--teacher-view",
    type=click.Choice(["image", "crop"]),
    help="What a loaded teacher sees: the whole image, as it did when the cache was written, or the student's crop.  "
    "[default with --teacher: image]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the last checkpoint as if nothing had happened. The data's root, the cache's path, the device and "
    "the number of workers may differ.",
)
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
    teacher: str | None,
    teacher_view: Literal["image", "crop"] | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Stage 2: train the student of the run file from labels and from what the cache keeps of the teacher.

    Writes last.safetensors, best.safetensors (by the validation on role select), metrics.jsonl and run.json.

    Several GPUs, or processes, share every batch: torchrun --nproc-per-node 4 -m segkd train-student --config run.toml
    """
    from segkd.pipeline import processes
    from segkd.pipeline.models.network import TeacherConfig
    from segkd.pipeline.student.train import train

    if init is not None:
        run = replace(run, student=replace(run.the_student(), init=init))
    if on_damage is not None:
        run = replace(run, train=replace(run.train, on_damage=on_damage))
    if no_distill and (teacher or teacher_view):
        given = "--teacher" if teacher else "--teacher-view"
        raise click.UsageError(f"--no-distill and {given} exclude each other; give the one that is meant")
    if teacher is not None and (run.teacher is None or run.teacher.reference != teacher):
        if run.teacher is not None:
            logger.warning(
                "--teacher is %s, and [teacher] of the run file describes %s: what it says is left aside",
                teacher,
                run.teacher.reference,
            )
        run = replace(run, teacher=TeacherConfig(reference=teacher))
    if teacher is not None or teacher_view is not None:
        view = teacher_view or (run.train.teacher_view if run.train.teacher_view != "cache" else "image")
        run = replace(run, train=replace(run.train, teacher_view=view))
    config = click.get_current_context().params["config"]
    folder = output or str(Path("runs") / Path(config or "student.toml").stem)
    with resumable(f"Go on with --resume; checkpoints are in {folder}."), processes.joined(run.train.device):
        if not processes.leads():
            logger.setLevel(logging.ERROR)
        summary = train(run, folder, distill=not no_distill, resume=resume, overwrite=overwrite, progress=progress())
        if not processes.leads():
            return
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
