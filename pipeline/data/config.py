"""How a run file describes a data set."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from segkd.pipeline.data.contamination import Policy
from segkd.pipeline.data.images import MAX_PIXELS
from segkd.pipeline.data.layouts import LAYOUTS
from segkd.pipeline.data.layouts.layout import EXCLUDED, IGNORED
from segkd.pipeline.data.sample import IGNORE, Role
from segkd.pipeline.data.scenes import SceneConfig
from segkd.storage.errors import ConfigError

Reader = Literal[
    "ade20k", "camvid", "cityscapes", "coco_stuff", "folder", "list", "pascal_context", "scenes", "voc2012"
]

_ALL = {"unlabelled", "skip", "max_pixels", "compare_contents"}
_LISTS = _ALL | {"root", "group", "lists", "classes", "palette", "label_values", "label_colours"}
_FOLDERS = _LISTS | {"folders", "fractions", "without_labels"}
_OPTIONS: Mapping[str, set[str]] = {
    **dict.fromkeys(LAYOUTS, _FOLDERS),
    "folder": _FOLDERS | {"images", "labels", "image_suffix", "label_suffix"},
    "list": _LISTS,
    "pascal_context": _FOLDERS | {"background"},
    "scenes": _ALL | {"scenes"},
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set: where its images and labels are, what each image may be used for, what the label values mean.

    Roles come from one of ``lists``, ``folders`` and ``fractions``; in published data sets else from the official
    split: train for train, validation for report. Select is then empty (but for ``camvid``), until ``fractions`` divide
    the training part, or ``lists`` or ``folders`` give all roles.
    """

    reader: Reader
    """How the files are laid out. ``ade20k``, ``camvid``, ``cityscapes``, ``coco_stuff``, ``pascal_context`` and
    ``voc2012`` are published data sets as they are downloaded. ``folder``: images and labels in two folders, matched by
    name. ``list``: text files of pairs. ``scenes``: built in, no files at all."""
    root: str = "."
    """The folder that everything but ``lists`` and ``unlabelled`` is relative to."""
    images: str = "images"
    """``folder``: the images, under ``root``, in folders of any depth."""
    labels: str = "labels"
    """``folder``: the label maps, under ``root``; may be the images' own folder. Empty: there are none."""
    image_suffix: str = ""
    """``folder``: what an image's name has after the part that it shares with its label map, such as ``_leftImg8bit``.
    With an extension (``.jpg``, ``_leftImg8bit.png``) it admits that format alone."""
    label_suffix: str = ""
    """``folder``: the same for label maps, such as ``_gtFine_labelIds``."""
    lists: dict[Role, str] = field(default_factory=dict)
    """One text file a role, relative to the working directory. Its lines name samples (``train/0001TP_006690``)
    or images' files below ``root``. For ``list`` they name an image and, behind a tab or a comma, its label map; with
    the reader of a published data set a label map behind a space is ignored. ``#`` begins a comment line."""
    folders: dict[Role, tuple[str, ...]] = field(default_factory=dict)
    """The folders of images of each role: ``train = ["train"]``; ``["."]`` is all. What is in none stays unused."""
    fractions: dict[Role, float] = field(default_factory=dict)
    """The share of groups that each role gets, by a hash of the group's name: new groups move no others. In a published
    data set the training part is divided, and the official roles of the others stay."""
    without_labels: Literal["refuse", "auxiliary"] = "refuse"
    """What becomes of an image without a label map where ``folders``, ``fractions`` or the official split give a role
    that needs one. ``auxiliary`` makes it an auxiliary sample where it would be trained on, and leaves it unused where
    images of its folder or group are scored on. (Lists say themselves what is auxiliary.)"""
    group: str | None = None
    """A regular expression that finds a sample's group in its id: its first parenthesis, or all that it matches.
    Images that show the same place or time belong to one group. Published data sets know their own: the city in
    ``cityscapes``, the sequence in ``camvid``, each photograph in others."""
    unlabelled: tuple[str, ...] = ()
    """Folders of images, relative to the working directory, that join as role auxiliary, with all that is below them.
    Their ids are ``unlabelled/<name of the folder>/<name of the image in it>``. Labels are never looked for."""
    skip: str | None = None
    """A text file, relative to the working directory, of images that are left out: a sample's id or its image's file a
    line. `segkd data check --list-broken` writes one; ``#`` begins a comment line. Empty: none."""
    classes: tuple[str, ...] = ()
    """Class names in index order; published data sets know their own."""
    background: bool = False
    """``pascal_context``: whether all that is none of the 59 classes is a class of its own, the first of 60."""
    palette: tuple[tuple[int, int, int], ...] = ()
    """An RGB colour a class, for pictures; none: those of ``label_colours``, or a customary one."""
    label_values: dict[str, str] = field(default_factory=dict)
    """Raw value of a label map, or a range of them -> class name, "ignore" or "exclude": ``7 = "road"``,
    ``0-6 = "ignore"``. "exclude" is for pixels that show nothing of the scene: the teacher's word does not count there
    either. None: value i is class i, and 255 is ignored. Of a published data set the values that are not given keep
    their meaning, unless ``classes`` are given."""
    label_colours: dict[str, str] = field(default_factory=dict)
    """Colour of a label map -> the same: ``"#804080" = "road"`` or ``"128,64,128" = "road"``."""
    max_pixels: int = MAX_PIXELS
    """Larger images are refused before they are decoded."""
    compare_contents: Policy = "refuse"
    """What is done where an image that is learned from is one of role select or report too, by its pixels or re-encoded
    or scaled: ``refuse`` or ``warn``. ``off`` does not compare; else every image is decoded once, and remembered.
    Unless it is ``off``, ``evaluate`` and ``teacher-cache`` warn of images of role auxiliary, select or report whose
    labels their network has learned."""
    scenes: SceneConfig = field(default_factory=SceneConfig)
    """``scenes``: what is generated."""

    def __post_init__(self) -> None:
        self._check_options()
        self._check_roles()
        self._check_classes()
        if self.group is not None:
            try:
                re.compile(self.group)
            except re.error as error:
                raise ConfigError(f"data.group = {self.group!r} is not a regular expression: {error}") from None
        if self.max_pixels < 1:
            raise ConfigError(f"data.max_pixels is {self.max_pixels}; it must be at least 1")

    def _check_options(self) -> None:
        for setting in dataclasses.fields(self):
            default = setting.default if setting.default_factory is dataclasses.MISSING else setting.default_factory()
            means_nothing = setting.name != "reader" and setting.name not in _OPTIONS[self.reader]
            if means_nothing and getattr(self, setting.name) != default:
                readers = " or ".join(f"'{reader}'" for reader, options in _OPTIONS.items() if setting.name in options)
                raise ConfigError(
                    f"data.{setting.name} means nothing to reader '{self.reader}', only to {readers}; "
                    "remove it or change data.reader"
                )

    def _check_roles(self) -> None:
        given = [name for name in ("lists", "folders", "fractions") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"data.{given[0]} and data.{given[1]} both give roles; keep one of them")
        if self.lists and self.without_labels != "refuse":
            raise ConfigError("data.without_labels means nothing beside data.lists, which name auxiliary samples")
        if self.reader == "folder" and not given:
            raise ConfigError(
                "data.lists, data.folders and data.fractions are all missing, so no image has a role; "
                'add one of them: folders.train = ["."] gives all images to training'
            )
        if self.reader == "list" and not self.lists:
            raise ConfigError(
                "data.lists is missing, reader 'list' needs it; give a file a role: train = \"train.txt\""
            )
        if self.fractions:
            total = math.fsum(self.fractions.values())
            none = [f"{role} = {share:g}" for role, share in self.fractions.items() if not share > 0]
            if none:
                raise ConfigError(f"data.fractions has {', '.join(none)}; leave out the roles that get no image")
            if not abs(total - 1) <= 1e-6:
                raise ConfigError(f"data.fractions add up to {total:g}, expected 1")
            if self.reader in LAYOUTS and Role.REPORT in self.fractions:
                raise ConfigError(
                    f"data.fractions.report is given, but fractions divide the training part of '{self.reader}', "
                    "which reports on the official validation images; leave report out"
                )
            if self.group is None and self.reader == "folder":
                raise ConfigError(
                    "data.fractions need data.group, so that no sequence is cut by a split; "
                    "group = '.*' makes every image a group of its own"
                )

    def _check_classes(self) -> None:
        if not self.classes and self.reader in ("folder", "list"):
            raise ConfigError("data.classes is missing; name the classes in index order")
        if len(self.classes) > IGNORE:
            raise ConfigError(f"data.classes has {len(self.classes)} names; label maps have room for {IGNORE}")
        for name in (IGNORED, EXCLUDED):
            if name in self.classes:
                raise ConfigError(
                    f"data.classes holds '{name}', which is no class; remove it, label values may map to it"
                )
        if self.background and self.classes:
            raise ConfigError(
                "data.background adds to the reader's own classes, but data.classes gives others; keep one of them"
            )
        repeated = next((name for name in self.classes if self.classes.count(name) > 1), None)
        if repeated is not None:
            raise ConfigError(f"data.classes holds {repeated!r} twice; name every class once")
        if self.label_values and self.label_colours:
            raise ConfigError(
                "data.label_values and data.label_colours are both given; keep the one that fits the files"
            )
        if any(channel not in range(256) for colour in self.palette for channel in colour):
            raise ConfigError("data.palette has a channel outside 0 to 255; give [red, green, blue] a class")
