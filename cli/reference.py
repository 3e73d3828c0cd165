"""The reference pages, made from the commands and the configuration themselves.

``python -m segkd.cli.reference docs`` writes ``commands.md`` and ``configuration.md`` into the folder ``docs``.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import click

from segkd.cli.main import main
from segkd.pipeline.config import RunConfig
from segkd.pipeline.evidence import Row, evidence_of
from segkd.pipeline.models.references import BUILT_IN
from segkd.pipeline.run_file import to_toml_value
from segkd.pipeline.settings import Setting, settings

NOTE = "<!-- Made by `python -m segkd.cli.reference docs`; change what it is made from instead. -->"


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    return {"commands.md": commands_page(), "configuration.md": configuration_page()}


def commands_page() -> str:
    """All commands with their arguments and options."""
    parts = ["# Commands", NOTE]
    rows = [f"| `{path}` | {_cell(command.get_short_help_str(limit=200))} |" for path, command in commands()]
    parts.append("\n".join(["| command | does |", "|---|---|", *rows]))
    parts.append(
        "Results go to standard output, logs to standard error. "
        "Exit status: 0 done, 1 the thing asked about is not so, 2 wrong usage, 130 interrupted."
    )
    for path, command in commands():
        context = click.Context(command, info_name=path, terminal_width=100)
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        parts += [f"## {path}", f"    {usage}", inspect.cleandoc(command.help or "")]
        options = [option for option in command.params if isinstance(option, click.Option)]
        records = [record for option in options if (record := option.get_help_record(context))]
        rows = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in records]
        parts.append("\n".join(["| option | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by what is typed."""

    def below(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield from below(f"{path} {name}", inner)
        else:
            yield path, command

    yield from below("segkd", main)


def configuration_page() -> str:
    """All tables and keys of a run file."""
    tables: dict[type, list[Setting]] = {}
    places: dict[type, list[str]] = {}
    for setting in settings(RunConfig):
        if setting.table is not None:
            places.setdefault(setting.table, []).append(f"[{'.'.join(setting.key)}]")
        keys = tables.setdefault(setting.owner, [])
        if setting.field.name not in [key.field.name for key in keys]:
            keys.append(setting)
    del tables[RunConfig]
    parts = ["# The run file", NOTE]
    parts.append(
        "A run file is TOML. Every key may also be given on the command line: `--set train.steps=500`. "
        "Paths are relative to the working directory unless the key says otherwise. "
        "`--print-config` prints the file that a command works with. "
        'A run file that begins with `extends = "other.toml"` (relative to its own folder) changes that one: tables '
        "are joined key by key, of any other value its own stands. It can change what it inherits, and not remove it; "
        "but a `[teacher]` or `[student]` with a `reference` of its own inherits nothing of another network's."
    )
    for kind, keys in tables.items():
        # What one table has of another one stands there.
        base = next((other for other in kind.__mro__[1:] if other in places), None)
        inherited = {field.name for field in dataclasses.fields(base)} if base else set()
        beside = [f"Beside the keys of {', '.join(places[base])}:"] if base else []
        prose = [_prose(inspect.getdoc(kind) or ""), *accuracy(kind), *beside]
        parts += [f"## {', '.join(places[kind])}", " ".join(prose)]
        meanings, hints = field_docs(kind), typing.get_type_hints(kind)
        rows = [
            f"| `{name}` | {_cell(_type_text(hints[name]))} | {_cell(_default_text(key))} "
            f"| {_cell(' '.join([meanings[name], *accuracy(kind, name)]))} |"
            for key in keys
            for name in [key.field.name]
            if name not in inherited
        ]
        parts.append("\n".join(["| key | holds | default | meaning |", "|---|---|---|---|", *rows]))
    parts += ["## Built-in networks", networks_table()]
    return "\n\n".join(parts) + "\n"


def networks_table() -> str:
    """What may stand as a reference without any code of one's own, with what ``arguments`` may hold."""
    rows = []
    for name, build in BUILT_IN.items():
        _, *own = inspect.signature(build).parameters.values()  # the first is the number of classes
        arguments = ", ".join(f"`{one.name} = {to_toml_value(one.default)}`" for one in own)
        rows.append(f"| `{name}` | {arguments or 'none'} | {_cell(_prose(inspect.getdoc(build) or ''))} |")
    return "\n".join(["| `reference` | `arguments`, with their defaults | what it is |", "|---|---|---|", *rows])


def field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, those that it inherits among them."""
    docs = {}
    for owner in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[field.target.id] = _prose(inspect.cleandoc(text))
    return docs


def accuracy(kind: type, name: str = "") -> list[str]:
    """What is to be said of the evidence for a setting of a dataclass, or for all of it: a sentence or none each."""
    evidence = evidence_of(kind)
    sentences = []
    if name in evidence:
        sentences.append(f"Accuracy{_figures(evidence[name])}.")
    values = {key.partition("=")[2]: row for key, row in evidence.items() if name and key.startswith(f"{name}=")}
    return sentences + [f"Accuracy of `{value}`{_figures(row)}." for value, row in values.items()]


def _figures(row: Row | None) -> str:
    return " not measured" if row is None else f": [results/{row.page}](results/{row.page}), *{row.row}*"


def _type_text(hint: Any) -> str:
    """A type as a run file's author thinks of it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (UnionType, typing.Union):
        return " or ".join(_type_text(option) for option in arguments if option is not NoneType)
    if origin is typing.Literal:
        return " or ".join(f"`{to_toml_value(value)}`" for value in arguments)
    if origin is tuple:
        return f"[{', '.join('...' if item is ... else _type_text(item) for item in arguments)}]"
    if origin is dict:
        return f"table: {_type_text(arguments[0])} = {_type_text(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "table"
    if issubclass(hint if isinstance(hint, type) else object, enum.Enum):
        return " or ".join(f"`{to_toml_value(member.value)}`" for member in hint)
    names = {str: "string", int: "integer", float: "number", bool: "true or false"}
    return names.get(hint, "anything")


def _default_text(setting: Setting) -> str:
    field = setting.field
    if field.default is not dataclasses.MISSING:
        return "" if field.default is None else f"`{to_toml_value(field.default)}`"
    if field.default_factory is dataclasses.MISSING:
        return "required"
    return "" if setting.table else f"`{to_toml_value(field.default_factory())}`"


def _prose(text: str) -> str:
    """A docstring's markup as Markdown's."""
    return re.sub(r":\w+:`(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for name, text in pages().items():
        (Path(sys.argv[1]) / name).write_text(text, encoding="utf-8")
