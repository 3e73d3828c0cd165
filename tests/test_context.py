"""The context coder: lossless for any bytes, one stream on every machine, never more than wrong codes from damage."""

import contextlib
import hashlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec

from segkd.pipeline.teacher.cache import summarise
from segkd.storage import context, context_kernel
from segkd.storage.chunks import require
from segkd.storage.coding import Raw, UniformSteps
from segkd.storage.context import GRADED, MARKED, PLANES, RAW, decode, encode
from segkd.storage.context_codec import ContextCodec
from segkd.storage.errors import CacheMismatchError, ConfigError
from segkd.storage.geometry import Mapping, network_axis
from segkd.storage.layout import PlannedSample, plan_units
from segkd.storage.reader import CacheReader
from segkd.storage.spec import CacheSpec, TargetSpec
from segkd.storage.table import CodedSample
from segkd.storage.writer import CacheWriter


def field(seed: int, classes: int, height: int, width: int, levels: int = 24) -> np.ndarray:
    """Codes as a distribution's are: smooth log-probabilities by integer arithmetic alone, the top class marked."""
    rng = np.random.default_rng(seed)
    waves = rng.integers(1, 9, (classes, 4, 3))
    i, j = np.mgrid[:height, :width]
    logits = np.zeros((classes, height, width), np.int64)
    for k in range(classes):
        for down, right, start in waves[k]:
            phase = (down * i + right * j + 8 * start) % 64
            logits[k] += np.minimum(phase, 64 - phase)
    logits += rng.integers(0, 3, logits.shape)
    top = logits.argmax(axis=0)
    behind = logits.max(axis=0) - logits
    codes = np.maximum(levels * 7 // 10 - behind * levels // 40, 0).astype(np.uint8)
    np.put_along_axis(codes, top[None], 255, axis=0)
    return codes


def padded(codes: np.ndarray, tile: int = 64) -> np.ndarray:
    out = np.zeros((len(codes), tile, tile), np.uint8)
    out[:, : codes.shape[1], : codes.shape[2]] = codes
    return out


shapes = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(np.uint8, shapes))
def test_any_bytes_come_back(codes):
    data = encode(codes)
    assert len(data) <= codes.size + 1
    np.testing.assert_array_equal(decode(data, codes.shape), codes)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_marked_cells_come_back(data):
    """One 255 in each cell of a box, the rest mostly 0, so that the marked mode itself is put to the test."""
    shape = data.draw(shapes)
    values = hnp.arrays(np.uint8, shape, elements=st.integers(0, 254), fill=st.just(0))
    codes = np.maximum(data.draw(values), data.draw(st.integers(0, 1))).astype(np.uint8)
    top = data.draw(hnp.arrays(np.int64, (1, *shape[1:]), elements=st.integers(0, shape[0] - 1)))
    np.put_along_axis(codes, top, 255, axis=0)
    box = data.draw(st.tuples(st.integers(0, shape[1]), st.integers(0, shape[2])))
    codes[:, box[0] :] = 0
    codes[:, :, box[1] :] = 0
    np.testing.assert_array_equal(decode(encode(codes), shape), codes)


