"""From tables to frozen dataclasses and back: overriding, validating, naming every setting.

Knows nothing of any particular setting. A problem is stated with its place (file or ``--set``), its dotted key, what
stands there, what is expected and the nearest known key; all problems of a file are stated together.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from segkd.pipeline.run_file import bare_key, tables_to_toml, to_toml_value
from segkd.storage.errors import ConfigError

T = TypeVar("T")
Key = tuple[str | int, ...]
"""Where something stands: table, key, position in an array."""

_NO_RUN_FILE = "no run file"


@dataclasses.dataclass(frozen=True)
class Override:
    """One ``--set key=value``."""

    key: tuple[str, ...]
    value: Any
    text: str


def parse_override(text: str) -> Override:
    """``a.b=value``: the value is TOML, or else the bare string. Raises ConfigError."""
    name, equals, written = text.partition("=")
    try:
        if not equals or "\n" in name:
            raise ValueError
        node: Any = tomllib.loads(f"{name} = 0")
    except ValueError:
        raise ConfigError(f"--set {text}: expected key=value with a dotted key, such as train.steps=500") from None
    key: list[str] = []
    while isinstance(node, dict):
        ((part, node),) = node.items()
        key.append(part)
    try:
        value = tomllib.loads(f"value = {written.strip()}\n")["value"]
    except tomllib.TOMLDecodeError:
        value = written.strip()
    return Override(tuple(key), value, text)


def parse(kind: type[T], tables: Mapping[str, Any], *, place: str | None = None, overrides: Sequence[str] = ()) -> T:
    """A ``kind`` (a dataclass) of ``tables`` with ``overrides`` put in. ``place`` names where the tables come from.

    Strict: a string is not a number, an unknown key is an error. Raises ConfigError with one line a problem.
    """
    changes = [parse_override(text) for text in overrides]
    merged = json.loads(json.dumps(tables, default=str))
    for change in changes:
        _put(merged, change)
    # Validated as JSON, because strict validation of Python objects would refuse TOML's arrays as tuples; wrapped in a
    # tuple, because pydantic takes a configuration only for types that could not have one of their own.
    adapter = TypeAdapter(tuple[kind], config=ConfigDict(strict=True, extra="forbid"))  # type: ignore[valid-type]
    try:
        (value,) = adapter.validate_json(json.dumps([merged], default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(kind, merged, error, place, changes))) from None
    return typing.cast(T, value)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON holds it: dicts, lists, strings, numbers, None."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def to_toml(config: Any) -> str:
    """A configuration as a run file that :func:`parse` turns into the same again.

    TOML has no None, so keys that hold it are left out; settings that may be None have it for their default.
    """
    return tables_to_toml(to_dict(config))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key that a run file may hold."""

    key: tuple[str, ...]
    field: dataclasses.Field[Any]
    owner: type
    table: type | None
    """The dataclass that the key holds, where it holds one."""


NAMED = "<name>"
"""Stands in a :class:`Setting` for the name that a run file gives to one of several tables of a kind."""


def settings(kind: type, prefix: tuple[str, ...] = ()) -> Iterator[Setting]:
    """All keys of a dataclass, depth first, in their order."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key = (*prefix, field.name)
        table = _dataclass_in(hints[field.name])
        yield Setting(key, field, kind, table)
        if table is None and typing.get_origin(hints[field.name]) is dict:
            table, key = _dataclass_in(typing.get_args(hints[field.name])[1]), (*key, NAMED)
            if table is not None:
                yield Setting(key, field, kind, table)
        if table is not None:
            yield from settings(table, key)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in ``X`` or ``X | None``."""
    options = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def _put(tables: dict[str, Any], change: Override) -> None:
    """Sets one key, making the tables on the way to it; a value that stands where a table must be gives way."""
    *parents, last = change.key
    for parent in parents:
        if not isinstance(tables.get(parent), dict):
            tables[parent] = {}
        tables = tables[parent]
    tables[last] = change.value


