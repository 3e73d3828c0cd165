"""Whether what is learned from is kept apart from what is chosen and reported on, by what the images show."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from segkd.pipeline.data.contents import Content
from segkd.pipeline.data.matching import alike
from segkd.pipeline.data.sample import LEARNED, SCORED, DataSource, Role, Sample
from segkd.storage.errors import ContaminationError

logger = logging.getLogger(__name__)

Policy = Literal["refuse", "warn", "off"]
"""What is done about contamination; off: images are not compared."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A sample whose image another sample of another role shows too."""

    sample: Sample
    other: Sample
    difference: int
    """The largest difference of tones, of 255."""
    exact: bool
    """Whether all pixels are equal."""


@dataclass(frozen=True)
class Twins:
    """All samples whose image has more than one role; of each the one that is most like it."""

    contaminated: tuple[Twin, ...]
    """Samples of role select or report that are learned from as well."""
    shared: tuple[Twin, ...]
    """Samples of role report that are selected on as well."""
    copies: tuple[Twin, ...]
    """Auxiliary samples whose image is one of role train, labels and all."""


def find_twins(samples: Sequence[Sample], contents: Mapping[str, Content]) -> Twins:
    """The twins among the samples whose content is known, in the order of the samples."""
    of: dict[Role, list[Sample]] = {role: [] for role in Role}
    for sample in samples:
        if sample.id in contents:
            of[sample.role].append(sample)
    learned, scored = ([sample for role in roles for sample in of[role]] for roles in (LEARNED, SCORED))
    return Twins(
        contaminated=_twins(scored, learned, contents),
        shared=_twins(of[Role.REPORT], of[Role.SELECT], contents),
        copies=_twins(of[Role.AUXILIARY], of[Role.TRAIN], contents),
    )


def _twins(samples: Sequence[Sample], others: Sequence[Sample], contents: Mapping[str, Content]) -> tuple[Twin, ...]:
    lists = ([contents[sample.id] for sample in part] for part in (samples, others))
    return tuple(
        Twin(samples[found.first], others[found.second], found.difference, found.exact) for found in alike(*lists)
    )


def require_apart(twins: Twins, source: DataSource, policy: Policy) -> None:
    """Raises ContaminationError, or warns of it, as ``policy`` says; warns of what else is in two roles."""
    if twins.contaminated:
        message = _counted(twins.contaminated, describe_contaminated(twins.contaminated[0], source))
        if policy == "refuse":
            raise ContaminationError(f'{message}; or train all the same with data.compare_contents = "warn"')
        logger.warning(message)
    for found, describe in ((twins.shared, describe_shared), (twins.copies, describe_copy)):
        if found:
            logger.warning(_counted(found, describe(found[0], source)))


def _counted(twins: Sequence[Twin], first: str) -> str:
    return first if len(twins) == 1 else f"{first}; there are {len(twins):,} such pairs, segkd data check lists them"


def describe_contaminated(twin: Twin, source: DataSource) -> str:
    """What is wrong and what to do."""
    return f"{_pair(twin, source)}, so its score would be too good; take one of them out of its role"


def describe_shared(twin: Twin, source: DataSource) -> str:
    """What may be wrong and what to do."""
    return f"{_pair(twin, source)}, so what is chosen is chosen on what is reported; take one of them out of its role"


def describe_copy(twin: Twin, source: DataSource) -> str:
    """What may be wrong and what to do."""
    return f"{_pair(twin, source)}, so it brings no image that is new; take it out of role auxiliary"


def _pair(twin: Twin, source: DataSource) -> str:
    how = (
        "pixel for pixel"
        if twin.exact
        else f"encoded or scaled otherwise (their tones differ by at most {twin.difference} of 255)"
    )
    return f"{describe_sample(twin.sample, source)} is the same image as {describe_sample(twin.other, source)}, {how}"


def describe_sample(sample: Sample, source: DataSource) -> str:
    """Id, role and file."""
    file = source.image_file(sample)
    return f"sample {sample.id!r} ({sample.role}{'' if file is None else f', {file}'})"
