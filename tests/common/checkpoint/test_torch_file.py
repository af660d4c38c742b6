"""Torch checkpoints without torch: hand-made archives, hostile ones, damaged ones, real ones."""

import collections
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_writer import Call, Global, Storage, archive, tensor

from common.checkpoint import open_checkpoint, open_torch_file
from common.errors import UserError

SIX = np.arange(6, dtype=np.float32)


@pytest.mark.smoke
def test_reads_nested_strided_shared_tensors(tmp_path):
    shared = Storage("FloatStorage", "0", 6)
    half = np.array([1.5, -2, 3], ml_dtypes.bfloat16)
    tree = {
        "model": collections.OrderedDict(
            {
                "a.weight": tensor(shared, 0, (2, 3), (3, 1)),
                "a.transposed": tensor(shared, 0, (3, 2), (1, 3)),
                "a.tail": tensor(shared, 4, (2,), (1,)),
                "scalar": tensor(shared, 5, (), ()),
                "empty": tensor(shared, 6, (0, 4), (4, 1)),
                "half": tensor(Storage("BFloat16Storage", "1", 3), 0, (3, 1), (1, 1)),
                "flag": tensor(Storage("BoolStorage", "2", 2), 0, (2,), (1,)),
            }
        ),
        "list": [Call("torch._utils _rebuild_parameter", tensor(shared, 1, (1,), (1,)), True, {})],
        7: tensor(shared, 2, (1,), (1,)),
        "epoch": 3,
        "dtype": Global("torch bfloat16"),
        "size": Call("torch Size", (2, 3)),
    }
    path = archive(tmp_path / "a.pth", tree, {"0": SIX, "1": half, "2": np.array([True, False])})
    reader = open_torch_file(path)
    expected = {
        "model.a.weight": SIX.reshape(2, 3),
        "model.a.transposed": SIX.reshape(2, 3).T,
        "model.a.tail": SIX[4:],
        "model.scalar": SIX[5],
        "model.empty": np.zeros((0, 4), np.float32),
        "model.half": half[:, None],
        "model.flag": np.array([True, False]),
        "list.0": SIX[1:2],
        "7": SIX[2:3],
    }
    assert list(reader.keys()) == list(expected)
    for name, array in expected.items():
        assert reader.shape(name) == array.shape
        assert reader.dtype(name) == array.dtype
        np.testing.assert_array_equal(reader.read(name), array)
    part = reader.read("model.a.transposed", (slice(1, 3), slice(0, 1)))
    np.testing.assert_array_equal(part, [[1], [2]])


def test_attributes_of_state_dicts_are_dropped(tmp_path):
    state = {"_metadata": {"": {"version": 1}}}
    tree = Call("collections OrderedDict", state=state)
    assert list(open_torch_file(archive(tmp_path / "a.pt", tree)).keys()) == []


class System:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_pickle_does_not_run(tmp_path):
    marker = tmp_path / "owned"
    data = pickle.dumps({"weight": System(f"touch {marker}")}, 2)
    path = archive(tmp_path / "evil.pth", data)
    with pytest.raises(UserError, match=r"wants to run 'posix\.system': refused"):
        open_torch_file(path)
    assert not marker.exists()
    pickle.loads(data)  # The pickle is a live one: Python's own reader runs it.
    assert marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "os system",
        "torch load",
        "torch._utils _rebuild_tensor_v3",
        "collections OrderedDict.fromkeys",
        "torch.storage _load_from_bytes",
        "argparse Namespace",
        "numpy FloatStorage",
    ],
)
def test_other_names_are_refused(name, tmp_path):
    for tree in (Global(name), Call(name, "x")):
        with pytest.raises(UserError) as caught:
            open_torch_file(archive(tmp_path / "evil.pth", {"a": tree}))
        assert f"wants to run '{name.replace(' ', '.')}': refused" in str(caught.value)


