"""``segkd cache show``: a sample's targets as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from segkd.cli.options import json_option, overwrite_option, run_options, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


@click.command("show", short_help="Draw the targets of samples.")
@click.argument("samples", metavar="SAMPLE...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FOLDER", required=True, help="Where the pictures go.")
@run_options()
@overwrite_option
@json_option
@verbosity_options
def cache_show(run: RunConfig, samples: tuple[str, ...], output: str, overwrite: bool, as_json: bool) -> None:
    """Draw what the run's cache keeps of samples: image, labels, teacher's argmax, confidence, first-order map.

    A SAMPLE is its id, such as train/0001TP_006690. Each becomes a PNG file.
    """
    from segkd.pipeline.data.readers import open_data
    from segkd.pipeline.evaluation.cached import draw_samples
    from segkd.storage.reader import CacheReader

    cache = CacheReader(run.cache.path, partial=True)
    written = [str(path) for path in draw_samples(cache, open_data(run.data), samples, output, overwrite=overwrite)]
    show({"pictures": written}, "\n".join(written), as_json=as_json)