@pytest.mark.parametrize(
    ("codes", "mode"),
    [
        pytest.param(field(0, 11, 64, 64), MARKED, id="distribution"),
        pytest.param(padded(field(1, 11, 26, 56)), MARKED, id="padded"),
        pytest.param(field(2, 11, 64, 64, levels=254), MARKED, id="fine levels"),
        pytest.param(np.maximum(field(2, 11, 64, 64), 3), GRADED, id="graded"),
        pytest.param(np.maximum(field(5, 300, 4, 6), 1), GRADED, id="more graded classes than are averaged"),
        pytest.param(padded(field(3, 1, 5, 5)), MARKED, id="one class"),
        pytest.param(field(4, 150, 32, 32), MARKED, id="three words of classes"),
        pytest.param(np.full((3, 64, 64), 7, np.uint8), PLANES, id="constant"),
        pytest.param(np.zeros((3, 64, 64), np.uint8), PLANES, id="nothing"),
        pytest.param(field(5, 3, 64, 64)[:1] // 2, PLANES, id="one smooth plane"),
        pytest.param(np.full((2, 64, 64), 255, np.uint8), PLANES, id="two marks a cell"),
        pytest.param(np.random.default_rng(0).integers(0, 256, (2, 64, 64), np.uint8), RAW, id="noise"),
        pytest.param(np.array([[[9]]], np.uint8), RAW, id="one byte"),
    ],
)
def test_each_mode_comes_back(codes, mode):
    data = encode(codes)
    assert data[0] == mode
    np.testing.assert_array_equal(decode(data, codes.shape), codes)


def test_many_classes_few_of_them_present():
    codes = np.zeros((65_535, 3, 4), np.uint8)
    codes[40_000], codes[[3, 300, 65_534], 1, 2] = 255, 9
    data = encode(codes)
    assert len(data) < 60
    np.testing.assert_array_equal(decode(data, codes.shape), codes)
    with pytest.raises(ValueError, match=r"takes uint8 arrays \(classes, h, w\), got uint8 \(65536, 1, 1\)"):
        encode(np.zeros((65_536, 1, 1), np.uint8))


@pytest.mark.parametrize("mode", [MARKED, PLANES, GRADED])
def test_rows_before_the_stop_are_right(mode):
    codes = field(6, 5, 40, 30)
    if mode == PLANES:
        codes = np.minimum(codes, 254)
    if mode == GRADED:
        codes = np.maximum(codes, 1)
    data = encode(codes)
    assert data[0] == mode
    for stop in (0, 1, 17, 40, 64):
        np.testing.assert_array_equal(decode(data, codes.shape, stop=stop)[:, :stop], codes[:, :stop])


def test_the_stream_is_the_documented_one():
    """Format 1.0 promises these bytes: whoever changes them has made another codec."""
    streams = [
        encode(field(7, 11, 64, 64)),
        encode(field(8, 3, 64, 64)[:1] // 2),
        encode(field(9, 150, 32, 32)),
        encode(np.maximum(field(7, 11, 64, 64), 3)),
    ]
    digests = [hashlib.sha256(data).hexdigest()[:16] for data in streams]
    assert digests == STREAMS


def test_threads_get_the_same_bytes():
    codes = [field(seed, 11, 64, 64) for seed in range(4)]
    expected, got = [encode(tile) for tile in codes], [b""] * 4

    def work(place):
        for _ in range(3):
            got[place] = encode(decode(encode(codes[place]), codes[place].shape))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_smaller_than_zstd():
    distribution = [field(seed, 11, 64, 64) for seed in range(3)]
    assert sum(map(len, map(encode, distribution))) < 0.7 * sum(len(Zstd(19).encode(tile)) for tile in distribution)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_gives_an_array_or_a_value_error(data):
    codes = SMALL[data.draw(st.integers(0, len(SMALL) - 1))]
    stream = bytearray(encode(codes))
    for _ in range(data.draw(st.integers(0, 3))):
        stream[data.draw(st.integers(0, min(len(stream) - 1, 40)))] = data.draw(st.integers(0, 255))
    stream = stream[: data.draw(st.integers(0, len(stream)))]
    with contextlib.suppress(ValueError):
        assert decode(bytes(stream), codes.shape).shape == codes.shape


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([(1, 4, 4), (3, 64, 64), (200, 8, 8)]))
def test_any_bytes_decode_to_an_array_or_a_value_error(data, shape):
    with contextlib.suppress(ValueError):
        assert decode(data, shape).shape == shape


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no bytes to decode"),
        (b"\x00ab", "2 bytes cannot be an array of shape"),
        (
            b"\x03\x01",
            "a tile is coded in mode 3 of the context coder, which this version of segkd does not know; "
            "read the cache with the version that wrote it, or write it again",
        ),
        (b"\x02\x80", "the header ends early"),
        (b"\x02\xff\xff\xff\xff\xff\x01", "more than 35 bits"),
        (b"\x02\x05\x01\x01\x01\x00", "a box of 5×1 cells and 1 classes does not fit"),
        (b"\x02\x01\x01\x00\x00", "a box of 1×1 cells and 0 classes does not fit"),
        (b"\x01\x01\x01\x04", "4 classes are not empty of 3"),
        (b"\x01\x01\x01\x01\x06", "does not name 1 of 3"),
    ],
)
def test_headers_that_cannot_be(data, message):
    with pytest.raises(ValueError, match=message):
        decode(data, (3, 4, 4))


def make_array(path, codes, **options):
    array = zarr.create_array(
        path,
        shape=(8, *codes.shape),
        chunks=(1, *codes.shape),
        shards=(4, *codes.shape),
        dtype=codes.dtype,
        serializer=ContextCodec(),
        compressors=[Crc32cCodec()],
        **options,
    )
    array[2], array[7] = codes, codes // 2
    return array


def test_zarr_reads_it_in_a_fresh_process(tmp_path):
    codes = field(10, 11, 32, 32)
    make_array(tmp_path / "a.zarr", codes)
    np.save(tmp_path / "codes.npy", codes)
    program = (
        "import numpy as np, sys, zarr\n"
        "a, codes = zarr.open_array(sys.argv[1], mode='r'), np.load(sys.argv[2])\n"
        "assert (a[2] == codes).all() and (a[7] == codes // 2).all() and not a[3].any()\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, tmp_path / "a.zarr", tmp_path / "codes.npy"]
    subprocess.run(command, check=True, cwd=tmp_path)


def test_zarr_and_the_functions_write_the_same(tmp_path):
    codes = field(11, 5, 16, 16)
    array = zarr.create_array(
        tmp_path / "a.zarr",
        shape=codes.shape,
        chunks=codes.shape,
        dtype="u1",
        serializer=ContextCodec(),
        compressors=None,
    )
    array[:] = codes
    assert (tmp_path / "a.zarr/c/0/0/0").read_bytes() == encode(codes)
    with pytest.raises(NotImplementedError):
        ContextCodec().compute_encoded_size(1, None)


def test_other_arrays_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"takes uint8 arrays .*, got float32 .*; keep other targets with zstd"):
        zarr.create_array(tmp_path / "f", shape=(1, 2, 8, 8), dtype="f4", serializer=ContextCodec(), compressors=None)
    with pytest.raises(ConfigError, match=r"takes uint8 arrays .*, got uint8 \(8, 8\)"):
        zarr.create_array(tmp_path / "p", shape=(8, 8), dtype="u1", serializer=ContextCodec(), compressors=None)
    array = zarr.create_array(
        tmp_path / "t", shape=(2, 2, 8, 8), chunks=(2, 2, 8, 8), dtype="u1", serializer=ContextCodec(), compressors=None
    )
    with pytest.raises(ConfigError, match="make a chunk of each tile"):
        array[:] = 1
    with pytest.raises(ConfigError, match="takes no configuration"):
        ContextCodec.from_dict({"name": "segkd.context", "configuration": {"version": 2}})


