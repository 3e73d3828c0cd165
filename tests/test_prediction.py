"""Label maps and overlays in files: where they go, what they hold, and what is refused before a file is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segkd.pipeline.data.sample import Classes
from segkd.pipeline.evaluation.prediction import images_below, predict_images
from segkd.storage.errors import ConfigError, DataError, NetworkError, OutputExistsError
from segkd.storage.geometry import Mapping, network_axis

CLASSES = Classes(names=("dark", "bright"), palette=((20, 30, 40), (250, 240, 10)))


def by_brightness(image):
    """Class 1 where a pixel is bright; the grid is the image's own."""
    bright = torch.from_numpy(image.mean(axis=-1) / 255)
    mapping = Mapping(network_axis(image.shape[0], image.shape[0]), network_axis(image.shape[1], image.shape[1]))
    return torch.stack([1 - bright, bright])[None].float(), mapping


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "seq.1/night").mkdir(parents=True)
    for index, name in enumerate(("a.png", "seq.1/b.002.jpg", "seq.1/night/c.PNG")):
        pixels = np.zeros((16, 24 + 8 * index, 3), np.uint8)
        pixels[:, : 8 * (index + 1)] = 255
        Image.fromarray(pixels).save(images / name, quality=95)
    (images / "notes.txt").write_text("no image")
    (images / ".hidden.png").write_bytes(b"")
    return images


def files_in(output: Path) -> list[str]:
    return sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())


def test_images_below_keeps_nested_names_and_leaves_the_rest_out(folder):
    found = images_below(folder)
    assert [name for name, _ in found] == ["a", "seq.1/b.002", "seq.1/night/c"]
    assert [path.name for _, path in found] == ["a.png", "b.002.jpg", "c.PNG"]


def test_label_maps_hold_class_indices_and_show_in_colours(folder, tmp_path):
    done = []
    summary = predict_images(by_brightness, images_below(folder), tmp_path / "out", CLASSES, on_image=done.append)
    assert summary.to_dict() == {"written": 3, "skipped": {}}
    assert done == ["a", "seq.1/b.002", "seq.1/night/c"]
    assert files_in(tmp_path / "out") == [
        *("labels/a.png", "labels/seq.1/b.002.png", "labels/seq.1/night/c.png"),
        *("overlays/a.jpg", "overlays/seq.1/b.002.jpg", "overlays/seq.1/night/c.jpg"),
    ]
    with Image.open(tmp_path / "out/labels/seq.1/night/c.png") as image:
        assert image.mode == "P"
        labels, shown = np.array(image), np.array(image.convert("RGB"))
    assert labels.tolist() == [[1] * 24 + [0] * 16] * 16
    assert shown[0, 0].tolist() == list(CLASSES.palette[1])
    assert shown[0, -1].tolist() == list(CLASSES.palette[0])
    with Image.open(tmp_path / "out/overlays/a.jpg") as image:
        assert image.size == (24, 16)
        np.testing.assert_allclose(image.getpixel((23, 15)), (10, 15, 20), atol=4)


def test_overlays_are_optional(folder, tmp_path):
    predict_images(by_brightness, images_below(folder), tmp_path / "out", CLASSES, overlays=False)
    assert all(name.startswith("labels/") for name in files_in(tmp_path / "out"))


def test_nothing_is_overwritten_unless_allowed(folder, tmp_path):
    output = tmp_path / "out"
    (output / "labels/seq.1").mkdir(parents=True)
    (output / "labels/seq.1/b.002.png").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"b\.002\.png exists, and so do 0 more of 6 files to write; choose"):
        predict_images(by_brightness, images_below(folder), output, CLASSES)
    assert files_in(output) == ["labels/seq.1/b.002.png"]
    assert (output / "labels/seq.1/b.002.png").read_text() == "mine"
    assert predict_images(by_brightness, images_below(folder), output, CLASSES, overwrite=True).written == 3
    with Image.open(output / "labels/seq.1/b.002.png") as image:
        assert image.size == (32, 16)


def test_an_unreadable_image_stops_the_run_or_is_named_and_counted(folder, tmp_path):
    whole = (folder / "seq.1/b.002.jpg").read_bytes()
    (folder / "seq.1/b.002.jpg").write_bytes(whole[: len(whole) // 2])
    images = images_below(folder)
    with pytest.raises(DataError, match=r"b\.002\.jpg: cannot be read \(.+\); .+: --on-error skip --overwrite$"):
        predict_images(by_brightness, images, tmp_path / "fail", CLASSES)
    assert files_in(tmp_path / "fail") == ["labels/a.png", "overlays/a.jpg"]
    done = []
    summary = predict_images(by_brightness, images, tmp_path / "skip", CLASSES, on_error="skip", on_image=done.append)
    assert summary.written == 2
    assert list(summary.skipped) == ["seq.1/b.002"]
    assert "b.002.jpg" in summary.skipped["seq.1/b.002"]
    assert len(done) == 3
    assert "labels/seq.1/b.002.png" not in files_in(tmp_path / "skip")


def test_a_file_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    def half(_image, path, **_options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space left") as caught:
        predict_images(by_brightness, images_below(folder), tmp_path / "out", CLASSES)
    assert Path(caught.value.filename).is_relative_to(tmp_path / "out" / "overlays")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("output", [".", "out"])
def test_predictions_are_not_images_the_next_time(folder, output):
    found = images_below(folder)
    predict_images(by_brightness, found, folder / output, CLASSES)
    assert len(images_below(folder)) > len(found)
    assert images_below(folder, output=folder / "seq" / ".." / output) == found


@pytest.mark.parametrize("name", ["../a", "/etc/a", "b/../../a", ""])
def test_names_never_leave_the_output_folder(folder, tmp_path, name):
    with pytest.raises(DataError, match="would be written outside"):
        predict_images(by_brightness, [(name, folder / "a.png")], tmp_path / "out", CLASSES)
    assert not (tmp_path / "out").exists()


def test_two_images_of_one_name_are_refused(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    with pytest.raises(DataError, match="two images are called 'a' and would share one label map; rename one"):
        predict_images(by_brightness, images_below(folder), tmp_path / "out", CLASSES)


def test_more_classes_than_a_label_map_holds_are_refused(folder, tmp_path):
    many = Classes(names=tuple(map(str, range(256))), palette=((0, 0, 0),) * 256)
    with pytest.raises(ConfigError, match="256 classes do not fit into label maps of 8 bits; expected at most 255"):
        predict_images(by_brightness, images_below(folder), tmp_path / "out", many)


def test_an_output_of_other_classes_is_refused(folder, tmp_path):
    three = Classes(names=("a", "b", "c"), palette=((0, 0, 0),) * 3)
    with pytest.raises(NetworkError, match=r"a\.png: the output has shape \(1, 2, 16, 24\), expected \(1, 3, h, w\)"):
        predict_images(by_brightness, images_below(folder), tmp_path / "out", three)


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: not a folder; give the folder that holds the images"):
        images_below(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no image in it or below; expected files ending in \.bmp \.jpeg \.jpg"):
        images_below(tmp_path)
