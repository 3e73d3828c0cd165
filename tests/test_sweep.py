"""A miniature sweep on built-in scenes: killed, interrupted, divided, taken up elsewhere; its table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from segkd.cli.main import main
from segkd.pipeline.ablation.arms import resolve_arms
from segkd.pipeline.ablation.gains import gains, rows
from segkd.pipeline.ablation.ledger import Images, Ledger, RunRecord
from segkd.pipeline.ablation.recorded import recorded
from segkd.pipeline.ablation.sweep import ablate, plan_sweep
from segkd.pipeline.ablation.table import Results
from segkd.pipeline.ablation.worker import perform
from segkd.pipeline.config import load
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import Role
from segkd.pipeline.evaluation.evaluate import evaluate_network
from segkd.pipeline.models.references import described_predictor, load_network
from segkd.pipeline.student import checkpoint
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.fingerprints import content_digest
from segkd.storage.errors import ConfigError, RecordError
from segkd.storage.locks import locked

NETWORK = '''
"""A small student that stops its own sweep at the third step, once, when it is asked to."""
import os, signal, time
from pathlib import Path
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, num_classes, 1))
        self.calls = 0

    def forward(self, images):
        self.calls += self.training
        if self.calls == 3 and "ACT" in os.environ and not (mark := Path(os.environ["MARK"])).exists():
            mark.touch()
            if os.environ["ACT"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(5)
        return self.body(images)
'''

RUN = """
[data]
reader = "scenes"
[data.scenes]
size = [48, 64]
train = 5
auxiliary = 4
select = 2
report = 6

[teacher]
reference = "deeplab-mobilenetv1"
arguments = {{ width = 0.25 }}

[cache]
path = "{folder}/cache.zarr"
roles = ["train", "auxiliary"]

[student]
reference = "{folder}/network.py:Small"
stride = 4

[augment]
crop = [32, 48]

[train]
steps = 8
labelled = 2
auxiliary = 2
warmup = 2
ema = 0.5
validate_every = 0
checkpoint_every = 2
log_every = 2
threads = 1
device = "cpu"

[ablate]
ladder = ["alone", "auxiliary-zero-first"]
seeds = [0, 1]
block = 2
"""
ARMS, SEEDS = ("alone", "auxiliary-zero-first"), (0, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file, its student and its cache."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "network.py").write_text(NETWORK)
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    teacher_cache(load(folder / "run.toml"))
    return folder


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    """The same folder, with every run done in ``out``, one after the other in this process."""
    for job in plan_sweep(load(place / "run.toml"), place / "out").jobs:
        perform(job)
    return place


def segkd(place: Path, *words: str | Path) -> Result:
    return CliRunner().invoke(main, ["ablate", "-c", str(place / "run.toml"), *map(str, words)])


def records(ledger: Path) -> dict[str, dict[str, Any]]:
    """All records, without what a clock said."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(ledger.iterdir())}
    for record in found.values():
        del record["seconds"], record["cost"]["latency"]
    return found


def test_a_record_has_the_last_average_s_scores_on_report_and_every_image_s_matrix(undisturbed: Path) -> None:
    run = load(undisturbed / "run.toml")
    source = open_data(run.data)
    for arm in ARMS:
        folder = undisturbed / "out" / arm / "seed-1"
        # Independently: the averaged weights, put into the network by hand.
        description, tensors = checkpoint.load(folder / "last.safetensors")
        assert any(name.startswith("ema.") for name in tensors)
        predictor = described_predictor(description.network, source.classes.names, device=torch.device("cpu"))
        checkpoint.load_weights(predictor.network, checkpoint.part(tensors, "ema."), folder)
        expected = evaluate_network(predictor, source, Role.REPORT)
        record = load_record(undisturbed, arm, 1)
        assert record.report == expected.scores.to_dict()
        assert record.select == evaluate_network(predictor, source, Role.SELECT).scores.to_dict()
        counts = record.images.counts()
        np.testing.assert_array_equal(counts.sum(0), expected.scores.confusion.counts)
        assert record.images.ids == tuple(f"report/{number:04d}" for number in range(6))
        assert record.images.groups[::2] == tuple(f"report-place-{number:03d}" for number in range(3))
        assert counts.sum((1, 2)).tolist() == [48 * 64] * 6
        labelled = 4 if arm == "alone" else 2
        assert (record.seen.labelled, record.seen.auxiliary) == (8 * labelled, 8 * (4 - labelled))
        assert (record.steps, record.threads, record.device, record.damaged) == (8, 1, "cpu", 0)
        assert record.cost["parameters"] == sum(p.numel() for p in predictor.network.parameters())
        assert record.seconds > 0


