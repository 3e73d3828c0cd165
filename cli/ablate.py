"""``segkd ablate``: arms x seeds at matched compute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from segkd.cli.options import json_option, progress, resumable, run_options, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


@click.command("ablate", short_help="Train arms x seeds at matched compute and compare them.")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    help="Where runs, records and tables go.  [default: runs/NAME-ablate of NAME.toml]",
)
@click.option("--jobs", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
@click.option(
    "--task",
    metavar="I/N",
    help="Do every N-th run, from the I-th on (I from 0); found by itself in a Slurm array, an indexed Kubernetes "
    "job (with SEGKD_TASKS) and under torchrun; off: all runs.",
)
@click.option("--print-plan", is_flag=True, help="List the runs and which are done, and do nothing else.")
@click.option(
    "--tables",
    is_flag=True,
    help="Print the tables of what the ledger holds, and do nothing else: data, cache and teacher need not be here.",
)
@run_options()
@json_option
@verbosity_options
def ablate(
    run: RunConfig, output: str | None, jobs: int, task: str | None, print_plan: bool, tables: bool, as_json: bool
) -> None:
    """Train the arms of the run file's [ablate], each with every seed, and print what each of them gains.

    The run file is the full arm; the others take something away from it, at the same images a step. Runs that are
    recorded in the ledger are not done again, interrupted ones go on. The table is of all that is done. Exit status 1
    if a run has failed.
    """
    from segkd.pipeline.ablation.ledger import Ledger
    from segkd.pipeline.ablation.recorded import recorded
    from segkd.pipeline.ablation.sweep import ablate as compare
    from segkd.pipeline.ablation.sweep import plan_sweep
    from segkd.pipeline.processes import take_device
    from segkd.pipeline.teacher.division import find_share

    config = click.get_current_context().params["config"]
    folder = output or str(Path("runs") / f"{Path(config or 'student.toml').stem}-ablate")
    if tables:
        if print_plan or task is not None:
            given = "--print-plan" if print_plan else "--task"
            raise click.UsageError(f"--tables and {given} exclude each other; give the one that is meant")
        found = recorded(run, Ledger(run.ablate.ledger or Path(folder) / "ledger"))
        show(found.to_dict(), found.markdown(), as_json=as_json)
        return
    share = find_share(task, os.environ)
    take_device("train.device", run.train.device)
    with resumable("What is done is kept; the same command goes on."):
        sweep = plan_sweep(run, folder, measure=not print_plan, progress=progress())
        if print_plan:
            show(sweep.listing(), "\n".join(sweep.lines()), as_json=as_json)
            return
        results = compare(sweep, processes=jobs, share=share, progress=progress())
    show(results.to_dict(), results.markdown(), as_json=as_json)
    if results.failures:
        click.get_current_context().exit(1)
