"""How a folder of images and label maps is laid out: which image has which label map, by their names.

Names are relative to a root, with ``/``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from segkd.pipeline.data import images
from segkd.pipeline.data.names import split_extension
from segkd.storage.errors import DataError

_LABELS_NAME = re.compile("label|annot|mask|gt|truth|segm|target", re.IGNORECASE)
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What folders are called -> the split that they hold."""


@dataclass(frozen=True)
class Laid:
    """Where images and label maps are, as the settings of a reader; and the label maps found."""

    settings: dict[str, Any]
    folders: Sequence[str]
    """The first folder in every image's id; empty for images in none."""
    labels: Sequence[str] = field(default_factory=tuple)
    """Names below the root."""
    paired: int = 0
    unlabelled: Sequence[str] = ()
    """Folders of which no image has a label map, though others have."""
    unpaired: int = 0
    """Other images that have none."""
    beside: Sequence[str] = ()
    """Further folders that hold images and belong to no label maps."""
    others: Sequence[tuple[str, str, int]] = ()
    """Further folders of images and of their label maps, and how many are paired: no reader takes several."""

    @property
    def labels_top(self) -> str:
        """The folder of label maps."""
        top: str = self.settings["labels"]
        return top


def laid_out(root: Path, names: Sequence[str]) -> Laid:
    """What is found in the files ``names`` below ``root``, in order.

    SegNet's folders, a folder of images beside one of label maps, both in one folder, or images alone. Raises DataError
    where there are no images, or label maps that lie deeper.
    """
    return _segnet(names) or _pairs(root, names)


def _segnet(names: Sequence[str]) -> Laid | None:
    """``train`` beside ``trainannot``, and so on."""
    tops = {name.split("/")[0] for name in names if "/" in name}
    splits = {top for top in tops if f"{top}annot" in tops}
    if not splits:
        return None
    label_tops = {f"{split}annot" for split in splits}
    labels = [name for name in names if name.split("/")[0] in label_tops and _is_label(name)]
    return Laid({"reader": "camvid"}, sorted(splits), labels, len(labels))


def _pairs(root: Path, names: Sequence[str]) -> Laid:
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
            paired, key=lambda of: (not is_scored(of), of.paired, _LABELS_NAME.search(of.labels_top) is not None)
        )
        ours = {best.settings["images"], best.labels_top, "."}
        others = [of for of in paired if not ours & {of.settings["images"], of.labels_top}]
        taken = {*ours, *label_tops, *(of.settings["images"] for of in others)}
        beside = [top for top, inside in by_top.items() if top not in taken and any(map(_is_image, inside))]
        return replace(
            best,
            others=[(of.settings["images"], of.labels_top, of.paired) for of in others],
            beside=[] if best.settings["images"] == "." else beside,
        )
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
    return Laid({"reader": "folder", "images": ".", "labels": ""}, _first_folders(found))


def is_scored(layout: Laid) -> bool:
    """Whether the images' folder is called as those are that are scored on."""
    return SPLITS.get(layout.settings["images"].lower(), "train") != "train"


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


def _match(image_top: str, label_top: str, by_top: Mapping[str, Sequence[str]]) -> Laid:
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
    layout = Laid(settings, _first_folders(image_names), [f"{label_top}/{name}" for name in labels], paired)
    return _with_unlabelled(layout, image_names, label_names) if paired and image_top != label_top else layout


def _with_unlabelled(layout: Laid, image_names: Sequence[str], label_names: Sequence[str]) -> Laid:
    """With what it says of images that have no label map. That they may have none is drafted where they lie beside
    others that have, and where no label map is left over: else it is likelier that something else is meant."""
    image_suffix, label_suffix = (layout.settings.get(key, "") for key in ("image_suffix", "label_suffix"))
    stems = {name: split_extension(name)[0] for name in (*image_names, *label_names)}
    images_of = {
        stems[name].removesuffix(image_suffix): name for name in image_names if stems[name].endswith(image_suffix)
    }
    labelled = {stems[name].removesuffix(label_suffix) for name in label_names if stems[name].endswith(label_suffix)}
    left_over = any(
        not stems[name].endswith(label_suffix) or stems[name].removesuffix(label_suffix) not in images_of
        for name in label_names
    )
    folders = {name.rpartition("/")[0] for stem, name in images_of.items() if stem in labelled}
    tops = {folder.split("/")[0] for folder in folders}
    unlabelled = [top for top in layout.folders if top not in tops]
    unpaired = [
        name for stem, name in images_of.items() if stem not in labelled and name.split("/")[0] not in unlabelled
    ]
    if unpaired and not left_over and {name.rpartition("/")[0] for name in unpaired} <= folders:
        layout = replace(layout, settings={**layout.settings, "without_labels": "auxiliary"}, unpaired=len(unpaired))
    return replace(layout, unlabelled=unlabelled)


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


def _first_folders(names: Sequence[str]) -> list[str]:
    return sorted({name.split("/")[0] for name in names if "/" in name})


def _is_image(name: str) -> bool:
    return split_extension(name)[1] in images.IMAGE_EXTENSIONS


def _is_label(name: str) -> bool:
    return split_extension(name)[1] in images.LABEL_EXTENSIONS