def load_record(place: Path, arm: str, seed: int) -> RunRecord:
    sweep = plan_sweep(load(place / "run.toml"), place / "out")
    return sweep.records[arm][seed]


def test_arms_of_a_seed_begin_with_the_same_weights(undisturbed: Path) -> None:
    run = load(undisturbed / "run.toml")
    jobs = plan_sweep(run, undisturbed / "out").jobs
    first = {}
    for job in jobs:
        torch.manual_seed(job.run.train.seed)
        network = load_network(job.run.the_student(), 12)
        first[job.arm, job.seed] = torch.cat([p.flatten() for p in network.parameters()])
    assert torch.equal(first[ARMS[0], 0], first[ARMS[1], 0])
    assert not torch.equal(first[ARMS[0], 0], first[ARMS[0], 1])


def test_a_killed_run_does_not_stop_the_others_and_goes_on_to_the_same_record(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACT", "kill")
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    broken = segkd(undisturbed, "-o", tmp_path / "out", "--jobs", "2", "-q")
    assert broken.exit_code == 1, broken.output
    assert len(list((tmp_path / "out" / "ledger").iterdir())) == 3
    (failed,) = (line for line in broken.stdout.splitlines() if line.startswith("Failed: "))
    assert "it was killed by signal 9 (log: " in failed
    assert "Not done: 1 runs (" in broken.stdout
    listed = segkd(undisturbed, "-o", tmp_path / "out", "--print-plan", "-q").stdout
    assert "begun" in listed
    assert listed.splitlines()[-1] == "3 of 4 runs are done"
    healed = segkd(undisturbed, "-o", tmp_path / "out", "-q", "--json")
    assert healed.exit_code == 0, healed.output
    assert records(tmp_path / "out" / "ledger") == records(undisturbed / "out" / "ledger")
    result = json.loads(healed.stdout)
    assert (result["missing"], result["failures"]) == ([], {})
    assert result == json.loads((tmp_path / "out" / "results.json").read_text())


def test_ctrl_c_saves_what_is_under_way_and_says_how_to_go_on(undisturbed: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "segkd.cli", "ablate", "-c", undisturbed / "run.toml", "-o", tmp_path / "out", "-q"]
    environment = os.environ | {"ACT": "interrupt", "MARK": str(tmp_path / "mark")}
    stopped = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.endswith(
        "Interrupted. 0 of 4 runs are done, those under way are saved; the same command goes on with them.\n"
    )
    folder = tmp_path / "out" / "alone" / "seed-0"
    assert checkpoint.load(folder / "last.safetensors")[0].step == 3
    assert "SIGTERM stopped the run after step 3 of 8" in folder.with_name("seed-0.log").read_text()
    job = plan_sweep(load(undisturbed / "run.toml"), tmp_path / "out").jobs[0]
    perform(job)
    again = records(tmp_path / "out" / "ledger")
    assert again == {"alone.seed-0": records(undisturbed / "out" / "ledger")["alone.seed-0"]}


def test_ctrl_c_while_a_run_is_starting(undisturbed: Path, tmp_path: Path) -> None:
    """As a terminal sends it, to all processes at once; what is done is in the tables."""
    shutil.copytree(undisturbed / "out" / "ledger", tmp_path / "out" / "ledger")
    (tmp_path / "out" / "ledger" / "alone.seed-0.json").unlink()
    words = [sys.executable, "-m", "segkd.cli", "ablate", "-c", undisturbed / "run.toml", "-o", tmp_path / "out"]
    with subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True, start_new_session=True) as sweep:
        assert sweep.stderr is not None
        said = [next(line for line in sweep.stderr if "alone, seed 0: begun" in line)]
        time.sleep(0.5)  # its process is importing torch by now
        os.killpg(sweep.pid, signal.SIGINT)
        said += sweep.stderr
    assert sweep.returncode == 130
    assert said[-1].startswith("Interrupted. 3 of 4 runs are done")
    assert "Traceback" not in "".join(said)
    assert "| auxiliary-zero-first | 2 |" in (tmp_path / "out" / "table.md").read_text()


