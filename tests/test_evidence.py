"""What the settings say of their accuracy is what docs/results has."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal

import numpy as np
import pytest

from segkd.cli.reference import accuracy, pages
from segkd.pipeline.ablation.ledger import Ledger
from segkd.pipeline.ablation.statistics import paired_t
from segkd.pipeline.config import RunConfig
from segkd.pipeline.evidence import Evidence, Row, evidence_of
from segkd.pipeline.settings import settings
from segkd.pipeline.student.knowledge.config import KnowledgeConfig
from segkd.pipeline.student.resuming import is_harmless

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
STATED = {
    kind: evidence
    for kind in dict.fromkeys(setting.owner for setting in settings(RunConfig))
    if (evidence := evidence_of(kind))
}


TABLES = re.compile(r"^segkd ablate .*--tables", re.MULTILINE)


def rows(page: str) -> set[str]:
    """The first cells of a page's rows of figures."""
    lines = (RESULTS / page).read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(" †") for line in lines if re.match(r"\|.*\| \**[+-]?\d+\.\d", line)}


def choices(hint: object) -> set[object]:
    """What a setting may be, where it is one of several."""
    if typing.get_origin(hint) is Literal:
        return set(typing.get_args(hint))
    return {choice for part in typing.get_args(hint) for choice in choices(part)}


@pytest.mark.parametrize("kind", STATED, ids=lambda kind: kind.__name__)
def test_evidence_is_of_a_setting_and_its_row_exists(kind: type) -> None:
    hints = typing.get_type_hints(kind)
    for key, row in STATED[kind].items():
        name, _, value = key.partition("=")
        assert not name or name in {field.name for field in dataclasses.fields(kind)}, key
        assert not value or value in choices(hints[name]), key
        if row is not None:
            assert row.row in rows(row.page), key


def test_rows_are_told_from_what_is_no_row() -> None:
    assert "student, distilled" in rows("demo.md")
    assert "student, reborn" not in rows("demo.md")


