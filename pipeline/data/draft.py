"""A first description of a folder of images: what its layout and the values of its label maps look like."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segkd.pipeline.data import images
from segkd.pipeline.data.labels import colour_key
from segkd.pipeline.data.layouts.camvid import SEGNET
from segkd.pipeline.data.layouts.layout import Layout
from segkd.pipeline.data.names import names_under, split_extension
from segkd.pipeline.data.recognition import below, recognised
from segkd.pipeline.data.sample import IGNORE, Role
from segkd.pipeline.run_file import to_toml_value
from segkd.storage.errors import DataError

_LOOKED_AT = 64
"""Label maps whose values are read."""
_MOST_COLOURS = 256
"""More different ones than this are no classes."""
_CAMVID_VALUES = range(12)
_LABELS_NAME = re.compile("label|annot|mask|gt|truth|segm|target", re.IGNORECASE)
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class _Layout:
    """Where images and label maps are, as the settings of a reader; and the label maps found."""

    settings: dict[str, Any]
    folders: Sequence[str]
    """The first folder in every image's id; empty for images in none."""
    labels: Sequence[str] = field(default_factory=tuple)
    """Names below the root."""
    paired: int = 0
    unpaired: int = 0
    """Images that have no label map, beside others that have."""
    others: Sequence[tuple[str, str, int]] = ()
    """Further folders of images and of their label maps, and how many are paired: no reader takes several."""

    @property
    def labels_top(self) -> str:
        """The folder of label maps."""
        top: str = self.settings["labels"]
        return top


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
    layout = _segnet(names) or _pairs(root, names)
    meaning = _meaning([root / name for name in _spread(layout.labels, _LOOKED_AT)])
    if layout.settings["reader"] == "camvid" and meaning.fits_camvid:
        meaning = _Meaning((), {})
    tables: dict[str, Mapping[str, Any]] = {"folders": _roles(layout), **meaning.tables}
    return "\n".join(
        [
            "# Drafted from the files. Name the classes, see that the roles are what you mean, then check again.",
            *(
                f"# Left out: {count:,} images of {images_top} with label maps in {labels_top}. To use them, bring all "
                "images into folders of one, label maps into folders of another: images/train, images/val, labels/train"
                for images_top, labels_top, count in layout.others
            ),
            *(
                [
                    f"# {layout.unpaired:,} of the images have no label map of their name: those are auxiliary. Should "
                    "all have one, correct the suffixes, and remove without_labels."
                ]
                if layout.unpaired
                else []
            ),
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
        yield f"{key if re.fullmatch('[a-z0-9]+', key) else to_toml_value(key)} = {to_toml_value(value)}"


def _segnet(names: Sequence[str]) -> _Layout | None:
    """``train`` beside ``trainannot``, and so on."""
    tops = {name.split("/")[0] for name in names if "/" in name}
    splits = {top for top in tops if f"{top}annot" in tops}
    if not splits:
        return None
    label_tops = {f"{split}annot" for split in splits}
    labels = [name for name in names if name.split("/")[0] in label_tops and _is_label(name)]
    return _Layout({"reader": "camvid"}, sorted(splits), labels, len(labels))


def _pairs(root: Path, names: Sequence[str]) -> _Layout:
    """The two folders, or the one, in which the most images have a label map."""
    by_top: dict[str, list[str]] = {".": list(names)}
    for name in names:
        top, slash, rest = name.partition("/")
        if slash:
            by_top.setdefault(top, []).append(rest)
    label_tops = [top for top, inside in by_top.items() if top != "." and _holds_labels(root / top, top, inside)]
    candidates = [(image, label) for label in label_tops for image in by_top if image != label] + [(".", ".")]
    layouts = [_match(image, label, by_top) for image, label in candidates]
    paired = [layout for layout in layouts if layout.paired]
    if paired:
        # What is scored on is not what to learn from, however large it is.
        best = max(
            paired, key=lambda of: (not _is_scored(of), of.paired, _LABELS_NAME.search(of.labels_top) is not None)
        )
        ours = {best.settings["images"], best.labels_top, "."}
        others = [of for of in paired if not ours & {of.settings["images"], of.labels_top}]
        return replace(best, others=[(of.settings["images"], of.labels_top, of.paired) for of in others])
    found = [name for name in names if _is_image(name)]
    if not found:
        raise DataError(f"{root}: holds no images; expected {', '.join(sorted(images.IMAGE_EXTENSIONS))} files")
    deeper = [str(root / top) for top, inside in by_top.items() if top != "." and _labels_are_beside(inside)]
    if deeper:
        more = f" and {len(deeper) - 2:,} more" if len(deeper) > 2 else ""
        raise DataError(
            f"{root}: label maps lie a level deeper, beside the images of {' and '.join(deeper[:2])}{more}; name "
            f"that folder, or bring them into one folder of images and one of label maps, such as {root}/images/a and "
            f"{root}/labels/a"
        )
    return _Layout({"reader": "folder", "images": ".", "labels": ""}, _first_folders(found))


def _is_scored(layout: _Layout) -> bool:
    return _SPLITS.get(layout.settings["images"].lower(), "train") != "train"


def _labels_are_beside(names: Sequence[str]) -> bool:
    """Whether one of a folder's folders is called as label maps are, and has some for the images of another."""
    by_top: dict[str, list[str]] = {}
    for name in names:
        top, slash, rest = name.partition("/")
        if slash:
            by_top.setdefault(top, []).append(rest)
    labels = [top for top in by_top if _LABELS_NAME.search(top)]
    return any(_match(image, label, by_top).paired for label in labels for image in by_top if image != label)


def _holds_labels(folder: Path, top: str, names: Sequence[str]) -> bool:
    """By its name, or by a first file of one channel."""
    labels = [name for name in names if _is_label(name)]
    if not labels or _LABELS_NAME.search(top):
        return bool(labels)
    try:
        images.read_raw_labels(folder / labels[0], "values")
    except DataError:
        return False
    return True


def _match(image_top: str, label_top: str, by_top: Mapping[str, Sequence[str]]) -> _Layout:
    """How the images of one folder and the label maps of another are named, by what pairs the most."""
    prefix = "" if label_top == image_top else f"{label_top}/"
    image_names = [name for name in by_top[image_top] if _is_image(name) and not (prefix and name.startswith(prefix))]
    label_names = [name for name in by_top[label_top] if _is_label(name)]
    most: tuple[int, bool, str, str] = 0, False, "", ""
    for image_suffix in _common_tails([split_extension(name)[0] for name in image_names]):
        stems: dict[str, set[str]] = {}
        for name in image_names:
            stems.setdefault(split_extension(name)[0].removesuffix(image_suffix), set()).add(f"{image_top}/{name}")
        found = Counter(_rest(name, f"{label_top}/{name}", stems) for name in label_names)
        for suffix, count in found.items():
            if suffix is not None and (count, "label" in suffix.lower()) > most[:2]:
                most = count, "label" in suffix.lower(), image_suffix, suffix
    paired, _, image_suffix, label_suffix = most
    if image_top == label_top and 3 * paired < len(image_names):
        paired = 0  # a few images that happen to be called like others
    settings = {"reader": "folder", "images": image_top, "labels": label_top}
    settings |= {"image_suffix": image_suffix} if image_suffix else {}
    settings |= {"label_suffix": label_suffix} if label_suffix else {}
    labels = [name for name in label_names if split_extension(name)[0].endswith(label_suffix)]
    named_alike = [name for name in image_names if split_extension(name)[0].endswith(image_suffix)]
    unpaired = len(named_alike) - paired if paired and image_top != label_top else 0
    settings |= {"without_labels": "auxiliary"} if unpaired else {}
    return _Layout(settings, _first_folders(image_names), [f"{label_top}/{name}" for name in labels], paired, unpaired)


def _rest(label: str, file: str, stems: Mapping[str, set[str]]) -> str | None:
    """What a label map's name has behind the longest stem of another file's that it begins with."""
    name = split_extension(label)[0]
    for end in range(len(name), 0, -1):
        if stems.get(name[:end], set()) - {file} and not name[end : end + 1].isdigit():
            return name[end:]
    return None


def _common_tails(stems: Sequence[str]) -> list[str]:
    """The empty suffix, and what all names end with, from each of its ``_`` or ``-`` on; shortest first."""
    # What the first and the last in order share at their beginning, all do.
    ordered = sorted(stem[::-1] for stem in stems)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ordered[0], ordered[-1], strict=False)) if stems else ()
    tail = "".join(letter for letter, _ in same)[::-1]
    return ["", *(tail[place:] for place in reversed(range(len(tail))) if tail[place] in "_-")]


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


def _roles(layout: _Layout) -> dict[str, list[str]]:
    """Folders of the usual names get the usual roles; all is to train on where there are none."""
    splits = {folder: _SPLITS[folder.lower()] for folder in layout.folders if folder.lower() in _SPLITS}
    if not splits:
        if layout.settings["reader"] == "camvid":
            return {Role.TRAIN: list(layout.folders)}
        learned = Role.REPORT if _is_scored(layout) else Role.TRAIN
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
    return roles


def _first_folders(names: Sequence[str]) -> list[str]:
    return sorted({name.split("/")[0] for name in names if "/" in name})


def _spread(names: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the names, evenly spread."""
    return [names[index * len(names) // count] for index in range(count)] if len(names) > count else list(names)


def _is_image(name: str) -> bool:
    return split_extension(name)[1] in images.IMAGE_EXTENSIONS


def _is_label(name: str) -> bool:
    return split_extension(name)[1] in images.LABEL_EXTENSIONS