def test_a_ledger_is_taken_up_elsewhere(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "out" / "ledger", tmp_path / "ledger")
    taken = segkd(undisturbed, "-o", tmp_path / "out", "-q", "-s", f"ablate.ledger='{tmp_path / 'ledger'}'")
    assert taken.exit_code == 0, taken.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "table.md"]
    assert taken.stdout == (tmp_path / "out" / "table.md").read_text()


def test_tasks_share_the_runs(undisturbed: Path, tmp_path: Path) -> None:
    left = tmp_path / "ledger"
    left.mkdir()
    for name in ("alone.seed-0", "auxiliary-zero-first.seed-0", "alone.seed-1"):
        shutil.copy(undisturbed / "out" / "ledger" / f"{name}.json", left)
    words = ("-o", tmp_path / "out", "-s", f"ablate.ledger='{left}'")
    idle = segkd(undisturbed, *words, "--task", "1/3")
    assert idle.exit_code == 0, idle.output
    assert "task 1/3 (--task 1/3): 1 of 4 runs, 0 to do" in idle.stderr
    assert "Not done: 1 runs (auxiliary-zero-first, seed 1)." in idle.stdout
    busy = segkd(undisturbed, *words, "--task", "0/3", "-q")
    assert busy.exit_code == 0, busy.output
    assert "Not done" not in busy.stdout
    assert records(left) == records(undisturbed / "out" / "ledger")


def test_tasks_that_end_together_leave_whole_tables_of_all(undisturbed: Path, tmp_path: Path) -> None:
    """None is refused its turn, and none takes away what another one is writing."""
    shutil.copytree(undisturbed / "out" / "ledger", tmp_path / "out" / "ledger")
    sweep = plan_sweep(load(undisturbed / "run.toml"), tmp_path / "out")
    with ThreadPoolExecutor(4) as tasks:
        for results in tasks.map(lambda _: ablate(sweep), range(80)):
            assert results.missing == ()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ledger", "results.json", "table.md"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["missing"] == []


def test_a_record_keeps_the_validations_on_the_way(place: Path, tmp_path: Path) -> None:
    job = plan_sweep(load(place / "run.toml", ["train.validate_every=3"]), tmp_path).jobs[0]
    record = perform(job)
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    validated = {line["step"]: line["select"]["miou"] for line in lines if "select" in line}
    assert list(validated) == [3, 6, 8]
    assert record.select is not None
    assert validated[8] == record.select["miou"]
    assert {int(step): miou for step, miou in record.curve.items()} == validated
    assert Ledger(job.ledger).read(job.arm, job.seed) == record


def test_two_processes_do_not_work_on_one_run(place: Path, tmp_path: Path) -> None:
    job = plan_sweep(load(place / "run.toml"), tmp_path).jobs[0]
    job.folder.mkdir(parents=True)
    with locked(job.folder, alone=True), pytest.raises(RecordError) as caught:
        perform(job)
    assert str(caught.value) == (
        f"{job.folder}: another process is at this run; leave it to that one, or stop it and go on here"
    )


# The table


def made_up(
    place: Path, scores: dict[str, list[float]], on_select: dict[str, list[float | None]] | None = None, **settings: Any
) -> Results:
    """The results of made-up scores, arm by arm and seed by seed; on select the same, if not given."""
    own = {"all": {"like": "alone", "set": ["data.scenes.train=9"]}} if "all" in scores else {}
    text = [f"ablate.arms.{name}.set={json.dumps(arm['set'])}" for name, arm in own.items()]
    text += [f"ablate.arms.{name}.like='{arm['like']}'" for name, arm in own.items()]
    base = load(place / "run.toml", text)
    run = replace(base, ablate=replace(base.ablate, seeds=tuple(range(5)), **settings))
    sweep = plan_sweep(run, place / "out")
    template = sweep.records["alone"][0]
    rng = np.random.default_rng(0)
    noise = [rng.multinomial(40, np.full(144, 1 / 144)).reshape(12, 12) for _ in range(6)]
    found: dict[str, dict[int, RunRecord]] = {}
    for arm, values in scores.items():
        for seed, miou in enumerate(values):
            confusions = [
                np.eye(12, dtype=np.int64) * round(10 * miou) + 300 * (image > 9) + noise[image] for image in range(6)
            ]
            images = Images.of(template.images.ids, template.images.groups, template.images.classes, confusions)
            report = {**template.report, "miou": miou}
            chosen = report if on_select is None else {**template.report, "miou": on_select[arm][seed]}
            found.setdefault(arm, {})[seed] = replace(
                template, arm=arm, seed=seed, report=report, select=chosen, images=images
            )
    return Results(
        rows=tuple(rows(sweep.arms, found, run.ablate)),
        gains=tuple(gains(sweep.arms, found, run.ablate)),
        records=tuple(record for of_arm in found.values() for record in of_arm.values()),
        config=run.ablate,
        stamps=("It must be known.",),
        failures={},
        missing=(),
    )