PAGES = sorted(str(path.relative_to(ROOT)) for path in (*RESULTS.glob("*.md"), ROOT / "configs/paper/README.md"))


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_what_the_records_beside_them_print(
    page: str, published: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, records or how they are told have changed: ``python benchmarks/published.py`` writes pages anew."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text(encoding="utf-8")
    # A command that is not told apart would let its table grow old.
    assert len(published.commands(text)) == text.count("<!-- prints -->") == text.count("<!-- end -->")
    assert sum("--tables" in command for command in published.commands(text)) == len(TABLES.findall(text))
    assert published.renewed(text) == text


def test_gains_in_the_readme_are_those_of_the_page() -> None:
    page = (RESULTS / "camvid-s.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.findall(r"\| \**([\d.]+)\** \| \*\*(\S+)\*\* \((\S+ to \S+)\) \| (\S+ to \S+) \|", readme)
    assert len(told) == 2
    for arm, (mean, difference, over_seeds, over_images) in zip(("zero", "zero-first"), told, strict=True):
        assert f"| auxiliary-{arm} | 5 | {mean} ± " in page
        row = next(line for line in page.splitlines() if line.startswith(f"| auxiliary-{arm} − alone |"))
        assert f" | 5 | {difference} | {over_seeds} | gain | {over_images} | gain |" in row


def test_a_table_that_records_do_not_print_is_found(published: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = next(text for path, text in published.pages() if path.name == "camvid-s.md")
    changed = re.sub(r"(\| alone \| \d+ \| )\d", r"\g<1>9", page, count=1)
    assert changed != page
    assert published.renewed(changed) == page


def test_a_gain_by_classes_and_parts_is_that_of_the_records(where: ModuleType) -> None:
    ledger = RESULTS / "ledger" / "camvid-s-init"
    both = where.pairs(Ledger(ledger), "auxiliary-zero", "zero")
    stated = [[run.report["per_class"] for run in pair] for pair in both]
    for row in where.of_classes(both):
        later, earlier = np.mean([[run[row.what] for run in pair] for pair in stated], 0)
        assert (row.later, row.earlier) == pytest.approx((later, earlier))
    (whole,) = where.of_parts(both, 1)
    later, earlier = np.transpose([[run.report["miou"] for run in pair] for pair in both])
    assert (whole.later, whole.earlier) == pytest.approx((later.mean(), earlier.mean()))
    expected = paired_t(list(later - earlier))
    assert expected is not None
    assert (whole.over_seeds.low, whole.over_seeds.high) == pytest.approx((expected.low, expected.high))
    images = both[0][0].images.ids
    assert [row.what for row in where.of_parts(both, 2)] == [
        f"{images[0]} to {images[49]}",
        f"{images[50]} to {images[-1]}",
    ]


def test_curves_are_means_over_seeds_at_the_steps_that_all_of_them_have(curves: ModuleType, tmp_path: Path) -> None:
    ledger, kept = Ledger(tmp_path), Ledger(RESULTS / "ledger" / "camvid-s-init")
    of: dict[tuple[str, int], dict[str, float | None]] = {
        ("zero", 0): {"2": 10.0, "4": 20.0, "6": 30.0},
        ("zero", 1): {"2": 12.0, "4": 26.0},
        ("alone", 0): {"2": 8.0, "4": None, "6": 16.0},
        ("alone", 1): {},
    }
    for (arm, seed), curve in of.items():
        record = kept.read(arm, seed)
        assert record is not None
        ledger.save(dataclasses.replace(record, curve=curve))
    assert list(curves.markdown(curves.read_arms(ledger))) == [
        "| step | alone (1) | zero (2) |",
        "|---|---|---|",
        "| 2 | 8.00 | 11.00 |",
        "| 4 |  | 23.00 |",
        "| 6 | 16.00 |  |",
        "",
        "```mermaid",
        "xychart-beta",
        '    x-axis ["2"]',
        '    y-axis "mIoU on select"',
        "    line [8.00]",
        "    line [11.00]",
        "```",
    ]


def test_a_table_without_an_end_is_left_alone(published: ModuleType) -> None:
    """Up to the next one's end stands text that is nobody's output."""
    fence = "```sh\nsegkd ablate --tables\n```\n\n<!-- prints -->\n"
    page = f"{fence}\nprose\n\n{fence}<!-- end -->\n"
    assert [match.start() for match in published.BLOCK.finditer(page)] == [page.rindex("```sh")]


@pytest.mark.parametrize("kind", KnowledgeConfig().kinds(), ids=lambda kind: kind.name)
def test_every_kind_of_knowledge_states_its_evidence(kind: object) -> None:
    """As a whole, or each of its forms."""
    evidence = evidence_of(type(kind))
    hints = typing.get_type_hints(type(kind))
    forms = {f"form={value}" for value in typing.get_args(hints.get("form"))}
    assert "" in evidence or (forms and forms <= evidence.keys())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    evidence: ClassVar[Evidence] = {"": None, "rate": None}
    rate: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Base):
    evidence: ClassVar[Evidence] = {"form=a": Row("page.md", "the row"), "form=b": None}
    form: Literal["a", "b"] = "a"
    other: int = 0


def test_sentences() -> None:
    assert accuracy(Example) == ["Accuracy not measured."]
    assert accuracy(Example, "rate") == ["Accuracy not measured."]
    assert accuracy(Example, "form") == [
        "Accuracy of `a`: [results/page.md](results/page.md), *the row*.",
        "Accuracy of `b` not measured.",
    ]
    assert accuracy(Example, "other") == []


SIZE = {"steps", "labelled", "auxiliary", "seed", "validate_every", "deterministic", "allow_unpromised"}
"""What makes an experiment longer, or another of its kind, rather than another experiment."""


def test_every_setting_that_decides_what_training_gives_is_stated() -> None:
    """What a sweep counts among a run's effective settings, but for its size."""
    tables = ("augment", "loss", "train")
    decide = [setting for setting in settings(RunConfig) if setting.key[0] in tables and setting.table is None]
    names = {".".join(setting.key) for setting in decide if not is_harmless(".".join(setting.key))}
    stated = {
        f"{setting.key[0]}.{key.partition('=')[0]}" for setting in decide for key in STATED.get(setting.owner, {})
    }
    assert {name for name in names if name.partition(".")[2] not in SIZE} == stated


def test_the_page_says_so_of_every_option_without_a_row() -> None:
    unmeasured = sum(row is None for evidence in STATED.values() for row in evidence.values())
    assert unmeasured > 5
    assert len(re.findall(r"Accuracy (of `\w+` )?not measured\.", pages()["configuration.md"])) == unmeasured
