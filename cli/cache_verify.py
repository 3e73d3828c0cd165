"""``segkd cache verify``: every byte of a cache checked."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from segkd.cli.options import json_option, progress, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.progress import Task


@click.command("verify", short_help="Check every byte of a cache.")
@click.argument("cache", metavar="CACHE")
@click.option("--workers", metavar="N", type=click.IntRange(1), help="Threads that read.  [default: one a core]")
@json_option
@verbosity_options
def cache_verify(cache: str, workers: int | None, as_json: bool) -> None:
    """Check every byte of a cache, metadata included, and list what is damaged and which samples that concerns.

    Ends with 0 for a whole cache and with 1 for a damaged one. Of an unfinished cache the finished units are checked.
    """
    from segkd.storage.audit import verify

    with ExitStack() as stack:
        tasks: list[Task] = []

        def on_progress(_: int, total: int) -> None:
            if not tasks:
                tasks.append(stack.enter_context(progress().task("verify", total, unit="unit")))
            tasks[0].advance()

        report = verify(cache, workers=workers or os.cpu_count() or 1, on_progress=on_progress)
    show(report.to_dict(), "\n".join(report.lines()), as_json=as_json)
    click.get_current_context().exit(0 if report.whole else 1)
