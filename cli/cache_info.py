"""``segkd cache info``: what a cache holds."""

from __future__ import annotations

import click

from segkd.cli.options import json_option, show, verbosity_options


@click.command("info", short_help="Say what a cache holds.")
@click.argument("cache", metavar="CACHE")
@json_option
@verbosity_options
def cache_info(cache: str, as_json: bool) -> None:
    """Samples, classes, targets, size, teacher and coding report of a cache, finished or not."""
    from segkd.pipeline.run_file import tables_to_toml
    from segkd.pipeline.teacher.cache import summarise
    from segkd.storage.reader import CacheReader

    spec = CacheReader(cache, partial=True).spec.to_dict()
    summary = summarise(cache)
    description = tables_to_toml({"teacher": spec["teacher"]}).strip()
    text = [*summary.lines(), f"  classes: {', '.join(spec['classes'])}", "", description]
    show({**summary.to_dict(), "spec": spec}, "\n".join(text), as_json=as_json)
