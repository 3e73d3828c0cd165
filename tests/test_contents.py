"""What an image shows: what its digest and its tones survive, what they tell apart, and how that is remembered."""

from __future__ import annotations

import io
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segkd.pipeline.config import load
from segkd.pipeline.data import contents, remembered
from segkd.pipeline.data.contamination import Twins, find_twins
from segkd.pipeline.data.contents import Content, content_of, read_contents
from segkd.pipeline.data.images import read_image
from segkd.pipeline.data.matching import LEAST_CONTRAST, TOLERANCE, Likeness, alike
from segkd.pipeline.data.readers import open_data
from segkd.pipeline.data.remembered import Memory, Stamp, stamp_of
from segkd.pipeline.data.sample import DataSource, Role
from segkd.pipeline.data.scenes import SceneConfig, SceneSource
from segkd.storage.errors import DataError

ROOT = Path(__file__).parents[1]
CAMVID = ROOT / "../shared/data/camvid"
SCENES = SceneSource(SceneConfig(train=12, auxiliary=0, select=0, report=12))
PHOTOGRAPHS = tuple(getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket"))

Pixels = npt.NDArray[np.uint8]


def pictures() -> list[Pixels]:
    return [SCENES.image(sample) for sample in SCENES.samples] + list(PHOTOGRAPHS)


def written(image: Pixels, form: str, **options: object) -> Pixels:
    """The image after a file of this format."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return np.asarray(Image.open(file).convert("RGB"))


def of_tones(*tones: Sequence[float] | npt.NDArray[np.generic]) -> list[Content]:
    """Contents with these tones and digests of their own."""
    return [Content(os.urandom(16), np.asarray(one, np.uint8).tobytes()) for one in tones]


# --- what a content is ------------------------------------------------------------------------------------------------


def test_equal_pixels_have_one_digest_in_whatever_file(tmp_path: Path) -> None:
    image = SCENES.image(SCENES.samples[0])
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image).save(tmp_path / "a.bmp")
    Image.fromarray(image).save(tmp_path / "a.webp", lossless=True)
    turned = Image.fromarray(np.rot90(image))
    exif = Image.Exif()
    exif[274] = 6  # to be shown a quarter turn clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert {content_of(read_image(path)) for path in tmp_path.iterdir()} == {content_of(image)}


@given(st.integers(0, 11), st.data())
@settings(max_examples=25)
def test_any_other_pixel_and_any_other_shape_is_another_digest(number: int, data: st.DataObject) -> None:
    image = SCENES.image(SCENES.samples[number])
    y, x, channel = (data.draw(st.integers(0, size - 1)) for size in image.shape)
    other = image.copy()
    other[y, x, channel] ^= 1
    assert content_of(other).digest != content_of(image).digest
    height, width, _ = image.shape
    assert content_of(image.reshape(width, height, 3)).digest != content_of(image).digest


filters = st.sampled_from([Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
photographs = st.integers(len(SCENES.samples), len(SCENES.samples) + len(PHOTOGRAPHS) - 1)


@given(
    # A box filter moves pixels where the ratio is no whole number: 128 x 160 pixels are too few for that.
    st.one_of(
        st.tuples(st.integers(0, len(SCENES.samples) - 1), filters),
        st.tuples(photographs, st.one_of(filters, st.just(Image.Resampling.BOX))),
    ),
    st.floats(0.4, 2.0),
    st.floats(0.9, 1.1),
    st.integers(75, 95),
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
)
@settings(max_examples=90)
def test_tones_survive_re_encoding_and_scaling(
    picture: tuple[int, Image.Resampling], scale: float, aspect: float, quality: int, form: str
) -> None:
    number, how = picture
    image = pictures()[number]
    height, width, _ = image.shape
    first = written(image, "JPEG", quality=95)
    size = round(width * scale * aspect), round(height * scale)
    second = written(np.asarray(Image.fromarray(first).resize(size, how)), form, quality=quality)
    (found,) = alike([content_of(second)], [content_of(picture) for picture in pictures()])
    assert (found.second, found.exact) == (number, False)


def test_different_scenes_and_photographs_differ() -> None:
    all_of_them = [content_of(image) for image in pictures()]
    for number, one in enumerate(all_of_them):
        assert alike([one], all_of_them[:number] + all_of_them[number + 1 :]) == []


def test_what_moves_before_a_still_camera_is_seen() -> None:
    image = PHOTOGRAPHS[1]
    other = image.copy()
    height, width, _ = image.shape
    other[height // 3 : height // 2, width // 3 : width // 3 + width // 8] = 0  # 2 % of the image
    assert alike([content_of(image)], [content_of(other)]) == []


def test_hardly_any_contrast_is_compared_by_pixels_alone() -> None:
    noise = np.random.default_rng(0).integers(0, 3, (2, 40, 60, 3)).astype(np.uint8)
    first, second = (content_of(image) for image in noise)
    assert alike([first], [second]) == []
    assert alike([first], [second, first]) == [Likeness(0, 1, 0, True)]


# --- finding likenesses -----------------------------------------------------------------------------------------------


def reference(first: Sequence[Content], second: Sequence[Content]) -> list[tuple[int, int, bool]]:
    """For each of ``first``, what it is found to be like: difference and exactness, by trying all pairs."""
    found = []
    for index, one in enumerate(first):
        best = None
        for other in second:
            a, b = (np.frombuffer(content.tones, np.uint8).astype(float) for content in (one, other))
            difference, contrast = np.abs(a - b).max(), min(a.std(), b.std())
            if one.digest == other.digest:
                best = (0, True)
            elif contrast >= LEAST_CONTRAST and difference <= TOLERANCE * contrast:
                best = min(best or (256, False), (int(difference), False), key=lambda pair: (not pair[1], pair[0]))
        if best is not None:
            found.append((index, *best))
    return found


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=60)
def test_the_search_finds_what_trying_all_pairs_finds(seed: int, m: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    originals = np.clip(rng.normal(120, rng.uniform(4, 60, (4, 1)), (4, 256)), 0, 255).round()

    def some(count: int) -> list[Content]:
        chosen = originals[rng.integers(0, 4, count)]
        jitter = rng.integers(-1, 2, chosen.shape) * rng.integers(0, 16, (count, 1))
        tones = np.clip(chosen + jitter, 0, 255).astype(np.uint8)
        return [Content(bytes([rng.integers(0, 30)]) * 16, one.tobytes()) for one in tones]

    first, second = some(m), some(n)
    found = alike(first, second)
    assert [(one.first, one.difference, one.exact) for one in found] == reference(first, second)
    for one in found:
        pair = [np.frombuffer(part[at].tones, np.uint8) for part, at in ((first, one.first), (second, one.second))]
        assert one.exact or np.abs(np.subtract(*pair, dtype=np.int16)).max() == one.difference


def test_the_tolerance_is_a_part_of_the_contrast() -> None:
    tones = np.tile([100, 180], 128)  # contrast 40
    near, far = tones.copy(), tones.copy()
    near[7], far[7] = tones[7] + 9, tones[7] + 11
    assert [one.first for one in alike(of_tones(near, far), of_tones(tones))] == [0]


@pytest.mark.skipif(not CAMVID.exists(), reason="needs CamVid in ../shared/data")
def test_frames_of_one_drive_are_no_twins_and_re_encoded_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    source = open_data(load("configs/camvid.toml").data)
    found = read_contents(source, source.samples)
    twins = find_twins(source.samples, found)
    assert twins == Twins((), (), ())
    report = [sample for sample in source.samples if sample.role is Role.REPORT][::10]
    again = [content_of(written(source.image(sample), "JPEG", quality=75)) for sample in report]
    assert [one.exact for one in alike([found[sample.id] for sample in report], again)] == [False] * len(report)


# --- remembering ------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path) -> DataSource:
    """Eight images in files, and a memory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return open_data(load(run).data)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[Pixels]:
    """The images whose content was computed."""
    seen: list[Pixels] = []

    def look(image: Pixels) -> Content:
        seen.append(image)
        return content_of(image)

    monkeypatch.setattr(contents, "content_of", look)
    return seen


def test_a_second_reading_decodes_only_what_has_changed(
    source: DataSource, looked: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_AT_ONCE", 3)
    first = read_contents(source, source.samples)
    assert first == {sample.id: content_of(source.image(sample)) for sample in source.samples}
    assert len(looked) == 8
    looked.clear()
    assert read_contents(source, source.samples) == first
    assert looked == []
    file = source.image_file(source.samples[3])
    assert file is not None
    Image.fromarray(255 - read_image(file)).save(file)
    again = read_contents(source, source.samples)
    assert len(looked) == 1
    assert [name for name in first if again[name] != first[name]] == [source.samples[3].id]


def test_what_was_done_before_an_interruption_is_remembered(
    source: DataSource, looked: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_AT_ONCE", 3)
    file = source.image_file(source.samples[7])
    assert file is not None
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=f"^{file}: cannot be read"):
        read_contents(source, source.samples)
    file.write_bytes(whole)
    looked.clear()
    read_contents(source, source.samples)
    assert len(looked) == 2


def test_a_damaged_memory_is_begun_anew(source: DataSource, looked: list[Pixels], tmp_path: Path) -> None:
    first = read_contents(source, source.samples)
    (database,) = (tmp_path / "xdg" / "segkd").iterdir()
    database.write_bytes(b"no database" * 1000)
    assert read_contents(source, source.samples) == first
    assert len(looked) == 16
    read_contents(source, source.samples)
    read_contents(source, source.samples)
    assert len(looked) == 24  # what was damaged was removed, and written anew by the next


def test_a_damaged_record_is_not_believed(source: DataSource, looked: list[Pixels], tmp_path: Path) -> None:
    first = read_contents(source, source.samples)
    (database,) = (tmp_path / "xdg" / "segkd").iterdir()
    with sqlite3.connect(database) as connection:
        (path,) = connection.execute("SELECT path FROM files LIMIT 1").fetchone()
        connection.execute("UPDATE files SET content = zeroblob(272) WHERE path = ?", (path,))
    connection.close()
    assert read_contents(source, source.samples) == first
    assert len(looked) == 9


def test_a_memory_that_cannot_be_written_is_no_error(
    source: DataSource, looked: list[Pixels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read_contents(source, source.samples) == read_contents(source, source.samples)
    assert len(looked) == 16


def test_a_locked_memory_is_left_alone(
    source: DataSource, looked: list[Pixels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_PATIENCE", 0.0)
    first = read_contents(source, source.samples)
    (database,) = (tmp_path / "xdg" / "segkd").iterdir()
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert read_contents(source, source.samples) == first
    assert len(looked) == 16
    other.execute("COMMIT")
    other.close()
    read_contents(source, source.samples)
    assert len(looked) == 16


def test_without_a_home_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", homeless)
    memory = Memory()
    stamp = Stamp(b"/a", 1, 2)
    memory.keep([(stamp, b"content")])
    assert memory.recall([stamp]) == {}


def test_a_file_that_cannot_be_asked_has_no_stamp(tmp_path: Path) -> None:
    assert stamp_of(tmp_path / "absent") is None


def test_scenes_are_looked_at_every_time(looked: list[Pixels]) -> None:
    for _ in range(2):
        found = read_contents(SCENES, SCENES.samples)
    assert len(looked) == 2 * len(SCENES.samples)
    assert len({content.digest for content in found.values()}) == len(SCENES.samples)
    assert not find_twins(SCENES.samples, found).contaminated