def _problems(
    kind: type, tables: Any, error: ValidationError, place: str | None, changes: Sequence[Override]
) -> list[str]:
    """One line a problem, in the order of the settings."""
    # Alternatives of a union complain one by one about the same key, each in an error type of its own.
    complaints: dict[Key, dict[str, str]] = {}
    for item in error.errors(include_url=False):
        key = _resolved(tables, item["loc"][1:])
        if item["type"] == "missing" and isinstance(item["loc"][-1], str):
            key = (*key, item["loc"][-1])
        complaints.setdefault(key, {})[item["type"]] = _complaint(kind, key, item)
    lines = []
    for key, by_type in complaints.items():
        # A table that does not exist may have been made by a change below it.
        unknown = "unexpected_keyword_argument" in by_type
        change = next(
            (
                change
                for change in reversed(changes)
                if key[: len(change.key)] == change.key or (unknown and change.key[: len(key)] == key)
            ),
            None,
        )
        where = f"--set {change.text}" if change else place or _NO_RUN_FILE
        first, *others = by_type.values()
        text = " or ".join([first, *(other.removeprefix("expected ") for other in others)])
        # A component's own complaint may already begin with the place.
        stands = "" if text.startswith(f"{_dotted(key)}.") else f"{_standing(tables, key)}: "
        lines.append(f"{where}: {stands}{text}")
    return lines


def _complaint(kind: type, key: Key, item: ErrorDetails) -> str:
    """What pydantic says, in the words of a run file."""
    last, context = item["loc"][-1], item.get("ctx", {})
    match item["type"]:
        case "unexpected_keyword_argument":
            return f"there is no such key; {_nearest(kind, key)}"
        case "missing" if isinstance(last, str):
            return "is missing and has no default"
        case "missing":
            return f"expected {int(last) + 1} values"
        case "too_long":
            return f"expected {context['max_length']} values"
        case "value_error":
            return str(context["error"])
        case "dataclass_type":
            return "expected a table"
        case "literal_error":
            options = re.findall(r"'([^']*)'", context["expected"])
            near = get_close_matches(str(item["input"]), options, 1)
            return f"expected {context['expected']}" + (f"; did you mean '{near[0]}'?" if near else "")
        case "int_parsing" if last == "[key]":
            return "expected an integer for the key"
        case _:
            return f"expected {item['msg'].removeprefix('Input should be ')}"


def _nearest(kind: type, key: Key) -> str:
    """The known key that was probably meant: a sibling, else one of that name in another table."""
    known = [setting.key for setting in settings(kind)]
    siblings = [other[-1] for other in known if _is_of(key[:-1], other[:-1])]
    near = get_close_matches(str(key[-1]), siblings, 1)
    if near:
        return f"did you mean {_dotted((*key[:-1], near[0]))}?"
    elsewhere = [other for other in known if other[-1] == key[-1]]
    if elsewhere:
        return f"did you mean {' or '.join(_dotted(other) for other in elsewhere)}?"
    return f"known here: {', '.join(siblings)}"


def _is_of(key: Key, known: tuple[str, ...]) -> bool:
    return len(key) == len(known) and all(one in (other, NAMED) for one, other in zip(known, key, strict=True))


def _resolved(tables: Any, location: Key) -> Key:
    """The part of a location that stands in the tables: what follows names alternatives of a union."""
    for depth, part in enumerate(location):
        try:
            tables = tables[part]
        except (KeyError, IndexError, TypeError):
            return location[:depth]
    return location


def _standing(tables: Any, key: Key) -> str:
    """A key and, unless it is absent or a table, what stands there."""
    for part in key:
        tables = tables[part] if isinstance(part, int) or part in tables else {}
    return _dotted(key) if isinstance(tables, dict) else f"{_dotted(key)} = {_shortened(tables)}"


def _dotted(key: Key) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{bare_key(part)}"
    return text.removeprefix(".")


def _shortened(value: Any) -> str:
    text = to_toml_value(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
