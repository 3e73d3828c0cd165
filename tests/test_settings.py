"""Reading, overriding, validating and writing of configurations, on a dataclass of the test's own."""

from __future__ import annotations

import string
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkd.pipeline.run_file import read_toml
from segkd.pipeline.settings import parse, parse_override, settings, to_dict, to_toml
from segkd.storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 10
    rate: float = 0.5
    crop: tuple[int, int] = (3, 4)
    form: Literal["kl", "squared"] = "kl"
    output: str | int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    palette: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps = {self.steps}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Data:
    root: str
    labels: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outer:
    data: Data
    train: Inner = field(default_factory=Inner)
    student: Inner | None = None


@dataclass(frozen=True, kw_only=True)
class Several:
    arms: dict[str, Data] = field(default_factory=dict)


GOOD: dict[str, Any] = {"data": {"root": "here"}}


def message(tables: dict[str, Any], *overrides: str, place: str | None = "run.toml") -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, tables, place=place, overrides=overrides)
    return str(caught.value)


def test_defaults_and_conversions() -> None:
    outer = parse(
        Outer,
        tomllib.loads(
            'data = {root = "r", labels = {7 = "Road"}}\ntrain = {rate = 1, crop = [5, 6], palette = [[1, 2, 3]]}'
        ),
    )
    assert outer == Outer(
        data=Data(root="r", labels={7: "Road"}), train=Inner(rate=1.0, crop=(5, 6), palette=((1, 2, 3),)), student=None
    )
    assert isinstance(outer.train.rate, float)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"train": {"stpes": 5}}, "run.toml: train.stpes = 5: there is no such key; did you mean train.steps?"),
        ({"steps": 5}, "run.toml: steps = 5: there is no such key; did you mean train.steps or student.steps?"),
        ({"trian": {"steps": 5}}, "run.toml: trian: there is no such key; did you mean train?"),
        ({"zzz": True}, "run.toml: zzz = true: there is no such key; known here: data, train, student"),
        ({"train": {"steps": "5"}}, 'run.toml: train.steps = "5": expected a valid integer'),
        ({"train": {"steps": 5.5}}, "run.toml: train.steps = 5.5: expected a valid integer"),
        ({"train": {"steps": True}}, "run.toml: train.steps = true: expected a valid integer"),
        ({"train": {"rate": "fast"}}, 'run.toml: train.rate = "fast": expected a valid number'),
        ({"train": {"steps": 0}}, "run.toml: train: steps = 0: expected at least 1"),
        ({"train": 3}, "run.toml: train = 3: expected a table"),
        ({"train": {"form": "kll"}}, "run.toml: train.form = \"kll\": expected 'kl' or 'squared'; did you mean 'kl'?"),
        ({"train": {"form": "zz"}}, "run.toml: train.form = \"zz\": expected 'kl' or 'squared'"),
        ({"train": {"crop": [1]}}, "run.toml: train.crop = [1]: expected 2 values"),
        ({"train": {"crop": [1, 2, 3]}}, "run.toml: train.crop = [1, 2, 3]: expected 2 values"),
        ({"train": {"crop": [1, "2"]}}, 'run.toml: train.crop[1] = "2": expected a valid integer'),
        ({"train": {"output": [2]}}, "run.toml: train.output = [2]: expected a valid string or a valid integer"),
        ({"data": {}}, "run.toml: data.root: is missing and has no default"),
        (
            {"data": {"root": "r", "labels": {"x": "Road"}}},
            'run.toml: data.labels.x = "Road": expected an integer for the key',
        ),
    ],
)
def test_messages(tables: dict[str, Any], expected: str) -> None:
    assert message(GOOD | tables) == expected


def test_tables_that_the_run_file_names() -> None:
    assert parse(Several, {"arms": {"one": {"root": "r"}}}).arms == {"one": Data(root="r")}
    assert [(setting.key, setting.table) for setting in settings(Several)] == [
        (("arms",), None),
        (("arms", "<name>"), Data),
        (("arms", "<name>", "root"), None),
        (("arms", "<name>", "labels"), None),
    ]
    with pytest.raises(ConfigError) as caught:
        parse(Several, {"arms": {"one": {"rot": "r", "root": "r"}}}, place="run.toml")
    assert str(caught.value) == 'run.toml: arms.one.rot = "r": there is no such key; did you mean arms.one.root?'


def test_all_problems_are_stated_together() -> None:
    lines = message({"data": {"rot": "r"}, "train": {"steps": "5"}}).splitlines()
    assert lines == [
        "run.toml: data.root: is missing and has no default",
        'run.toml: data.rot = "r": there is no such key; did you mean data.root?',
        'run.toml: train.steps = "5": expected a valid integer',
    ]


def test_a_problem_of_an_override_is_laid_at_its_door() -> None:
    assert (
        message(GOOD, "train.stpes=5")
        == "--set train.stpes=5: train.stpes = 5: there is no such key; did you mean train.steps?"
    )
    trian = "--set trian.steps=5: trian: there is no such key; did you mean train?"
    assert message(GOOD, "trian.steps=5", "train.steps=6") == trian
    assert message({}, place=None) == "no run file: data: is missing and has no default"


@pytest.mark.parametrize("text", ["train.steps", "=3", "a b=3", "a.=3", "\na=3"])
def test_malformed_overrides(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert str(caught.value) == f"--set {text}: expected key=value with a dotted key, such as train.steps=500"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.steps=5", ("train", "steps"), 5),
        ("train.form = squared", ("train", "form"), "squared"),
        ('a."b.c"="5"', ("a", "b.c"), "5"),
        ("data.root=../some dir/x=y", ("data", "root"), "../some dir/x=y"),
        ("train.crop=[1, 2]", ("train", "crop"), [1, 2]),
        ("data.root=", ("data", "root"), ""),
    ],
)
def test_override_values(text: str, key: tuple[str, ...], value: object) -> None:
    override = parse_override(text)
    assert (override.key, override.value) == (key, value)