def test_rows_gains_and_what_must_be_known(undisturbed: Path) -> None:
    alone = [40.0, 42.0, 41.0, 39.0, 43.0]
    better = [value + 2 + change for value, change in zip(alone, (0.1, -0.1, 0.2, 0.0, -0.2), strict=True)]
    results = made_up(undisturbed, {"alone": alone, "auxiliary-zero-first": better, "all": [46.0] * 5}, upper="all")
    text = results.markdown()
    assert text.startswith("**It must be known.**\n\n| arm | seeds | mIoU |")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in reversed(text.splitlines())}
    assert "| 5 | 41.00 ± 1.58 | 41.00 ± 1.58 | 32 | 0 | 32 | 0.00 M |" in lines["alone"]
    assert "| 5 | 43.00 ± " in lines["auxiliary-zero-first"]
    assert lines["auxiliary-zero-first"].endswith("| 40 % |")
    assert "† all is not at matched compute: samples of role train (5, now 9)." in text
    (gain,) = (gain for gain in results.gains if gain.later == "auxiliary-zero-first")
    assert (gain.earlier, gain.seeds, gain.seeds_verdict, gain.matched) == ("alone", (0, 1, 2, 3, 4), "gain", True)
    assert gain.mean == pytest.approx(2.0)
    assert gain.over_seeds is not None
    assert gain.over_seeds.low == pytest.approx(2 - 2.776445 * np.std([0.1, -0.1, 0.2, 0, -0.2], ddof=1) / 5**0.5)
    (all_labels,) = (gain for gain in results.gains if gain.later == "all")
    assert (all_labels.earlier, all_labels.matched) == ("alone", False)
    assert "| all − alone † | its own settings |" in text
    assert "a bootstrap of 3 blocks of up to 2 consecutive frames" in text


def test_networks_that_predict_one_class_are_told(undisturbed: Path) -> None:
    """Two of them are equal for sure, which says nothing of their arms."""
    results = made_up(undisturbed, {"alone": [40.0, 41.0], "auxiliary-zero-first": [40.0, 41.0]})
    assert "one class alone" not in results.markdown()
    sweep = plan_sweep(load(undisturbed / "run.toml"), undisturbed / "out")
    record = sweep.records["alone"][0]
    sky = record.images.counts().sum(2, keepdims=True) * (np.arange(12) == 3)
    images = Images.of(record.images.ids, record.images.groups, record.images.classes, list(sky))
    found = {"alone": {0: record, 1: replace(record, images=images), 2: replace(record, images=images)}}
    (row,) = rows(sweep.arms, found, sweep.run.ablate)
    assert row.collapsed == (1, 2)
    text = replace(results, rows=(row,)).markdown()
    assert "\nalone, seed 1, 2: predicts one class alone, so that no gain of it counts." in text


def test_a_gain_says_whether_select_agrees(undisturbed: Path) -> None:
    alone, better = [40.0, 42.0, 41.0], [42.0, 44.5, 42.5]
    on_select: dict[str, list[float | None]] = {"alone": [30.0, 30.5, 31.0], "auxiliary-zero-first": [29.0, 30.0, 29.5]}
    results = made_up(undisturbed, {"alone": alone, "auxiliary-zero-first": better}, on_select)
    (gain,) = results.gains
    # Student's t with two degrees of freedom: 4.3027.
    half = 4.302653 * 0.5 / 3**0.5
    assert gain.select_mean == pytest.approx(-1.0)
    assert gain.select_over_seeds is not None
    assert (gain.select_over_seeds.low, gain.select_over_seeds.high) == pytest.approx((-1 - half, -1 + half))
    text = results.markdown()
    assert "| alone | 3 | 41.00 ± 1.00 | 30.50 ± 0.50 |" in text
    assert f" | -1.00 | {-1 - half:+.2f} to {-1 + half:+.2f} |\n" in text


