"""GGUF files: what is written is read, in slices too; hostile and damaged files are one line."""

import struct
import zlib

import ml_dtypes
import numpy as np
import pytest
from gguf_writer import ARRAY, STRING, Raw, gguf_bytes, padded, q4_1, q8_0
from hypothesis import given, settings
from hypothesis import strategies as st

from common.checkpoint import gguf
from common.checkpoint.folder import open_checkpoint
from common.checkpoint.gguf import GGUFTensors, is_gguf_file, open_gguf_file
from common.checkpoint.gguf_types import GGUFType, gguf_type
from common.errors import UserError

QUANTISED = [2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 15, 20, 23]
# CRC-32 of `random_blocks` expanded; tests/parity holds llama.cpp's own package to the same.
DIGESTS = {
    2: 1_068_213_300,
    3: 1_541_630_237,
    6: 2_876_572_064,
    7: 708_734_728,
    8: 4_044_018_941,
    10: 1_987_890_086,
    11: 1_095_393_464,
    12: 3_495_578_049,
    13: 134_049_101,
    14: 803_967_525,
    15: 61_461_710,
    20: 2_436_944_137,
    23: 3_958_061_423,
}


def random_blocks(number: int, count: int = 64) -> np.ndarray:
    """`[count]` records of random bits, but for scales, which are small and finite."""
    stored = gguf_type(number)
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 256, count * stored.num_bytes, np.uint8).view(stored.layout)
    for field in ("d", "m", "dmin"):
        if field in stored.layout.names:
            blocks[field] = rng.normal(size=count) / 8
    return blocks


def sample_metadata():
    return {
        "general.architecture": "llama",
        "general.alignment": 64,
        "u1": np.uint8(200),
        "i1": np.int8(-3),
        "u2": np.uint16(60_000),
        "i2": np.int16(-30_000),
        "u4": np.uint32(4_000_000_000),
        "i4": np.int32(-2_000_000_000),
        "u8": np.uint64(2**63),
        "i8": np.int64(-(2**62)),
        "f4": np.float32(0.1),
        "f8": 0.1 + np.float64(0),
        "yes": True,
        "naïve": "日本語 🤖",
        "texts": ["a", "", "ü"],
        "no texts": [],
        "numbers": np.array([1.5, -2.5], "<f4"),
        "flags": np.array([True, False, True]),
    }


def sample_tensors():
    rng = np.random.default_rng(0)
    plain = {
        name: rng.normal(size=(3, 5)).astype(name) for name in ("<f4", "<f2", "<f8", "<i4", "|i1")
    }
    return plain | {
        "bf16": rng.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16),
        "vector": rng.normal(size=7).astype(np.float32),
        "scalar": np.array(3.5, np.float32),
    }


@pytest.fixture
def write(tmp_path):
    def write_file(metadata, tensors, **options) -> GGUFTensors:
        (tmp_path / "model.gguf").write_bytes(gguf_bytes(metadata, tensors, **options))
        return open_gguf_file(tmp_path / "model.gguf")

    return write_file


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_was_written(write, version, tmp_path):
    reader = write(sample_metadata(), sample_tensors(), version=version)
    assert reader.metadata.keys() == sample_metadata().keys()
    for key, value in sample_metadata().items():
        expected = 0.1 if key == "f4" else value
        np.testing.assert_array_equal(reader.metadata[key], expected)
        assert type(reader.metadata[key]) is type(np.array(value).tolist()) or value.ndim
    assert set(reader.keys()) == set(sample_tensors())
    for name, expected in sample_tensors().items():
        found = reader.read(name)
        assert (reader.shape(name), reader.dtype(name)) == (expected.shape, expected.dtype)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.tobytes() == expected.tobytes()
    assert is_gguf_file(tmp_path / "model.gguf")
    assert isinstance(open_checkpoint(tmp_path / "model.gguf"), GGUFTensors)


def test_metadata_of_the_wrong_kind_is_named(write):
    reader = write(sample_metadata(), {})
    assert reader.integer("u4") == 4_000_000_000
    assert reader.number("u1") == 200.0
    assert reader.boolean("yes") is True
    assert reader.string("naïve") == "日本語 🤖"
    assert reader.strings("texts") == ["a", "", "ü"]
    assert reader.numbers("numbers").tolist() == [1.5, -2.5]
    assert reader.integer("none", 3) == 3
    for get, key in (
        (reader.integer, "i1"),
        (reader.integer, "yes"),
        (reader.number, "texts"),
        (reader.boolean, "u1"),
        (reader.string, "u1"),
        (reader.strings, "numbers"),
        (reader.numbers, "texts"),
    ):
        with pytest.raises(UserError, match=f"metadata {key} is .* not "):
            get(key)
    with pytest.raises(UserError, match="lacks the metadata text; did you mean 'texts'"):
        reader.string("text")