def test_overrides_replace_what_the_file_says_and_the_last_wins() -> None:
    tables = GOOD | {"train": {"steps": 3, "arguments": {"a": 1, "b": 2}}}
    overrides = ["train.steps=4", "train.steps=5", "train.arguments={b=3}", "student.rate=2"]
    outer = parse(Outer, tables, overrides=overrides)
    assert (outer.train.steps, outer.train.arguments) == (5, {"b": 3})
    assert outer.student == Inner(rate=2.0)
    assert tables["train"]["steps"] == 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    absent, binary, broken = tmp_path / "absent.toml", tmp_path / "binary.toml", tmp_path / "broken.toml"
    binary.write_bytes(b"\xff\xfe")
    broken.write_text("[train]\nsteps = = 4\n")
    for path, expected in [
        (absent, "there is no such file; name an existing run file (.toml)"),
        (binary, "cannot be read: it is not UTF-8 text; a run file is a TOML text file"),
        (tmp_path, "cannot be read: Is a directory; a run file is a TOML text file"),
        (broken, "not valid TOML: Invalid value (at line 2, column 9)"),
    ]:
        with pytest.raises(ConfigError) as caught:
            read_toml(path)
        assert str(caught.value) == f"{path}: {expected}"


def test_a_network_inherits_nothing_of_another(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[student]\nreference = "a"\narguments = { width = 0.5 }\n[train]\nsteps = 3\n')
    top = 'extends = "base.toml"\n[student]\n'
    for own, expected in (
        ('reference = "b"', {"reference": "b"}),
        ('reference = "a"', {"reference": "a"}),
        ("stride = 4", {"reference": "a", "arguments": {"width": 0.5}, "stride": 4}),
    ):
        (tmp_path / "own.toml").write_text(top + own)
        assert read_toml(tmp_path / "own.toml").tables == {"student": expected, "train": {"steps": 3}}


def test_a_file_extends_another(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "base.toml").write_text(
        '[data]\nroot = "there"\n[train]\nsteps = 3\ncrop = [1, 2]\narguments = { a = 1, b = 2 }\n'
    )
    (tmp_path / "in" / "middle.toml").write_text('extends = "../base.toml"\n[train]\narguments = { b = 3 }\n')
    (tmp_path / "in" / "last.toml").write_text('extends = "middle.toml"\n[train]\ncrop = [5, 6]\n[student]\n')
    last = tmp_path / "in" / "last.toml"
    assert (
        read_toml(last).place
        == f"{last}, which extends {tmp_path}/in/middle.toml, which extends {tmp_path}/in/../base.toml"
    )
    outer = parse(Outer, read_toml(last).tables)
    assert outer == Outer(
        data=Data(root="there"), train=Inner(steps=3, crop=(5, 6), arguments={"a": 1, "b": 3}), student=Inner()
    )


def test_files_that_cannot_be_extended(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text('extends = "two.toml"\n')
    (tmp_path / "two.toml").write_text('extends = "one.toml"\n')
    (tmp_path / "number.toml").write_text("extends = 3\n")
    (tmp_path / "nul.toml").write_text('extends = "a\\u0000.toml"\n')
    (tmp_path / "lost.toml").write_text('extends = "absent.toml"\n')
    for name, expected in [
        (
            "one.toml",
            'one.toml: it extends itself, by extends = "two.toml"; remove one such line '
            f"(extended by {tmp_path}/two.toml) (extended by {tmp_path}/one.toml)",
        ),
        ("number.toml", "number.toml: extends = 3: expected the name of a run file, relative to this one's folder"),
        (
            "lost.toml",
            f"absent.toml: there is no such file; name an existing run file (.toml) (extended by {tmp_path}/lost.toml)",
        ),
        (
            "nul.toml",
            "a\0.toml: cannot be read: embedded null byte; a run file is a TOML text file "
            f"(extended by {tmp_path}/nul.toml)",
        ),
    ]:
        with pytest.raises(ConfigError) as caught:
            read_toml(tmp_path / name)
        assert str(caught.value) == f"{tmp_path}/{expected}"


def test_settings_lists_every_key_once() -> None:
    keys = [".".join(setting.key) for setting in settings(Outer)]
    assert keys[:4] == ["data", "data.root", "data.labels", "train"]
    assert len(keys) == len(set(keys)) == 3 + 2 + 7 + 7


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.one_of(texts, st.integers(-(2**53), 2**53), st.booleans(), st.floats(allow_nan=False))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
inners = st.builds(
    Inner,
    steps=st.integers(1, 2**53),
    rate=st.floats(allow_nan=False),
    crop=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    form=st.sampled_from(["kl", "squared"]),
    output=st.none() | st.integers(0, 9) | st.text(string.printable, max_size=5),
    arguments=st.dictionaries(texts, values, max_size=3),
    palette=st.lists(st.tuples(*[st.integers(0, 255)] * 3), max_size=3).map(tuple),
)


@given(st.builds(Outer, data=st.builds(Data, root=texts), train=inners, student=st.none() | inners))
def test_round_trips(outer: Outer) -> None:
    assert parse(Outer, tomllib.loads(to_toml(outer))) == outer
    assert parse(Outer, to_dict(outer)) == outer
