"""The command ``segkd``: gathers the commands, and turns errors into a message and an exit status."""

from __future__ import annotations

import errno
import traceback
from typing import Any, NoReturn

import click

from segkd import __version__
from segkd.cli.ablate import ablate
from segkd.cli.cache_compact import cache_compact
from segkd.cli.cache_info import cache_info
from segkd.cli.cache_repair import cache_repair
from segkd.cli.cache_show import cache_show
from segkd.cli.cache_verify import cache_verify
from segkd.cli.data_check import data_check
from segkd.cli.data_list import data_list
from segkd.cli.evaluate import evaluate
from segkd.cli.export import export
from segkd.cli.options import VERBOSITY, Interrupted, set_up_logging
from segkd.cli.plan import plan
from segkd.cli.predict import predict
from segkd.cli.report import report
from segkd.cli.teacher_cache import teacher_cache
from segkd.cli.train_student import train_student
from segkd.pipeline.memory import keep_freed_memory
from segkd.storage.errors import SegkdError

_REMEDIES = {
    errno.ENOSPC: "free some space, or name another place",
    errno.EDQUOT: "free some space, or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.EACCES: "check its owner and mode, or name another place",
    errno.EEXIST: "a file stands where a folder must; name another place",
    errno.ENOTDIR: "a file stands where a folder must; name another place",
}
"""What to do about what the system refuses."""


class Main(click.Group):
    """The group that ends with the project's exit statuses: 0 done, 1 it is not so, 2 wrong usage, 130 interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        set_up_logging(0)
        keep_freed_memory()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(str(interrupt) or "Nothing half-written is left behind.") from None
        except SegkdError as error:
            _fail(ctx, str(error), error.exit_status)
        except OSError as error:
            if error.errno in (None, errno.EPIPE):
                raise
            remedy = _REMEDIES.get(error.errno)
            _fail(ctx, f"{error.filename or 'the system'}: {error.strerror}{f'; {remedy}' if remedy else ''}", 1)


def _fail(context: click.Context, message: str, status: int) -> NoReturn:
    """Says what is wrong, with a traceback only for who asked for it, and ends."""
    if context.meta.get(VERBOSITY, 0) >= 2:
        click.echo(traceback.format_exc(), err=True, nl=False)
    click.echo(f"Error: {message}", err=True)
    context.exit(status)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="segkd")
def main() -> None:
    """Distil a heavy segmentation network into fast ones: cache the teacher once, then train students."""


@main.group()
def data() -> None:
    """Look at data sets."""


@main.group()
def cache() -> None:
    """Look at caches."""


data.add_command(data_check, "check")
data.add_command(data_list, "list")
cache.add_command(cache_compact, "compact")
cache.add_command(cache_info, "info")
cache.add_command(cache_repair, "repair")
cache.add_command(cache_show, "show")
cache.add_command(cache_verify, "verify")
main.add_command(plan)
main.add_command(teacher_cache)
main.add_command(train_student)
main.add_command(evaluate)
main.add_command(predict)
main.add_command(report)
main.add_command(export)
main.add_command(ablate)