@pytest.mark.parametrize("number", QUANTISED)
def test_blocks_expand_to_known_weights(number):
    weights = gguf_type(number).dequantise(random_blocks(number))
    assert weights.dtype == np.float32
    assert np.isfinite(weights).all()
    assert zlib.crc32(np.ascontiguousarray(weights)) == DIGESTS[number]


def test_quantised_weights_are_near_the_originals(write):
    weights = np.random.default_rng(0).normal(size=(4, 6, 64)).astype(np.float32)
    reader = write({}, {"eight": q8_0(weights), "four": q4_1(weights)})
    spread = np.abs(weights).reshape(-1, 32).max(axis=1).max()
    assert np.abs(reader.read("eight") - weights).max() < 0.6 * spread / 127
    assert np.abs(reader.read("four") - weights).max() < 0.6 * 2 * spread / 15
    assert (reader.type_name("eight"), reader.dtype("eight")) == ("Q8_0", np.float32)


def scalar_q8_k(block: np.void) -> list[float]:
    return [float(block["d"]) * int(q) for q in block["qs"]]


def test_q8_k_by_hand():
    blocks = random_blocks(15, 3)
    expected = [scalar_q8_k(block) for block in blocks]
    np.testing.assert_allclose(gguf_type(15).dequantise(blocks), expected, rtol=1e-6)


@pytest.mark.parametrize("number", QUANTISED)
def test_a_slice_is_the_slice_of_the_whole(write, number, monkeypatch):
    stored = gguf_type(number)
    shape = (3, 5, 2 * stored.block)
    blocks = random_blocks(number, 30)
    monkeypatch.setattr(gguf, "CHUNK", 4 * stored.block)
    reader = write(
        {}, {"before": np.ones(3, np.float32), "x": Raw(number, blocks.tobytes(), shape)}
    )
    whole = stored.dequantise(blocks).reshape(shape)
    np.testing.assert_array_equal(reader.read("x"), whole)
    width = shape[-1]
    for index in (
        (slice(0, 3), slice(1, 4), slice(0, width)),
        (slice(1, 2), slice(0, 5), slice(3, 9)),
        (slice(2, 3), slice(4, 5), slice(stored.block - 1, stored.block + 1)),
        (slice(0, 3), slice(0, 5, 2), slice(5, width, 3)),
        (slice(1, 1), slice(0, 5), slice(0, 7)),
        (slice(0, 3), slice(0, 5), slice(7, 7)),
    ):
        np.testing.assert_array_equal(reader.read("x", index), whole[index])


def test_only_the_blocks_of_a_slice_are_expanded(write, monkeypatch):
    weights = np.random.default_rng(0).normal(size=(100, 320)).astype(np.float32)
    reader = write({}, {"x": q8_0(weights)})
    seen = []
    unpack = GGUFType.dequantise
    monkeypatch.setattr(
        GGUFType, "dequantise", lambda self, b: seen.append(len(b)) or unpack(self, b)
    )
    assert reader.read("x", (slice(2, 5), slice(40, 70))).shape == (3, 30)
    assert sum(seen) == 3 * 2


def text(data: str) -> bytes:
    return struct.pack("<Q", len(data.encode())) + data.encode()


