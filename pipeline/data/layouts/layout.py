"""What a published data set's file in this folder says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from segkd.pipeline.data.images import IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from segkd.pipeline.data.names import Naming, by_stem, names_under
from segkd.pipeline.data.sample import Role
from segkd.storage.errors import DataError

Colour = tuple[int, int, int]

IGNORED = "ignore"
"""What a label map's raw value is mapped to when no loss and no score shall count it as a label."""
EXCLUDED = "exclude"
"""The same where what the teacher says shall not count either: pixels that show nothing of the scene."""


@dataclass(frozen=True)
class Files:
    """Files by sample id; names below the root."""

    images: Mapping[str, str]
    labels: Mapping[str, str]
    labels_place: str
    """Where label maps were looked for."""
    roles: Mapping[str, Role] = field(default_factory=dict)
    """What samples are for unless the run file says otherwise. Those of role train are the training part."""
    roles_told: str = ""
    """The same in words."""
    roles_doubted: str = ""
    """Why these may not be the roles that are meant, and what to do; empty where nothing speaks against them."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One edition of a published data set: what lies where, and what the values of its label maps mean."""

    title: str
    expects: tuple[str, ...]
    """What must be in the root folder: a glob each, or several between ``or``, one of which must match."""
    find: Callable[[Path], Files]
    """The files below a root where all that is expected was found."""
    classes: Mapping[str, Colour]
    """Name -> customary colour, in index order."""
    kind: Literal["values", "colours"] = "values"
    meaning: Mapping[int, str]
    """Raw value, or colour as ``red << 16 | green << 8 | blue`` -> class name, :data:`IGNORED` or :data:`EXCLUDED`.
    A value that is not here is an error: that is how label maps of another edition are found out."""
    background: Collection[int] = ()
    """Ignored values that ``data.background`` makes a class of their own, before the others."""
    background_colour: Colour = (0, 0, 0)
    group: str = ".*"
    """A regular expression that finds a sample's group in its id: all of it for photographs, which are not related."""
    not_called: str = ""
    """A regular expression of the names that a folder of another data set of this layout customarily has."""

    def missing(self, root: Path) -> list[str]:
        """What is expected but not there."""
        return [item for item in self.expects if not any(exists(root, glob) for glob in item.split(" or "))]

    def is_another(self, root: Path) -> bool:
        """Whether the folder's name says that it holds another data set."""
        return self.not_called != "" and re.fullmatch(self.not_called, root.absolute().name) is not None


def between_commas(text: str) -> tuple[str, ...]:
    """The names of a list too long for a name a line."""
    return tuple(part.strip() for part in text.split(","))


def code_of(colour: Colour) -> int:
    """A colour as a key of :attr:`Layout.meaning`."""
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def voc_colour(index: int) -> Colour:
    """Pascal VOC's colour map: the bits of an index are dealt to red, green and blue in turn, high bits first."""
    red = green = blue = 0
    for bit in range(8):
        red |= (index >> 3 * bit & 1) << 7 - bit
        green |= (index >> 3 * bit + 1 & 1) << 7 - bit
        blue |= (index >> 3 * bit + 2 & 1) << 7 - bit
    return red, green, blue


def images_in(root: Path, folder: str, suffix: str = "", *, prefix: str = "") -> dict[str, str]:
    """``prefix`` and what a name has before ``suffix`` -> name, of the images in a folder below the root."""
    return _files_in(root, folder, Naming(suffix, IMAGE_EXTENSIONS), prefix)


def labels_in(root: Path, folder: str, suffix: str = "", *, prefix: str = "") -> dict[str, str]:
    """The same for label maps."""
    return _files_in(root, folder, Naming(suffix, LABEL_EXTENSIONS), prefix)


def _files_in(root: Path, folder: str, naming: Naming, prefix: str) -> dict[str, str]:
    place = root / folder
    if not place.is_dir():
        return {}
    return {f"{prefix}{stem}": f"{folder}/{name}" for stem, name in by_stem(names_under(place), naming, place).items()}


def first_folder(root: Path, *names: str) -> str:
    """The first of the folders below the root that is there; the first of all where none is."""
    return next((name for name in names if (root / name).is_dir()), names[0])


def roles_of_list(root: Path, role: Role, *names: str) -> tuple[dict[str, Role], str]:
    """The samples that the first of some list files that is there names, and which one that is; none: no samples.

    A line begins with an id, or with the path of a file whose stem it is.
    """
    name = next((name for name in names if (root / name).is_file()), None)
    if name is None:
        return {}, f"no sample is {role}, for there is no {' or '.join(names)}"
    try:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{root / name}: cannot be read as text ({error}); restore it") from None
    return {PurePosixPath(line.split()[0]).stem: role for line in lines if line.strip()}, f"{role} is {name}"


def roles_of_folders(ids: Iterable[str], folders: Mapping[str, Role]) -> dict[str, Role]:
    """The role of each id by its first folder; what is in another one has none."""
    return {sample: folders[top] for sample in ids if (top := sample.split("/")[0]) in folders}


def exists(root: Path, glob: str) -> bool:
    """Whether anything below the root is called like this."""
    return next(root.glob(glob), None) is not None
