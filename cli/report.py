"""``segkd report``: runs side by side in one HTML page."""

from __future__ import annotations

import click

from segkd.cli.options import json_option, overwrite_option, show, verbosity_options


@click.command("report", short_help="Put runs side by side in one HTML page.")
@click.argument("runs", metavar="FOLDER...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE", required=True, help="The page to write: report.html.")
@overwrite_option
@json_option
@verbosity_options
def report(runs: tuple[str, ...], output: str, overwrite: bool, as_json: bool) -> None:
    """Write one page of the training runs in each FOLDER and below it, finished or not.

    Scores, settings that differ, curves and IoU by class, runs that differ in their seed alone together, and the table
    of a sweep where there is one. The page needs nothing beside it.
    """
    from pathlib import Path

    from segkd.pipeline.report import find_runs, groups_of
    from segkd.pipeline.report_page import page, sweep_tables, write_page

    folders = [Path(folder) for folder in runs]
    found = find_runs(folders)
    groups = groups_of(found)
    text = page(groups, sweep_tables(folders), ", ".join(runs))
    write_page(Path(output), text, overwrite=overwrite)
    size = len(text.encode())
    result = {"path": output, "bytes": size, "runs": [run.name for run in found]}
    together = "" if len(groups) == len(found) else f" of {len(groups):,} kinds"
    words = f"{output}: {len(found):,} run{'s' if len(found) > 1 else ''}{together}, {size / 1e6:.2f} MB"
    show(result, words, as_json=as_json)
