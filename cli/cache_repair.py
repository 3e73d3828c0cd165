"""``segkd cache repair``: what is damaged is written again."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from segkd.cli.options import json_option, progress, resumable, run_options, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


@click.command("repair", short_help="Write what is damaged in a cache again.")
@click.argument("cache", metavar="[CACHE]", required=False)
@run_options()
@json_option
@verbosity_options
def cache_repair(run: RunConfig, cache: str | None, as_json: bool) -> None:
    """Write what is damaged in CACHE again, and nothing else. Without CACHE: the run file's cache.path.

    Metadata are made again from what is intact; the teacher of the run file computes damaged units again, from the
    images that they were made of. On the same machine the cache has the bytes that it had before the damage. Ends with
    1 where something could not be repaired, and says what.
    """
    from segkd.pipeline.teacher.repair import repair

    if cache is not None:
        run = replace(run, cache=replace(run.cache, path=cache))
    with resumable("What is repaired is kept; the same command goes on with the rest."):
        summary = repair(run, workers=os.cpu_count() or 1, progress=progress())
    show(summary.to_dict(), "\n".join(summary.lines()), as_json=as_json)
    click.get_current_context().exit(0 if summary.whole and summary.sealed and not summary.failures else 1)
