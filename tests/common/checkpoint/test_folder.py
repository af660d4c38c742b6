"""Folders: single file or shards, hostile index files, formats told apart."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import common
from common.checkpoint import open_checkpoint, open_huggingface, subtree, write_safetensors
from common.checkpoint.reader import ArrayTensors
from common.errors import UserError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    tensors = {f"t{i}": np.full(4, i, np.float32) for i in range(4)}
    write_safetensors(tmp_path, tensors, max_shard_bytes=32)
    return tmp_path


@pytest.mark.smoke
def test_reads_shards_as_one(sharded):
    for path in (sharded, sharded / INDEX):
        reader = open_checkpoint(path)
        assert sorted(reader.keys()) == ["t0", "t1", "t2", "t3"]
        assert (reader.shape("t3"), reader.dtype("t3")) == ((4,), np.float32)
        np.testing.assert_array_equal(reader.read("t3", (slice(1, 3),)), [3, 3])
    with pytest.raises(UserError, match="no tensor 't9'"):
        reader.read("t9")


def test_single_file_in_a_folder_and_alone(tmp_path):
    write_safetensors(tmp_path, {"a": np.arange(3)})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        np.testing.assert_array_equal(open_checkpoint(path).read("a"), [0, 1, 2])
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(open_huggingface(tmp_path).read("a"), [0, 1, 2])


def edit(**changes):
    def change(weight_map):
        weight_map.update(changes)
        return {"weight_map": weight_map}

    return change


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
HOSTILE = {
    "missing shard": (edit(t0="model-00009-of-00002.safetensors"), "not beside it"),
    "wrong shard": (edit(t0=SECOND), f"'t0' in {SECOND}, which lacks it"),
    "missing tensor": (edit(extra=FIRST), f"'extra' in {FIRST}, which lacks it"),
    "parent folder": (edit(t0="../model.safetensors"), "not the name of a file beside it"),
    "absolute path": (edit(t0="/etc/passwd"), "not the name of a file beside it"),
    "backslash": (edit(t0="..\\x"), "not the name of a file beside it"),
    "dots": (edit(t0=".."), "not the name of a file beside it"),
    "no name": (edit(t0=""), "not the name of a file beside it"),
    "zero byte": (edit(t0="a\0b"), "not the name of a file beside it"),
    "not a string": (edit(t0=3), "not the name of a file beside it"),
    "omitted": (lambda m: {"weight_map": {k: m[k] for k in ("t0", "t2", "t3")}}, "omits"),
    "no map": (lambda m: {"metadata": {}}, "no weight_map"),
    "empty map": (lambda m: {"weight_map": {}}, "no weight_map"),
    "list": (lambda m: [], "not a JSON object"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index(case, sharded):
    change, message = HOSTILE[case]
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    (sharded / INDEX).write_text(json.dumps(change(weight_map)))
    with pytest.raises(UserError) as caught:
        open_checkpoint(sharded)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("a file of some other kind")
    with pytest.raises(UserError, match=r"notes\.txt"):
        open_checkpoint(tmp_path / "notes.txt")


def test_subtree_takes_the_first_prefix_there_is(tmp_path):
    names = ("model.a", "model.b", "ema.a")
    reader = ArrayTensors(tmp_path, {name: np.arange(i) for i, name in enumerate(names)})
    inner = subtree(reader, "module.", "model.")
    assert sorted(inner.keys()) == ["a", "b"]
    assert (inner.shape("b"), inner.read("b").tolist()) == ((1,), [0])
    assert subtree(reader, "ema.").shape("a") == (2,)
    assert subtree(reader, "nothing.") is reader
    with pytest.raises(UserError, match="no tensor"):
        inner.read("ema.a")


def test_importing_loads_no_storage_library():
    code = (
        "import sys, common.checkpoint; "
        "print({'orbax', 'tensorstore', 'torch', 'safetensors', 'grain'} & set(sys.modules))"
    )
    root = Path(common.__file__).parent.parent
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert shown.stdout == "set()\n", shown.stderr
