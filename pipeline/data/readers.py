"""From a description to a data set: which files are its samples, and what each may be used for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath

from segkd.pipeline.data import images
from segkd.pipeline.data.complaints import Complaint, of_all, of_lines
from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.files import FileSource
from segkd.pipeline.data.labels import LabelMap, describe
from segkd.pipeline.data.layouts import LAYOUTS
from segkd.pipeline.data.layouts.layout import Files, Layout
from segkd.pipeline.data.names import Naming, by_stem, inside, names_in, names_under, split_extension
from segkd.pipeline.data.recognition import layout_of
from segkd.pipeline.data.roles import Line, by_folders, by_fractions, by_lines, grouping, labels_apart, lines_of
from segkd.pipeline.data.sample import SCORED, DataSource, Role
from segkd.pipeline.data.scenes import SceneSource
from segkd.pipeline.data.skipping import Skipped
from segkd.pipeline.data.unlabelled import with_unlabelled
from segkd.storage.errors import DataError

logger = logging.getLogger(__name__)

_EXTENSIONS = images.IMAGE_EXTENSIONS | images.LABEL_EXTENSIONS


@dataclass(frozen=True)
class Found:
    """What a description finds."""

    source: DataSource
    unused: int = 0
    """Images that have no role."""
    skipped: int = 0
    """Images that ``data.skip`` leaves out."""
    idle: tuple[Complaint, ...] = ()
    """What is wrong with ``data.skip`` itself."""
    complaints: tuple[Complaint, ...] = ()
    label_map: LabelMap | None = None
    """What the values of label maps mean, where there are files of them."""
    told: str = ""
    """Which published data set it is, and where roles come from."""


def open_data(config: DataConfig) -> DataSource:
    """The data set that ``config`` describes. Only folders and lists are read, no image is.

    Raises DataError for files that are missing or cannot be told apart, ContaminationError for a sample of two roles.
    """
    found = find(config)
    errors = [str(complaint) for complaint in found.complaints if complaint.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more: run `segkd data check`)" if len(errors) > 1 else ""
        raise DataError(errors[0] + more)
    for complaint in found.idle:
        logger.warning(str(complaint))
    return found.source


def find(config: DataConfig) -> Found:
    """The same with all that single samples lack as complaints; what leaves no data set at all is raised."""
    skipped = Skipped(config.skip)
    found = Found(SceneSource(config.scenes)) if config.reader == "scenes" else _find_files(config, skipped)
    if config.unlabelled:
        joined = with_unlabelled(found.source, config.unlabelled, config.max_pixels, skipped)
        found = replace(found, source=joined)
    return replace(found, skipped=skipped.count, idle=tuple(skipped.complaints()))


def _find_files(config: DataConfig, skipped: Skipped) -> Found:
    root = Path(config.root)
    layout = layout_of(config.reader, root) if config.reader in LAYOUTS else None
    classes, label_map = describe(config, layout)
    complaints: list[Complaint] = []
    if config.reader == "list":
        files, roles = _listed(config, complaints)
    else:
        files = layout.find(root) if layout else _folder_files(config)
        _check_any(files, config)
        roles = _roles(config, files, layout, complaints)
        lone = [str(root / name) for sample_id, name in sorted(files.labels.items()) if sample_id not in files.images]
        complaints += of_all("warning", lone, "a label map without an image; it is not used")
    unused = len(files.images) - len(roles)
    stay = skipped.without(((sample_id, files.images[sample_id]) for sample_id in roles), root)
    roles = {sample_id: roles[sample_id] for sample_id in stay}
    complaints += _missing_labels(config, files, roles)
    group_of = _grouping(config, layout)
    rows = (
        (sample_id, role, group_of(sample_id), files.images[sample_id], files.labels.get(sample_id))
        for sample_id, role in roles.items()
    )
    source = FileSource(root, rows, classes, label_map, config.max_pixels)
    told = _told(config, files, layout)
    return Found(source, unused, complaints=tuple(complaints), label_map=label_map, told=told)


def _told(config: DataConfig, files: Files, layout: Layout | None) -> str:
    """Which data set it is, and where roles come from."""
    if layout is None:
        return ""
    if config.lists or config.folders:
        return f"{layout.title}; roles by data.{'lists' if config.lists else 'folders'}"
    divided = "; data.fractions divide the training part" if config.fractions else ""
    return f"{layout.title}; official roles: {files.roles_told}{divided}"


def _folder_files(config: DataConfig) -> Files:
    root = Path(config.root)
    image_folder, label_folder = root / config.images, root / config.labels
    image_naming = Naming(config.image_suffix, images.IMAGE_EXTENSIONS)
    label_naming = Naming(config.label_suffix, images.LABEL_EXTENSIONS)
    if not config.labels:
        return Files(_below(root, config.images, names_under(image_folder), image_naming), {}, "data.labels = ''")
    image_names = names_under(image_folder, skip=label_folder)
    if image_folder == label_folder:
        image_names = (name for name in image_names if label_naming.stem(name) is None)
    return Files(
        _below(root, config.images, image_names, image_naming),
        _below(root, config.labels, names_under(label_folder, skip=image_folder), label_naming),
        str(label_folder),
    )


def _below(root: Path, folder: str, names: Iterator[str], naming: Naming) -> dict[str, str]:
    prefix = "" if Path(folder) == Path() else f"{Path(folder).as_posix()}/"
    return {stem: prefix + name for stem, name in by_stem(names, naming, root / folder).items()}


def _check_any(files: Files, config: DataConfig) -> None:
    """Raises DataError where there are no images, no label maps, or no image with a label map."""
    root, folder = Path(config.root), config.reader == "folder"
    if not files.images:
        expected = Naming(config.image_suffix, images.IMAGE_EXTENSIONS)
        raise DataError(f"{root / config.images if folder else root}: holds no images; expected files {expected}")
    if folder and config.labels and not files.labels:
        expected = Naming(config.label_suffix, images.LABEL_EXTENSIONS)
        raise DataError(
            f"{root / config.labels}: holds no label maps; expected files {expected}, or data.labels = '' for none"
        )
    if files.labels and files.images.keys().isdisjoint(files.labels):
        raise DataError(
            f"{root}: no image has a label map of its name; images are {_examples(files.images)}, label maps "
            f"{_examples(files.labels)}; set data.image_suffix and data.label_suffix (reader 'folder') to what differs"
        )


def _examples(ids: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(ids)[:3]))


def _listed(config: DataConfig, complaints: list[Complaint]) -> tuple[Files, dict[str, Role]]:
    """The files that list files name, in pairs; those that are not there become complaints."""
    root = Path(config.root)
    present = cache(lambda folder: names_in(root / folder))
    image_of: dict[str, str] = {}
    label_of: dict[str, str] = {}
    named: list[tuple[str, Line]] = []
    absent: list[tuple[str, str]] = []
    untabbed: list[tuple[str, str]] = []
    for line in lines_of(config.lists):
        parts = [part.strip() for part in line.text.split("\t" if "\t" in line.text else ",")]
        if len(parts) > 2 or not parts[0]:
            raise DataError(
                f"{line.place}: {line.text!r}; expected an image and at most one label map, "
                "with a tab between them where names hold commas"
            )
        paths = [PurePosixPath(inside(part, line.place)) for part in parts if part]
        missing = [path for path in paths if path.name not in present(path.parent)]
        if missing:
            pair = _image_of_pair(line.text) != line.text and len(parts) == 1
            (untabbed if pair else absent).extend((line.place, str(root / path)) for path in missing)
            continue
        sample_id = str(paths[0].with_suffix(""))
        named.append((sample_id, line))
        image_of[sample_id] = str(paths[0])
        if len(paths) == 2:
            label_of[sample_id] = str(paths[1])
    complaints += of_lines(absent, "file")
    complaints += of_lines(untabbed, "file", "; put a tab or a comma between image and label map")
    return Files(image_of, label_of, "its line of the list"), by_lines(named)


def _roles(config: DataConfig, files: Files, layout: Layout | None, complaints: list[Complaint]) -> dict[str, Role]:
    if config.lists:
        return by_lines(_named(config, files, layout, complaints))
    apart = partial(_apart, config, files, complaints)
    if config.folders:
        return apart(by_folders(config.folders, files.images))
    group_of = _grouping(config, layout)
    if layout is None:
        return apart(by_fractions(config.fractions, group_of, files.images), group_of)
    official = _official(config, files, layout, complaints)
    if not config.fractions:
        return apart(official)
    training = [sample_id for sample_id, role in official.items() if role is Role.TRAIN]
    others: dict[str, Role] = {key: role for key, role in official.items() if role is not Role.TRAIN}
    return apart(others) | apart(by_fractions(config.fractions, group_of, training), group_of)


def _apart(
    config: DataConfig,
    files: Files,
    complaints: list[Complaint],
    roles: dict[str, Role],
    group_of: Callable[[str], str] | None = None,
) -> dict[str, Role]:
    """Roles as ``data.without_labels`` has them."""
    if config.without_labels == "refuse":
        return roles
    apart = labels_apart(roles, files.labels, group_of)
    for role in SCORED:
        out = [key for key, of in sorted(roles.items()) if of == role and key not in apart]
        places = [str(Path(config.root) / files.images[sample_id]) for sample_id in out]
        complaints += of_all("warning", places, f"no label map of its name, so it is left out of role {role}")
    return apart


def _grouping(config: DataConfig, layout: Layout | None) -> Callable[[str], str]:
    return grouping(config.group or (layout.group if layout else None))


def _official(config: DataConfig, files: Files, layout: Layout, complaints: list[Complaint]) -> dict[str, Role]:
    """The roles that the data set's own split gives. Images that its lists name in vain are one complaint."""
    if not files.roles:
        raise DataError(
            f"{config.root}: no image has a role by the official split of {layout.title} ({files.roles_told}); "
            "give roles by data.lists or data.folders"
        )
    if files.roles_doubted:
        complaints.append(Complaint("error", f"{config.root}: {files.roles_doubted}"))
    absent = sorted(files.roles.keys() - files.images.keys())
    if absent:
        complaints.append(
            Complaint(
                "error",
                f"{config.root}: {len(absent):,} images of the official lists are missing, the first is {absent[0]!r}; "
                "complete the download, or give roles by data.lists",
            )
        )
    return {sample_id: role for sample_id, role in files.roles.items() if sample_id in files.images}


