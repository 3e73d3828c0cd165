"""What stands in the JSON of an unfinished cache, for which no digest vouches, is read as it was written or refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from segkd.pipeline.teacher.cache import summarise
from segkd.storage.audit import verify
from segkd.storage.coding import CompandedDistribution
from segkd.storage.errors import AFTER_DAMAGE, CacheDamagedError, CacheExistsError, SegkdError
from segkd.storage.generation import generations_of, read_spec
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import PlannedSample, plan_units
from segkd.storage.reader import CacheReader
from segkd.storage.spec import CacheSpec, TargetSpec
from segkd.storage.writer import CacheWriter

ROOT, PLAN = "zarr.json", "generations/0/zarr.json"
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**12,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "../..",
    [],
    {},
    [[]],
    {"a": 1},
]


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A cache of which nothing but the metadata is written."""
    target = TargetSpec(
        name="soft",
        channels=3,
        coder=CompandedDistribution(),
        bound=1e-3,
        measures=("kl", "entropy"),
        bounded=("kl",),
        parameters={"temperatures": [1.0]},
        fallback=True,
    )
    spec = CacheSpec(classes=("a", "b", "c"), targets={"soft": target}, tile=8, fingerprints={"code": "x"}, teacher={})
    mapping = Mapping(network_axis(32, 8), network_axis(32, 8))
    samples = [PlannedSample(id=f"{k}", role="train", image_size=(32, 32), mapping=mapping) for k in range(3)]
    path = tmp_path / "c.zarr"
    CacheWriter(path, spec, plan_units(samples, unit_samples=2, tile=8))
    return path


def everything(path: Path) -> None:
    """All that opens a cache, as the commands do."""
    generations_of(path, read_spec(path))
    reader = CacheReader(path, partial=True)
    assert not list(reader.entries())
    reader.statistics()
    summarise(path).lines()


def mutated(file: Path, keys: tuple[str | int, ...], value: Any, *, lost: bool = False) -> None:
    document = json.loads(file.read_bytes())
    at = document
    for key in keys[:-1]:
        at = at[key]
    if lost:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    file.write_text(json.dumps(document))


def places(document: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    found = [place for key, value in inner for place in places(value, (*at, key))]
    return [at, *found] if at else found


@pytest.mark.parametrize("name", [ROOT, PLAN])
def test_whatever_stands_anywhere_it_is_an_error_of_segkds_own_and_soon(begun: Path, name: str) -> None:
    file = begun / name
    content = file.read_bytes()
    for place in places(json.loads(content)):
        for value in ODD:
            mutated(file, place, value)
            refused(begun)
        if isinstance(place[-1], str):
            file.write_bytes(content)
            mutated(file, place, None, lost=True)
            refused(begun)
        file.write_bytes(content)
    everything(begun)


def refused(path: Path) -> None:
    """Each way to open it ends well or in an error of segkd's own."""
    ways: list[Callable[[Path], object]] = [everything, lambda it: verify(it, workers=1)]
    for way in ways:
        with contextlib.suppress(SegkdError):
            way(path)


TARGET = ("attributes", "segkd", "targets", 0)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        (ROOT, (*TARGET, "channels"), "3", "targets[0].channels is '3', expected a whole number of 1 to 65,535"),
        (ROOT, (*TARGET, "fallback"), None, "targets[0].fallback is None, expected true or false"),
        (ROOT, (*TARGET, "name"), "../up", "targets[0].name is '../up', expected a name of letters, digits and und"),
        (ROOT, (*TARGET, "bounded"), ["x"], "targets[0].bounded is ['x'], expected some of the measures kl, entropy"),
        (ROOT, (*TARGET, "coder", "levels"), [1, "x"], "expected a coder: levels must be numbers above 0"),
        (ROOT, (*TARGET, "coder", "exponent"), True, "expected a coder: exponent must be a number above 0"),
        (ROOT, ("attributes", "segkd", "targets"), None, "targets is None, expected a list"),
        (ROOT, ("attributes", "segkd", "targets"), [], "targets is [], expected one at least, each of another name"),
        (ROOT, ("attributes", "segkd", "teacher"), 3, "teacher is 3, expected an object"),
        (PLAN, ("attributes", "segkd"), None, "attributes.segkd is None, expected an object"),
        (
            PLAN,
            ("attributes", "segkd", "plan", "units"),
            10**12,
            "plan.units is 1000000000000, expected a whole number",
        ),
        (PLAN, ("attributes", "segkd", "plan", "units"), 0, "plan.units is 0, expected a whole number of 2 to"),
        (PLAN, ("attributes", "segkd", "plan", "shard_tiles"), 1.0, "plan.shard_tiles is 1.0, expected a whole number"),
        (PLAN, ("attributes", "segkd", "plan", "roles"), {"train": "3"}, "plan.roles.train is '3', expected a whole"),
    ],
)
def test_the_file_the_key_and_what_was_expected_are_named(
    begun: Path, name: str, place: tuple[str | int, ...], value: Any, message: str
) -> None:
    mutated(begun / name, place, value)
    with pytest.raises(CacheDamagedError) as caught:
        CacheReader(begun, partial=True)
    assert str(caught.value).startswith(f"{begun / name} cannot be read (")
    assert message in str(caught.value)
    assert str(caught.value).endswith(f"); {AFTER_DAMAGE}")
    assert [damage.file for damage in verify(begun).damage] == [name]


@pytest.mark.parametrize("attributes", [None, {}, {"segkd": None}, [], "x"])
def test_a_group_without_a_specification_is_no_cache(begun: Path, attributes: Any) -> None:
    mutated(begun / ROOT, ("attributes",), attributes)
    with pytest.raises(CacheExistsError) as caught:
        read_spec(begun)
    assert str(caught.value) == f"{begun} is a Zarr group but not a segkd cache; choose another path"
