"""The run file as a whole: what it holds, the files in configs/, the pages in docs/."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from types import NoneType

import pytest

from segkd.cli.reference import NOTE, commands, field_docs, pages
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data.config import DataConfig
from segkd.pipeline.models.network import NetworkConfig
from segkd.pipeline.settings import parse, settings, to_dict, to_toml
from segkd.storage.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def test_there_are_run_files() -> None:
    assert {"camvid.toml", "demo.toml", "demo-teacher.toml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_run_file_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    run = load(path)
    again = tmp_path / "again.toml"
    again.write_text(to_toml(run))
    assert load(again) == run
    assert parse(RunConfig, to_dict(run)) == run


def test_overrides_without_a_file() -> None:
    run = load(None, ["data.reader=scenes", "train.steps=700", "student.reference=enet"])
    assert run.train.steps == 700
    assert run.student == NetworkConfig(reference="enet")
    assert run.teacher is None


def test_what_a_command_needs_is_asked_for_by_name() -> None:
    run = RunConfig(data=DataConfig(reader="scenes"), student=NetworkConfig(reference="enet"))
    assert run.the_student().reference == "enet"
    with pytest.raises(ConfigError) as caught:
        run.the_teacher()
    assert str(caught.value) == (
        "the run has no teacher: expected a table [teacher] with the network's reference; "
        "add it to the run file, or give --set teacher.reference=NAME"
    )


def test_a_setting_that_may_be_none_is_none_by_default() -> None:
    # TOML cannot say None, so a setting that may be None and is something else by default could not be set to it.
    for setting in settings(RunConfig):
        hint = typing.get_type_hints(setting.owner)[setting.field.name]
        if NoneType in typing.get_args(hint):
            assert setting.field.default is None, setting.key


def test_every_setting_has_a_docstring() -> None:
    for setting in settings(RunConfig):
        assert field_docs(setting.owner).get(setting.field.name), setting.key


def test_every_configuration_is_frozen() -> None:
    for kind in {setting.owner for setting in settings(RunConfig)}:
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]
        assert all(field.kw_only for field in dataclasses.fields(kind)), kind


@pytest.mark.parametrize("name", pages())
def test_the_pages_are_those_of_today(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == pages()[name], (
        "run: python -m segkd.cli.reference docs"
    )


def test_the_pages_hold_every_command_and_every_setting() -> None:
    commands_page, configuration_page = pages()["commands.md"], pages()["configuration.md"]
    for path, command in commands():
        assert f"\n## {path}\n" in commands_page
        assert command.help
        assert command.short_help
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", None), f"{path} {parameter.name}"
                assert all(name in commands_page for name in parameter.opts)
    for setting in settings(RunConfig):
        assert f"| `{setting.field.name}` |" in configuration_page or f"[{'.'.join(setting.key)}]" in configuration_page
    assert NOTE in commands_page
    assert NOTE in configuration_page
