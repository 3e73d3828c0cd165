"""``segkd teacher-cache``: stage 1."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from segkd.cli.options import json_option, progress, resumable, run_options, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


@click.command("teacher-cache", short_help="Stage 1: write the cache of a teacher.")
@run_options(budget=True)
@click.option(
    "--task",
    metavar="I/N",
    help="Write every N-th unit, from the I-th on (I from 0); found by itself in a Slurm array, an indexed Kubernetes "
    "job (with SEGKD_TASKS) and under torchrun; off: all units.",
)
@click.option("--dask", metavar="WHERE", help="Let Dask workers write: local:2, or a scheduler: tcp://HOST:8786.")
@click.option(
    "--close", is_flag=True, help="Finish a cache that was begun with another list as it is, and add what differs."
)
@json_option
@verbosity_options
def teacher_cache(run: RunConfig, task: str | None, dask: str | None, close: bool, as_json: bool) -> None:
    """Stage 1: the teacher looks at every image once and leaves its targets in the cache.

    The run file's [data], [teacher] and [cache] say what of whom goes where. What an earlier run has finished is not
    done again. A complete cache is compared with the list of samples: what was added or changed is added, what was
    removed is hidden, and a cache that holds the list as it is is left alone.
    """
    from segkd.pipeline.processes import take_device
    from segkd.pipeline.teacher.cache import teacher_cache as write
    from segkd.pipeline.teacher.division import find_share

    share = find_share(task, os.environ)
    take_device("cache.device", run.cache.device)
    with resumable("Finished units are kept; the same command goes on with the others."):
        summary = write(run, share=share, dask=dask, close=close, progress=progress())
    show(summary.to_dict(), "\n".join(summary.lines()), as_json=as_json)
