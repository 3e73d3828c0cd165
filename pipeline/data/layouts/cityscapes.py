"""Cityscapes: ``leftImg8bit`` with ``gtFine``; ``train_extra``, with ``gtCoarse`` where it is there, is auxiliary.

Official label maps hold label ids, of which 19 are classes. Three others show nothing of the scene: what a teacher says
of the bonnet of its own car, or of the black border of rectification, is no knowledge. In ``labelTrainIds``, which the
data set's own scripts make, they are one with all other void.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from segkd.pipeline.data.layouts.layout import (
    EXCLUDED,
    IGNORED,
    Files,
    Layout,
    images_in,
    labels_in,
    roles_of_folders,
)
from segkd.pipeline.data.sample import IGNORE, Role

_CLASSES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label ids of the classes. All others of 0 to 33 are void."""
_UNSEEN = (1, 2, 3)
"""ego vehicle, rectification border, out of roi"""


def _find(root: Path, *, kind: str) -> Files:
    images = images_in(root, "leftImg8bit", "_leftImg8bit")
    fine = labels_in(root, "gtFine", f"_gtFine_{kind}")
    coarse = labels_in(root, "gtCoarse", f"_gtCoarse_{kind}")
    # Fine maps of test are dummies; coarse ones of train and val are not what anyone trains or reports on.
    labels = {sample: name for sample, name in fine.items() if sample.startswith(("train/", "val/"))}
    labels |= {sample: coarse[sample] for sample in images.keys() & coarse if sample.startswith("train_extra/")}
    return Files(
        images=images,
        labels=labels,
        labels_place=f"{root}/gtFine (*_gtFine_{kind}.png; those of test are not public)",
        roles=roles_of_folders(images, {"train": Role.TRAIN, "train_extra": Role.AUXILIARY, "val": Role.REPORT}),
        roles_told="train is train, auxiliary is train_extra, report is val",
    )


_LABEL_IDS = Layout(
    title="Cityscapes",
    expects=("leftImg8bit/*/*", "gtFine/*/*/*_gtFine_labelIds.png"),
    find=partial(_find, kind="labelIds"),
    classes=_CLASSES,
    meaning={
        **dict.fromkeys(range(34), IGNORED),
        **dict.fromkeys(_UNSEEN, EXCLUDED),
        **dict(zip(_IDS, _CLASSES, strict=True)),
    },
    # The city: within one, sequences may follow each other.
    group="^[^/]+/([^/]+)/",
)
_TRAIN_IDS = replace(
    _LABEL_IDS,
    expects=("leftImg8bit/*/*", "gtFine/*/*/*_gtFine_labelTrainIds.png"),
    find=partial(_find, kind="labelTrainIds"),
    meaning={**dict(enumerate(_CLASSES)), IGNORE: IGNORED},
)
CITYSCAPES = (_LABEL_IDS, _TRAIN_IDS)
