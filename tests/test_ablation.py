"""A sweep's arms, identities, records and refusals; tests/test_sweep.py runs one."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from segkd.cli.main import main
from segkd.pipeline.ablation.arms import AUXILIARY, effective, resolve_arms
from segkd.pipeline.ablation.config import LADDER
from segkd.pipeline.ablation.identity import differences, read_held
from segkd.pipeline.ablation.ledger import Images, Ledger, RunRecord, Seen
from segkd.pipeline.ablation.longer import circumstances, measure_longer, stage_1_seconds
from segkd.pipeline.ablation.sweep import plan_sweep
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import Role
from segkd.pipeline.models.references import described
from segkd.pipeline.settings import parse
from segkd.pipeline.student.inputs import open_inputs
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.fingerprints import content_digest
from segkd.storage.errors import CacheMismatchError, ConfigError, ContaminationError, DataError, RecordError, SegkdError

SETTINGS = ["train.labelled=3", "train.auxiliary=5", "augment.photometric=0.2", "ablate.seeds=[0, 7]"]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[[Path], Path]) -> Path:
    """A run file whose cache is written."""
    path = make_run(tmp_path_factory.mktemp("cached"))
    teacher_cache(load(path))
    return path


def read(path: Path, *settings: str) -> RunConfig:
    return load(path, [*SETTINGS, *settings])


def planned(path: Path, *settings: str, output: Path | None = None) -> dict[str, str]:
    """Digest of every run, by arm and seed."""
    sweep = plan_sweep(read(path, *settings), output or path.parent / "out", measure=False)
    return {str(job): content_digest(job.identity) for job in sweep.jobs}


def message(error: type[SegkdError], path: Path, *settings: str) -> str:
    with pytest.raises(error) as caught:
        plan_sweep(read(path, *settings), path.parent / "out", measure=False)
    return str(caught.value)


# Arms


@pytest.mark.parametrize(
    ("later", "earlier", "what"),
    [
        ("zero", "alone", {"knowledge.zero_order"}),
        ("first", "alone", {"knowledge.first_order"}),
        ("zero-first", "zero", {"knowledge.first_order"}),
        ("auxiliary-zero-first", "auxiliary-zero", {"knowledge.first_order"}),
        ("alone-augmented", "alone", {"augment.photometric"}),
        ("alone-longer", "alone", {"train.steps"}),
        ("label-smoothing", "alone", {"loss.label_smoothing"}),
        ("auxiliary-zero", "pseudo-labels", {"knowledge.zero_order", "knowledge.pseudo_labels"}),
        (
            "auxiliary-zero",
            "zero",
            {
                "train.labelled",
                "train.auxiliary",
                "train.least_confidence",
                "train.most_entropy",
                "augment.auxiliary_photometric",
                "augment.cutmix",
            },
        ),
    ],
)
def test_a_pair_differs_in_one_thing(run: Path, later: str, earlier: str, what: set[str]) -> None:
    arms = resolve_arms(read(run), 2.5)
    after, before = (effective(arms[name].run) for name in (later, earlier))
    keys = {key for key in after.keys() | before.keys() if after.get(key) != before.get(key)}
    assert {next((name for name in what if key.startswith(name)), key) for key in keys} == what


def test_what_the_built_in_arms_are(run: Path) -> None:
    arms = resolve_arms(read(run, "knowledge.zero_order.weight=3", "knowledge.zero_order.schedule='rise'"), 2.5)
    assert tuple(arms) == LADDER
    for name, arm in arms.items():
        share = (3, 5) if name in AUXILIARY else (8, 0)
        assert (arm.run.train.labelled, arm.run.train.auxiliary) == share
        assert arm.distills == ("alone" not in name and name != "label-smoothing")
        assert arm.unmatched == (("train.steps (2, now 5)",) if name == "alone-longer" else ())
    assert arms["auxiliary-zero-first"].settings == ()
    assert arms["alone-augmented"].run.augment.photometric == 1.0
    assert arms["label-smoothing"].run.loss.label_smoothing == 0.1
    pseudo, zero = arms["pseudo-labels"].run.knowledge, arms["auxiliary-zero"].run.knowledge.zero_order
    assert (pseudo.pseudo_labels.weight, pseudo.pseudo_labels.schedule) == (zero.weight, zero.schedule)
    assert (pseudo.pseudo_labels.form, pseudo.zero_order.weight, pseudo.first_order.weight) == ("hard", 0, 0)


@pytest.mark.parametrize(
    ("setting", "other"),
    [
        ("train.auxiliary=0", "augment.cutmix=0.5"),
        ("loss.ohem_threshold=0", "loss.ohem_min_kept=0.5"),
        ("loss.cross_entropy=0", "loss.ohem_threshold=0.7"),
    ],
)
def test_settings_that_do_nothing_make_no_difference(run: Path, setting: str, other: str) -> None:
    assert effective(read(run, setting)) == effective(read(run, setting, other))


def test_an_arm_can_be_trained_by_hand_with_the_settings_that_are_listed(run: Path) -> None:
    for arm in resolve_arms(read(run), 2.0).values():
        assert replace(read(run, *arm.settings), ablate=arm.run.ablate) == arm.run


def test_other_comparators_of_the_run_file_are_off_in_every_arm_but_an_own_one(run: Path) -> None:
    own = 'ablate.arms.dist.set=["knowledge.dist.weight=2"]'
    arms = resolve_arms(read(run, own), 2.0)
    assert [name for name, arm in arms.items() if arm.run.knowledge.dist.weight] == ["dist"]
    assert (arms["dist"].like, arms["dist"].unmatched) == ("auxiliary-zero-first", ())


@pytest.mark.parametrize(
    ("changed", "unmatched"),
    [
        ("knowledge.first_order.weight=30", ()),
        ("cache.path='another.zarr'", ()),
        ("train.threads=2", ()),
        ("train.labelled=4", ("images a step (8, now 9)",)),
        ("train.learning_rate=0.5", ("train.learning_rate (0.001, now 0.5)",)),
        ("augment.crop=[64, 64]", ("augment.crop ([32, 32], now [64, 64])",)),
        ("student.reference='fast-scnn'", ("student.reference ('enet', now 'fast-scnn')",)),
    ],
)
def test_what_is_not_at_matched_compute_is_said(run: Path, changed: str, unmatched: tuple[str, ...]) -> None:
    arms = resolve_arms(read(run, f"ablate.arms.own.set={json.dumps([changed])}", "ablate.ladder=[]"), None)
    assert arms["own"].unmatched == unmatched


def test_other_samples_are_marked_by_what_they_hold_and_not_by_where_they_are_listed(
    cached: Path, tmp_path: Path
) -> None:
    for name, folders in (("same", "a"), ("all", "ab")):
        lines = [f"{folder}/{number}" for folder in folders for number in range(2)]
        (tmp_path / name).write_text("\n".join(lines))
    for role, folder in (("auxiliary", "b"), ("select", "c"), ("report", "d")):
        (tmp_path / role).write_text(f"{folder}/0\n{folder}/1")
    lists = {name: f"data.lists.train='{tmp_path / name}'" for name in ("same", "all")}
    others = f"data.lists={{select='{tmp_path / 'select'}', report='{tmp_path / 'report'}'}}"
    arms = [f"ablate.arms.{name}={{like='alone', set={json.dumps([others, lists[name]])}}}" for name in lists]
    base = [f"data.lists.{role}='{tmp_path / role}'" for role in ("auxiliary", "select", "report")]
    base += ["data.folders={}", f"data.lists.train='{tmp_path / 'same'}'", "ablate.ladder=['zero']"]
    sweep = plan_sweep(read(cached, *base, *arms), tmp_path / "out")
    assert sweep.arms["same"].unmatched == ()
    assert sweep.arms["all"].unmatched == ("samples of role train (2, now 4)",)


def test_arms_of_one_seed_see_labelled_samples_in_one_order(cached: Path) -> None:
    drawn = {}
    for name, arm in resolve_arms(read(cached), 2.0).items():
        inputs = open_inputs(arm.run, described(arm.run.the_student()), distill=arm.distills)
        draws = [draw for step in range(40) for draw in inputs.stream.draws(step)]
        drawn[name] = [(draw.sample.id, draw.epoch) for draw in draws if draw.sample.role is Role.TRAIN]
    assert {len(order) for order in drawn.values()} == {3 * 40, 8 * 40}
    for order in drawn.values():
        assert order == drawn["alone"][: len(order)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["train.auxiliary=0"],
            "arm auxiliary-zero needs train.auxiliary above 0, and the run file has 0; "
            "give it, or leave arms out of ablate.ladder",
        ),
        (
            ["knowledge.first_order.weight=0"],
            "arm first needs knowledge.first_order.weight above 0, and the run file has 0; "
            "give it, or leave arms out of ablate.ladder",
        ),
        (
            ["augment.photometric=1.0"],
            "arms alone and alone-augmented are the same settings in this run file; "
            "leave one of them out of ablate.ladder or ablate.arms",
        ),
        (
            ['ablate.arms.own.set=["train.stops=3"]'],
            "arm own: --set train.stops=3: train.stops = 3: there is no such key; did you mean train.steps?",
        ),
        (
            ["ablate.arms.own.set=[\"data.folders.report=['a']\", \"data.folders.train=['d']\"]"],
            "arm own reports on other samples than the run file, so nothing compares with it; "
            "leave role report as it is",
        ),
        (
            ["ablate.arms.own.set=['data.lists={report = \"r.txt\"}']"],
            "arm own: its settings: data.lists and data.folders both give roles; keep one of them",
        ),
        (
            ["ablate.arms.own.set=['data.folders={}', 'data.lists={report = \"r.txt\"}']"],
            "arm own: data.lists.report = 'r.txt' cannot be read (No such file or directory); "
            "its path is relative to the working directory",
        ),
        (
            ['ablate.arms.own.set=["train.seed=5"]'],
            "arm own: train.seed is the sweep's, the same for all arms; set it in [ablate]",
        ),
        (
            ['ablate.arms.own.set=["ablate.margin=1"]'],
            "arm own: ablate.margin is the sweep's, the same for all arms; set it in [ablate]",
        ),
        (
            ['ablate.arms.own={like="zero", set=["train.batch_norm=\'labelled\'"]}'],
            "arms zero and own are the same settings in this run file; "
            "leave one of them out of ablate.ladder or ablate.arms",
        ),
    ],
)
def test_arms_that_cannot_be(cached: Path, settings: list[str], expected: str) -> None:
    assert message(ConfigError, cached, *settings) == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("ablate.ladder=[]", "ablate.ladder and ablate.arms are both empty; name arms to train"),
        (
            "ablate.seeds=[1, 1]",
            "ablate.seeds names something twice: [1, 1]; name each once",
        ),
        ("ablate.seeds=[]", "ablate.seeds is []; give at least one, each 0 or more"),
        (
            "ablate.arms.zero.set=[]",
            "ablate.arms has an arm 'zero'; its name is made of letters, digits, - and _, "
            "and is not that of a built-in arm",
        ),
        (
            'ablate.arms."a/b".set=[]',
            "ablate.arms has an arm 'a/b'; its name is made of letters, digits, - and _, "
            "and is not that of a built-in arm",
        ),
        ("ablate.longer=-1", "ablate.longer is -1.0; expected 0 or more"),
        ("ablate.label_smoothing=2", "ablate.label_smoothing is 2.0; expected 0 to 1"),
        ("ablate.block=0", "ablate.block is 0; it must be at least 1"),
        (
            "ablate.upper='all'",
            "ablate.upper is 'all', which is no arm of this sweep; its arms are " + ", ".join(LADDER),
        ),
    ],
)
def test_settings_of_a_sweep_that_cannot_be(run: Path, setting: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(run, [setting])
    assert str(caught.value).endswith(expected)


# Identities


def test_identities_do_not_depend_on_places_speed_or_the_rest_of_the_sweep(
    cached: Path, tmp_path: Path, make_run: Callable[[Path], Path]
) -> None:
    before = planned(cached)
    moved = make_run(tmp_path / "elsewhere")
    shutil.copytree(cached.parent / "cache.zarr", tmp_path / "moved.zarr")
    elsewhere = planned(moved, f"cache.path='{tmp_path / 'moved.zarr'}'", output=tmp_path / "out")
    assert elsewhere == before
    assert planned(cached, "train.threads=2", "train.workers=1", "train.device='auto'") == before
    own = planned(cached, "ablate.ladder=['zero']", 'ablate.arms.own.set=["train.clip=1"]', "ablate.block=3")
    assert own.keys() == {"zero, seed 0", "own, seed 0", "zero, seed 7", "own, seed 7"}
    assert own["zero, seed 7"] == before["zero, seed 7"]
    assert len(set(before.values())) == len(before)


def test_settings_that_an_arm_does_not_use_do_not_make_it_another(cached: Path) -> None:
    before = planned(cached)
    after = planned(cached, "augment.cutmix=0.5", "train.least_confidence=0.1", "knowledge.dist.temperature=2")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{arm}, seed {seed}" for arm in AUXILIARY for seed in (0, 7)}
    weight = planned(cached, "knowledge.first_order.weight=20")
    learns = {f"{arm}, seed {seed}" for arm in ("first", "zero-first", "auxiliary-zero-first") for seed in (0, 7)}
    assert {name for name in before if before[name] != weight[name]} == learns


@pytest.mark.parametrize(("folder", "role"), [("a", "train"), ("b", "auxiliary"), ("c", "select"), ("d", "report")])
@pytest.mark.parametrize("kind", ["images", "labels"])
def test_identities_depend_on_what_the_samples_hold(
    cached: Path, tmp_path: Path, folder: str, role: str, kind: str
) -> None:
    shutil.copytree(cached.parent, tmp_path / "copy")
    run = tmp_path / "copy" / "tiny.toml"
    run.write_text(run.read_text().replace(str(cached.parent), str(run.parent)))
    before = planned(run)
    file = run.parent / kind / folder / "0.png"
    pixels = np.asarray(Image.open(file)).copy()
    pixels[0, 0] = 0 if pixels[0, 0].any() else 1
    Image.fromarray(pixels).save(file)
    after = planned(run)
    changed = {name.split(",")[0] for name in before if before[name] != after[name]}
    if role == "auxiliary":
        # Nobody looks at their labels.
        assert changed == (set(AUXILIARY) if kind == "images" else set())
    else:
        assert changed == {name.split(",")[0] for name in before}


def test_identities_depend_on_what_is_excluded(tmp_path: Path) -> None:
    """In the labels it is 255 like all that is ignored, but the teacher's word does not count there either."""
    for folder in ("images/train", "labels/train", "images/val", "labels/val"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3) if "images" in folder else (8, 8), 3, np.uint8)).save(
            tmp_path / folder / "a.png"
        )
    digests = set()
    for meaning in ("ignore", "exclude", "road"):
        config = DataConfig(
            reader="folder",
            root=str(tmp_path),
            classes=("road", "sky"),
            folders={Role.TRAIN: ("train",), Role.REPORT: ("val",)},
            label_values={"0-1": "sky", "3": meaning},
        )
        source = open_data(config)
        digests.add(read_held(source).digest(source, Role.TRAIN))
    assert len(digests) == 3