def test_instances_and_extensions_are_refused(tmp_path):
    for data in (b"(ios\nsystem\n.", b"\x82\x01.", b"cos\nsystem\n)\x81."):
        with pytest.raises(UserError, match=r"refused|is damaged"):
            open_torch_file(archive(tmp_path / "evil.pth", data))


def test_a_pickle_cannot_change_the_reader(tmp_path):
    for name in ("torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch Size"):
        module, attribute = name.split()
        for state in (b"}U\x01aK\x01s", b"N}U\x05valueK\x01s\x86"):
            data = f"c{module}\n{attribute}\n".encode() + state + b"b."
            with pytest.raises(UserError, match="a torch name is changed"):
                open_torch_file(archive(tmp_path / "evil.pth", data))


FLOATS = Storage("FloatStorage", "0", 6)
HOSTILE_TENSORS = {
    "offset past the end": (tensor(FLOATS, 6, (1,), (1,)), "past the end"),
    "shape past the end": (tensor(FLOATS, 0, (7,), (1,)), "past the end"),
    "stride past the end": (tensor(FLOATS, 0, (2, 2), (5, 1)), "past the end"),
    "broadcast bomb": (tensor(FLOATS, 0, (2**40,), (0,)), "past the end"),
    "negative stride": (tensor(FLOATS, 5, (6,), (-1,)), "not a natural number"),
    "negative offset": (tensor(FLOATS, -1, (1,), (1,)), "not a natural number"),
    "negative dim": (tensor(FLOATS, 0, (-1,), (1,)), "not a natural number"),
    "float dim": (tensor(FLOATS, 0, (1.0,), (1,)), "not a natural number"),
    "list shape": (tensor(FLOATS, 0, [1], (1,)), "not a natural number"),
    "overflowing dims": (tensor(FLOATS, 0, (2**62, 2**62), (1, 1)), "impossible shape"),
    "ranks differ": (tensor(FLOATS, 0, (1, 1), (1,)), "impossible shape"),
    "no storage": (tensor("0", 0, (1,), (1,)), "has no storage"),
    "missing record": (
        tensor(Storage("FloatStorage", "9", 6), 0, (1,), (1,)),
        "record '9', which is missing",
    ),
    "record of another folder": (
        tensor(Storage("FloatStorage", "../version", 1), 0, (1,), (1,)),
        "which is missing",
    ),
    "storage larger than its record": (
        tensor(Storage("FloatStorage", "0", 7), 0, (7,), (1,)),
        "claims 7 elements",
    ),
    "negative storage": (
        tensor(Storage("FloatStorage", "0", -7), 0, (1,), (1,)),
        "not a natural number",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_hostile_tensor_is_one_clear_line(case, tmp_path):
    value, message = HOSTILE_TENSORS[case]
    path = archive(tmp_path / "bad.pth", {"model": {"w": value}}, {"0": SIX})
    with pytest.raises(UserError) as caught:
        open_torch_file(path)
    assert message in str(caught.value)
    assert "'model.w'" in str(caught.value)


def loop_of_itself():
    tree: dict = {}
    tree["again"] = tree
    return tree


def doubling():
    tree: list = []
    for _ in range(30):
        tree = [tree, tree]
    return tree


HOSTILE_ARCHIVES = {
    "contains itself": ({"tree": loop_of_itself()}, "nests more"),
    "billion laughs": ({"tree": doubling()}, "nests more"),
    "two names alike": (
        {
            "tree": {
                "a.b": tensor(FLOATS, 0, (1,), (1,)),
                "a": {"b": tensor(FLOATS, 0, (1,), (1,))},
            },
            "records": {"0": SIX},
        },
        "two tensors named 'a.b'",
    ),
    "not a pickle": ({"tree": b"hello"}, "data.pkl is damaged"),
    "cut pickle": ({"tree": b"\x80\x02}q"}, "data.pkl is damaged"),
    "bad persistent id": ({"tree": b"\x80\x02U\x01aQ."}, "data.pkl is damaged"),
    "torch name called": ({"tree": {"a": Call("torch float32")}}, "data.pkl is damaged"),
    "path escape": ({"tree": {}, "extra": [("../../x", b"")]}, "points outside"),
    "absolute": ({"tree": {}, "extra": [("/etc/x", b"")]}, "points outside"),
    "compressed": ({"tree": {}, "compression": zipfile.ZIP_DEFLATED}, "is compressed"),
    "second data.pkl": ({"tree": {}, "extra": [("b/data.pkl", b"")]}, "without a torch data.pkl"),
}


@pytest.mark.parametrize("case", HOSTILE_ARCHIVES)
def test_hostile_archive_is_one_clear_line(case, tmp_path):
    options, message = HOSTILE_ARCHIVES[case]
    with pytest.raises(UserError) as caught:
        open_torch_file(archive(tmp_path / "bad.pth", **options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"without a torch data\.pkl"):
        open_torch_file(path)
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("tensors"))
    with pytest.raises(UserError, match=r"torch before 1\.6"):
        open_torch_file(path)
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")
    with pytest.raises(UserError, match=r"torch before 1\.6"):
        open_checkpoint(path.rename(tmp_path / "old"))
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match="not a torch checkpoint"):
        open_torch_file(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        open_torch_file(path)


def test_big_endian_is_refused(tmp_path):
    path = archive(tmp_path / "a.pth", {})
    path.write_bytes(path.read_bytes().replace(b"little", b"bigend"))
    with pytest.raises(UserError, match="big-endian"):
        open_torch_file(path)


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory):
    tree = {"a": tensor(FLOATS, 0, (2, 3), (3, 1)), "b": {"c": tensor(FLOATS, 1, (5,), (1,))}}
    return archive(tmp_path_factory.mktemp("fuzz") / "valid.pth", tree, {"0": SIX})


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_file_is_refused_or_read(valid_file: Path, data):
    content = bytearray(valid_file.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    length = data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))
    damaged = valid_file.with_name("damaged.pth")
    damaged.write_bytes(content[:length])
    try:
        reader = open_torch_file(damaged)
    except UserError:
        return
    for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
        assert reader.read(name).shape == reader.shape(name)
        reader.read(name).tobytes()


