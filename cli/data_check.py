"""``segkd data check``: what a data set holds and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from segkd.cli.options import json_option, overwrite_option, progress, run_options, show, verbosity_options
from segkd.storage.errors import OutputExistsError

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig
    from segkd.pipeline.data.check import DataReport


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

    joins = list_broken is not None and run.data.skip is not None and Path(list_broken) == Path(run.data.skip)
    if list_broken is not None and not joins:
        _require_free(list_broken, overwrite=overwrite)
    report = check(run.data, progress=progress())
    complaints = [f"{complaint.severity.capitalize()}: {complaint}" for complaint in report.complaints]
    if report.broken or list_broken is not None:
        complaints.append(_left_out(report, list_broken, joins=joins))
    show(report.to_dict(), "\n".join(filter(None, [report.table(), *complaints])), as_json=as_json)
    if not report.ok:
        click.get_current_context().exit(1)


def _left_out(report: DataReport, file: str | None, *, joins: bool) -> str:
    """Writes the ids of samples whose files cannot be used where that is asked for, behind the lines of ``file`` where
    it ``joins`` them, and says how to do without them."""
    from segkd.pipeline.output import replacing

    broken, errors = report.broken, sum(complaint.severity == "error" for complaint in report.complaints)
    count = f"{len(broken):,} sample{'s' if len(broken) > 1 else ''}"
    if not broken:
        return f"No file is broken; {file} {'stays as it is' if joins else 'is not written'}"
    if file is None:
        return f'To do without {count}: --list-broken broken.txt, and skip = "broken.txt" in [data]'
    before = Path(file).read_text(encoding="utf-8-sig").splitlines() if joins else []
    with replacing(Path(file)) as partial:
        partial.write_text("".join(f"{line}\n" for line in (*before, *broken)), encoding="utf-8")
    others = f"; {errors - len(broken):,} more of the errors are not of broken files" if errors > len(broken) else ""
    if joins:
        return f"{file} names {count} more, which leaves them out{others}"
    return f"{file} names {count}; skip = {json.dumps(file)} in [data] leaves them out{others}"


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
