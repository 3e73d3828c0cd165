"""``segkd plan``: what stage 1 will take, and whether its teacher is ready for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from segkd.cli.options import json_option, run_options, show, verbosity_options

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig


@click.command("plan", short_help="Foretell the cache: size, coding error, time; check the teacher.")
@click.option(
    "--samples", metavar="K", type=click.IntRange(min=2), help="Samples to try, spread over all. [default: 48]"
)
@run_options(budget=True)
@json_option
@verbosity_options
def plan(run: RunConfig, samples: int | None, as_json: bool) -> None:
    """Foretell what `segkd teacher-cache` will take, from a few samples that go through it into a temporary folder.

    Bytes, coding error, time, what an interruption costs, free space, and after how many training steps the cache has
    paid for itself. The teacher is checked too: how far it disagrees with itself (to set max_kl by), and, where there
    are labels of role select or train, whether another description of it (order of channels, range of values, offset
    or order of classes) labels clearly better: then the command ends with status 1.
    """
    from segkd.pipeline.teacher.plan import plan as foretell
    from segkd.pipeline.teacher.trial import TRIED

    foretold = foretell(run, samples=samples or TRIED)
    show(foretold.to_dict(), "\n".join(foretold.lines()), as_json=as_json)
    if not foretold.ok:
        click.get_current_context().exit(1)
