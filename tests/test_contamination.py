"""Images in two roles: refused, warned of, recorded; and labels that a network has learned and should not have."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segkd.cli.main import main
from segkd.pipeline.config import RunConfig, load
from segkd.pipeline.data import contents
from segkd.pipeline.data.check import check
from segkd.pipeline.data.contents import Content, read_contents
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.sample import Role, Sample
from segkd.pipeline.student import checkpoint
from segkd.pipeline.student.leaks import LabelLeak, find_label_leaks
from segkd.pipeline.student.seen import SampleList, Seen
from segkd.pipeline.student.train import train
from segkd.pipeline.teacher.cache import teacher_cache
from segkd.pipeline.teacher.division import Share
from segkd.storage.errors import CheckpointError, ConfigError, ContaminationError

Files = dict[str, Path]


@pytest.fixture
def files(run: Path) -> Files:
    """The images of the tiny run by id: ``a`` is train, ``b`` auxiliary, ``c`` select, ``d`` report."""
    return {f"{folder}/{n}": run.parent / "images" / folder / f"{n}.png" for folder in "abcd" for n in range(2)}


@pytest.fixture
def alone(run: Path) -> RunConfig:
    """A run that learns from role train alone."""
    return changed(load(run), train={"auxiliary": 0})


def changed(run: RunConfig, **tables: dict[str, Any]) -> RunConfig:
    return replace(run, **{name: replace(getattr(run, name), **settings) for name, settings in tables.items()})


def put_copy(files: Files, of: str, to: str, *, coarser: bool = False) -> None:
    """Makes one sample's image another's; ``coarser``: as a JPEG saw it."""
    image = Image.open(files[of])
    if coarser:
        image.save(files[to].with_suffix(".jpg"), quality=75)
        image = Image.open(files[to].with_suffix(".jpg"))
        image.load()
        files[to].with_suffix(".jpg").unlink()
    image.save(files[to])


# --- policies ---------------------------------------------------------------------------------------------------------


def test_honest_data_are_trained_on_and_recorded(alone: RunConfig, tmp_path: Path) -> None:
    train(alone, tmp_path / "out", distill=False)
    for name in ("last", "best"):
        seen = checkpoint.load(tmp_path / f"out/{name}.safetensors")[0].samples
        source = open_data(alone.data)
        known = read_contents(source, source.samples)
        assert (seen.labels_of.names(), seen.images_of.names()) == (["a/0", "a/1"], [])
        assert seen.selected_on.names() == ["c/0", "c/1"]
        assert seen.labels_of.pixels() == [known[name].digest for name in ("a/0", "a/1")]
        assert seen.contaminated == 0
    document = json.loads((tmp_path / "out/run.json").read_text())
    counts = {"labels_of": 2, "labels_before": 0, "images_of": 0, "selected_on": 2, "contaminated": 0}
    assert document["samples"] == counts
    assert document["configuration"]["data"]["compare_contents"] == "refuse"


def test_a_scored_image_that_is_learned_from_is_refused(alone: RunConfig, files: Files, tmp_path: Path) -> None:
    put_copy(files, "a/1", "d/0")
    with pytest.raises(ContaminationError) as caught:
        train(alone, tmp_path / "out", distill=False)
    assert str(caught.value) == (
        f"sample 'd/0' (report, {files['d/0']}) is the same image as sample 'a/1' (train, {files['a/1']}), pixel for "
        "pixel, so its score would be too good; take one of them out of its role; or train all the same with "
        'data.compare_contents = "warn"'
    )
    assert not (tmp_path / "out").exists()


def test_re_encoded_pairs_are_counted(alone: RunConfig, files: Files, tmp_path: Path) -> None:
    put_copy(files, "a/1", "d/0", coarser=True)
    put_copy(files, "a/0", "c/1", coarser=True)
    with pytest.raises(ContaminationError) as caught:
        train(alone, tmp_path / "out", distill=False)
    text = str(caught.value)
    assert text.startswith(
        f"sample 'c/1' (select, {files['c/1']}) is the same image as sample 'a/0' (train, {files['a/0']}), encoded or "
        "scaled otherwise (their tones differ by at most "
    )
    assert "out of its role; there are 2 such pairs, segkd data check lists them; or train all" in text


def test_auxiliary_samples_count_where_they_are_drawn(run: Path, files: Files, tmp_path: Path) -> None:
    put_copy(files, "b/0", "d/1")
    teacher_cache(load(run))
    train(changed(load(run), train={"auxiliary": 0}), tmp_path / "alone")
    with pytest.raises(ContaminationError, match=r"^sample 'd/1' \(report, .*'b/0' \(auxiliary, .*, pixel for pixel"):
        train(load(run), tmp_path / "out")


def test_warned_of_it_goes_on_and_is_recorded(
    alone: RunConfig, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_copy(files, "a/1", "d/0")
    put_copy(files, "a/1", "d/1")
    train(changed(alone, data={"compare_contents": "warn"}), tmp_path / "out", distill=False)
    assert caplog.messages == [
        f"sample 'd/0' (report, {files['d/0']}) is the same image as sample 'a/1' (train, {files['a/1']}), pixel for "
        "pixel, so its score would be too good; take one of them out of its role; there are 2 such pairs, "
        "segkd data check lists them"
    ]
    assert checkpoint.load(tmp_path / "out/last.safetensors")[0].samples.contaminated == 2
    document = json.loads((tmp_path / "out/run.json").read_text())
    assert document["samples"]["contaminated"] == 2
    assert document["configuration"]["data"]["compare_contents"] == "warn"


def test_off_looks_at_no_image_and_is_recorded(
    alone: RunConfig, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_copy(files, "a/1", "d/0")
    monkeypatch.setattr(contents, "content_of", None)
    off = changed(alone, data={"compare_contents": "off"})
    train(off, tmp_path / "out", distill=False)
    seen = checkpoint.load(tmp_path / "out/last.safetensors")[0].samples
    assert (seen.contaminated, seen.labels_of.digests) == (None, None)
    assert seen.labels_of.names() == ["a/0", "a/1"]
    assert not any("is the same image" in item.message for item in check(off.data).complaints)


def test_what_else_has_two_roles_is_warned_of(
    run: Path, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_copy(files, "a/0", "b/1")
    put_copy(files, "c/0", "d/0")
    teacher_cache(load(run))
    caplog.clear()
    train(load(run), tmp_path / "out")
    assert caplog.messages == [
        f"sample 'd/0' (report, {files['d/0']}) is the same image as sample 'c/0' (select, {files['c/0']}), "
        "pixel for pixel, so what is chosen is chosen on what is reported; take one of them out of its role",
        f"sample 'b/1' (auxiliary, {files['b/1']}) is the same image as sample 'a/0' (train, {files['a/0']}), "
        "pixel for pixel, so it brings no image that is new; take it out of role auxiliary",
    ]


def test_data_check_lists_all_of_it(run: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    put_copy(files, "a/0", "c/0")
    put_copy(files, "b/0", "d/1", coarser=True)
    put_copy(files, "a/1", "b/1")
    config = load(run).data
    report = check(config)
    assert not report.ok
    found = [item for item in report.complaints if "is the same image as" in item.message]
    assert [(item.severity, item.message[:12]) for item in found] == [
        ("error", "sample 'c/0'"),
        ("error", "sample 'd/1'"),
        ("warning", "sample 'b/1'"),
    ]
    assert check(replace(config, compare_contents="warn")).ok
    # What was looked at for the check is known to whoever asks next.
    monkeypatch.setattr(contents, "content_of", None)
    source = open_data(config)
    assert len(read_contents(source, source.samples)) == 8


def test_a_resumed_run_must_see_the_same_images(alone: RunConfig, files: Files, tmp_path: Path) -> None:
    train(alone, tmp_path / "out", distill=False)
    Image.fromarray(255 - np.asarray(Image.open(files["a/0"]))).save(files["a/0"])
    with pytest.raises(CheckpointError, match="differs in the samples"):
        train(alone, tmp_path / "out", distill=False, resume=True)


# --- label leaks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def leaking(alone: RunConfig, files: Files) -> RunConfig:
    """A run whose teacher is a checkpoint that has learned the labels of ``a``, two of which have other names here."""
    folder = files["a/0"].parents[2]
    train(alone, folder / "teacher", distill=False)
    put_copy(files, "a/0", "b/1")
    put_copy(files, "a/1", "d/0")
    for n in range(2):
        Image.fromarray(255 - np.asarray(Image.open(files[f"a/{n}"]))).save(files[f"a/{n}"])
    assert alone.teacher is not None
    return changed(
        alone,
        train={"auxiliary": 1},
        teacher={"reference": str(folder / "teacher/last.safetensors"), "stride": None},
    )


def message(run: RunConfig, files: Files) -> str:
    assert run.teacher is not None
    return (
        f"{run.teacher.reference} was trained on the labels of 1 auxiliary, 1 report samples of these data, the first "
        f"sample 'b/1' (auxiliary, {files['b/1']}), as 'a/0': what it scores there, and what a student of it scores, "
        "proves nothing; take a network that has learned the labels of role train alone"
    )


def by_another(run: RunConfig, files: Files, path: Path) -> str:
    """The same of a checkpoint that has not learned the labels itself."""
    assert run.teacher is not None
    return message(run, files).replace(
        run.teacher.reference, f"{path}, or a network that it began with or was taught by,"
    )


def test_labels_that_a_teacher_has_learned_are_found_by_pixels(leaking: RunConfig, files: Files) -> None:
    source = open_data(leaking.data)
    assert leaking.teacher is not None
    found = find_label_leaks(leaking.teacher.reference, source, read_contents(source, source.samples))
    by_id = {sample.id: sample for sample in source.samples}
    assert found.leaks == (LabelLeak(by_id["b/1"], "a/0", itself=True), LabelLeak(by_id["d/0"], "a/1", itself=True))
    assert found.describe(source) == message(leaking, files)


def test_both_stages_warn_of_label_leaks(
    leaking: RunConfig, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher_cache(leaking, share=Share(number=1, tasks=2, origin="test"))
    assert message(leaking, files) not in caplog.messages  # Only the first task looks.
    teacher_cache(leaking)
    assert caplog.messages.count(message(leaking, files)) == 1
    caplog.clear()
    train(leaking, tmp_path / "out")
    assert caplog.messages == [message(leaking, files)]
    caplog.clear()
    assert leaking.teacher is not None
    shutil.move(leaking.teacher.reference, tmp_path / "gone.safetensors")
    train(leaking, tmp_path / "again")
    assert caplog.messages == []


def test_labels_that_were_learned_before_a_warm_start_are_followed(
    leaking: RunConfig, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice: by what the network began with, and by what that one began with."""
    assert leaking.teacher is not None
    first, clean = Path(leaking.teacher.reference), changed(leaking, train={"auxiliary": 0})
    begun = changed(clean, student={"init": str(first)})
    train(begun, tmp_path / "second", distill=False)
    warned = f"{first} was trained on the labels of 1 report samples"  # Auxiliary ones are not drawn.
    assert len([text for text in caplog.messages if text.startswith(warned)]) == 1
    second = tmp_path / "second/last.safetensors"
    train(changed(clean, student={"init": str(second)}), tmp_path / "third", distill=False)
    source = open_data(leaking.data)
    known = read_contents(source, source.samples)
    for path in (second, tmp_path / "third/last.safetensors"):
        samples = checkpoint.load(path)[0].samples
        assert samples.labels_of.pixels() == [known[name].digest for name in ("a/0", "a/1")]
        found = find_label_leaks(path, source, known)
        assert [leak.sample.id for leak in found.leaks] == ["b/1", "d/0"]
        assert found.describe(source) == by_another(leaking, files, path)
    assert [part.names() for part in checkpoint.load(second)[0].samples.labels_before] == [["a/0", "a/1"]]
    assert checkpoint.load(tmp_path / "third/last.safetensors")[0].samples.to_dict()["labels_before"] == 4
    # A run that began with a checkpoint goes on as the same run.
    train(begun, tmp_path / "second", distill=False, resume=True)


