"""``segkd data list``: which image has which role."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from segkd.cli.options import ROLES, json_option, run_options, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


@click.command("list", short_help="List the samples: role, id, group, file.")
@click.option("--role", type=click.Choice(ROLES), help="Those of one role alone.")
@run_options()
@json_option
@verbosity_options
def data_list(run: RunConfig, role: str | None, as_json: bool) -> None:
    """List the samples of the run file's [data], a line each: role, id, group and image, with tabs between them.

    Ids are what lists (data.lists), `cache show` and predictions name samples by; groups are what data.fractions keep
    together.
    """
    from segkd.pipeline.data.readers import open_data

    source = open_data(run.data)
    samples = [
        {
            "role": str(sample.role),
            "id": sample.id,
            "group": sample.group,
            "image": str(source.image_file(sample) or ""),
        }
        for sample in source.samples
        if role in (None, sample.role)
    ]
    show({"samples": samples}, "\n".join("\t".join(sample.values()) for sample in samples), as_json=as_json)
