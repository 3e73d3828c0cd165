"""The arms of a sweep: what each of them changes of the run file.

The run file is the full arm, "auxiliary-zero-first"; every other arm takes something away from it or does something
else in its place, at the same images a step. Built-in arms are settings like those of ``--set``, so that any of them
can be trained by hand.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from segkd.pipeline.ablation.config import AblateConfig, BuiltIn
from segkd.pipeline.config import RunConfig
from segkd.pipeline.settings import parse, parse_override, to_dict
from segkd.pipeline.student.inputs import check_knowledge
from segkd.pipeline.student.resuming import is_harmless
from segkd.storage.differences import difference, leaves
from segkd.storage.errors import ConfigError

FULL: BuiltIn = "auxiliary-zero-first"

KEPT: Mapping[BuiltIn, tuple[str, ...]] = {
    "alone": (),
    "alone-augmented": (),
    "alone-longer": (),
    "label-smoothing": (),
    "zero": ("zero_order",),
    "first": ("first_order",),
    "zero-first": ("zero_order", "first_order"),
    "auxiliary-zero": ("zero_order",),
    "auxiliary-zero-first": ("zero_order", "first_order"),
    "pseudo-labels": ("zero_order",),
}
"""The knowledge of the run file that each arm learns from; "pseudo-labels" puts its argmax in its place."""

AUXILIARY: tuple[BuiltIn, ...] = ("auxiliary-zero", "auxiliary-zero-first", "pseudo-labels")
"""The arms that see auxiliary images; the others have as many labelled ones in their place."""

_FREE = (
    "data",
    "cache",
    "teacher",
    "loss",
    "knowledge",
    "augment.photometric",
    "augment.auxiliary_photometric",
    "augment.cutmix",
    "train.labelled",
    "train.auxiliary",
    "train.teacher_view",
    "train.batch_norm",
    "train.least_confidence",
    "train.most_entropy",
)
"""What arms may differ in at matched compute: what they learn from, not how much of it or for how long. Samples are
compared by what they hold, once the data are open."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm, resolved."""

    name: str
    like: str | None
    """The built-in arm that it changes; None for a built-in one."""
    settings: tuple[str, ...]
    """What it changes of the run file, as ``--set`` takes it."""
    run: RunConfig
    """The run file with these settings, without its table [ablate]."""
    unmatched: tuple[str, ...]
    """What is not at matched compute, in words; empty where all of it is."""

    @property
    def distills(self) -> bool:
        """Whether it learns anything of the teacher."""
        return any(kind.weight for kind in self.run.knowledge.kinds())


def resolve_arms(run: RunConfig, longer: float | None) -> dict[str, Arm]:
    """The arms that the run file asks for, by name, in the order of the table.

    ``longer``: the factor of "alone-longer"; None leaves that arm out. Raises ConfigError for an arm that the run file
    cannot make, and for two arms that are the same.
    """
    ablate = run.ablate
    bare = replace(run, ablate=AblateConfig())
    tables = to_dict(bare)
    arms: dict[str, Arm] = {}
    for name in ablate.ladder:
        if name != "alone-longer" or longer is not None:
            arms[name] = _arm(name, None, tuple(_built_in(name, run, longer)), tables, bare)
    for own, config in ablate.arms.items():
        if config.like == "alone-longer" and longer is None:
            continue
        changed = (*_built_in(config.like, run, longer), *config.set)
        arms[own] = _arm(own, config.like, changed, tables, bare)
    _require_different(arms)
    return arms


def _arm(name: str, like: str | None, changed: tuple[str, ...], tables: Mapping[str, Any], base: RunConfig) -> Arm:
    try:
        for setting in changed:
            if (key := ".".join(parse_override(setting).key)) == "train.seed" or key.partition(".")[0] == "ablate":
                raise ConfigError(f"{key} is the sweep's, the same for all arms; set it in [ablate]")
        resolved = parse(RunConfig, tables, place="its settings", overrides=changed)
        knowledge = [kind for kind in resolved.knowledge.kinds() if kind.weight]
        if knowledge:
            check_knowledge(knowledge, resolved.train)
    except ConfigError as error:
        raise ConfigError(f"arm {name}: {error}") from None
    return Arm(name=name, like=like, settings=changed, run=resolved, unmatched=tuple(_unmatched(base, resolved)))


def _built_in(name: BuiltIn, run: RunConfig, longer: float | None) -> Iterator[str]:
    """The settings of a built-in arm. Raises ConfigError where the run file lacks what it needs."""
    train, kept = run.train, KEPT[name]
    for kind in kept:
        if not getattr(run.knowledge, kind).weight:
            raise _lacks(name, f"knowledge.{kind}.weight")
    if name in AUXILIARY and not train.auxiliary:
        raise _lacks(name, "train.auxiliary")
    if name not in AUXILIARY and train.auxiliary:
        yield f"train.labelled={train.labelled + train.auxiliary}"
        yield "train.auxiliary=0"
    yield from _knowledge(name, run, kept)
    if name == "alone-augmented":
        yield f"augment.photometric={run.augment.auxiliary_photometric!r}"
    if name == "alone-longer":
        assert longer is not None, "an arm without its length is left out"
        yield f"train.steps={round(train.steps * longer)}"
    if name == "label-smoothing":
        yield f"loss.label_smoothing={run.ablate.label_smoothing!r}"


