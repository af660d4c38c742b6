"""The workspace's checkpoints: what comes back, on which devices, and what damage does."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common.checkpoint import array_folder
from common.checkpoint.fingerprint import fingerprints
from common.checkpoint.store import (
    CheckpointStore,
    load_params,
    read_model_folder,
    save_model_folder,
    save_params,
)
from common.errors import UserError
from common.sharding import MeshConfig, make_mesh


def make_state(value: float = 1.0) -> dict[str, Any]:
    base = jnp.arange(32.0).reshape(8, 4) * value
    return {
        "step": jnp.int32(int(value)),
        "params": {"embed": base, "blocks": {0: base.astype(jnp.bfloat16), 1: base[0] > 3}},
        "opt_state": ({"embed": base * base}, jnp.zeros((0, 3)), jnp.uint8(7)),
        "rest": {"key": jax.random.key(int(value))},
    }


def abstract(tree: Any, sharding: Any = None) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(tree: Any, expected: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected)):
        assert leaf.dtype == wanted.dtype
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, wanted = jax.random.key_data(leaf), jax.random.key_data(wanted)
        np.testing.assert_array_equal(np.array(leaf), np.array(wanted))


@pytest.fixture(name="two")
def _two(tmp_path: Path) -> CheckpointStore:
    """A store with intact checkpoints of steps 1 and 2."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        store.save(step, make_state(step), {"next": 10 * step})
    store.wait()
    return store


@pytest.mark.smoke
def test_state_of_every_kind_comes_back(two):
    step, state, data = two.restore(abstract(make_state()))
    assert (step, data) == (2, {"next": 20})
    assert_same(state, make_state(2))


