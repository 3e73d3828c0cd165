"""ADE20K in the edition of the scene parsing challenge (ADEChallengeData2016).

Label maps are grey images: 0 is everything else, which is ignored, and 1 to 150 are the classes. Maps that someone has
already brought to 0 to 149 have 255 for ignore, which no official one has.
"""

from __future__ import annotations

from pathlib import Path

from segkd.pipeline.data.layouts.ade_colours import ADE_COLOURS
from segkd.pipeline.data.layouts.layout import (
    IGNORED,
    Files,
    Layout,
    between_commas,
    images_in,
    labels_in,
    roles_of_folders,
)
from segkd.pipeline.data.sample import Role

_NAMES = between_commas(
    "wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,door,table,mountain,"
    "plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,armchair,seat,fence,desk,rock,"
    "wardrobe,lamp,bathtub,railing,cushion,base,box,column,signboard,chest of drawers,counter,sand,sink,skyscraper,"
    "fireplace,refrigerator,grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,"
    "bookcase,blind,coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,"
    "swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,booth,"
    "television receiver,airplane,dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,poster,stage,"
    "van,ship,fountain,conveyer belt,canopy,washer,plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,"
    "minibike,cradle,oven,ball,food,step,tank,trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,"
    "sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,monitor,bulletin board,shower,"
    "radiator,glass,clock,flag"
)


def _find(root: Path) -> Files:
    images = images_in(root, "images")
    return Files(
        images=images,
        labels=labels_in(root, "annotations"),
        labels_place=str(root / "annotations"),
        roles=roles_of_folders(images, {"training": Role.TRAIN, "validation": Role.REPORT}),
        roles_told="train is training, report is validation",
    )


ADE20K = (
    Layout(
        title="ADE20K (ADEChallengeData2016)",
        expects=("images/training", "annotations/training"),
        find=_find,
        classes=dict(zip(_NAMES, ADE_COLOURS, strict=True)),
        meaning={0: IGNORED, **dict(enumerate(_NAMES, start=1))},
    ),
)