def test_without_a_score_on_select_nothing_is_said_of_it(undisturbed: Path) -> None:
    scores = {"alone": [40.0, 41.0], "auxiliary-zero-first": [42.0, 43.0]}
    results = made_up(undisturbed, scores, {"alone": [30.0, None], "auxiliary-zero-first": [31.0, 32.0]})
    (gain,) = results.gains
    assert (gain.select_mean, gain.select_over_seeds) == (None, None)
    text = results.markdown()
    assert "| alone | 2 | 40.50 ± 0.71 | n/a |" in text
    assert next(line for line in text.splitlines() if " − " in line).endswith(" | n/a | n/a |")


def test_a_gap_closed_says_of_how_many_seeds(undisturbed: Path) -> None:
    """Where the upper bound has fewer than the arm."""
    scores = {"alone": [40.0, 48.0, 41.0], "auxiliary-zero-first": [43.0, 49.0, 41.0]}
    for upper, told in (([46.0], "50 % of 1 seed"), ([46.0, 52.0], "40 % of 2 seeds"), ([46.0, 52.0, 47.0], "25 %")):
        lines = made_up(undisturbed, {**scores, "all": upper}, upper="all").markdown().splitlines()
        assert next(line for line in lines if line.startswith("| auxiliary-zero-first | 3 ")).endswith(f" | {told} |")


def test_the_scores_of_each_seed_are_told(undisturbed: Path) -> None:
    """Of arms that have other seeds than the first, and of roles without a score, too."""
    scores = {"alone": [40.0, 41.0, 42.0], "auxiliary-zero-first": [43.0, 44.126], "all": [46.0]}
    on_select: dict[str, list[float | None]] = {
        "alone": [30.0, 31.0, 32.0],
        "auxiliary-zero-first": [33.0, None],
        "all": [36.0],
    }
    text = made_up(undisturbed, scores, on_select, upper="all").markdown()
    assert (
        "\n\n| seed: mIoU on report / on select | 0 | 1 | 2 |\n|---|---|---|---|\n"
        "| alone | 40.00 / 30.00 | 41.00 / 31.00 | 42.00 / 32.00 |\n"
        "| auxiliary-zero-first | 43.00 / 33.00 | 44.13 / n/a |  |\n"
        "| all† | 46.00 / 36.00 |  |  |\n\n"
    ) in text


def test_only_common_seeds_are_paired_and_one_seed_decides_nothing(undisturbed: Path) -> None:
    results = made_up(undisturbed, {"alone": [40.0, 41.0, 42.0], "auxiliary-zero-first": [43.0]})
    (gain,) = results.gains
    assert (gain.seeds, gain.differences, gain.over_seeds) == ((0,), (3.0,), None)
    assert gain.seeds_verdict == "undecided"
    assert "| 1 | +3.00 | n/a | undecided |" in results.markdown()


def test_what_arms_differ_in_is_told_in_full(undisturbed: Path) -> None:
    """Auxiliary images are perturbed otherwise than labelled ones, and a length that was set is no measured time."""
    ladder = ("alone", "alone-longer", "zero", "auxiliary-zero", "auxiliary-zero-first")
    scores = {arm: [40.0] for arm in ladder}

    def told(**augment: float) -> dict[str, str]:
        run = load(undisturbed / "run.toml", [f"augment.{name}={value}" for name, value in augment.items()])
        arms = resolve_arms(replace(run, ablate=replace(run.ablate, ladder=ladder)), 2.5)
        found = made_up(undisturbed, scores, ladder=ladder, longer=2.5)
        records = {record.arm: {0: record} for record in found.records}
        stated = {gain.what: f"{gain.later} − {gain.earlier}" for gain in gains(arms, records, found.config)}
        measured = gains(arms, records, replace(found.config, longer=0.0))
        return stated | {gain.what: f"{gain.later} − {gain.earlier}" for gain in measured}

    both = told()
    assert both["2.5 times the steps"] == both["the time of distillation, spent on training"] == "alone-longer − alone"
    against = "auxiliary-zero-first − alone-longer"
    images = "auxiliary images in place of labelled ones"
    perturbed = "(auxiliary photometric strength 1, labelled 0.5)"
    assert both[f"distillation as a whole, against 2.5 times the steps {perturbed}"] == against
    assert both[f"distillation as a whole, at its own cost in time {perturbed}"] == against
    assert both[f"{images} {perturbed}"] == "auxiliary-zero − zero"
    assert images in told(photometric=1.0)
    assert f"{images} (CutMix 0.5)" in told(photometric=1.0, cutmix=0.5)


