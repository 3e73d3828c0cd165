"""A first description of a folder of images: what its layout and the values of its label maps look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segkd.pipeline.data import images
from segkd.pipeline.data.labels import colour_key
from segkd.pipeline.data.layouts.camvid import SEGNET
from segkd.pipeline.data.layouts.layout import Layout
from segkd.pipeline.data.names import names_under
from segkd.pipeline.data.pairing import SPLITS, Laid, is_scored, laid_out
from segkd.pipeline.data.recognition import below, recognised
from segkd.pipeline.data.sample import IGNORE, Role
from segkd.pipeline.run_file import bare_key, to_toml_value
from segkd.storage.errors import DataError

_LOOKED_AT = 64
"""Label maps whose values are read."""
_MOST_COLOURS = 256
"""More different ones than this are no classes."""
_CAMVID_VALUES = range(12)


def draft(root: str | Path) -> str:
    """A TOML table ``[data]`` for the folder ``root``, with placeholders for what files cannot tell.

    Recognises the published data sets, here or a little below, SegNet's folders, a folder of images beside one of label
    maps, and both in one folder. Raises DataError where there are no images, or label maps that lie deeper or cannot be
    ones.
    """
    root = Path(root)
    # SegNet's folders may hold label maps of others, so these are looked into.
    for folder in below(root):
        published = recognised(folder)
        if published is not None and published[1] is not SEGNET:
            return _published(folder, *published)
    names = sorted(names_under(root))
    layout = laid_out(root, names)
    meaning = _meaning([root / name for name in _spread(layout.labels, _LOOKED_AT)])
    if layout.settings["reader"] == "camvid" and meaning.fits_camvid:
        meaning = _Meaning((), {})
    roles = _roles(layout)
    tables: dict[str, Mapping[str, Any]] = {"folders": roles, **meaning.tables}
    return "\n".join(
        [
            "# Drafted from the files. Name the classes, see that the roles are what you mean, then check again.",
            *(
                f"# Left out: {count:,} images of {images_top} with label maps in {labels_top}. To use them, bring all "
                "images into folders of one, label maps into folders of another: images/train, images/val, labels/train"
                for images_top, labels_top, count in layout.others
            ),
            *_told_of_unlabelled(root, layout, roles),
            "[data]",
            *(f"{key} = {to_toml_value(value)}" for key, value in layout.settings.items()),
            f"root = {to_toml_value(str(root))}",
            *([f"classes = {to_toml_value(meaning.classes)}"] if meaning.classes else []),
            *(line for name, table in tables.items() if table for line in ("", f"[data.{name}]", *_entries(table))),
            "",
        ]
    )


def _published(root: Path, reader: str, layout: Layout) -> str:
    """The description of a published data set: nearly all of it is known."""
    return "\n".join(
        [
            f"# {layout.title}. Official roles: {layout.find(root).roles_told}.",
            "[data]",
            f"reader = {to_toml_value(reader)}",
            f"root = {to_toml_value(str(root))}",
            "# Some groups of the training part for role select; lists or folders would give all roles instead:",
            "# fractions = { train = 0.9, select = 0.1 }",
            "",
        ]
    )


def _entries(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        yield f"{bare_key(key)} = {to_toml_value(value)}"


@dataclass(frozen=True)
class _Meaning:
    """Placeholder classes and the tables that map raw values to them."""

    classes: tuple[str, ...]
    tables: dict[str, dict[str, str]]
    fits_camvid: bool = False


def _meaning(files: Sequence[Path]) -> _Meaning:
    if not files:
        return _Meaning(("class0", "class1"), {})
    kind: Literal["values", "colours"] = "values"
    try:
        images.read_raw_labels(files[0], kind)
    except DataError:
        kind = "colours"
    found: set[int] = set()
    for file in files:
        raw = images.read_raw_labels(file, kind).astype(np.int64)
        found.update(np.unique(raw @ np.array([1 << 16, 1 << 8, 1]) if kind == "colours" else raw).tolist())
        if kind == "colours" and len(found) > _MOST_COLOURS:
            raise DataError(
                f"{file}: more than {_MOST_COLOURS} colours by this label map, which classes cannot be; "
                "make label maps without smoothing, in a format that loses nothing"
            )
    if kind == "colours":
        keys = [colour_key((code >> 16, code >> 8 & 255, code & 255)) for code in sorted(found)]
        names = tuple(f"class{index}" for index in range(len(keys)))
        return _Meaning(names, {"label_colours": dict(zip(keys, names, strict=True))})
    return _meaning_of_values(found)


def _meaning_of_values(found: set[int]) -> _Meaning:
    values = sorted(found - {IGNORE})
    fits_camvid = found <= set(_CAMVID_VALUES)
    if found == {0, IGNORE}:  # a mask of black and white
        return _Meaning(("class0", "class1"), {"label_values": {"0": "class0", str(IGNORE): "class1"}})
    if not values or values[-1] < min(2 * len(values), IGNORE):
        # Few gaps: those are classes that the label maps looked at happen not to show.
        return _Meaning(tuple(f"class{index}" for index in range(max(values, default=0) + 1)), {}, fits_camvid)
    table = {str(value): f"class{value}" for value in values}
    ignored = {str(IGNORE): "ignore"} if IGNORE in found else {}
    return _Meaning(tuple(table.values()), {"label_values": table | ignored}, fits_camvid)


def _roles(layout: Laid) -> dict[str, list[str]]:
    """Folders of the usual names get the usual roles, and others without label maps that of auxiliary ones; all is to
    train on where there are none."""
    named = {folder: SPLITS[folder.lower()] for folder in layout.folders if folder.lower() in SPLITS}
    splits = {folder: split for folder, split in named.items() if folder not in layout.unlabelled}
    if not splits:
        if layout.settings["reader"] == "camvid":
            return {Role.TRAIN: list(layout.folders)}
        learned = Role.REPORT if is_scored(layout) else Role.TRAIN
        return {learned if layout.labels else Role.AUXILIARY: ["."]}
    customary = {
        "train": Role.TRAIN,
        "val": Role.SELECT if "test" in splits.values() else Role.REPORT,
        "test": Role.REPORT,
    }
    roles: dict[str, list[str]] = {}
    for folder, split in splits.items():
        role = customary[split] if layout.labels else Role.AUXILIARY
        roles.setdefault(role, []).append(folder)
    # Beside folders of images any folder may be anything: pictures of label maps, say.
    if layout.settings["reader"] == "folder" and layout.settings["images"] != ".":
        extra = [folder for folder in layout.unlabelled if folder not in named]
        roles |= {Role.AUXILIARY: extra} if extra else {}
    return roles


def _spread(names: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the names, evenly spread."""
    return [names[index * len(names) // count] for index in range(count)] if len(names) > count else list(names)


def _told_of_unlabelled(root: Path, layout: Laid, roles: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if layout.unpaired:
        yield (
            f"# Images without a label map of their name, beside others that have one: {layout.unpaired:,}. "
            "without_labels makes those to train on auxiliary, and leaves out others. Should all have one, correct the "
            "suffixes and remove it."
        )
    unused = [folder for folder in layout.unlabelled if not any(folder in folders for folders in roles.values())]
    if unused and "." not in roles.get(Role.TRAIN, ()):
        yield f"# Not used: {', '.join(unused)}, where no image has a label map."
    if layout.beside:
        folders = to_toml_value([str(root / folder) for folder in layout.beside])
        yield f"# Images without label maps lie in other folders, too. As auxiliary ones: unlabelled = {folders}"
