"""Run files: TOML documents that may extend each other, read and written. What their settings are is not known here."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segkd.storage.errors import ConfigError

EXTENDS = "extends"
"""The key by which a run file names another, relative to its own folder, whose settings it changes."""


def relative_to_here(path: str | Path) -> str:
    """What to add to the message that a path of a run file is not found; nothing for one that is absolute."""
    if Path(path).is_absolute():
        return ""
    return f"; paths in a run file are relative to the folder you run from, {Path.cwd()}"


@dataclass(frozen=True)
class TomlFile:
    """A TOML file, put over the one that it ``extends``, if it does."""

    tables: dict[str, Any]
    place: str
    """How messages name it: with those whose settings it changes."""


def read_toml(path: str | Path) -> TomlFile:
    """The tables of a TOML file, put over those of the file that it ``extends``, if it does.

    Tables are joined key by key; of any other value the later one stands. A table that names its ``reference`` is the
    description of a network, all of it: another network's arguments are none of its own. Raises ConfigError for a file
    that is absent or cannot be read, with the line, and for files that extend each other.
    """
    return _read_toml(Path(path), ())


def _read_toml(path: Path, extending: tuple[Path, ...]) -> TomlFile:
    tables = _own_tables(path)
    if EXTENDS not in tables:
        return TomlFile(tables, str(path))
    name = tables.pop(EXTENDS)
    if not isinstance(name, str):
        raise ConfigError(
            f"{path}: {EXTENDS} = {to_toml_value(name)}: expected the name of a run file, relative to this one's folder"
        )
    if path.resolve() in extending:
        raise ConfigError(f"{path}: it extends itself, by {EXTENDS} = {to_toml_value(name)}; remove one such line")
    try:
        base = _read_toml(path.parent / name, (*extending, path.resolve()))
    except ConfigError as error:
        raise ConfigError(f"{error} (extended by {path})") from None
    others = {name for name, table in tables.items() if isinstance(table, dict) and "reference" in table}
    inherited = {name: table for name, table in base.tables.items() if name not in others}
    return TomlFile(joined(inherited, tables), f"{path}, which extends {base.place}")


def joined(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two documents' tables, key by key; of any other value the one in ``over`` stands."""
    both = {**under, **over}
    for key in under.keys() & over.keys():
        if isinstance(under[key], Mapping) and isinstance(over[key], Mapping):
            both[key] = joined(under[key], over[key])
    return both


def _own_tables(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; name an existing run file (.toml)") from None
    except (OSError, ValueError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", error)
        raise ConfigError(f"{path}: cannot be read: {reason}; a run file is a TOML text file") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def tables_to_toml(tables: Mapping[str, Any]) -> str:
    """A JSON document's tables as TOML, without the keys that hold None."""
    return "\n".join(_table((), tables)).strip() + "\n"


def to_toml_value(value: Any) -> str:
    """One value as TOML writes it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        inside = ", ".join(
            f"{bare_key(key)} = {to_toml_value(item)}" for key, item in value.items() if item is not None
        )
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(to_toml_value(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def bare_key(key: str) -> str:
    """A key as TOML writes it."""
    plain = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if plain else to_toml_value(key)


def _table(path: tuple[str, ...], table: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a table: its own keys first, then its tables."""
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    own = [
        f"{bare_key(key)} = {to_toml_value(value)}"
        for key, value in table.items()
        if key not in inner and value is not None
    ]
    if path and (own or not inner):
        yield from ("", f"[{'.'.join(map(bare_key, path))}]")
    yield from own
    for key, value in inner.items():
        yield from _table((*path, key), value)
