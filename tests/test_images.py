"""Image files: upright sizes and pixels, modes, bounds, damage."""

from __future__ import annotations

import hashlib
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from segkd.pipeline.data.images import digest, read_image, read_raw_labels, read_size
from segkd.storage.errors import DataError

TALL = np.random.default_rng(0).integers(0, 256, (5, 3, 3), np.uint8)
"""H, W = 5, 3."""

LEAVE_OUT = "restore the file, or leave it out: segkd data check --list-broken writes a list for data.skip"


def fails(message: str) -> pytest.RaisesExc[DataError]:
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


# What a viewer does to the stored pixels, EXIF 2.3, table "Orientation".
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("extension", ["png", "tif", "webp"])
def test_pixels_and_size_are_upright(tmp_path: Path, orientation: int, extension: str) -> None:
    file = tmp_path / f"a.{extension}"
    exact = {"lossless": True} if extension == "webp" else {}
    Image.fromarray(TALL).save(file, exif=with_orientation(orientation), **exact)
    expected = UPRIGHT[orientation](TALL)
    np.testing.assert_array_equal(read_image(file), expected)
    assert read_size(file) == expected.shape[:2]


def test_jpeg_of_a_camera_on_its_side(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    ramp = np.tile(np.linspace(0, 255, 48, dtype=np.uint8)[None, :, None], (32, 1, 3))
    Image.fromarray(ramp).save(file, quality=95, exif=with_orientation(6))
    assert read_size(file) == (48, 32)
    assert np.abs(read_image(file).astype(int) - UPRIGHT[6](ramp)).max() <= 4


def test_label_maps_turn_with_their_images(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(TALL[..., 0]).save(file, exif=with_orientation(8))
    np.testing.assert_array_equal(read_raw_labels(file, "values"), UPRIGHT[8](TALL[..., 0]))


def test_size_needs_the_header_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((64, 48, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-10])
    assert read_size(file) == (64, 48)
    truncated = re.escape(f"{file}: cannot be read (image file is truncated)")
    with pytest.raises(
        DataError,
        match=f"^{truncated}; {LEAVE_OUT}$",
    ):
        read_image(file)


def test_pixels_can_be_written_to(tmp_path: Path) -> None:
    Image.fromarray(TALL).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").flags.writeable


def test_grey_palette_and_opaque_images_become_rgb(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    grey = TALL[..., 0]
    Image.fromarray(grey).save(file)
    np.testing.assert_array_equal(read_image(file), np.repeat(grey[..., None], 3, axis=2))
    palette = Image.fromarray(grey % 3).convert("P")
    palette.putdata((grey % 3).ravel())
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(file)
    np.testing.assert_array_equal(read_image(file), 10 + 30 * (grey % 3)[..., None] + [0, 10, 20])
    Image.fromarray(np.dstack([TALL, np.full_like(grey, 255)])).save(file)
    np.testing.assert_array_equal(read_image(file), TALL)


def test_transparent_pixels_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    alpha = np.full((5, 3, 1), 255, np.uint8)
    alpha[2, 1] = 254
    Image.fromarray(np.dstack([TALL, alpha])).save(file)
    message = (
        f"{file}: an image with transparent pixels, expected opaque ones; "
        "flatten it onto the background that the networks are to see"
    )
    with fails(message):
        read_image(file)
    palette = Image.new("P", (2, 2))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(file, transparency=0)
    with fails(message):
        read_image(file)


REMEDY = "expected 8-bit RGB, grey or palette; convert it, with the range of brightness that the networks are to see"


def test_deep_grey_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(file)
    with fails(f"{file}: an image with 16 bits a channel, {REMEDY}"):
        read_image(file)


def test_deep_colour_is_refused_though_its_mode_looks_shallow(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png_of_16_bit_colour())
    with Image.open(file) as image:
        assert image.mode == "RGB"
    with fails(f"{file}: an image with 16 bits a channel, {REMEDY}"):
        read_image(file)


def test_other_colour_spaces_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    Image.new("CMYK", (4, 4)).save(file)
    with fails(f"{file}: an image with pixels of mode CMYK, {REMEDY}"):
        read_image(file)


def test_more_pixels_than_allowed_are_refused_before_decoding(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(TALL).save(file)
    assert read_size(file, max_pixels=15) == (5, 3)
    for read in (read_size, read_image):
        with fails(
            f"{file}: 3 x 5 pixels, more than the 14 that data.max_pixels allows; "
            "raise it if the image is meant to be that large"
        ):
            read(file, max_pixels=14)


def test_a_large_image_is_bounded_by_us_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("1", (20_000, 10_000)).save(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_size(file) == (10_000, 20_000)
        with fails(
            f"{file}: 20000 x 10000 pixels, more than the 150000000 that data.max_pixels allows; "
            "raise it if the image is meant to be that large"
        ):
            read_image(file, max_pixels=150_000_000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image of a known format"),
        (b"text", "not an image of a known format"),
        (None, "No such file or directory"),
    ],
)
def test_what_is_no_image(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "a.png"
    if content is not None:
        file.write_bytes(content)
    for read in (read_size, read_image):
        with fails(f"{file}: cannot be read ({reason}); {LEAVE_OUT}"):
            read(file)


def test_every_cut_of_a_png_is_a_data_error(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(TALL).save(file)
    whole = file.read_bytes()
    # The last 21 bytes are checksums and the end marker, without which the pixels are complete.
    for length in range(len(whole) - 21):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match="cannot be read"):
            read_image(file)


def test_digest_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a") == hashlib.sha256(b"abc").digest()[:16]
    with fails(f"{tmp_path / 'b'}: cannot be read (No such file or directory); {LEAVE_OUT}"):
        digest(tmp_path / "b")


def test_raw_values_are_what_stands_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    for depth in (np.uint8, np.uint16):
        values = np.random.default_rng(1).integers(0, np.iinfo(depth).max, (5, 3), depth)
        Image.fromarray(values).save(file)
        np.testing.assert_array_equal(read_raw_labels(file, "values"), values)
    Image.fromarray(TALL[..., 0] > 127).save(file)
    np.testing.assert_array_equal(read_raw_labels(file, "values"), (TALL[..., 0] > 127).astype(np.uint8))


def test_palette_labels_are_indices_unless_colours_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.new("P", (2, 2))
    image.putdata(indices.ravel())
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
    image.save(file)
    np.testing.assert_array_equal(read_raw_labels(file, "values"), indices)
    np.testing.assert_array_equal(read_raw_labels(file, "colours")[..., 0], 9 - indices)


def test_label_maps_of_the_wrong_kind(tmp_path: Path) -> None:
    colour, grey, lossy = tmp_path / "c.png", tmp_path / "g.png", tmp_path / "l.jpg"
    Image.fromarray(TALL).save(colour)
    Image.fromarray(TALL[..., 0]).save(grey)
    Image.fromarray(TALL[..., 0]).save(lossy)
    with fails(
        f"{colour}: a label map of mode RGB, expected one channel of class values; "
        "if its colours are the classes, map them in [data.label_colours]"
    ):
        read_raw_labels(colour, "values")
    with fails(
        f"{grey}: a label map of one channel (mode L), expected the colours of [data.label_colours]; "
        "map its values in [data.label_values] instead"
    ):
        read_raw_labels(grey, "colours")
    with fails(f"{lossy}: a label map in JPEG, which does not keep values; make label maps as PNG"):
        read_raw_labels(lossy, "values")


def png_of_16_bit_colour() -> bytes:
    """A PNG of 1 x 1 pixel, 16 bits in each of red, green and blue, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(">HHH", 300, 600, 900))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
