"""Finding files: which names of a folder count, and what they have in common with those of another.

Names are relative to a root, with ``/``; names that a text file gives never leave it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from segkd.pipeline.run_file import relative_to_here
from segkd.storage.errors import DataError


@dataclass(frozen=True)
class Naming:
    """Which files of a folder count, and what they have in common with their partner."""

    suffix: str
    """What the name has behind the common part; with a dot in it the extension is included."""
    extensions: Set[str]
    """The extensions that count where the suffix has none."""

    def __str__(self) -> str:
        return f"*{self.suffix}" + ("" if "." in self.suffix else f"{{{','.join(sorted(self.extensions))}}}")

    def stem(self, name: str) -> str | None:
        """The common part of a name, None for a file that does not count."""
        if "." not in self.suffix:
            name, extension = split_extension(name)
            if extension not in self.extensions:
                return None
        stem = name.removesuffix(self.suffix) if name.endswith(self.suffix) else ""
        return None if stem == "" or stem.endswith("/") else stem


def listing(names: Sequence[str], *, most: int = 20) -> str:
    """The names for a message, or the first of very many."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def split_extension(name: str) -> tuple[str, str]:
    """A name without its extension, and the extension in lower case with its dot; empty where there is none."""
    stem, dot, extension = name.rpartition(".")
    return (stem, f".{extension.lower()}") if dot and "/" not in extension else (name, "")


def names_under(folder: Path, *, skip: Path | None = None) -> Iterator[str]:
    """All files under ``folder`` except those under ``skip``, and except hidden ones; nothing is asked of single files.

    Raises DataError for a folder that is absent or may not be read.
    """
    pending = [""]
    while pending:
        parent = pending.pop()
        try:
            with os.scandir(folder / parent) as entries:
                for entry in entries:
                    name = f"{parent}{entry.name}"
                    if entry.name.startswith("."):
                        continue
                    if not entry.is_dir():
                        yield name
                    elif folder / name != skip:
                        pending.append(f"{name}/")
        except OSError as error:
            raise DataError(
                f"{folder / parent}: cannot be listed ({error.strerror}); check the folders of [data]"
                f"{relative_to_here(folder)}"
            ) from None


def names_in(folder: Path) -> set[str]:
    """The files and folders in ``folder``; none where there is no such folder."""
    try:
        return {path.name for path in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def by_stem(names: Iterable[str], naming: Naming, place: Path) -> dict[str, str]:
    """Common part -> name, of the names that count. Raises DataError where two share it, and for one not in UTF-8."""
    found: dict[str, str] = {}
    for name in names:
        stem = naming.stem(name)
        if stem is None:
            continue
        if not _is_text(name):
            raise DataError(f"{place}: the name {name!r} is not UTF-8, so that no list or cache can hold it; rename it")
        if stem in found:
            first, second = sorted((found[stem], name))
            raise DataError(
                f"{place}: {first} and {second} have one name; remove one of them, or give a suffix with the "
                "extension that counts"
            )
        found[stem] = name
    return found


def _is_text(name: str) -> bool:
    """Whether a file's name is text, not bytes that Python could only escape."""
    return not any("\udc80" <= character <= "\udcff" for character in name)


def inside(name: str, place: str) -> str:
    """The name that ``place`` gives, in its plainest form. Raises DataError for one that leaves its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{place}: {name!r} leaves the folder of the data; expected a name below data.root")
    return str(path)