def _knowledge(name: BuiltIn, run: RunConfig, kept: Collection[str]) -> Iterator[str]:
    """The weights that turn off what the arm does not learn from, kinds that the project gains later among them."""
    zero = run.knowledge.zero_order
    learned = ("pseudo_labels",) if name == "pseudo-labels" else kept
    for kind in run.knowledge.kinds():
        if kind.name not in learned and kind.weight:
            yield f"knowledge.{kind.name}.weight=0"
    if name == "pseudo-labels":
        # The teacher's argmax instead of its distribution, and nothing else: as heavy, on the same crops.
        yield f"knowledge.pseudo_labels.weight={zero.weight!r}"
        yield f"knowledge.pseudo_labels.on={json.dumps(zero.on)}"
        yield f"knowledge.pseudo_labels.schedule={json.dumps(zero.schedule)}"
        yield 'knowledge.pseudo_labels.form="hard"'
        yield f"knowledge.pseudo_labels.class_weighted={json.dumps(zero.class_weighted)}"


def _lacks(name: str, key: str) -> ConfigError:
    return ConfigError(
        f"arm {name} needs {key} above 0, and the run file has 0; give it, or leave arms out of ablate.ladder"
    )


def effective(run: RunConfig) -> dict[str, Any]:
    """The settings that decide what training gives, by dotted key: not paths, not how fast it goes, nothing unused."""
    tables = to_dict(run)
    del tables["ablate"], tables["cache"], tables["teacher"], tables["data"], tables["student"]
    tables["knowledge"] = {kind.name: tables["knowledge"][kind.name] for kind in run.knowledge.kinds() if kind.weight}
    if not run.train.auxiliary:
        for table, key in (
            ("augment", "auxiliary_photometric"),
            ("augment", "cutmix"),
            ("train", "least_confidence"),
            ("train", "most_entropy"),
        ):
            del tables[table][key]
        if run.train.batch_norm != "frozen":
            tables["train"]["batch_norm"] = "joint"  # all of a batch is of one kind
    if not (run.loss.cross_entropy and run.loss.ohem_threshold):
        del tables["loss"]["ohem_threshold"], tables["loss"]["ohem_min_kept"]
    if not tables["knowledge"]:
        tables["train"]["teacher_view"] = "cache"  # nobody looks
    return {key: value for key, value in leaves(tables) if not is_harmless(key)}


def views(arms: Mapping[str, Arm]) -> Iterator[tuple[str, str, str]]:
    """The pairs of arms that differ in where the same teacher's knowledge comes from and in nothing else.

    Each is later arm, earlier arm, what they differ in.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for arm in arms.values():
        if arm.distills:
            settings = effective(arm.run)
            view = settings.pop("train.teacher_view")
            key = json.dumps([settings, *_tables(arm, "data", "student", "teacher")], sort_keys=True)
            found.setdefault(key, {}).setdefault(view, []).append(arm.name)
    for by_view in found.values():
        for later, earlier, what in (
            ("cache", "image", "the cache in place of the teacher itself: coding"),
            ("image", "crop", "the teacher on whole images in place of the student's crops: working offline"),
        ):
            for pair in product(by_view.get(later, ()), by_view.get(earlier, ())):
                yield *pair, what


def _tables(arm: Arm, *names: str) -> list[Any]:
    tables = to_dict(arm.run)
    return [tables[name] for name in names]


def _unmatched(base: RunConfig, arm: RunConfig) -> Iterator[str]:
    """What of the arm is not at matched compute with the run file."""
    images = base.train.labelled + base.train.auxiliary, arm.train.labelled + arm.train.auxiliary
    if images[0] != images[1]:
        yield difference("images a step", *images)
    before, after = dict(leaves(to_dict(base))), dict(leaves(to_dict(arm)))
    for key in sorted(before.keys() | after.keys()):
        free = is_harmless(key) or any(key == name or key.startswith(f"{name}.") for name in _FREE)
        if not free and before.get(key) != after.get(key):
            yield difference(key, before.get(key), after.get(key))


def _require_different(arms: Mapping[str, Arm]) -> None:
    """Raises ConfigError for two arms of the same settings: one of them would be trained in vain."""
    seen: dict[str, str] = {}
    for arm in arms.values():
        everything = [effective(arm.run), *_tables(arm, "data", "student")]
        if arm.distills and arm.run.train.teacher_view == "cache":
            everything.append(arm.run.cache.path)
        elif arm.distills:
            everything += [*_tables(arm, "teacher"), arm.run.cache.precision]
        key = json.dumps(everything, sort_keys=True)
        if key in seen:
            raise ConfigError(
                f"arms {seen[key]} and {arm.name} are the same settings in this run file; "
                "leave one of them out of ablate.ladder or ablate.arms"
            )
        seen[key] = arm.name
