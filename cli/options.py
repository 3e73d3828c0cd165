"""Options that several commands share, as decorators, and how results leave a command.

Nothing here imports torch when the module is imported: ``segkd --help`` must be quick.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from segkd.pipeline.config import RunConfig
    from segkd.pipeline.progress import Progress

Command = Callable[..., None]

VERBOSITY = "segkd.verbosity"
"""Key in click's context: the number of -v less the number of -q."""


ROLES = ("train", "auxiliary", "select", "report")


class Interrupted(click.ClickException):
    """Ctrl-C, and how to go on."""

    exit_code = 130

    def show(self, file: Any = None) -> None:
        click.echo(f"Interrupted. {self.message}", file=file, err=True)


@contextmanager
def resumable(remedy: str) -> Iterator[None]:
    """Turns Ctrl-C in a long task into one line that says how to go on, if the task does not say so itself."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Interrupted(str(interrupt) or remedy) from None


class _ToStandardError(logging.Handler):
    """Log lines that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.capitalize()}: "
        tqdm.write(f"{prefix}{self.format(record)}", file=sys.stderr)


def set_up_logging(verbosity: int) -> None:
    """Logs to standard error: warnings alone when quiet, details when verbose."""
    logger = logging.getLogger("segkd")
    logger.setLevel(logging.WARNING if verbosity < 0 else logging.DEBUG if verbosity > 0 else logging.INFO)
    if not any(isinstance(handler, _ToStandardError) for handler in logger.handlers):
        logger.addHandler(_ToStandardError())


def verbosity_options(command: Command) -> Command:
    """``-v`` and ``-q``."""

    def count(context: click.Context, parameter: click.Parameter, value: int) -> None:
        change = value if parameter.name == "verbose" else -value
        context.meta[VERBOSITY] = context.meta.get(VERBOSITY, 0) + change
        set_up_logging(context.meta[VERBOSITY])

    shared: dict[str, Any] = {"count": True, "expose_value": False, "is_eager": True, "callback": count}
    command = click.option("-q", "--quiet", help="Warnings and results only.", **shared)(command)
    return click.option("-v", "--verbose", help="More detail; twice: tracebacks.", **shared)(command)


def progress() -> Progress:
    """Where the running command's long tasks report to; of several processes the first one's do."""
    from segkd.pipeline.processes import started
    from segkd.pipeline.progress import progress_for

    follows = started() > 1 and os.environ["RANK"] != "0"
    return progress_for(quiet=follows or click.get_current_context().meta.get(VERBOSITY, 0) < 0)


def json_option(command: Command) -> Command:
    """``--json``, as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def overwrite_option(command: Command) -> Command:
    """``--overwrite``."""
    return click.option("--overwrite", is_flag=True, help="Replace what already stands at the output.")(command)


def device_option(command: Command) -> Command:
    """``--device``."""
    text = "Where networks run: cpu, cuda, cuda:1 …; auto takes a GPU where there is one."
    return click.option("--device", metavar="DEVICE", default="auto", show_default=True, help=text)(command)


def reference_option(command: Command) -> Command:
    """``--reference``."""
    text = "The code of the checkpoint's network where it is not built in (file.py:callable), which you trust."
    return click.option("--reference", metavar="REFERENCE", help=text)(command)


def run_options(*, required: bool = True, budget: bool = False) -> Callable[[Command], Command]:
    """``--config``, ``--set`` and ``--print-config``; the command gets the ``run`` that they describe.

    Where they are not required, it gets None if none is given. ``budget``: with ``--budget``, short for a setting.
    """
    budget_text = "Bytes that the cache may take, in place of a bound: 200GB, 1.5TiB."
    extra: Callable[[Command], Command] = (
        click.option("--budget", metavar="SIZE", help=budget_text) if budget else lambda command: command
    )

    def decorate(command: Command) -> Command:
        @click.option("-c", "--config", metavar="FILE", help="The run file (TOML).")
        @click.option(
            "-s", "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a setting: train.steps=500."
        )
        @extra
        @click.option("--print-config", is_flag=True, help="Print the resolved run file and do nothing else.")
        @functools.wraps(command)
        def loaded(
            config: str | None,
            overrides: tuple[str, ...],
            print_config: bool,
            budget: str | None = None,
            **others: Any,
        ) -> None:
            if budget is not None:
                overrides = (*overrides, f"cache.budget={json.dumps(budget)}")
            given = config is not None or overrides or print_config
            if required and not given:
                raise click.UsageError("Missing option '-c' / '--config': the run file that says what to work on.")
            run = _load(config, overrides, print_config) if given else None
            if not print_config:
                command(run=run, **others)

        return loaded

    return decorate


def _load(config: str | None, overrides: tuple[str, ...], print_config: bool) -> RunConfig:
    from segkd.pipeline.config import load
    from segkd.pipeline.settings import to_toml

    run = load(config, overrides)
    if print_config:
        click.echo(to_toml(run), nl=False)
    return run


def show(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """A command's result on standard output."""
    click.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text)
