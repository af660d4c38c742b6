"""Safetensors files: both ways against the reference library, hostile files, damaged ones."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from common.checkpoint.safetensors import DTYPES, open_safetensors_file, read_metadata
from common.checkpoint.safetensors_writer import LazyTensor, write_safetensors
from common.errors import UserError

DTYPE_LIST = [np.dtype(d) for d in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
GOOD_FIELD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def sample_tensors():
    rng = np.random.default_rng(0)
    tensors = {f"t.{dtype.name}": rng.integers(0, 2, (3, 5)).astype(dtype) for dtype in DTYPE_LIST}
    tensors["half"] = rng.normal(size=(4, 2, 3)).astype(BFLOAT16)
    tensors["nothing"] = np.zeros((0, 7), np.float32)
    tensors["scalar"] = np.array(3.5, np.float32)
    tensors["naïve"] = rng.normal(size=7).astype(np.float32)
    return tensors


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def file_bytes(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.smoke
def test_reads_what_the_reference_library_writes(tmp_path):
    tensors = sample_tensors()
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    reader = open_safetensors_file(tmp_path / "a.safetensors")
    assert set(reader.keys()) == set(tensors)
    for name, expected in tensors.items():
        assert reader.shape(name) == expected.shape
        assert reader.dtype(name) == expected.dtype
        assert_same(reader.read(name), expected)
    index = (slice(1, 3), slice(0, 2), slice(2, 3))
    assert_same(reader.read("half", index), tensors["half"][index])
    assert read_metadata(tmp_path / "a.safetensors") == {"format": "pt"}


def test_writes_the_bytes_of_the_reference_library(tmp_path):
    tensors = sample_tensors()
    write_safetensors(tmp_path / "ours", tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours = (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_view_of_the_file_cannot_be_written(tmp_path):
    write_safetensors(tmp_path, {"x": np.ones(3, np.float32)})
    array = open_safetensors_file(tmp_path / "model.safetensors").read("x")
    with pytest.raises(ValueError):
        array[0] = 2


def test_unknown_tensor_names_the_nearest(tmp_path):
    write_safetensors(tmp_path, {"weight": np.ones(3, np.float32)})
    reader = open_safetensors_file(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no tensor 'wieght'; did you mean 'weight'"):
        reader.read("wieght")


def test_booleans_are_zero_or_one(tmp_path):
    header = {"x": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}
    (tmp_path / "x").write_bytes(file_bytes(header, b"\x00\x02\xff"))
    assert open_safetensors_file(tmp_path / "x").read("x").tobytes() == b"\x00\x01\x01"


FIELD = GOOD_FIELD
HOSTILE = {
    "empty file": (b"", "is empty"),
    "no room for a length": (b"\x08\0\0", "3 bytes, too few"),
    "header past the end": ((2**40).to_bytes(8, "little") + b"{}", "claims a header of"),
    "header past the limit": ((2**64 - 1).to_bytes(8, "little") + b"{}", "claims a header of"),
    "truncated": (file_bytes({"x": FIELD}, b"\0" * 7), "'x' ends at byte 8 of a buffer of 7"),
    "not JSON": (file_bytes(b"{nope}"), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "deep JSON": (file_bytes(b"[" * 200_000), "not valid JSON"),
    "endless number": (file_bytes(b'{"x": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "not an object": (file_bytes(b"[]"), "not a JSON object"),
    "metadata not strings": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "duplicate name": (
        file_bytes(f'{{"x": {json.dumps(FIELD)}, "x": {json.dumps(FIELD)}}}'.encode()),
        "lists 'x' twice",
    ),
    "field missing": (file_bytes({"x": {"dtype": "F32", "shape": [2]}}), "'x' needs exactly"),
    "field not an object": (file_bytes({"x": 3}), "'x' needs exactly"),
    "unknown dtype": (file_bytes({"x": FIELD | {"dtype": "F31"}}), "'x' has dtype 'F31'"),
    "dtype not a string": (file_bytes({"x": FIELD | {"dtype": ["F32"]}}), "'x' has dtype"),
    "negative dim": (file_bytes({"x": FIELD | {"shape": [-2]}}), "'x' has an impossible shape"),
    "boolean dim": (file_bytes({"x": FIELD | {"shape": [True]}}), "'x' has an impossible shape"),
    "float dim": (file_bytes({"x": FIELD | {"shape": [2.0]}}), "'x' has an impossible shape"),
    "huge dims": (file_bytes({"x": FIELD | {"shape": [2**62, 8]}}), "impossible shape"),
    "huge empty dims": (
        file_bytes({"x": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}}),
        "impossible shape",
    ),
    "many dims": (file_bytes({"x": FIELD | {"shape": [1] * 99}}), "impossible shape"),
    "wrapping dims": (file_bytes({"x": FIELD | {"shape": [2**63, 2**63, 2]}}), "impossible"),
    "wrong size": (file_bytes({"x": FIELD | {"shape": [3]}}), "'x' has 8 bytes"),
    "negative offset": (file_bytes({"x": FIELD | {"data_offsets": [-8, 0]}}), "byte range"),
    "reversed offsets": (file_bytes({"x": FIELD | {"data_offsets": [8, 0]}}), "byte range"),
    "one offset": (file_bytes({"x": FIELD | {"data_offsets": [8]}}), "byte range"),
    "past the end": (file_bytes({"x": FIELD | {"data_offsets": [8, 16]}}), "'x' ends at byte 16"),
    "hole at the start": (
        file_bytes({"x": FIELD | {"data_offsets": [8, 16]}}, b"\0" * 16),
        "8 unclaimed bytes before tensor 'x'",
    ),
    "hole at the end": (file_bytes({"x": FIELD}, b"\0" * 9), "1 unclaimed bytes after"),
    "overlap": (
        file_bytes({"x": FIELD, "y": FIELD | {"data_offsets": [4, 12]}}, b"\0" * 12),
        "'y' overlaps tensor 'x'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_one_clear_line(case, tmp_path):
    data, message = HOSTILE[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        open_safetensors_file(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            open_safetensors_file(path)


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_safetensors(folder, sample_tensors())
    return folder / "model.safetensors"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_file_is_refused_or_read(valid_file: Path, data):
    content = bytearray(valid_file.read_bytes())
    # Most of what can go wrong is in the header: aim there.
    positions = st.integers(0, min(len(content) - 1, data.draw(st.sampled_from([16, 2000, 10**6]))))
    for position in data.draw(st.lists(positions, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    damaged = valid_file.with_name("damaged")
    length = data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))
    damaged.write_bytes(content[:length])
    try:
        reader = open_safetensors_file(damaged)
    except UserError:
        return
    for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
        array = reader.read(name)
        assert array.shape == reader.shape(name)
        array.tobytes()


def test_shards_like_hugging_face(tmp_path):
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(5)}
    tensors["big"] = np.ones((50,), np.float32)
    files = write_safetensors(tmp_path, tensors, max_shard_bytes=80)
    assert [f.name for f in files] == [
        *(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)),
        "model.safetensors.index.json",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_size": 400}
    assert index["weight_map"]["t1"] == files[0].name
    assert index["weight_map"]["big"] == files[3].name
    shard = safetensors.numpy.load_file(files[1])
    assert set(shard) == {"t2", "t3"}
    np.testing.assert_array_equal(shard["t3"], tensors["t3"])


def test_holds_one_tensor_at_a_time(tmp_path):
    calls = []

    def tensor(i):
        def values():
            calls.append(i)
            return np.full(4, i, np.float32)

        return values

    lazy = {f"t{i}": LazyTensor((4,), np.dtype(np.float32), tensor(i)) for i in range(3)}
    write_safetensors(tmp_path / "lazy", lazy)
    assert calls == [0, 1, 2]
    write_safetensors(tmp_path / "bare", {f"t{i}": tensor(i) for i in range(3)})
    name = "model.safetensors"
    assert (tmp_path / "lazy" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()


def test_failed_write_leaves_nothing(tmp_path):
    def broken():
        raise RuntimeError("out of luck")

    tensors = {
        "a": np.ones(30, np.float32),
        "b": LazyTensor((3,), np.dtype(np.float32), broken),
    }
    with pytest.raises(RuntimeError, match="out of luck"):
        write_safetensors(tmp_path, tensors, max_shard_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_writes_over_nothing(tmp_path):
    files = write_safetensors(tmp_path, {"a": np.ones(3, np.float32)})
    before = files[0].read_bytes()
    with pytest.raises(UserError, match=r"already holds model\.safetensors"):
        write_safetensors(tmp_path, {"a": np.zeros(3, np.float32)})
    assert files[0].read_bytes() == before


def test_refuses_a_dtype_the_format_lacks(tmp_path):
    with pytest.raises(UserError, match="'a' is complex128"):
        write_safetensors(tmp_path, {"a": np.zeros(3, np.complex128)})


def test_big_endian_and_strided_arrays_are_written_in_order(tmp_path):
    tensors = {
        "swapped": np.arange(6, dtype=">f4"),
        "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }
    write_safetensors(tmp_path, tensors)
    loaded = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for name, expected in tensors.items():
        np.testing.assert_array_equal(loaded[name], expected)


def test_every_dtype_comes_back(tmp_path):
    tensors = {tag: np.arange(2).astype(dtype) for tag, dtype in DTYPES.items()}
    write_safetensors(tmp_path, tensors)
    reader = open_safetensors_file(tmp_path / "model.safetensors")
    for name, expected in tensors.items():
        assert_same(reader.read(name), expected)
