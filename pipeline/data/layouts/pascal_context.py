"""Pascal Context: VOC 2010's images with the 59 customary classes of its 459 labels.

Three editions. PNG label maps hold 0 for everything else and 1 to 59 for the classes: in alphabetical order where the
field's tools have made them, VOC's 20 before the others in those that the authors of the labels give away themselves
(``59_context_labels``, with ``59_labels.txt``). Maps that someone has brought to 0 to 58 have 255 for ignore, which
those have not. The original MATLAB files hold the numbers of the 459 labels, which begin with 1.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from segkd.pipeline.data.layouts.ade_colours import ADE_COLOURS
from segkd.pipeline.data.layouts.layout import (
    IGNORED,
    Files,
    Layout,
    between_commas,
    images_in,
    labels_in,
    roles_of_list,
)
from segkd.pipeline.data.names import Naming, by_stem, names_under
from segkd.pipeline.data.sample import Role

_LABELS = {
    name: int(number)
    for name, number in map(
        str.split,
        between_commas(
            "aeroplane 2, bag 9, bed 18, bedclothes 19, bench 22, bicycle 23, bird 25, boat 31, book 33, bottle 34, "
            "building 44, bus 45, cabinet 46, car 59, cat 65, ceiling 68, chair 72, cloth 80, computer 85, cow 98, "
            "cup 104, curtain 105, dog 113, door 115, fence 144, floor 158, flower 159, food 162, grass 187, "
            "ground 189, horse 207, keyboard 220, light 232, motorbike 258, mountain 259, mouse 260, person 284, "
            "plate 295, platform 296, pottedplant 308, road 324, rock 326, sheep 347, shelves 349, sidewalk 354, "
            "sign 355, sky 360, snow 366, sofa 368, table 397, track 415, train 416, tree 420, truck 424, "
            "tvmonitor 427, wall 440, water 445, window 454, wood 458"
        ),
    )
}
"""Class -> its number among the 459 labels."""
_ALL_LABELS = range(1, 460)
_AUTHORS_ORDER = between_commas(
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,table,dog,horse,motorbike,person,pottedplant,sheep,sofa,"
    "train,tvmonitor,bag,bed,bench,book,building,cabinet,ceiling,cloth,computer,cup,door,fence,floor,flower,food,grass,"
    "ground,keyboard,light,mountain,mouse,curtain,platform,sign,plate,road,rock,shelves,sidewalk,sky,snow,bedclothes,"
    "track,tree,truck,wall,water,window,wood"
)
"""They call three of them diningtable, clothes and bedcloth."""


def _find(root: Path, labels: dict[str, str], place: str) -> Files:
    roles: dict[str, Role] = {}
    told = []
    for role, split in ((Role.TRAIN, "train"), (Role.REPORT, "val")):
        # VOC 2010's own lists, for detection, name 4,998 and 5,105 images; those that the field's tools make name two
        # and one less.
        lists = (f"ImageSets/SegmentationContext/{split}.txt", f"ImageSets/Main/{split}.txt")
        found, words = roles_of_list(root, role, *lists)
        roles |= found
        told.append(words)
    return Files(images_in(root, "JPEGImages"), labels, str(root / place), roles, ", ".join(told))


def _find_png(root: Path, *, place: str) -> Files:
    return _find(root, labels_in(root, place), place)


def _find_mat(root: Path) -> Files:
    place = root / "trainval"
    found = by_stem(names_under(place), Naming("", {".mat"}), place)
    return _find(root, {stem: f"trainval/{name}" for stem, name in found.items()}, "trainval")


_PNG = Layout(
    title="Pascal Context (PNG)",
    expects=("JPEGImages", "SegmentationClassContext/*.png"),
    find=partial(_find_png, place="SegmentationClassContext"),
    # Customary are the first of ADE20K's colours, the very first one being the background's.
    classes=dict(zip(_LABELS, ADE_COLOURS[1:], strict=False)),
    meaning={0: IGNORED, **dict(enumerate(_LABELS, start=1))},
    background=(0,),
    background_colour=ADE_COLOURS[0],
)
_AUTHORS = replace(
    _PNG,
    title="Pascal Context (PNG of its authors)",
    expects=("JPEGImages", "59_context_labels/*.png"),
    find=partial(_find_png, place="59_context_labels"),
    meaning={0: IGNORED, **dict(enumerate(_AUTHORS_ORDER, start=1))},
)
_MAT = replace(
    _PNG,
    title="Pascal Context (MATLAB)",
    expects=("JPEGImages", "trainval/*.mat"),
    find=_find_mat,
    # 0 is no label at all, which is not the same as one of the 400 that are no class.
    meaning={0: IGNORED, **dict.fromkeys(_ALL_LABELS, IGNORED), **{code: name for name, code in _LABELS.items()}},
    background=tuple(sorted(set(_ALL_LABELS) - set(_LABELS.values()))),
)
PASCAL_CONTEXT = (_PNG, _AUTHORS, _MAT)
