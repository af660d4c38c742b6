"""Parameter trees of JAX releases: Orbax folders of several layouts, Flax msgpack."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from common.checkpoint import open_checkpoint, open_msgpack_file, open_tree_folder
from common.errors import UserError

LEAVES = {
    "params/embedder/input_embedding": jnp.arange(12, dtype=jnp.bfloat16).reshape(4, 3),
    "params/blocks.0/mlp_block/ffw_up/w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "params/blocks.0/mlp_block/ffw_up/b": jnp.ones((2, 1, 1, 4)),
    "params/blocks.10/scale": jnp.zeros(3),
    "params/list/1": jnp.full((2,), 7, jnp.int32),
}


def tree():
    nested = {"params": {"list": [jnp.float32(0), LEAVES["params/list/1"]], "none": None}}
    for name, leaf in LEAVES.items():
        *path, last = name.split("/")
        if "list" in path:
            continue
        node = nested
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return nested


def check(reader):
    assert set(reader.keys()) == {*LEAVES, "params/list/0"}
    for name, leaf in LEAVES.items():
        expected = np.asarray(leaf)
        assert reader.shape(name) == expected.shape
        assert reader.dtype(name) == expected.dtype
        np.testing.assert_array_equal(reader.read(name), expected)
    name = "params/blocks.0/mlp_block/ffw_up/w"
    index = (slice(1, 2), slice(0, 3), slice(2, 4))
    np.testing.assert_array_equal(reader.read(name, index), LEAVES[name][index])
    with pytest.raises(UserError, match=r"no tensor 'params/blocks\.1/scale'"):
        reader.shape("params/blocks.1/scale")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "2b"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree())
    return path


@pytest.mark.smoke
def test_reads_a_pytree_folder(released):
    check(open_checkpoint(released))


def test_reads_a_folder_with_an_odd_name(released, tmp_path):
    check(open_checkpoint(shutil.copytree(released, tmp_path / "a b#c%20d?é")))


@pytest.mark.parametrize("options", [{"use_ocdbt": False}, {"use_zarr3": True}])
def test_reads_other_layouts(options, tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(tmp_path / "a", tree())
    check(open_checkpoint(tmp_path / "a"))


def test_reads_a_standard_checkpoint_in_a_step(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a" / "default", tree())
    check(open_checkpoint(tmp_path / "a"))


def test_reads_the_structure_file_of_old_versions(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "a", {"params": {"blocks.0": {"w": jnp.arange(3)}}})
    (tmp_path / "a" / "_METADATA").unlink()
    structure = {"params": {"blocks.0": {"w": "PLACEHOLDER://params.blocks.0.w"}}}
    (tmp_path / "a" / "checkpoint").write_bytes(serialization.msgpack_serialize(structure))
    reader = open_checkpoint(tmp_path / "a")
    np.testing.assert_array_equal(reader.read("params/blocks.0/w"), [0, 1, 2])


def test_lost_chunk_is_an_error_and_not_zeros(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "a", {"w": jnp.arange(1.0, 4.0)})
    (tmp_path / "a" / "w" / "0").unlink()
    with pytest.raises(UserError, match="'w' is missing or damaged"):
        open_tree_folder(tmp_path / "a").read("w")


def read_all(folder):
    reader = open_tree_folder(folder)
    return [reader.read(name) for name in LEAVES]


def test_truncated_and_missing_data(released, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(released, folder)
    read_all(folder)
    for data in folder.glob("**/d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(UserError, match="is missing or damaged"):
        read_all(folder)
    for data in folder.glob("**/d/*"):
        data.unlink()
    with pytest.raises(UserError, match="is missing or damaged"):
        read_all(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nope", "not valid JSON"),
        ("{}", "does not describe a tree"),
        ('{"tree_metadata": 3}', "does not describe a tree"),
        ('{"tree_metadata": {"a": {"key_metadata": 1}}}', "does not describe a tree"),
        ('{"tree_metadata": {}}', "lists no arrays"),
    ],
)
def test_hostile_metadata(text, message, tmp_path):
    (tmp_path / "_METADATA").write_text(text)
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["../secret", "/etc"])
def test_metadata_cannot_leave_the_folder(key, tmp_path):
    leaf = {"key_metadata": [{"key": key}], "value_metadata": {"value_type": "jax.Array"}}
    (tmp_path / "_METADATA").write_text(json.dumps({"tree_metadata": {"a": leaf}}))
    with pytest.raises(UserError, match="points outside"):
        open_checkpoint(tmp_path)


def test_reads_flax_msgpack(tmp_path):
    path = tmp_path / "model.msgpack"
    path.write_bytes(serialization.to_bytes(tree()))
    reader = open_checkpoint(path)
    for name, leaf in LEAVES.items():
        np.testing.assert_array_equal(reader.read(name), np.asarray(leaf))


@pytest.mark.parametrize("data", [b"", b"hello", b"\x81\xa1a\x01", b"\x81\xa1a\xc7\xff\x01abc"])
def test_damaged_msgpack(data, tmp_path):
    (tmp_path / "a.msgpack").write_bytes(data)
    with pytest.raises(UserError, match=r"not a Flax msgpack file|holds no arrays"):
        open_msgpack_file(tmp_path / "a.msgpack")


def test_says_what_it_is_not(tmp_path):
    with pytest.raises(UserError, match="not an Orbax checkpoint"):
        open_tree_folder(tmp_path)