def test_identities_of_distilled_arms_alone_depend_on_the_teacher(cached: Path, tmp_path: Path) -> None:
    before = planned(cached)
    other = f"cache.path='{tmp_path / 'other.zarr'}'"
    teacher_cache(load(cached, [other, "cache.max_kl=0.1"]))
    after = planned(cached, other)
    alone = {"alone", "alone-augmented", "label-smoothing"}
    assert {name.split(",")[0] for name in before if before[name] == after[name]} == alone


def test_identities_depend_on_the_weights_that_a_student_begins_with(cached: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    digests = set()
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        digests.add(planned(cached, f"student.init='{weights}'")["alone, seed 0"])
    assert len(digests) == 2


# Records


def record_of(run: RunConfig, output: Path, arm: str, seed: int) -> RunRecord:
    """A record of a run that nobody has done."""
    (job,) = (job for job in plan_sweep(run, output, measure=False).jobs if (job.arm, job.seed) == (arm, seed))
    confusions = [np.diag([90, 100, 110]) + k for k in range(2)]
    miou = 100 * (181 / 185 + 201 / 205 + 221 / 225) / 3
    macc = 100 * (181 / 183 + 201 / 203 + 221 / 223) / 3
    scores = {"miou": miou, "macc": macc, "aacc": 100 * 603 / 609, "boundary_miou": 30.0}
    latency = {"p50_ms": 2.0}
    return RunRecord(
        arm=arm,
        seed=seed,
        digest=content_digest(job.identity),
        identity=job.identity,
        report=scores,
        select=scores,
        images=Images.of(["d/0", "d/1"], ["", ""], ["red", "green", "blue"], confusions),
        steps=2,
        seen=Seen(labelled=16, auxiliary=0),
        damaged=0,
        cost={"parameters": 1000, "flops": 10**9, "shape": [32, 40], "latency": latency},
        seconds=1.5,
        versions={"segkd": "0"},
        device="cpu",
        threads=1,
    )


def test_a_record_comes_back_as_it_was_saved(cached: Path, tmp_path: Path) -> None:
    record = record_of(read(cached), tmp_path, "zero", 7)
    ledger = Ledger(tmp_path / "ledger")
    assert ledger.load("zero", 7, record.identity) is None
    ledger.save(record)
    assert ledger.load("zero", 7, record.identity) == record
    assert [path.name for path in ledger.folder.iterdir()] == ["zero.seed-7.json"]
    np.testing.assert_array_equal(record.images.counts()[1], np.diag([90, 100, 110]) + 1)


def test_images_are_grouped_as_the_data_group_them_now(cached: Path, tmp_path: Path) -> None:
    """How decides no result, so a record stays, but it decides the intervals over images."""
    Ledger(tmp_path / "ledger").save(record_of(read(cached), tmp_path, "zero", 7))
    for setting, groups in (("data.group='.*'", ("d/0", "d/1")), ("data.group='^[a-z]'", ("d", "d"))):
        record = plan_sweep(read(cached, setting), tmp_path, measure=False).records["zero"][7]
        assert record.images.groups == groups


def test_a_run_is_done_where_its_record_is(cached: Path, tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger").save(record_of(read(cached), tmp_path, "zero", 7))
    listing = CliRunner().invoke(
        main, ["ablate", "-c", str(cached), "-o", str(tmp_path), "--print-plan", "--json", "-q", *overrides()]
    )
    assert listing.exit_code == 0, listing.output
    states = {(run["arm"], run["seed"]): run["state"] for run in json.loads(listing.stdout)["runs"]}
    assert [run for run, state in states.items() if state == "done"] == [("zero", 7)]
    assert set(states.values()) == {"done", "pending"}


def test_runs_are_numbered_once_all_of_them_are_known(cached: Path, tmp_path: Path) -> None:
    """A task does every N-th: a run that is yet to come would move the numbers of those behind it."""
    unsettled = plan_sweep(read(cached), tmp_path, measure=False)
    assert {run["number"] for run in unsettled.listing()["runs"]} == {None}
    assert (
        "alone-longer: how much longer is measured when the sweep begins; then runs are numbered" in unsettled.lines()
    )
    assert "      pending alone, seed 0" in unsettled.lines()
    settled = plan_sweep(read(cached, "ablate.longer=2"), tmp_path, measure=False)
    assert [run["number"] for run in settled.listing()["runs"]] == list(range(20))
    assert "   0  pending alone, seed 0" in settled.lines()


def overrides() -> list[str]:
    return [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.mark.parametrize(
    ("settings", "differing"),
    [
        (["train.steps=3"], "train.steps (2, now 3)"),
        (["knowledge.zero_order.weight=2"], "knowledge.zero_order.weight (1.0, now 2.0)"),
        (["data.folders.train=['a', 'b']", "data.folders.auxiliary=['c']", "data.folders.select=[]"], None),
        (["student.reference='fast-scnn'"], "the student's code, student.reference ('enet', now 'fast-scnn')"),
    ],
)
def test_a_record_of_another_run_is_refused_with_what_differs(
    cached: Path, tmp_path: Path, settings: list[str], differing: str | None
) -> None:
    ledger = f"ablate.ledger='{tmp_path}'"
    Ledger(tmp_path).save(record_of(read(cached, ledger), tmp_path, "zero", 0))
    if differing is None:
        differing = "the samples of role select, the samples of role train"
    assert message(RecordError, cached, ledger, *settings) == (
        f"{tmp_path / 'zero.seed-0.json'} is the record of a run that differs in {differing}; "
        "name another folder in ablate.ledger, or remove the record to run it again"
    )


def test_a_record_that_is_older_than_a_setting_is_of_its_default(cached: Path, tmp_path: Path) -> None:
    ledger, record = Ledger(tmp_path), record_of(read(cached), tmp_path, "zero", 7)
    older = dict(record.identity["settings"])
    assert older.pop("loss.label_smoothing") == 0.0
    identity = record.identity | {"settings": older}
    ledger.save(replace(record, identity=identity, digest=content_digest(identity)))
    assert ledger.load("zero", 7, record.identity) is not None
    changed = record.identity | {"settings": record.identity["settings"] | {"loss.label_smoothing": 0.1}}
    with pytest.raises(RecordError, match=r"differs in loss\.label_smoothing \(0\.0, now 0\.1\);"):
        ledger.load("zero", 7, changed)
    # Infinity is text in an identity.
    auxiliary = record_of(read(cached), tmp_path, "auxiliary-zero", 7)
    older = {key: value for key, value in auxiliary.identity["settings"].items() if key != "train.most_entropy"}
    assert differences(auxiliary.identity | {"settings": older}, auxiliary.identity) == []
    # A kind of knowledge that it did not learn from is no setting that it is older than.
    knowledge = {"knowledge.first_order.weight": 10.0, "knowledge.first_order.form": "softmax"}
    with pytest.raises(RecordError, match=r"knowledge\.first_order\.weight \(None, now 10\.0\)"):
        ledger.load("zero", 7, record.identity | {"settings": record.identity["settings"] | knowledge})


def test_a_record_of_another_format_is_refused(cached: Path, tmp_path: Path) -> None:
    ledger, record = Ledger(tmp_path), record_of(read(cached), tmp_path, "zero", 7)
    ledger.save(replace(record, version=2))
    with pytest.raises(RecordError) as error:
        ledger.load("zero", 7, record.identity)
    assert str(error.value) == (
        f"{tmp_path / 'zero.seed-7.json'}: segkd-run-record 2, and this segkd reads segkd-run-record 1; "
        "use the segkd that wrote it, or remove it to run it again"
    )


def test_a_record_that_was_changed_is_refused(cached: Path, tmp_path: Path) -> None:
    ledger, record = Ledger(tmp_path), record_of(read(cached), tmp_path, "zero", 7)
    ledger.save(replace(record, identity=record.identity | {"distill": False}))
    with pytest.raises(RecordError) as error:
        ledger.load("zero", 7, record.identity)
    assert str(error.value) == (
        f"{tmp_path / 'zero.seed-7.json'}: its digest is not that of its identity, so the file was changed; "
        "restore it, or remove it to run it again"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"arm": "first"},
        {"seed": 8},
        {"report": {"miou": 50.0}},
        {"report": {"miou": "50", "macc": 1.0, "aacc": 1.0, "boundary_miou": 1.0}},
        {"select": {}},
        {"cost": {}},
        {"identity": {"distill": True}},
        {"identity": {"distill": True, "settings": [], "student": {}, "data": {}, "cache": {}}},
    ],
)
def test_what_is_not_the_record_that_its_name_promises_is_refused(
    cached: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    ledger, record = Ledger(tmp_path), record_of(read(cached), tmp_path, "zero", 7)
    ledger.save(record)
    path = ledger.path("zero", 7)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RecordError) as error:
        ledger.load("zero", 7, record.identity)
    assert str(error.value) == (
        f"{path}: not the record of zero, seed 7, that its name promises; restore it, or remove it to run it again"
    )


@pytest.mark.parametrize("score", ["miou", "macc", "aacc"])
@pytest.mark.parametrize("value", [99.0, None])
def test_a_record_whose_scores_were_changed_is_refused(
    cached: Path, tmp_path: Path, score: str, value: float | None
) -> None:
    ledger, record = Ledger(tmp_path), record_of(read(cached), tmp_path, "zero", 7)
    ledger.save(replace(record, report=record.report | {score: value}))
    with pytest.raises(RecordError) as error:
        ledger.load("zero", 7, record.identity)
    assert str(error.value) == (
        f"{tmp_path / 'zero.seed-7.json'}: its scores on role report are not those of its confusion matrices, so the "
        "file was changed; restore it, or remove it to run it again"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read: not JSON in UTF-8; restore it, or remove it to run it again"),
        ("[]", "not a JSON object; restore it, or remove it to run it again"),
    ],
)
def test_a_damaged_record_is_refused(cached: Path, tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "alone.seed-0.json"
    path.write_text(text)
    assert message(RecordError, cached, f"ablate.ledger='{tmp_path}'") == f"{path}: {problem}"


def test_a_record_whose_matrices_are_damaged_is_refused(cached: Path, tmp_path: Path) -> None:
    record = record_of(read(cached), tmp_path, "alone", 0)
    Ledger(tmp_path).save(record)
    path = tmp_path / "alone.seed-0.json"
    document = json.loads(path.read_text())
    document["images"]["groups"] = [""]
    path.write_text(json.dumps(document))
    assert message(ConfigError, cached, f"ablate.ledger='{tmp_path}'") == (
        f"{path}: images: expected as many groups and confusion matrices as ids"
    )


# What is settled once


def test_the_first_to_settle_a_plan_settles_it_for_all(tmp_path: Path) -> None:
    first, second = ({"longer": longer, "of": {}} for longer in (1.5, 2.5))
    assert Ledger(tmp_path).settle(first) == first
    assert Ledger(tmp_path).settle(second) == first
    assert Ledger(tmp_path).settled() == first
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_settled_length_is_kept_and_a_set_one_needs_no_measuring(cached: Path, tmp_path: Path) -> None:
    ledger = f"ablate.ledger='{tmp_path}'"
    fixed = planned(cached, ledger, "ablate.longer=3.0")
    assert "alone-longer, seed 0" not in planned(cached, ledger)
    Ledger(tmp_path).settle({"longer": 3.0, "of": circumstances(read(cached))})
    assert planned(cached, ledger) == fixed
    assert message(ConfigError, cached, ledger, "ablate.longer=2") == (
        f"ablate.longer is 2, but {tmp_path / 'plan.json'} has settled on 3; "
        "leave it out, or name another folder in ablate.ledger"
    )


def test_a_length_that_was_settled_for_another_run_is_refused(cached: Path, tmp_path: Path) -> None:
    """One that a trial of a few steps has measured, say."""
    ledger = f"ablate.ledger='{tmp_path}'"
    Ledger(tmp_path).settle({"longer": 3.0, "of": circumstances(read(cached))})
    assert message(ConfigError, cached, ledger, "train.steps=600", "student.arguments={ a = 1 }") == (
        f"{tmp_path / 'plan.json'} has the length of alone-longer for another run, which differs in train.steps "
        "(2, now 600), student.arguments.a (None, now 1); name another folder in ablate.ledger, remove the file to "
        "measure anew, or set ablate.longer"
    )


def test_a_damaged_plan_is_refused(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    assert message(RecordError, cached, f"ablate.ledger='{tmp_path}'") == (
        f"{tmp_path / 'plan.json'}: not what a sweep has settled; restore it, or remove it to measure anew"
    )


def test_a_length_that_follows_from_an_arm_that_cannot_be(cached: Path, tmp_path: Path) -> None:
    settings = "train.auxiliary=0", "ablate.ladder=['alone', 'alone-longer']", f"ablate.ledger='{tmp_path}'"
    with pytest.raises(ConfigError) as error:
        plan_sweep(read(cached, *settings), tmp_path)
    assert str(error.value) == (
        "the length of alone-longer follows from the time of auxiliary-zero-first, but arm auxiliary-zero-first needs "
        "train.auxiliary above 0, and the run file has 0; give it, or leave arms out of ablate.ladder; "
        "set ablate.longer to the factor yourself, or leave alone-longer out of ablate.ladder"
    )


def test_the_length_follows_from_stage_1_and_both_step_times(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"auxiliary-zero-first": 0.3, "alone": 0.2}
    monkeypatch.setattr("segkd.pipeline.ablation.longer.step_seconds", lambda arm: seconds[arm.name])
    monkeypatch.setattr("segkd.pipeline.ablation.longer.stage_1_seconds", lambda *_: 85.0)
    measured = measure_longer(read(cached, "train.steps=1000", "ablate.ladder=['zero']"))
    assert measured["longer"] == 1.9  # (85 + 1000 * 0.3) / 0.2 = 1925 steps, to one decimal
    assert measured["measured"]["stage_1_seconds"] == 85.0


def test_step_times_are_measured_on_both_arms(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segkd.pipeline.ablation.longer.STEPS", 3)
    measured = measure_longer(read(cached, "train.threads=1"))
    assert measured["longer"] >= 1
    assert all(value > 0 for key, value in measured["measured"].items() if key.endswith("seconds"))


Line = tuple[int, float, float, int]


def log_lines(path: Path, *lines: Line, host: str = "", device: str = "cpu") -> Path:
    """Process, when it began, seconds since, threads."""
    names = ("process", "began", "seconds_since_start", "threads")
    entries = [
        {"host": host or socket.gethostname(), "device": device, **dict(zip(names, line, strict=True))}
        for line in lines
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_the_time_of_stage_1_is_that_of_all_processes(tmp_path: Path) -> None:
    """Also of one that has the number of another before it, and was heard of later after its start."""
    log = log_lines(
        tmp_path / "log", (1, 0.0, 2.0, 1), (2, 0.0, 5.0, 1), (1, 0.0, 3.0, 1), (1, 9.0, 4.0, 1), (1, 9.0, 4.5, 1)
    )
    assert stage_1_seconds(log, torch.device("cpu"), 1) == 3.0 + 5.0 + 4.5


@pytest.mark.parametrize(("threads", "expected"), [(1, 4 * 5.0 + 2.0), (2, 11.0), (0, 22.0 / torch.get_num_threads())])
def test_threads_of_stage_1_are_counted(tmp_path: Path, threads: int, expected: float) -> None:
    log = log_lines(tmp_path / "log", (1, 0.0, 5.0, 4), (2, 0.0, 2.0, 1))
    assert stage_1_seconds(log, torch.device("cpu"), threads) == pytest.approx(expected)
    on_gpu = log_lines(tmp_path / "log", (1, 0.0, 5.0, 4), (2, 0.0, 2.0, 1), device="cuda")
    assert stage_1_seconds(on_gpu, torch.device("cuda"), threads) == 7.0


def test_times_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    remedy = "set ablate.longer to the factor yourself, or leave alone-longer out of ablate.ladder"
    here = socket.gethostname()
    log, line = tmp_path / "log", (1, 0.0, 2.0, 1)

    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            stage_1_seconds(log, torch.device("cpu"), 1)
        return str(caught.value)

    assert refusal() == f"{log}: there is no log of stage 1, so its time is not known; {remedy}"
    log_lines(log, line, host="elsewhere")
    compare = "so the times of the two do not compare"
    assert refusal() == f"{log}: stage 1 ran on elsewhere, and this is {here}, {compare}; {remedy}"
    log_lines(log, line, device="cuda")
    assert refusal() == f"{log}: stage 1 computed on cuda, and this is cpu, {compare}; {remedy}"
    log.write_text("")
    assert refusal() == f"{log}: stage 1 ran on no machine, and this is {here}, {compare}; {remedy}"
    log.write_text(json.dumps({"host": here, "process": 1, "seconds_since_start": 2.0, "device": "cpu"}))
    assert refusal() == f"{log}: an earlier segkd wrote it, which did not count threads; {remedy}"


# Data


def test_select_and_report_that_share_images_are_refused_or_stamped(cached: Path, tmp_path: Path) -> None:
    shutil.copytree(cached.parent, tmp_path / "copy")
    run = tmp_path / "copy" / "tiny.toml"
    run.write_text(run.read_text().replace(str(cached.parent), str(run.parent)))
    shutil.copy(run.parent / "images/d/1.png", run.parent / "images/c/0.png")
    assert message(ContaminationError, run) == (
        "role select and role report share 1 images, the first 'c/0' and 'd/1': what is chosen on report is no result "
        "on report; remove them from one of the roles, or set ablate.allow_shared_select = true, and every table will "
        "say so"
    )
    allowed = "ablate.allow_shared_select=true"
    sweep = plan_sweep(read(run, allowed, "ablate.longer=2"), tmp_path / "out")
    assert sweep.stamps == (
        "Role select and role report share 1 of 2 images: what was chosen was chosen on what is reported.",
        f"Which labels were learned before is not known: the teacher {read(run).the_teacher().reference} is not "
        "a checkpoint of segkd, or its file is not here.",
    )


def test_images_that_are_learned_from_and_scored_are_refused_or_stamped(cached: Path, tmp_path: Path) -> None:
    shutil.copytree(cached.parent, tmp_path / "copy")
    run = tmp_path / "copy" / "tiny.toml"
    run.write_text(run.read_text().replace(str(cached.parent), str(run.parent)))
    images = run.parent / "images"
    shutil.copy(images / "b/0.png", images / "d/1.png")
    longer, labels_alone = "ablate.longer=2", "ablate.ladder=['alone', 'label-smoothing']"
    assert message(ContaminationError, run, longer) == (
        f"sample 'd/1' (report, {images / 'd/1.png'}) is the same image as sample 'b/0' (auxiliary, "
        f"{images / 'b/0.png'}), pixel for pixel, so its score would be too good; take one of them out of its role; or "
        'train all the same with data.compare_contents = "warn"'
    )
    for policy in ("warn", "off"):
        settings = (f"data.compare_contents='{policy}'", longer)
        told = plan_sweep(read(run, *settings), tmp_path / "out").stamps
        assert told[0] == (
            "auxiliary-zero, auxiliary-zero-first, pseudo-labels: 1 of 4 images of roles select and report are learned "
            "from: their scores are too good."
        )
        assert plan_sweep(read(run, *settings, labels_alone), tmp_path / "out").stamps == ()  # none draws it
    own = 'ablate.arms.own={like=\'alone\', set=[\'data.compare_contents="warn"\', \'data.folders={train=["a", "b"], '
    own += 'select=["c"], report=["d"]}\']}'
    assert plan_sweep(read(run, labels_alone, own), tmp_path / "out").stamps == (
        "own: 1 of 4 images of roles select and report are learned from: their scores are too good.",
    )


def test_an_arm_may_not_select_on_what_is_reported_either(cached: Path, tmp_path: Path) -> None:
    own = 'ablate.arms.own={like=\'alone\', set=[\'data.folders={train=["a"], select=["e"], report=["d"]}\']}'
    shutil.copytree(cached.parent, tmp_path / "copy")
    run = tmp_path / "copy" / "tiny.toml"
    run.write_text(run.read_text().replace(str(cached.parent), str(run.parent)))
    for kind in ("images", "labels"):
        shutil.copytree(run.parent / kind / "d", run.parent / kind / "e")
    settings = ("ablate.ladder=['alone']", own)
    assert message(ContaminationError, run, *settings).startswith(
        "role select and role report share 2 images, the first 'e/0' and 'd/0': "
    )
    assert plan_sweep(read(run, *settings, "ablate.allow_shared_select=true"), tmp_path / "out").stamps == (
        "own: Role select and role report share 2 of 2 images: what was chosen was chosen on what is reported.",
    )


def test_a_teacher_that_has_learned_labels_of_auxiliary_images_is_refused(done: Path) -> None:
    checkpoint = done.parent / "student" / "last.safetensors"
    teacher = f"teacher.reference='{checkpoint}'"
    swapped = ["data.folders={train=['b'], auxiliary=['a'], select=['c'], report=['d']}"]
    assert message(ContaminationError, done, teacher, *swapped) == (
        f"{checkpoint} was trained on the labels of 2 auxiliary samples of these data, the first sample 'a/0' "
        f"(auxiliary, {done.parent / 'images/a/0.png'}), as 'a/0': what it scores there, and what a student of it "
        "scores, proves nothing; take a network that has learned the labels of role train alone"
    )
    # Neither teacher nor student may begin with what it must not know.
    labels_alone = ["ablate.ladder=['alone']", *swapped]
    assert plan_sweep(read(done, teacher, *labels_alone), done.parent / "out").stamps == ()
    begun = message(ContaminationError, done, f"student.init='{checkpoint}'", *labels_alone)
    assert begun.startswith(f"{checkpoint} was trained on the labels of 2 auxiliary samples of these data")


def test_the_teacher_that_is_named_must_be_the_caches(done: Path, tmp_path: Path) -> None:
    """Else its labels would be checked, and another's knowledge learned."""
    checkpoint, other = done.parent / "student" / "last.safetensors", tmp_path / "last.safetensors"
    shutil.copy(checkpoint.with_name("best.safetensors"), other)
    run, cache = tmp_path / "run.toml", tmp_path / "cache.zarr"
    run.write_text(done.read_text().replace("stride = 4", "").replace(f"{done.parent}/cache.zarr", str(cache)))
    longer, honest, another = "ablate.longer=2", f"teacher.reference='{checkpoint}'", f"teacher.reference='{other}'"
    teacher_cache(read(run, honest))
    assert plan_sweep(read(run, honest, longer), tmp_path / "out").stamps == ()
    name_it = "name this teacher's cache in cache.path, or write it with segkd teacher-cache"
    assert message(CacheMismatchError, run, another, longer) == (
        f"{cache} is of a teacher that differs in the content of {other}; {name_it}"
    )
    assert message(CacheMismatchError, done, another, longer) == (
        f"{done.parent}/cache.zarr is of a teacher that differs in reference ('teacher.py:build', now "
        f"'last.safetensors'); {name_it}"
    )


def test_an_arm_that_would_learn_nothing_of_the_teacher_is_refused_when_planned(cached: Path) -> None:
    assert message(ConfigError, cached, "knowledge.zero_order.on='auxiliary'", "ablate.ladder=['zero']") == (
        'arm zero: knowledge.zero_order.on is "auxiliary", but train.auxiliary is 0, so it would never act; raise '
        'train.auxiliary, set on = "all", or knowledge.zero_order.weight = 0'
    )


def test_an_own_arm_without_the_one_that_it_is_like_is_warned_of(
    cached: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = 'ablate.arms.own={like="zero", set=["knowledge.zero_order.weight=2"]}'
    planned(cached, own)
    assert caplog.messages == []
    planned(cached, own, "ablate.ladder=['alone']")
    assert caplog.messages == ["arm own is compared with nothing: zero, which it is like, is not in ablate.ladder"]


def test_a_sweep_needs_samples_to_report_on(cached: Path) -> None:
    assert message(DataError, cached, "data.folders={train=['a'], auxiliary=['b'], select=['c']}") == (
        "the data have no sample of role report, so there is nothing to compare arms on; give it some"
    )


def test_records_are_read_strictly() -> None:
    with pytest.raises(ConfigError, match="there is no such key"):
        parse(Seen, {"labelled": 1, "auxiliary": 2, "more": 3})
