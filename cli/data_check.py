"""``segkd data check``: what a data set holds and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from segkd.cli.options import json_option, overwrite_option, progress, run_options, show, verbosity_options
from segkd.storage.errors import OutputExistsError

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


@click.command("check", short_help="Count, measure, complain; draft a description.")
@click.argument("folder", metavar="[FOLDER]", required=False)
@click.option("--write", metavar="FILE", help="Draft a run file that describes FOLDER by what is found in it.")
@click.option("--list-broken", metavar="FILE", help="Write the samples whose files cannot be used, for data.skip.")
@overwrite_option
@run_options(required=False)
@json_option
@verbosity_options
def data_check(
    run: RunConfig | None,
    folder: str | None,
    write: str | None,
    list_broken: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Read every image and label map of the run file's [data]: count, measure, complain.

    With FOLDER and --write it drafts a run file first, and checks what that describes. Ends with status 1 where the
    data cannot be used.
    """
    if run is None and folder is not None and write is not None:
        run = _drafted(folder, write, overwrite=overwrite)
    elif run is None or folder is not None or write is not None:
        raise click.UsageError("Give either the run file (--config), or a FOLDER and where to --write its description.")

    from segkd.pipeline.data.check import check

    if list_broken is not None:
        _require_free(list_broken, overwrite=overwrite)
    report = check(run.data, progress=progress())
    complaints = [f"{complaint.severity}: {complaint}" for complaint in report.complaints]
    if report.broken:
        complaints.append(_left_out(report.broken, list_broken))
    show(report.to_dict(), "\n".join(filter(None, [report.table(), *complaints])), as_json=as_json)
    if not report.ok:
        click.get_current_context().exit(1)


def _left_out(broken: Sequence[str], file: str | None) -> str:
    """Writes the ids of samples that cannot be used where that is asked for, and says how to do without them."""
    from segkd.pipeline.output import replacing

    count = f"{len(broken):,} sample{'s' if len(broken) > 1 else ''}"
    if file is None:
        return f'To do without {count}: --list-broken broken.txt, and skip = "broken.txt" in [data]'
    with replacing(Path(file)) as partial:
        partial.write_text("".join(f"{sample_id}\n" for sample_id in broken), encoding="utf-8")
    return f"{file} names {count}; skip = {json.dumps(file)} in [data] leaves them out"


def _require_free(file: str, *, overwrite: bool) -> None:
    if Path(file).exists() and not overwrite:
        raise OutputExistsError(f"{file} exists; name another file, or replace it with --overwrite")


def _drafted(folder: str, file: str, *, overwrite: bool) -> RunConfig:
    from segkd.pipeline.config import load
    from segkd.pipeline.data.draft import draft
    from segkd.pipeline.output import replacing

    _require_free(file, overwrite=overwrite)
    description = draft(folder)
    with replacing(Path(file)) as partial:
        partial.write_text(description, encoding="utf-8")
    return load(file)