def test_where_records_were_made_is_told(undisturbed: Path) -> None:
    """Also of those that an earlier segkd has left, which did not say by what code."""
    results = made_up(undisturbed, {"alone": [40.0, 41.0]})
    before, after = results.records
    left_out = {name: version for name, version in before.versions.items() if name != "code"}
    results = replace(results, records=(replace(before, versions=left_out), after))
    assert f"; code {after.versions['code']}, unknown." in results.markdown()


def test_results_are_json(undisturbed: Path) -> None:
    results = made_up(undisturbed, {"alone": [40.0, 41.0], "auxiliary-zero-first": [40.0, 41.0]})
    document = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    (gain,) = document["gains"]
    assert (gain["seeds_verdict"], gain["images_verdict"]) == ("equal", "equal")
    assert document["rows"][0]["metrics"]["boundary_miou"]["count"] == 2
    assert document["conditions"]["device"] == ["cpu"]


# Tables from records alone


@pytest.fixture
def bare(undisturbed: Path, tmp_path: Path) -> Path:
    """A run file with its records, and neither network nor cache nor anything else."""
    shutil.copy(undisturbed / "run.toml", tmp_path)
    text = (tmp_path / "run.toml").read_text().replace(str(undisturbed), str(tmp_path))
    (tmp_path / "run.toml").write_text(text)
    shutil.copytree(undisturbed / "out" / "ledger", tmp_path / "out" / "ledger")
    return tmp_path


def changed(bare: Path, name: str, **identity: Any) -> None:
    """Another identity for a record, table by table."""
    path = bare / "out" / "ledger" / f"{name}.json"
    record = json.loads(path.read_text())
    for table, values in identity.items():
        record["identity"][table] |= values
    path.write_text(json.dumps({**record, "digest": content_digest(record["identity"])}))


def test_tables_come_of_records_alone(undisturbed: Path, bare: Path) -> None:
    run = load(undisturbed / "run.toml")
    expected = ablate(plan_sweep(run, undisturbed / "out")).to_dict()
    result = segkd(bare, "-o", bare / "out", "--tables", "--json", "-q")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    record = json.loads((bare / "out" / "ledger" / "auxiliary-zero-first.seed-0.json").read_text())
    assert found.pop("stamps") == [
        "From records alone: samples, teacher and coding are the records' own, the teacher's weights "
        f"{record['identity']['cache']['weights'][:12]}; whether roles share images, and which labels were learned "
        "before, was not looked at."
    ]
    assert (found["missing"], found["failures"]) == ([], {})
    del expected["stamps"]
    assert found == json.loads(json.dumps(expected))
    assert sorted(path.name for path in bare.iterdir()) == ["out", "run.toml"]


def test_what_is_not_recorded_is_missing(bare: Path) -> None:
    (bare / "out" / "ledger" / "alone.seed-1.json").unlink()
    found = recorded(load(bare / "run.toml"), Ledger(bare / "out" / "ledger"))
    assert found.missing == ("alone, seed 1",)
    assert [row.seeds for row in found.rows] == [(0,), (0, 1)]
    with pytest.raises(
        RecordError, match=rf"^{bare}/none has no record of the run file's arms and seeds; check ablate"
    ):
        recorded(load(bare / "run.toml"), Ledger(bare / "none"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["train.steps=9"], "train.steps (8, now 9)"),
        (["student.arguments={width=2}"], "student.arguments.width (None, now 2)"),
        (["student.reference='other.py:Small'"], "student.reference ('network.py:Small', now 'other.py:Small')"),
        (["student.preprocessing.scale=0.5"], "student.preprocessing.scale (1.0, now 0.5)"),
        (["student.align_corners=true"], "student.align_corners (False, now True)"),
        (["student.init='/no/weights.pth'"], "student.init (None, now 'weights.pth')"),
    ],
)
def test_records_of_another_run_file_are_refused(bare: Path, settings: list[str], problem: str) -> None:
    with pytest.raises(RecordError) as error:
        recorded(load(bare / "run.toml", settings), Ledger(bare / "out" / "ledger"))
    assert str(error.value) == (
        f"{bare}/out/ledger/alone.seed-0.json is the record of a run that differs in {problem}; "
        "name the ledger of this run file in ablate.ledger"
    )


