"""COCO-Stuff on the 164k images of COCO 2017: the label maps of ``stuffthingmaps``.

Ids run from 0 to 181 with eleven gaps, things that COCO never annotated; 255 is unlabelled. Maps that the field's tools
have brought to 0 to 170 without gaps, ``*_labelTrainIds.png``, are read where there are no others; where they go by the
official names their first value in a gap is an error.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from segkd.pipeline.data.layouts.layout import (
    IGNORED,
    Files,
    Layout,
    between_commas,
    exists,
    first_folder,
    images_in,
    labels_in,
    roles_of_folders,
    voc_colour,
)
from segkd.pipeline.data.sample import IGNORE, Role

_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_NAMES = between_commas(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush,banner,blanket,branch,bridge,"
    "building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,ceiling-tile,cloth,clothes,clouds,counter,"
    "cupboard,curtain,desk-stuff,dirt,door-stuff,fence,floor-marble,floor-other,floor-stone,floor-tile,floor-wood,"
    "flower,fog,food-other,fruit,furniture-other,grass,gravel,ground-other,hill,house,leaves,light,mat,metal,"
    "mirror-stuff,moss,mountain,mud,napkin,net,paper,pavement,pillow,plant-other,plastic,platform,playingfield,"
    "railing,railroad,river,road,rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,stairs,"
    "stone,straw,structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,wall-concrete,wall-other,"
    "wall-panel,wall-stone,wall-tile,wall-wood,water-other,waterdrops,window-blind,window-other,wood"
)
_SPLITS = {"train2017": Role.TRAIN, "val2017": Role.REPORT}
_MAPS = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations")


_TRAIN_IDS = "_labelTrainIds"
"""What the names of maps without gaps have behind the image's number."""


def _globs(maps: str, suffix: str) -> list[str]:
    return [f"{maps}/{split}/*{suffix or '[0-9]'}.png" for split in _SPLITS]


def _expects(suffix: str) -> tuple[str, str]:
    return (
        "images/train2017 or images/val2017 or train2017 or val2017",
        " or ".join(glob for maps in _MAPS for glob in _globs(maps, suffix)),
    )


def _find(root: Path, *, suffix: str) -> Files:
    images: dict[str, str] = {}
    labels: dict[str, str] = {}
    maps = next(maps for maps in _MAPS if any(exists(root, glob) for glob in _globs(maps, suffix)))
    for split in _SPLITS:
        images |= images_in(root, first_folder(root, f"images/{split}", split), prefix=f"{split}/")
        labels |= labels_in(root, f"{maps}/{split}", suffix, prefix=f"{split}/")
    return Files(
        images=images,
        labels={sample: name for sample, name in labels.items() if not sample.endswith(_TRAIN_IDS)},
        labels_place=str(root / maps),
        roles=roles_of_folders(images, _SPLITS),
        roles_told="train is train2017, report is val2017",
    )


_BY_IDS = Layout(
    title="COCO-Stuff 164k",
    expects=_expects(""),
    find=partial(_find, suffix=""),
    # No colours are customary; these differ, and none is black.
    classes={name: voc_colour(index) for index, name in enumerate(_NAMES, start=1)},
    meaning={
        **dict(zip((value for value in range(182) if value not in _GAPS), _NAMES, strict=True)),
        IGNORE: IGNORED,
    },
)
_BY_TRAIN_IDS = replace(
    _BY_IDS,
    expects=_expects(_TRAIN_IDS),
    find=partial(_find, suffix=_TRAIN_IDS),
    meaning={**dict(enumerate(_NAMES)), IGNORE: IGNORED},
)
COCO_STUFF = (_BY_IDS, _BY_TRAIN_IDS)
