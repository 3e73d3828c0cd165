"""The page of runs: what it says is what the folders hold, and nothing is needed beside it."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from segkd.cli.main import main
from segkd.pipeline.report import differing_settings, find_runs, groups_of
from segkd.pipeline.report_page import charts_of, page
from segkd.pipeline.student.folder import RunFolder

SETTINGS: dict[str, Any] = {
    "student": {"reference": "enet"},
    "teacher": {"reference": "big.pt"},
    "train": {"seed": 0, "steps": 100, "learning_rate": 0.01},
    "knowledge": {"zero_order": {"weight": 1.0}},
    "ablate": {"seeds": [0]},
    "distill": True,
    "fingerprints": {"weights": "a" * 64, "code": "b" * 64},
}


def write(path: Path, steps: int = 100, mious: dict[int, float] | None = None, **changes: Any) -> Path:
    """A run that has logged every tenth step up to ``steps``; ``changes`` are settings of ``train``, or tables."""
    settings = json.loads(json.dumps(SETTINGS))
    for name, value in changes.items():
        (settings["train"] if name in settings["train"] else settings)[name] = value
    if not settings["distill"]:
        del settings["fingerprints"]
    run = {"configuration": settings, "versions": {"segkd": "1.2"}, "device": "cpu", "threads": 1}
    with RunFolder(path, tensorboard=False) as folder:
        folder.open(run, 0)
        for step in range(10, steps + 1, 10):
            seed = settings["train"]["seed"]
            gradient = {"total": 2.0, "zero_order": 0.5}
            folder.log(
                {"step": step, "loss": 1 + seed + 1 / step, "zero_order": 0.3, "learning_rate": 0.01}
                | {"gradient": gradient, "images_per_second": 10.0 * (seed + 1)}
            )
            if step in (mious or {}):
                scores = {"miou": mious[step], "boundary_miou": None, "macc": 50.0, "aacc": 80.0}
                folder.log({"step": step, "select": scores | {"per_class": {"sky": 90.0 + seed, "car": None}}})
    return path


def segkd(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Cells(HTMLParser):
    """The rows of all tables, the captions of figures, and whatever a browser would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.captions: list[str] = []
        self.loaded: list[str] = []
        self.scripts = 0
        self._into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            inside = (value or "").startswith("#")
            if name in ("src", "srcset", "data", "action") or (name.endswith("href") and not inside):
                self.loaded.append(f"{tag} {name}={value}")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._into = self.rows[-1]
        elif tag == "figcaption":
            self.captions.append("")
            self._into = self.captions

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "figcaption"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into:
            self._into[-1] = " ".join(f"{self._into[-1]}{data}".split())

    def row(self, first: str) -> list[str]:
        (found,) = (row[1:] for row in self.rows if row and row[0] == first)
        return found


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two seeds of a distilled student, of which one is under way, and one that learns from labels alone."""
    root = tmp_path / "sweep"
    write(root / "zero" / "seed-0", mious={50: 20.0, 100: 41.5})
    write(root / "zero" / "seed-1", seed=1, mious={50: 22.0, 100: 44.0}, ablate={"seeds": [1]})
    write(root / "zero" / "seed-2", seed=2, steps=60, mious={50: 30.0})
    write(root / "alone" / "seed-0", mious={100: 39.0}, distill=False)
    return root


def test_runs_that_differ_in_their_seed_are_one_row(sweep: Path) -> None:
    groups = groups_of(find_runs([sweep]))
    assert [(group.name, [run.seed for run in group.runs]) for group in groups] == [
        ("alone/seed-0", [0]),
        ("zero", [0, 1, 2]),
    ]
    cells = Cells(page(groups, {}, "a title"))
    # Of the seeds that are done: one that is under way would pull the mean down.
    spread = statistics.stdev([41.5, 44.0])
    assert cells.row("zero") == [
        *("labels, big.pt", "enet", "0, 1, 2", "100, 60 of 100", f"42.75 ± {spread:.2f}", "n/a"),
        *("50.00 ± 0.00", "80.00 ± 0.00", "20.0"),
    ]
    assert cells.row("alone/seed-0")[:5] == ["labels alone", "enet", "0", "100", "39.00"]
    assert cells.row("sky") == ["90.00", "90.50"]
    assert cells.row("car") == ["n/a", "n/a"]
    assert cells.row("distill") == ["False", "True"]
    # A run without a cache has no fingerprints, which is no difference by itself.
    assert list(differing_settings(groups)) == ["distill"]
    assert cells.row("segkd") == ["1.2"]


def test_a_mean_curve_goes_as_far_as_all_seeds_have_come(sweep: Path) -> None:
    (group,) = (group for group in groups_of(find_runs([sweep])) if group.name == "zero")
    assert group.curve("select/miou") == {50: 24.0}
    losses = group.curve("loss")
    assert list(losses) == [10, 20, 30, 40, 50, 60]
    assert losses[20] == pytest.approx(statistics.fmean([1, 2, 3]) + 1 / 20)
    assert group.curve("first_order") == {}


def test_all_that_was_logged_is_drawn_and_nothing_else(sweep: Path) -> None:
    groups = groups_of(find_runs([sweep]))
    cells = Cells(page(groups, {}, "a title"))
    assert cells.captions == [
        *("mIoU on role select", "loss, weighted", "zero_order"),
        *("norm of the gradient: total", "norm of the gradient: zero_order", "learning rate"),
    ]
    assert {chart.title for chart in charts_of(groups)} - set(cells.captions) == {"boundary mIoU on role select"}


def test_a_page_needs_nothing_and_runs_nothing(tmp_path: Path) -> None:
    write(tmp_path / "<script>alert(1)</script>" / "x", student={"reference": "<b>bold</b>"})
    write(tmp_path / "y")
    text = page(groups_of(find_runs([tmp_path])), {"a<b": "| <i> |"}, "<title>")
    cells = Cells(text)
    assert cells.loaded == []
    assert cells.scripts == 0
    assert cells.row("student.reference") == ["<b>bold</b>", "enet"]
    assert "<i>" not in text
    assert not re.search(r"url\((?!#)|@import", text)


def test_the_same_runs_are_the_same_page(sweep: Path) -> None:
    first, second = (page(groups_of(find_runs([sweep])), {}, "a title") for _ in range(2))
    assert first == second


def test_a_run_without_any_line_is_shown(tmp_path: Path) -> None:
    write(tmp_path / "new", steps=0)
    cells = Cells(page(groups_of(find_runs([tmp_path])), {}, "a title"))
    assert cells.row("new") == ["labels, big.pt", "enet", "0", "0 of 100", "n/a", "n/a", "n/a", "n/a", "n/a"]
    assert cells.captions == []


def test_a_teacher_of_one_s_own_is_a_run_too(tmp_path: Path) -> None:
    write(tmp_path / "teacher", teacher=None, distill=False)
    write(tmp_path / "student", teacher=None, cache={"path": "c.zarr"})
    cells = Cells(page(groups_of(find_runs([tmp_path])), {}, "a title"))
    assert [cells.row(name)[0] for name in ("teacher", "student")] == ["labels alone", "labels, c.zarr"]


def test_a_run_is_named_twice_and_counts_once(sweep: Path) -> None:
    assert [run.name for run in find_runs([sweep, sweep / "zero"])] == [
        "sweep/alone/seed-0",
        *(f"zero/seed-{seed}" for seed in range(3)),
    ]


def test_more_groups_than_colours_are_told_apart(tmp_path: Path) -> None:
    for number in range(9):
        write(tmp_path / f"run-{number}", learning_rate=number + 1.0)
    text = page(groups_of(find_runs([tmp_path])), {}, "a title")
    styles = re.findall(r'border-color:(#\w+);border-style:(\w+)"></span> run-(\d)', text)
    assert len({(colour, dashes) for colour, dashes, _ in styles}) == 9


def test_the_command_on_a_real_run_and_a_sweep_s_table(done: Path, sweep: Path, tmp_path: Path) -> None:
    (sweep / "table.md").write_text("| arm | gain |\n| zero | +1 |\n")
    shutil.copytree(done.parent / "student", sweep / "student")
    out = tmp_path / "new" / "report.html"
    result = segkd("report", sweep, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert written["path"] == str(out)
    assert written["bytes"] == out.stat().st_size
    assert written["runs"] == ["alone/seed-0", "student", *(f"zero/seed-{seed}" for seed in range(3))]
    text = out.read_text()
    assert "| zero | +1 |" in text
    assert Cells(text).row("student")[2] == "0"
    again = segkd("report", sweep, "-o", out)
    assert (again.exit_code, again.stderr) == (
        2,
        f"Error: {out} exists; choose another name or allow it with --overwrite\n",
    )
    assert segkd("report", sweep, "-o", out, "--overwrite").stdout == (
        f"{out}: 5 runs of 3 kinds, {out.stat().st_size / 1e6:.2f} MB\n"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "run.json").write_text("{"), r"\(JSONDecodeError: .+\)"),
        (lambda path: (path / "run.json").write_text("[1]"), r"\(TypeError: .+\)"),
        (lambda path: (path / "run.json").write_text('{"configuration": {}}'), r"\(KeyError: 'versions'\)"),
        (lambda path: (path / "metrics.jsonl").write_text("nonsense\n"), r"\(JSONDecodeError: .+\)"),
        (lambda path: (path / "metrics.jsonl").write_text("{}\n"), r"\(KeyError: 'step'\)"),
    ],
)
def test_a_damaged_run_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "runs" / "a")
    damage(path)
    result = segkd("report", tmp_path / "runs", "-o", tmp_path / "report.html")
    assert result.exit_code == 1
    assert re.fullmatch(
        rf"Error: {re.escape(str(path))}: run.json or metrics.jsonl is damaged or no run's {message}; leave the folder "
        "out, or take another copy\n",
        result.stderr,
    )
    assert not (tmp_path / "report.html").exists()


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a", steps=30)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    assert find_runs([tmp_path])[0].step == 30


def test_folders_without_a_run(tmp_path: Path) -> None:
    result = segkd("report", tmp_path, "-o", tmp_path / "report.html")
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {tmp_path}: no run is in it or below; name a folder that train-student or ablate has written "
        "(--output)\n",
    )
    result = segkd("report", tmp_path / "none", "-o", tmp_path / "report.html")
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {tmp_path / 'none'}: there is no such folder; name one that train-student or ablate has written\n",
    )