@pytest.mark.parametrize(
    ("identity", "problem"),
    [
        ({"data": {"report": "other"}}, "the samples of role report"),
        ({"student": {"code": "other"}}, "the student's code"),
        ({"data": {"auxiliary": "other"}}, "the samples of role auxiliary"),
        ({"cache": {"weights": "other"}}, "the weights of cache or teacher"),
        ({"cache": {"coding": "other"}}, "the coding of cache or teacher"),
    ],
)
def test_records_that_do_not_belong_together_are_refused(bare: Path, identity: dict[str, Any], problem: str) -> None:
    changed(bare, "auxiliary-zero-first.seed-1", **identity)
    with pytest.raises(RecordError) as error:
        recorded(load(bare / "run.toml"), Ledger(bare / "out" / "ledger"))
    before = "alone.seed-0" if "report" in problem or "student" in problem else "auxiliary-zero-first.seed-0"
    assert str(error.value) == (
        f"{bare}/out/ledger/auxiliary-zero-first.seed-1.json and {bare}/out/ledger/{before}.json are of runs that "
        f"differ in {problem}, so nothing is to be compared; keep a ledger for each"
    )


OWN = ["ablate.arms.more.like='alone'", "ablate.arms.more.set=['data.scenes.train=9']"]


def test_other_samples_of_an_arm_s_own_are_marked(bare: Path) -> None:
    ledger = bare / "out" / "ledger"
    for seed in (0, 1):
        record = json.loads((ledger / f"alone.seed-{seed}.json").read_text())
        (ledger / f"more.seed-{seed}.json").write_text(json.dumps(record | {"arm": "more"}))
        with pytest.raises(RecordError, match="are of one and the same run; restore them, or remove one"):
            recorded(load(bare / "run.toml", OWN), Ledger(ledger))
        changed(bare, f"more.seed-{seed}", data={"train": "other", "select": "other"})
    found = recorded(load(bare / "run.toml", OWN), Ledger(ledger))
    assert {row.arm: row.unmatched for row in found.rows} == {
        "alone": (),
        "auxiliary-zero-first": (),
        "more": ("samples of role train",),
    }
    assert [gain.matched for gain in found.gains if gain.later == "more"] == [False]


def test_how_long_longer_is_must_be_known(bare: Path) -> None:
    ledger = Ledger(bare / "out" / "ledger")
    longer = ["ablate.ladder=['alone', 'alone-longer']", "ablate.seeds=[0]"]
    assert recorded(load(bare / "run.toml", longer), ledger).missing == ("alone-longer, whose length is not settled",)
    ledger.settle({"longer": 2.0, "of": {}})
    assert recorded(load(bare / "run.toml", longer), ledger).missing == ("alone-longer, seed 0",)
    with pytest.raises(ConfigError, match=r"^ablate\.longer is 3, but .* has settled on 2; leave it out"):
        recorded(load(bare / "run.toml", [*longer, "ablate.longer=3"]), ledger)
    ledger.plan.write_text('{"longer": Infinity, "of": {}}')
    with pytest.raises(RecordError, match="not what a sweep has settled"):
        recorded(load(bare / "run.toml", longer), ledger)
    # Nobody asks for it.
    assert recorded(load(bare / "run.toml"), ledger).missing == ()


def test_tables_of_another_teacher_than_the_run_file_s_say_so(bare: Path) -> None:
    (bare / "teacher.py").write_text("")
    named = [
        f"teacher.reference='{bare / 'teacher.py'}:build'",
        "teacher.arguments={}",
        "ablate.allow_shared_select=true",
    ]
    assert recorded(load(bare / "run.toml", named), Ledger(bare / "out" / "ledger")).stamps[1:] == (
        "The run file's teacher is another one than that of the records.",
        "The run file allows that roles select and report share images.",
    )


@pytest.mark.parametrize("other", [["--print-plan"], ["--task", "0/2"]])
def test_tables_are_printed_and_nothing_else(bare: Path, other: list[str]) -> None:
    result = segkd(bare, "--tables", *other)
    assert result.exit_code == 2
    assert f"--tables and {other[0]} exclude each other; give the one that is meant" in result.output
