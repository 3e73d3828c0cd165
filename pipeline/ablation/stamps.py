"""What the tables of a sweep must say at their top: images in two roles, labels that were learned before.

Nothing is trained until it is known; what may not be is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from segkd.pipeline.ablation.arms import Arm
from segkd.pipeline.ablation.opened import Opened
from segkd.pipeline.config import RunConfig
from segkd.pipeline.data.contamination import Twins, find_twins, require_apart
from segkd.pipeline.data.sample import SCORED, DataSource, Role, with_role
from segkd.pipeline.student.leaks import beginnings, find_label_leaks
from segkd.storage.errors import CheckpointError, ContaminationError, DataError, SegkdError


def check_roles(run: RunConfig, arms: Collection[Arm], opened: Opened) -> Iterator[str]:
    """What tables must say of the roles, of the run file's data and of arms' own, and of which arms.

    Raises DataError without samples to report on, ContaminationError.
    """
    source, held = opened.data(run)
    if not with_role(source, Role.REPORT):
        raise DataError("the data have no sample of role report, so there is nothing to compare arms on; give it some")
    found: dict[tuple[int, bool], Twins] = {}
    of: dict[str, list[str]] = {}
    for arm in arms:
        try:
            source, held = opened.data(arm.run)
        except SegkdError as error:  # of the arm's own data: the run file's were opened before
            raise type(error)(f"arm {arm.name}: {error}") from None
        drawn = arm.run.train.auxiliary > 0
        if (id(source), drawn) not in found:
            roles = (*SCORED, Role.TRAIN, *([Role.AUXILIARY] if drawn else []))
            found[id(source), drawn] = find_twins(with_role(source, *roles), held.contents)
        twins = found[id(source), drawn]
        for stamp in (_stamp_of_learned(twins, arm.run, source), _stamp_of_shared(twins, run, source)):
            if stamp is not None:
                of.setdefault(stamp, []).append(arm.name)
    for stamp, named in of.items():
        yield stamp if len(named) == len(arms) else f"{', '.join(named)}: {stamp}"


def _stamp_of_learned(twins: Twins, run: RunConfig, source: DataSource) -> str | None:
    """What is learned from and scored on. Raises ContaminationError where that is refused."""
    found = twins.contaminated
    if found and run.data.compare_contents == "refuse":
        require_apart(twins, source, "refuse")
    scored = len(with_role(source, *SCORED))
    return (
        f"{len(found)} of {scored} images of roles select and report are learned from: their scores are too good."
        if found
        else None
    )


def _stamp_of_shared(twins: Twins, run: RunConfig, source: DataSource) -> str | None:
    """What is selected on and reported on."""
    shared = twins.shared
    if shared and not run.ablate.allow_shared_select:
        first = shared[0]
        raise ContaminationError(
            f"role select and role report share {len(shared)} images, the first {first.other.id!r} and "
            f"{first.sample.id!r}: what is chosen on report is no result on report; remove them from one of the roles, "
            "or set ablate.allow_shared_select = true, and every table will say so"
        )
    report = len(with_role(source, Role.REPORT))
    return (
        f"Role select and role report share {len(shared)} of {report} images: "
        "what was chosen was chosen on what is reported."
        if shared
        else None
    )


def check_labels(arms: Iterable[Arm], opened: Opened) -> tuple[str, ...]:
    """What tables must say of the labels that networks have seen before the sweep.

    Raises ContaminationError where a teacher, or what a student begins with, has learned a label that it must not know.
    """
    unknown: dict[str, None] = {}
    checked = set()
    for arm in arms:
        source, held = opened.data(arm.run)
        teacher = list(beginnings(arm.run.teacher if arm.distills else None))
        if arm.distills and not teacher:
            named = "that wrote the cache" if arm.run.teacher is None else arm.run.teacher.reference
            unknown[f"the teacher {named} is not a checkpoint of segkd, or its file is not here"] = None
        for path in (*teacher, *beginnings(arm.run.the_student())):
            if (path, id(source)) in checked:
                continue
            checked.add((path, id(source)))
            try:
                leaks = find_label_leaks(path, source, held.contents)
            except CheckpointError as error:
                unknown[str(error)] = None
                continue
            if leaks:
                raise ContaminationError(leaks.describe(source))
    return tuple(f"Which labels were learned before is not known: {why}." for why in unknown)