@pytest.mark.parametrize("count", [1, 4])
def test_eight_devices_restore_on_fewer(tmp_path, count):
    def placed(devices: int) -> NamedSharding:
        mesh = make_mesh(MeshConfig(fsdp=-1, data=1), jax.devices()[:devices])
        return NamedSharding(mesh, PartitionSpec("fsdp"))

    value = np.arange(64, dtype=np.float32).reshape(16, 4)
    state = {"params": {"w": jax.device_put(value, placed(8))}}
    store = CheckpointStore(tmp_path)
    store.save(5, state, None)
    _, restored, _ = store.restore(abstract(state, placed(count)))
    np.testing.assert_array_equal(restored["params"]["w"], value)
    assert restored["params"]["w"].sharding == placed(count)
    assert {s.data.shape for s in restored["params"]["w"].addressable_shards} == {(16 // count, 4)}


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    state = {"params": {"w": jnp.ones((512, 1024)) * jnp.arange(1024)}}
    expected = np.array(state["params"]["w"])
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    store = CheckpointStore(tmp_path)
    store.save(1, state, None)
    jax.block_until_ready(overwrite(state))
    _, restored, _ = store.restore(abstract(state))
    np.testing.assert_array_equal(restored["params"]["w"], expected)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    match how:
        case "deleted":
            file.unlink()
        case "truncated":
            file.write_bytes(content[: len(content) // 2])
        case "zeroed":
            file.write_bytes(bytes(len(content)))
        case "altered":
            file.write_bytes(bytes(byte ^ 0x41 for byte in content))


@pytest.mark.parametrize("how", ["deleted", "truncated", "zeroed", "altered"])
def test_damage_to_any_file_falls_back_to_the_checkpoint_before(two, how, caplog):
    names = [p.relative_to(two.path(2)) for p in two.path(2).rglob("*") if p.is_file()]
    assert len(names) > 5
    for name in names:
        spare = two.folder.with_name("spare")
        shutil.copytree(two.path(2), spare)
        if not (spare / name).stat().st_size:
            shutil.rmtree(spare)
            continue  # Nothing to truncate in an empty marker.
        damage(two.path(2) / name, how)
        caplog.clear()
        step, state, data = two.restore(abstract(make_state()))
        assert (step, data) == (1, {"next": 10}), name
        assert_same(state, make_state(1))
        lines = [r.getMessage() for r in caplog.records if r.name == "common.checkpoint.store"]
        assert len(lines) == 1
        assert "step 2 is damaged" in lines[0]
        assert two.steps() == [1]
        assert (two.folder / "damaged_step_00000002").is_dir()
        spare.rename(two.path(2))


def test_damage_that_the_file_list_agrees_with_is_found_in_the_arrays(two):
    path = two.path(2)
    record = json.loads((path / array_folder.RECORD).read_text())
    record["arrays"]["params/embed"]["sum"] ^= 1
    del record["check"]
    record["check"] = array_folder._crc(array_folder._dump(record))
    (path / array_folder.RECORD).write_text(json.dumps(record))
    array_folder.read_record(path)
    assert two.restore(abstract(make_state()))[0] == 1


def test_damage_inside_a_chunk_file_is_found_by_reading(two):
    path = two.path(2)
    largest = max((path / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    damage(largest, "zeroed")
    record = json.loads((path / array_folder.RECORD).read_text())
    (path / array_folder.RECORD).unlink()
    array_folder._write_record(path, {k: record[k] for k in ("step", "data", "arrays")})
    array_folder.read_record(path)
    assert two.restore(abstract(make_state()))[0] == 1


def test_nothing_readable_is_one_clear_error_and_nothing_is_moved(two):
    for step in two.steps():
        (two.path(step) / array_folder.RECORD).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is readable"):
        two.restore(abstract(make_state()))
    assert two.steps() == [1, 2]
    with pytest.raises(UserError, match="there is no checkpoint"):
        CheckpointStore(two.folder / "other").restore(abstract(make_state()))


def test_another_model_is_an_error_and_not_damage(two):
    other = abstract(make_state())
    other["params"]["embed"] = jax.ShapeDtypeStruct((8, 5), jnp.float32)
    with pytest.raises(UserError, match=r"'params/embed' has shape \(8, 4\) there and \(8, 5\)"):
        two.restore(other)
    other = abstract(make_state())
    other["opt_state"][0]["more"] = other["step"]
    with pytest.raises(UserError, match="another model or optimizer: 'opt_state/0/more'"):
        two.restore(other)
    assert two.steps() == [1, 2]


def test_the_newest_are_kept_and_leftovers_of_killed_saves_go(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for name in ("step_00000009.partial", "step_00000009.partial.orbax-tmp", "step_x", "other"):
        (tmp_path / name).mkdir()
    for step in (10, 20, 30):
        store.save(step, {"params": {"w": jnp.ones(3)}}, None)
    store.wait()
    assert store.steps() == [20, 30]
    assert store.latest() == 30
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "other", "step_00000020", "step_00000030", "step_x",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="cannot write checkpoints"):
        CheckpointStore(tmp_path / "checkpoints").save(1, make_state(), None)


def test_parameters_load_alone_from_a_run_and_from_their_folder(two, tmp_path):
    expected = make_state(2)["params"]
    save_params(tmp_path / "bare", expected)
    for path in (two.folder, two.path(2), tmp_path / "bare"):
        assert_same(load_params(path, abstract(expected)), expected)
    with pytest.raises(UserError, match="exists"):
        save_params(tmp_path / "bare", expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "checkpoints"]


def test_a_branch_of_the_parameters_is_read_by_itself(two):
    blocks = make_state(2)["params"]["blocks"]
    assert_same(load_params(two.folder, abstract(blocks), within=("blocks",)), blocks)
    with pytest.raises(UserError, match="'params/blocks/1' is not in this model"):
        load_params(two.folder, abstract({0: blocks[0]}), within=("blocks",))
    with pytest.raises(UserError, match="'params/heads/0' is not in it"):
        load_params(two.folder, abstract(blocks), within=("heads",))


def test_parameters_are_converted_to_the_dtype_asked_for(two):
    wanted = abstract(make_state()["params"])
    wanted["embed"] = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
    embed = load_params(two.folder, wanted)["embed"]
    np.testing.assert_array_equal(embed, make_state(2)["params"]["embed"].astype(jnp.bfloat16))


def test_parameters_fall_back_too_and_leave_the_run_as_it_is(two):
    damage(two.path(2) / array_folder.RECORD, "truncated")
    expected = make_state(1)["params"]
    assert_same(load_params(two.folder, abstract(expected)), expected)
    assert two.steps() == [1, 2]
    with pytest.raises(UserError, match=r"no parameters in .* are readable"):
        load_params(two.path(2), abstract(expected))
    with pytest.raises(UserError, match="no checkpoint in it"):
        load_params(two.folder / "nowhere", abstract(expected))


def test_fingerprints_see_order_and_not_sharding():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    value = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    spread = jax.device_put(value, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    plain = fingerprints({"x": jnp.asarray(value)})
    assert fingerprints({"x": spread}) == plain
    assert fingerprints({"x": jnp.asarray(value[::-1])}) != plain
    assert fingerprints({"x": jnp.zeros((2, 2))}) == {"x": 0}


def test_model_folder_holds_all_and_is_not_overwritten(tmp_path):
    params = make_state()["params"]
    tokenizer = tmp_path / "my.model"
    tokenizer.write_bytes(b"pieces")
    folder = tmp_path / "out" / "model"
    save_model_folder(folder, "recurrentgemma", {"width": 8}, params, tokenizer)
    package, config, params_path, tokenizer_path = read_model_folder(folder)
    assert (package, config) == ("recurrentgemma", {"width": 8})
    assert tokenizer_path.read_bytes() == b"pieces"
    assert_same(load_params(params_path, abstract(params)), params)
    with pytest.raises(UserError, match="exists"):
        save_model_folder(folder, "recurrentgemma", {}, params)
    with pytest.raises(UserError, match="no tokenizer"):
        save_model_folder(tmp_path / "new", "recurrentgemma", {}, params, tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.model", "out"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"format": "tenfold", "version": 1, "package": "x", "config": {"a',
        "[1, 2]",
        "null",
        '{"format": "other", "version": 1, "package": "x", "config": {}}',
        '{"format": "tenfold", "version": 2, "package": "x", "config": {}}',
        '{"format": "tenfold", "version": 1, "package": 3, "config": {}}',
        '{"format": "tenfold", "version": 1, "package": "x", "config": []}',
        '{"format": "tenfold", "version": 1, "package": "x"}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_hostile_model_json_is_a_user_error(tmp_path, text):
    (tmp_path / "params").mkdir()
    (tmp_path / "model.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"model\.json|format|version"):
        read_model_folder(tmp_path)


def test_incomplete_model_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no model\.json"):
        read_model_folder(tmp_path)
    head = {"format": "tenfold", "version": 1, "package": "x", "config": {}}
    (tmp_path / "model.json").write_text(json.dumps(head))
    with pytest.raises(UserError, match="no params"):
        read_model_folder(tmp_path)