def _named(
    config: DataConfig, files: Files, layout: Layout | None, complaints: list[Complaint]
) -> Iterator[tuple[str, Line]]:
    """The samples that list files name, by id or by the image's name; unknown ones become complaints.

    Of published data sets the field's lists name an image and its label map in a line, as if from the root of a disk;
    the image is what is looked for.
    """
    naming = Naming(config.image_suffix, images.IMAGE_EXTENSIONS)
    by_name = {name: sample_id for sample_id, name in files.images.items()}
    absent: list[tuple[str, str]] = []
    for line in lines_of(config.lists):
        name = inside(line.text if layout is None else _image_of_pair(line.text), line.place)
        sample_id = name if name in files.images else by_name.get(name, naming.stem(name))
        if sample_id is not None and sample_id in files.images:
            yield sample_id, line
        else:
            absent.append((line.place, repr(name)))
    complaints += of_lines(absent, "image", f" under {config.root}")


def _image_of_pair(text: str) -> str:
    """The first of two files that a line names, without the slash that it begins with; another line as it is."""
    parts = text.split()
    if len(parts) == 2 and all(split_extension(part)[1] in _EXTENSIONS for part in parts):
        return parts[0].lstrip("/")
    return text


def _missing_labels(config: DataConfig, files: Files, roles: Mapping[str, Role]) -> Iterator[Complaint]:
    remedies = {"": "", Role.TRAIN: ': data.without_labels = "auxiliary" makes it one'}
    for role in sorted({*roles.values()} - {Role.AUXILIARY}):
        missing = [key for key, of in sorted(roles.items()) if of == role and key not in files.labels]
        remedy = remedies.get("" if config.lists else role, ': data.without_labels = "auxiliary" leaves it out')
        yield from of_all(
            "error",
            [str(Path(config.root) / files.images[sample_id]) for sample_id in missing],
            f"no label map of its name in {files.labels_place}; a sample of role {role} needs one, "
            f"one of role {Role.AUXILIARY} does not{remedy}",
        )
