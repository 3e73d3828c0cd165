"""Which published data set a folder holds; and where it may be, when it is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from segkd.pipeline.data.layouts import LAYOUTS
from segkd.pipeline.data.layouts.layout import Layout
from segkd.pipeline.run_file import relative_to_here
from segkd.storage.errors import DataError

_LEVELS = 2
"""How far above and below a wrong root the right one is looked for; beside it, too."""
_MOST_FOLDERS = 40
"""More folders than this beside each other are the data's own."""


def recognised(root: Path) -> tuple[str, Layout] | None:
    """The reader and the edition for what lies in ``root``, if it is one of the published data sets."""
    return next(((reader, layout) for reader in LAYOUTS if (layout := _edition(reader, root))), None)


def layout_of(reader: str, root: Path) -> Layout:
    """The edition of a reader's data set that lies in ``root``.

    Raises DataError, which says what was looked for and, where it is found close by, what to set instead.
    """
    layout = _edition(reader, root)
    if layout is not None:
        return layout
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; correct data.root{relative_to_here(root)}")
    right = _close_by(reader, root)
    where = f'set data.root = "{right}", where it is' if right is not None else ""
    misnamed = next((layout for layout in LAYOUTS[reader] if not layout.missing(root)), None)
    if misnamed is not None:
        told = f"{root}: its name says that it is not {misnamed.title}, which it is laid out as"
        raise DataError(f"{told}; {where or 'rename it if it is all the same'}")
    raise DataError(f"{_not_there(reader, root)}; {where or _other_remedy(root)}")


def below(root: Path) -> Iterator[Path]:
    """The folder itself and those in it, the nearest first, to two levels."""
    level = [root]
    for _ in range(_LEVELS + 1):
        yield from level
        level = [folder for parent in level for folder in _folders(parent)]


def _edition(reader: str, root: Path) -> Layout | None:
    return next((layout for layout in LAYOUTS[reader] if not (layout.missing(root) or layout.is_another(root))), None)


def _folders(parent: Path) -> list[Path]:
    try:
        found = sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []
    return found if len(found) <= _MOST_FOLDERS else []


def _not_there(reader: str, root: Path) -> str:
    """What was looked for and what of it is missing, edition by edition."""
    told = []
    for layout in LAYOUTS[reader]:
        missing = layout.missing(root)
        found = "none of it" if len(missing) == len(layout.expects) else f"all but {' and '.join(missing)}"
        told.append(f"{' and '.join(layout.expects)}: found {found}")
    return f"{root}: is not laid out as reader '{reader}' needs it; looked for {'; or for '.join(told)}"


def _close_by(reader: str, root: Path) -> Path | None:
    """A folder below, above or beside a wrong root that holds the reader's data set."""
    parent = root.resolve().parent
    return next((folder for folder in [*_around(root), *_folders(parent)] if _edition(reader, folder)), None)


def _around(root: Path) -> list[Path]:
    return [*list(below(root))[1:], *list(root.resolve().parents)[:_LEVELS]]


def _other_remedy(root: Path) -> str:
    other = next(((folder, found) for folder in [root, *_around(root)] if (found := recognised(folder))), None)
    if other is not None:
        folder, (name, layout) = other
        where = "" if folder == root else f' and data.root = "{folder}"'
        return f'{folder} is laid out as {layout.title}: set data.reader = "{name}"{where}'
    return 'set data.root to the folder that holds these, or describe your own folders with data.reader = "folder"'