@pytest.mark.parity
def test_reads_what_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    dtypes = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")
    weight = torch.arange(24.0).reshape(4, 6)
    tree = {
        "model": model.state_dict(),
        "parameter": torch.nn.Parameter(weight),
        "epoch": 3,
        "views": [weight[1:3, ::2], weight.T, weight[2, 3]],
        **{name: torch.arange(5).to(getattr(torch, name)) for name in dtypes},
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
        "empty": torch.zeros(0, 3),
    }
    torch.save(tree, tmp_path / "a.pth")
    reader = open_checkpoint(tmp_path / "a.pth")
    expected = {
        **{f"model.{name}": value for name, value in model.state_dict().items()},
        **{f"views.{i}": view for i, view in enumerate(tree["views"])},
        **{name: value for name, value in tree.items() if torch.is_tensor(value)},
    }
    assert set(reader.keys()) == set(expected)
    for name, value in expected.items():
        found = reader.read(name)
        bfloat16 = value.dtype == torch.bfloat16
        assert str(found.dtype) == str(value.dtype).removeprefix("torch.")
        assert found.shape == tuple(value.shape)
        value = value.detach()
        np.testing.assert_array_equal(
            found.astype(np.float32) if bfloat16 else found,
            value.float().numpy() if bfloat16 else value.numpy(),
        )


@pytest.mark.parity
def test_old_torch_formats_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(3)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"torch before 1\.6"):
        open_checkpoint(tmp_path / "a.bin")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "b.bin")
    with pytest.raises(UserError, match=r"wants to run 'torch\.nn\.modules\.linear\.Linear'"):
        open_checkpoint(tmp_path / "b.bin")
