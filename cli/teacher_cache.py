"""``segkd teacher-cache``: stage 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from segkd.cli.options import json_option, progress, resumable, run_options, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


@click.command("teacher-cache", short_help="Stage 1: write the cache of a teacher.")
@run_options(budget=True)
@json_option
@verbosity_options
def teacher_cache(run: RunConfig, as_json: bool) -> None:
    """Stage 1: the teacher looks at every image once and leaves its targets in the cache.

    The run file's [data], [teacher] and [cache] say what of whom goes where. What an earlier run has finished is not
    done again; a complete cache is left alone.
    """
    from segkd.pipeline.teacher.cache import teacher_cache as write

    with resumable("Finished units are kept; the same command goes on with the others."):
        summary = write(run, progress=progress())
    show(summary.to_dict(), "\n".join(summary.lines()), as_json=as_json)
