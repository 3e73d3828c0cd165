"""Who may be used for what: roles of samples by list files, by folders, or by a hash of their groups."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from segkd.pipeline.data.sample import LEARNED, SCORED, Role
from segkd.storage.errors import ConfigError, ContaminationError, DataError


@dataclass(frozen=True)
class Line:
    """A line of a list file."""

    role: Role
    text: str
    place: str
    """File and line number."""


def lines_of(lists: Mapping[Role, str]) -> Iterator[Line]:
    """The lines of all list files but comments and blank ones. Raises ConfigError, and DataError for an empty file."""
    for role, file in lists.items():
        lines = list(lines_of_file(file, f"data.lists.{role}"))
        if not lines:
            raise DataError(f"{file}: names no sample; fill it, or remove data.lists.{role}")
        yield from (Line(role, text, place) for place, text in lines)


def lines_of_file(file: str, setting: str) -> Iterator[tuple[str, str]]:
    """Place and text of each line but comments and blank ones. Raises ConfigError, naming the setting."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"{setting} = {file!r} cannot be read ({reason}); its path is relative to the working directory"
        ) from None
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if line and not line.startswith("#"):
            yield f"{file}, line {number}", line


def by_lines(named: Iterable[tuple[str, Line]]) -> dict[str, Role]:
    """Sample id -> role, of ids with the line that names each.

    Raises ContaminationError for a sample of two roles, DataError for one that is named twice.
    """
    lines: dict[str, Line] = {}
    for sample_id, line in named:
        earlier = lines.setdefault(sample_id, line)
        if earlier is line:
            continue
        if earlier.role != line.role:
            raise ContaminationError(
                f"sample {sample_id!r} has two roles: {earlier.role} ({earlier.place}) and {line.role} ({line.place}); "
                "remove it from one of the lists"
            )
        raise DataError(
            f"sample {sample_id!r} is named twice: {earlier.place} and {line.place}; remove one of the lines"
        )
    return {sample_id: line.role for sample_id, line in lines.items()}


def by_folders(folders: Mapping[Role, Sequence[str]], ids: Iterable[str]) -> dict[str, Role]:
    """Sample id -> role, of ids that lie in one of the folders; the innermost one decides.

    Raises ContaminationError for a folder of two roles, DataError for one without samples.
    """
    roles: dict[tuple[str, ...], Role] = {}
    for role, names in folders.items():
        for name in names:
            parts = Path(name).parts
            if roles.setdefault(parts, role) != role:
                raise ContaminationError(
                    f"data.folders gives {name!r} to both {roles[parts]} and {role}; leave it to one of them"
                )
    found: dict[str, Role] = {}
    used = set()
    for sample_id in ids:
        parts = tuple(sample_id.split("/")[:-1])
        place = next((parts[:depth] for depth in range(len(parts), -1, -1) if parts[:depth] in roles), None)
        if place is not None:
            found[sample_id] = roles[place]
            used.add(place)
    for parts in roles.keys() - used:
        raise DataError(f"data.folders.{roles[parts]} names {'/'.join(parts) or '.'!r}, which holds no images")
    return found


def by_fractions(
    fractions: Mapping[Role, float], group_of: Callable[[str], str], ids: Iterable[str]
) -> dict[str, Role]:
    """Sample id -> role: each group falls where a hash of its name lies in the unit interval that the roles divide."""
    found = {}
    for sample_id in ids:
        digest = hashlib.sha256(group_of(sample_id).encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        for role in sorted(fractions):
            found[sample_id] = role
            position -= fractions[role]
            if position < 0:
                break
    return found


def labels_apart(
    roles: Mapping[str, Role], labels: Container[str], group_of: Callable[[str], str] | None
) -> dict[str, Role]:
    """Ids that are not in ``labels`` as auxiliary samples where they would be trained on. Where they would be scored on
    they have no role, since what they show other images of their folder or group show too; but a group of
    ``group_of`` without any label map is auxiliary as a whole.
    """
    labelled = [sample_id for sample_id in roles if sample_id in labels]
    scored = {group_of(sample_id) for sample_id in labelled if roles[sample_id] in SCORED} if group_of else set()
    found = {}
    for sample_id, role in roles.items():
        if sample_id in labels:
            found[sample_id] = role
        elif role in LEARNED or (group_of and group_of(sample_id) not in scored):
            found[sample_id] = Role.AUXILIARY
    return found


def grouping(pattern: str | None) -> Callable[[str], str]:
    """Sample id -> group, by a regular expression; none: no groups. The function raises DataError for no match."""
    if pattern is None:
        return lambda _: ""
    expression = re.compile(pattern)

    def group_of(sample_id: str) -> str:
        match = expression.search(sample_id)
        if match is None:
            raise DataError(f"data.group = {pattern!r} finds no group in sample {sample_id!r}; make it match every id")
        return str(match[1] if expression.groups else match[0])

    return group_of
