"""CamVid: SegNet's edition (480×360, ids 0 to 11) and the original one (960×720, 32 colours).

Both have SegNet's 11 classes; to the original's 32 they stand as its authors grouped them. The original comes without a
split; samples get the one that SegNet's folders have, which follows from their names.
"""

from __future__ import annotations

import re
from pathlib import Path

from segkd.pipeline.data.layouts.layout import (
    IGNORED,
    Files,
    Layout,
    code_of,
    images_in,
    labels_in,
    roles_of_folders,
)
from segkd.pipeline.data.names import names_in
from segkd.pipeline.data.sample import Role
from segkd.storage.errors import DataError

_CLASSES = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
_VOID = 11
_COLOURS = {
    "Sky": {"Sky": (128, 128, 128)},
    "Building": {
        "Bridge": (0, 128, 64),
        "Building": (128, 0, 0),
        "Wall": (64, 192, 0),
        "Tunnel": (64, 0, 64),
        "Archway": (192, 0, 128),
    },
    "Pole": {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    "Road": {"Road": (128, 64, 128), "LaneMkgsDriv": (128, 0, 192), "LaneMkgsNonDriv": (192, 0, 64)},
    "Pavement": {"Sidewalk": (0, 0, 192), "ParkingBlock": (64, 192, 128), "RoadShoulder": (128, 128, 192)},
    "Tree": {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    "SignSymbol": {"SignSymbol": (192, 128, 128), "Misc_Text": (128, 128, 64), "TrafficLight": (0, 64, 64)},
    "Fence": {"Fence": (64, 64, 128)},
    "Car": {
        "Car": (64, 0, 128),
        "SUVPickupTruck": (64, 128, 192),
        "Truck_Bus": (192, 128, 192),
        "Train": (192, 64, 128),
        "OtherMoving": (128, 64, 64),
    },
    "Pedestrian": {
        "Pedestrian": (64, 64, 0),
        "Child": (192, 128, 64),
        "CartLuggagePram": (64, 0, 192),
        "Animal": (64, 128, 64),
    },
    "Bicyclist": {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
    IGNORED: {"Void": (0, 0, 0)},
}
"""Class -> the original's 32, by their colours."""
_SEQUENCE = "([^/_]+)[^/]*$"
"""What a frame's name has before its first underscore."""
_TOLD = "train is train, select is val (every second frame of one clip), report is test"


def _find_segnet(root: Path) -> Files:
    """``<split>/<stem>`` and ``<split>annot/<stem>`` of every folder that is not itself one of labels."""
    present = names_in(root)
    images: dict[str, str] = {}
    labels: dict[str, str] = {}
    for name in sorted(name for name in present if not name.startswith(".")):
        if name.endswith("annot"):
            labels |= labels_in(root, name, prefix=f"{name.removesuffix('annot')}/")
        else:
            images |= images_in(root, name, prefix=f"{name}/")
    found = {sample.split("/")[0] for sample in images}
    val = Role.SELECT if "test" in found else Role.REPORT
    told = _TOLD if "test" in found else "train is train, report is val, for there is no test"
    roles = roles_of_folders(images, {"train": Role.TRAIN, "val": val, "test": Role.REPORT})
    return Files(images, labels, f"{root}/<split>annot", roles, told)


def _find_original(root: Path) -> Files:
    images = images_in(root, "701_StillsRaw_full")
    return Files(
        images=images,
        labels=labels_in(root, "LabeledApproved_full", "_L"),
        labels_place=f"{root}/LabeledApproved_full (*_L.png)",
        roles={sample: _customary_role(root, sample) for sample in images},
        roles_told=_TOLD + ", as in SegNet's edition",
    )


def _customary_role(root: Path, sample: str) -> Role:
    """By sequence and frame: 367 frames for train, 101 for val and 233 for test."""
    match = re.fullmatch(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)", sample)
    if match is None:
        raise DataError(
            f"{root}/701_StillsRaw_full: {sample!r} is no frame of CamVid's, expected names such as 0001TP_006690; "
            "take it out, or describe the data by reader 'folder'"
        )
    sequence, frame = match[1], int(match[2])
    if sequence == "Seq05VD" or (sequence == "0001TP" and frame > 8520):
        return Role.REPORT
    return Role.SELECT if sequence == "0016E5" and 7959 <= frame <= 8159 else Role.TRAIN


SEGNET = Layout(
    title="CamVid (SegNet)",
    expects=("?*annot",),
    find=_find_segnet,
    classes=_CLASSES,
    meaning={**dict(enumerate(_CLASSES)), _VOID: IGNORED},
    group=_SEQUENCE,
)
_ORIGINAL = Layout(
    title="CamVid (original)",
    expects=("701_StillsRaw_full", "LabeledApproved_full"),
    find=_find_original,
    classes=_CLASSES,
    kind="colours",
    meaning={code_of(colour): name for name, colours in _COLOURS.items() for colour in colours.values()},
    group=_SEQUENCE,
)
CAMVID = (SEGNET, _ORIGINAL)
