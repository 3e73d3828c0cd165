"""Pascal VOC 2012 for segmentation, with the annotations that SBD adds where they are there.

Label maps are palette images (or, SBD's, grey ones) whose *indices* are the classes: 0 is the background, which is a
class, and 255 is the border around objects, which is ignored.
"""

from __future__ import annotations

from pathlib import Path

from segkd.pipeline.data.layouts.layout import (
    IGNORED,
    Files,
    Layout,
    between_commas,
    images_in,
    labels_in,
    roles_of_list,
    voc_colour,
)
from segkd.pipeline.data.sample import IGNORE, Role

_LISTS = "ImageSets/Segmentation"
_SBD_LISTS = f"{_LISTS}/trainaug.txt", f"{_LISTS}/train_aug.txt"
_SBD = "SegmentationClassAug"
_NAMES = between_commas(
    "background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,"
    "pottedplant,sheep,sofa,train,tvmonitor"
)


def _find(root: Path) -> Files:
    added = labels_in(root, _SBD)
    # The official map wins: SBD's edition of the same image has no border, and other outlines.
    labels = added | labels_in(root, "SegmentationClass")
    listed = next((name for name in _SBD_LISTS if (root / name).is_file()), None)
    train, train_told = roles_of_list(root, Role.TRAIN, listed if added and listed else f"{_LISTS}/train.txt")
    report, report_told = roles_of_list(root, Role.REPORT, f"{_LISTS}/val.txt")
    return Files(
        images=images_in(root, "JPEGImages"),
        labels=labels,
        labels_place=str(root / "SegmentationClass") + (f" and {_SBD}" if added else ""),
        roles=train | report,
        roles_told=f"{train_told}, {report_told}",
        roles_doubted="" if bool(added) == bool(listed) else _half_of_sbd(listed),
    )


def _half_of_sbd(listed: str | None) -> str:
    there, gone = (_SBD, " or ".join(_SBD_LISTS)) if listed is None else (listed, _SBD)
    return (
        f"{there} is there and {gone} is not, so it is unknown whether SBD's 10,582 images or the official 1,464 are "
        f"to be trained on; add {gone}, remove {there}, or give all roles by data.lists"
    )


VOC2012 = (
    Layout(
        title="Pascal VOC 2012",
        expects=("JPEGImages", "SegmentationClass", _LISTS),
        find=_find,
        not_called=r"(?i)voc20(0\d|10|11)",
        classes={name: voc_colour(index) for index, name in enumerate(_NAMES)},
        meaning={**dict(enumerate(_NAMES)), IGNORE: IGNORED},
    ),
)