def head(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def info(name="x", dims=(8,), kind=0, offset=0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def one(**fields) -> bytes:
    return padded(head(1, 0) + info(**fields)) + bytes(64)


def key(value: bytes, count: int = 1) -> bytes:
    return head(0, count) + (text("k") + value) * count + bytes(64)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + data


HOSTILE = {
    "empty file": (b"", "is empty"),
    "few bytes": (b"GGUF\3\0", "6 bytes, too few"),
    "another magic": (b"GGML" + bytes(40), "begins with b'GGML'"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(40), "has version 1"),
    "version 4": (b"GGUF" + struct.pack("<I", 4) + bytes(40), "has version 4"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "is big endian"),
    "many tensors": (head(2**60, 0), "claims 1152921504606846976 tensors in 0 bytes"),
    "more tensors than bytes": (head(4, 0) + bytes(90), "claims 4 tensors in 90 bytes"),
    "many keys": (head(0, 2**63), "claims 9223372036854775808 metadata keys"),
    "key past the end": (head(0, 1) + struct.pack("<Q", 60) + bytes(30), "ends within the name"),
    "long key": (head(0, 1) + struct.pack("<Q", 2**62) + bytes(30), "bytes of text; at most"),
    "key not UTF-8": (head(0, 1) + struct.pack("<Q", 1) + b"\xff" * 30, "is not UTF-8"),
    "key twice": (key(struct.pack("<IB", 0, 1), 2), "lists metadata 'k' twice"),
    "unknown value": (key(struct.pack("<I", 13)), "'k' has the unknown type 13"),
    "value past the end": (head(0, 1) + text("kkkk") + struct.pack("<IB", 12, 0), "ends within"),
    "long text": (key(struct.pack("<IQ", STRING, 2**40)), "claims 1099511627776 bytes"),
    "text past the end": (key(struct.pack("<IQ", STRING, 2**20)), "wants 1048576 bytes"),
    "nested array": (key(array(ARRAY, 1, array(0, 1, b"x"))), "an array of arrays"),
    "array of nothing known": (key(array(77, 1)), "array of the unknown type 77"),
    "endless array": (key(array(0, 2**60)), "claims 1152921504606846976 elements"),
    "array past the end": (key(array(10, 2**20)), "wants 8388608 bytes"),
    "texts past the end": (key(array(STRING, 9)), "wants 72 bytes"),
    "alignment 0": (gguf_bytes({"general.alignment": Raw(4, bytes(4))}, {}), "is 0, not a power"),
    "alignment 48": (gguf_bytes({"general.alignment": 48}, {}), "is 48, not a power of two"),
    "alignment huge": (
        gguf_bytes({"general.alignment": Raw(4, struct.pack("<I", 2**31))}, {}),
        "is 2147483648, not a power of two",
    ),
    "alignment in words": (
        gguf_bytes({"general.alignment": Raw(STRING, text("32"))}, {}),
        "is '32', not a power of two",
    ),
    "tensor twice": (head(2, 0) + info() * 2 + bytes(64), "lists tensor 'x' twice"),
    "many dims": (one(dims=(1,) * 5), "has 5 dims; at most 4"),
    "no weights": (one(dims=(8, 0)), "impossible shape [0, 8]"),
    "wrapping dims": (one(dims=(2**63, 2**63, 4)), "impossible shape"),
    "unknown type": (one(kind=99), "has the unknown type 99, which is not read here"),
    "removed type": (one(kind=4), "has the unknown type 4"),
    "type not read": (one(kind=16), "has type IQ2_XXS, which is not read here"),
    "half a block": (one(kind=8), "[8], but Q8_0 comes in blocks of 32"),
    "number in blocks": (one(kind=8, dims=()), "[], but Q8_0 comes in blocks of 32"),
    "unaligned": (one(offset=8), "not a multiple of the alignment 32"),
    "past the end": (one(offset=64), "ends at byte"),
    "far past the end": (one(offset=2**64 - 32), "ends at byte"),
    "too large": (one(dims=(2**40,)), "the file is truncated or its header wrong"),
    "overlap": (
        padded(head(2, 0) + info("x", (9,)) + info("y", (8,), offset=32)) + bytes(96),
        "tensor 'y' overlaps tensor 'x'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_gguf_is_one_clear_line(case, tmp_path):
    data, message = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        open_gguf_file(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        assert not is_gguf_file(path)
        with pytest.raises(UserError, match="cannot read"):
            open_gguf_file(path)


@pytest.fixture(scope="module")
def whole():
    rng = np.random.default_rng(0)
    tensors = sample_tensors() | {"q": q4_1(rng.normal(size=(4, 64)))}
    return gguf_bytes(sample_metadata(), tensors)


@pytest.fixture(scope="module")
def damaged_path(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "model.gguf"


def read_all(path, data: bytes) -> None:
    """Opens and reads a file, which may fail in one way only and takes no more than it holds."""
    path.write_bytes(data)
    try:
        reader = open_gguf_file(path)
        for name in list(reader.keys()):
            assert reader.read(name).shape == reader.shape(name)
            assert reader.read(name).nbytes <= 16 * len(data)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_truncated_gguf_is_refused(whole, damaged_path, data):
    cut = data.draw(st.integers(0, len(whole) - 65))
    damaged_path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"truncated|too few|empty"):
        open_gguf_file(damaged_path)


@settings(max_examples=400, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_flipped_bytes_never_crash(whole, damaged_path, flips):
    data = bytearray(whole)
    for position, change in flips:
        data[position % len(data)] ^= change
    read_all(damaged_path, bytes(data))


@settings(max_examples=200, deadline=None)
@given(
    position=st.integers(0, 2**20),
    number=st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]),
)
def test_hostile_numbers_never_crash(whole, damaged_path, position, number):
    data = bytearray(whole)
    start = position % (len(data) - 8)
    data[start : start + 8] = number.to_bytes(8, "little")
    read_all(damaged_path, bytes(data))