def spec_with(codec, coder):
    soft = TargetSpec(
        name="soft", channels=5, coder=coder, bound=1.0, measures=("e",), bounded=("e",), parameters={}, codec=codec
    )
    return CacheSpec(classes=tuple("abcde"), targets={"soft": soft}, tile=16, fingerprints={}, teacher={})


def write_cache(path, codec="context"):
    """Three samples of 24×40 cells, and their codes."""
    mapping = Mapping(network_axis(24, 24), network_axis(40, 40))
    samples = [PlannedSample(id=f"{k}", role="train", image_size=(24, 40), mapping=mapping) for k in range(3)]
    codes = {sample.id: field(k, 5, 24, 40) for k, sample in enumerate(samples)}
    writer = CacheWriter(
        path, spec_with(codec, UniformSteps(reach=(1.0,))), plan_units(samples, unit_samples=2, tile=16)
    )
    for unit in writer.plan.units:
        writer.write(
            unit,
            [
                CodedSample(
                    image_digest=bytes(16),
                    codes={"soft": codes[s.id]},
                    rungs={"soft": 0},
                    measures={"soft": {"e": 0.0}},
                )
                for s in writer.plan.of(unit)
            ],
        )
    assert writer.seal()
    return codes


def test_a_dense_cache_is_read_by_the_reader_and_by_zarr(tmp_path):
    codes = write_cache(tmp_path / "cache.zarr")
    reader = CacheReader(tmp_path / "cache.zarr")
    for name, expected in codes.items():
        np.testing.assert_array_equal(reader.window(reader.entry(name), "soft", range(24), range(40)), expected)
        np.testing.assert_array_equal(
            reader.window(reader.entry(name), "soft", range(3, 20), range(10, 37)), expected[:, 3:20, 10:37]
        )
    tiles = zarr.open_group(tmp_path / "cache.zarr", mode="r")["generations/0/soft"]
    first = reader.entry("1").first_tile
    np.testing.assert_array_equal(tiles[first], codes["1"][:, :16, :16])


def test_a_dense_cache_is_not_damaged_where_numba_is_missing(tmp_path, monkeypatch):
    write_cache(tmp_path / "cache.zarr")
    context.kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "segkd.storage.context_kernel", None)
    monkeypatch.delattr("segkd.storage.context_kernel")
    reader = CacheReader(tmp_path / "cache.zarr")
    entry = reader.entry("1")
    assert summarise(tmp_path / "cache.zarr").sealed
    for attempt in (
        reader.prepare,
        lambda: reader.values(entry, "soft"),
        lambda: write_cache(tmp_path / "new.zarr"),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'segkd\[dense\]'"):
            attempt()
    context.kernels.cache_clear()


def test_what_cannot_be_packed_so_is_refused():
    with pytest.raises(ConfigError, match="soft is kept in float32, and the codec 'context' takes uint8 alone"):
        spec_with("context", Raw())
    with pytest.raises(CacheMismatchError, match="packed with the codec 'lzma'; this version of segkd reads"):
        require("lzma")


def test_without_numba_the_remedy_is_named(monkeypatch):
    context.kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "segkd.storage.context_kernel", None)
    monkeypatch.delattr("segkd.storage.context_kernel")
    with pytest.raises(ConfigError, match=r"cannot be imported .*; pip install 'segkd\[dense\]'"):
        encode(field(12, 2, 8, 8))
    context.kernels.cache_clear()


def test_it_compiles_where_no_cache_can_be_written(monkeypatch):
    def no_folder(signature, *, cache=False, **options):  # noqa: ARG001  # numba's
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (signature, function)

    monkeypatch.setattr(context_kernel.numba, "njit", no_folder)
    assert context_kernel.compiled("int64(int64)")(abs) == ("int64(int64)", abs)


SMALL = [
    np.maximum(field(12, 4, 8, 8), 1),
    field(13, 4, 8, 8),
    field(14, 70, 4, 4),
    field(15, 2, 8, 8)[:1] // 2,
    padded(field(16, 3, 3, 4), 16),
]
STREAMS = ["db076e106ee8f92d", "fa2dd28c0d080289", "6a3fedf50596335f", "cd4fc478ec5d6f66"]
