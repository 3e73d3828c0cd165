"""``segkd cache compact``: what is live of a cache, in one generation."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from segkd.cli.options import json_option, progress, resumable, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.progress import Task


@click.command("compact", short_help="Rewrite what is live of a cache into a new one.")
@click.argument("source", metavar="CACHE")
@click.argument("path", metavar="NEW")
@click.option("--skip-damaged", is_flag=True, help="Leave damaged samples out instead of refusing a damaged cache.")
@json_option
@verbosity_options
def cache_compact(source: str, path: str, skip_damaged: bool, as_json: bool) -> None:
    """Rewrite the samples of all generations of CACHE into NEW, a cache of one generation, without the teacher.

    NEW is what segkd teacher-cache would write afresh for the same samples. CACHE is checked first and left alone.
    """
    from segkd.storage.compact import compact

    with ExitStack() as stack:
        stack.enter_context(resumable("Finished units are kept; the same command goes on with the others."))
        tasks: list[Task] = []

        def on_progress(done: int, total: int) -> None:
            if not tasks:
                tasks.append(stack.enter_context(progress().task("compact", total)))
            tasks[0].advance(done - seen[0])
            seen[0] = done

        seen = [0]
        workers = os.cpu_count() or 1
        summary = compact(source, path, skip_damaged=skip_damaged, workers=workers, on_progress=on_progress)
    show(summary.to_dict(), "\n".join(summary.lines()), as_json=as_json)
