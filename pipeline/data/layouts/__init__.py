"""Published data sets: how each lies on disk and what its label values mean. One file a data set, one line here."""

from __future__ import annotations

from collections.abc import Mapping

from segkd.pipeline.data.layouts.ade20k import ADE20K
from segkd.pipeline.data.layouts.camvid import CAMVID
from segkd.pipeline.data.layouts.cityscapes import CITYSCAPES
from segkd.pipeline.data.layouts.coco_stuff import COCO_STUFF
from segkd.pipeline.data.layouts.layout import Layout
from segkd.pipeline.data.layouts.pascal_context import PASCAL_CONTEXT
from segkd.pipeline.data.layouts.voc2012 import VOC2012

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "ade20k": ADE20K,
    "camvid": CAMVID,
    "cityscapes": CITYSCAPES,
    "coco_stuff": COCO_STUFF,
    "pascal_context": PASCAL_CONTEXT,
    "voc2012": VOC2012,
}
"""Reader -> the editions of its data set; where a folder holds several of them, the first one is read."""