def test_labels_that_a_teacher_s_teacher_has_learned_are_followed(
    leaking: RunConfig, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher_cache(leaking)
    train(leaking, tmp_path / "student")
    path = tmp_path / "student/last.safetensors"
    source = open_data(leaking.data)
    found = find_label_leaks(path, source, read_contents(source, source.samples))
    assert [leak.sample.id for leak in found.leaks] == ["b/1", "d/0"]
    assert found.describe(source) == by_another(leaking, files, path)
    caplog.clear()
    taught = changed(leaking, teacher={"reference": str(path)}, cache={"path": str(tmp_path / "next.zarr")})
    teacher_cache(taught)
    assert by_another(leaking, files, path) in caplog.messages
    # On labels alone nothing of the teacher's is learned.
    train(changed(leaking, train={"auxiliary": 0}), tmp_path / "plain", distill=False)
    assert checkpoint.load(tmp_path / "plain/last.safetensors")[0].samples.labels_before == ()


def test_what_a_network_has_learned_itself_is_found_whatever_it_began_with(
    alone: RunConfig, files: Files, tmp_path: Path
) -> None:
    off = changed(alone, data={"compare_contents": "off"})
    train(off, tmp_path / "first", distill=False)
    train(changed(alone, student={"init": str(tmp_path / "first/last.safetensors")}), tmp_path / "out", distill=False)
    path = tmp_path / "out/last.safetensors"
    source = open_data(alone.data)
    with pytest.raises(CheckpointError) as caught:
        find_label_leaks(path, source, read_contents(source, source.samples))
    assert str(caught.value) == (
        f"{path}: keeps no digests of a network that it began with or was taught by, which was trained with "
        'data.compare_contents = "off"; whether it has learned labels that it should not cannot be told'
    )
    put_copy(files, "a/1", "d/0")
    source = open_data(alone.data)
    found = find_label_leaks(path, source, read_contents(source, source.samples))
    assert [leak.sample.id for leak in found.leaks] == ["d/0"]


def test_a_run_that_was_begun_before_beginnings_were_kept_learns_of_them(alone: RunConfig, tmp_path: Path) -> None:
    train(alone, tmp_path / "first", distill=False)
    begun = changed(alone, student={"init": str(tmp_path / "first/last.safetensors")})
    train(begun, tmp_path / "out", distill=False)
    path = tmp_path / "out/last.safetensors"
    description, tensors = checkpoint.load(path)
    older = replace(description, samples=replace(description.samples, labels_before=()))
    checkpoint.save(path, replace(older, step=1), tensors)
    train(begun, tmp_path / "out", distill=False, resume=True)
    samples = checkpoint.load(path)[0].samples
    assert samples.labels_before == (samples.labels_of,) == description.samples.labels_before


def test_weights_alone_tell_of_no_labels(alone: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(alone, tmp_path / "out", distill=False)
    caplog.clear()
    weights = checkpoint.part(checkpoint.load(tmp_path / "out/last.safetensors")[1], checkpoint.MODEL)
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    train(changed(alone, student={"init": str(tmp_path / "weights.safetensors")}), tmp_path / "next", distill=False)
    assert checkpoint.load(tmp_path / "next/last.safetensors")[0].samples.labels_before == ()
    assert not [text for text in caplog.messages if "labels" in text]


def test_a_score_on_what_a_network_has_learned_is_warned_of(
    leaking: RunConfig, run: Path, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    assert leaking.teacher is not None
    path = leaking.teacher.reference
    expected = (
        f"{path} was trained on the labels of 1 report samples of these data, the first sample 'd/0' (report, "
        f"{files['d/0']}), as 'a/1': what it scores there, and what a student of it scores, proves nothing; take a "
        "network that has learned the labels of role train alone"
    )

    def told(*words: str) -> list[str]:
        caplog.clear()
        result = CliRunner().invoke(main, ["evaluate", "-q", "-c", str(run), *words])
        assert result.exit_code == 0, result.output
        return caplog.messages

    assert told(path) == [expected]
    run.write_text(run.read_text().replace("stride = 4", ""))
    assert expected in told("--teacher", "-s", f"teacher.reference='{path}'")
    assert expected in told("--student", "-s", f"student.init='{path}'")
    assert expected not in told(path, "--role", "select")
    assert expected not in told(path, "--role", "train")
    assert expected not in told(path, "-s", "data.compare_contents='off'")


def test_an_honest_teacher_leaks_nothing(alone: RunConfig, tmp_path: Path) -> None:
    train(alone, tmp_path / "out", distill=False)
    source = open_data(alone.data)
    assert not find_label_leaks(tmp_path / "out/last.safetensors", source, read_contents(source, source.samples))


def test_a_teacher_without_digests_cannot_be_told(
    alone: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(changed(alone, data={"compare_contents": "off"}), tmp_path / "out", distill=False)
    path = tmp_path / "out/last.safetensors"
    expected = (
        f'{path}: keeps no digests of its samples, being trained with data.compare_contents = "off"; '
        "whether it has learned labels that it should not cannot be told"
    )
    with pytest.raises(CheckpointError) as caught:
        find_label_leaks(path, open_data(alone.data), {})
    assert str(caught.value) == expected
    teacher_cache(changed(alone, teacher={"reference": str(path), "stride": None}))
    assert expected in caplog.messages


# --- lists ------------------------------------------------------------------------------------------------------------

NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), unique=True)


@given(NAMES, st.booleans())
def test_lists_unpack_to_what_was_packed(names: list[str], compared: bool) -> None:
    samples = [Sample(id=name, role=Role.TRAIN, labelled=True) for name in names]
    known = {name: Content(bytes([n % 256] * 16), bytes(256)) for n, name in enumerate(names)}
    packed = SampleList.of(samples, known if compared else None)
    assert packed.names() == names
    assert packed.pixels() == ([known[name].digest for name in names] if compared else None)


def test_twelve_thousand_samples_take_a_third_of_a_megabyte() -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample(id=f"leftImg8bit/train/city{n % 40}/city{n % 40}_{n:06d}_000019", role=Role.TRAIN, labelled=True)
        for n in range(12_000)
    ]
    packed = SampleList.of(samples, {sample.id: Content(rng.bytes(16), bytes(256)) for sample in samples})
    assert len(packed.ids) + len(packed.digests or "") < 350_000


@pytest.mark.parametrize(
    "wrong",
    [{"count": 2}, {"ids": "!"}, {"ids": "AAAA"}, {"digests": "AAAA"}, {"digests": "*"}],
)
def test_lists_that_do_not_unpack_are_refused(wrong: dict[str, Any]) -> None:
    sample = Sample(id="a", role=Role.TRAIN, labelled=True)
    good = SampleList.of([sample], {"a": Content(bytes(16), bytes(256))})
    count = wrong.get("count", 1)
    with pytest.raises(ConfigError) as caught:
        replace(good, **wrong)
    assert str(caught.value) == f"expected {count} ids and as many digests, packed as docs/format.md says"


def test_a_network_that_has_seen_nothing_says_so() -> None:
    counts = {"labels_of": 0, "labels_before": 0, "images_of": 0, "selected_on": 0}
    assert Seen().to_dict() == {**counts, "contaminated": None}
