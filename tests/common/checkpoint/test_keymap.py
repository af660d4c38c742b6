"""Key maps: proof of bijection, sharded placement, and the way back bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from common.checkpoint import (
    DEPTHWISE_CONV,
    PLUS_ONE,
    TRANSPOSE,
    Concat,
    Piece,
    Reshape,
    Row,
    Stack,
    Transpose,
    chain,
    export_tensors,
    load_tensors,
    open_checkpoint,
    write_safetensors,
)
from common.checkpoint.reader import ArrayTensors
from common.errors import UserError

LAYERS, WIDTH, HIDDEN = 4, 8, 16
UP = chain(Stack(), Transpose((0, 2, 1)))
SHAPES = {
    "embed.weight": (24, WIDTH),
    "norm.weight": (WIDTH,),
    "conv.weight": (WIDTH, 1, 4),
    "qkv.weight": (3 * WIDTH, WIDTH),
    "bias": (2, 1, 1, WIDTH),
    "low": (8, WIDTH),
    "high": (16, WIDTH),
    **{f"layers.{i}.gate": (HIDDEN, WIDTH) for i in range(LAYERS)},
    **{f"layers.{i}.up": (HIDDEN, WIDTH) for i in range(LAYERS)},
    **{f"layers.{i}.scale": (WIDTH,) for i in range(LAYERS)},
}
ROWS = [
    Row("embed.weight", "embed.table"),
    Row("norm.weight", "norm.scale", PLUS_ONE),
    Row("conv.weight", "conv.w", DEPTHWISE_CONV),
    Row("bias", "bias", Reshape((2, 1, 1, -1))),
    Row(("low", "high"), "joined", Concat(0, (8, 16))),
    *(
        Row(Piece("qkv.weight", 0, i * WIDTH, (i + 1) * WIDTH), f"attention.{name}", TRANSPOSE)
        for i, name in enumerate("qkv")
    ),
    *(
        Row((f"layers.{i}.gate", f"layers.{i}.up"), "blocks.0.up", UP, index=i)
        for i in range(LAYERS)
    ),
    *(Row(f"layers.{i}.scale", "blocks.0.scale", index=i) for i in range(LAYERS)),
]


def abstract(shard=lambda *names: None, dtype=jnp.float32):
    def leaf(shape, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=shard(*names))

    return {
        "embed": {"table": leaf((24, WIDTH), "fsdp", "tensor")},
        "norm": {"scale": leaf((WIDTH,))},
        "conv": {"w": leaf((4, WIDTH), None, "tensor")},
        "bias": leaf((2, WIDTH), None, "tensor"),
        "joined": leaf((24, WIDTH), "tensor", "fsdp"),
        "attention": {name: leaf((WIDTH, WIDTH), "fsdp", "tensor") for name in "qkv"},
        "blocks": {
            0: {
                "up": leaf((LAYERS, 2, WIDTH, HIDDEN), "data", None, "fsdp", "tensor"),
                "scale": leaf((LAYERS, WIDTH), "data"),
            }
        },
    }


class Recorder(ArrayTensors):
    """Counts the elements read of each tensor."""

    def __init__(self, path, arrays):
        super().__init__(path, arrays)
        self.elements = dict.fromkeys(arrays, 0)

    def read(self, name, index=None):
        array = super().read(name, index)
        self.elements[name] += array.size
        return array


def checkpoint(tmp_path, dtype=ml_dtypes.bfloat16, **changes):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
    arrays.update(changes)
    return Recorder(tmp_path, {k: v for k, v in arrays.items() if v is not None})


def expected_tree(reader):
    source = {name: reader.read(name).astype(np.float32) for name in reader.keys()}  # noqa: SIM118
    qkv = source["qkv.weight"].reshape(3, WIDTH, WIDTH)
    layers = range(LAYERS)
    halves = [[source[f"layers.{i}.{half}"].T for half in ("gate", "up")] for i in layers]
    return {
        "embed": {"table": source["embed.weight"]},
        "norm": {"scale": source["norm.weight"] + 1},
        "conv": {"w": source["conv.weight"][:, 0].T},
        "bias": source["bias"].reshape(2, WIDTH),
        "joined": np.concatenate([source["low"], source["high"]]),
        "attention": {name: qkv[i].T for i, name in enumerate("qkv")},
        "blocks": {
            0: {
                "up": np.array(halves),
                "scale": np.array([source[f"layers.{i}.scale"] for i in layers]),
            }
        },
    }


def assert_trees_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.smoke
def test_loads_and_comes_back_bit_for_bit(tmp_path):
    reader = checkpoint(tmp_path)
    params = load_tensors(reader, ROWS, abstract())
    assert_trees_equal(params, expected_tree(reader))
    write_safetensors(tmp_path / "first", export_tensors(params, ROWS, jnp.bfloat16), 500)
    again = open_checkpoint(tmp_path / "first")
    assert set(again.keys()) == set(SHAPES)
    for name in SHAPES:
        assert again.read(name).dtype == ml_dtypes.bfloat16
        assert again.read(name).tobytes() == reader.read(name).tobytes()
    # And a second trip gives the same files.
    params = load_tensors(again, ROWS, abstract())
    write_safetensors(tmp_path / "second", export_tensors(params, ROWS, jnp.bfloat16), 500)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_float32_round_trip_without_rounding(tmp_path):
    rows = [row for row in ROWS if row.transform is not PLUS_ONE]
    reader = checkpoint(tmp_path, np.float32, **{"norm.weight": None})
    tree = abstract()
    del tree["norm"]
    exported = export_tensors(load_tensors(reader, rows, tree), rows)
    for name in reader.keys():  # noqa: SIM118
        assert exported[name].shape == reader.shape(name)
        assert exported[name].dtype == np.float32
        assert exported[name]().tobytes() == reader.read(name).tobytes()


def test_dtype_replaces_that_of_floating_parameters(tmp_path):
    reader = ArrayTensors(tmp_path, {"a": np.ones(3, np.float64), "n": np.arange(3)})
    tree = {
        "a": jax.ShapeDtypeStruct((3,), jnp.float32),
        "n": jax.ShapeDtypeStruct((3,), jnp.int32),
    }
    rows = [Row("a", "a"), Row("n", "n")]
    params = load_tensors(reader, rows, tree, dtype="bfloat16")
    assert (params["a"].dtype, params["n"].dtype) == (jnp.bfloat16, jnp.int32)
    exported = export_tensors(params, rows, dtype=jnp.float16)
    assert (exported["a"]().dtype, exported["n"]().dtype) == (np.float16, np.int32)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )


def test_sharded_load_equals_the_whole_and_reads_each_slice_once(tmp_path, mesh):
    tree = abstract(lambda *names: NamedSharding(mesh, P(*names)))
    reader = checkpoint(tmp_path)
    params = load_tensors(reader, ROWS, tree)
    # All devices are this process's, so the slices of each tensor add up to it.
    assert {n: c for n, c in reader.elements.items() if n != "bias"} == {
        n: np.prod(s) for n, s in SHAPES.items() if n != "bias"
    }
    assert_trees_equal(params, expected_tree(reader))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(tree), strict=True):
        assert a.sharding == b.sharding
    exported = export_tensors(params, ROWS, jnp.bfloat16)
    for name in SHAPES:
        assert exported[name]().tobytes() == reader.read(name).tobytes()


def test_a_process_reads_only_the_slices_of_its_devices(tmp_path, mesh, monkeypatch):
    # One device of the eight stands for a process: only its callback is asked for.
    reader = checkpoint(tmp_path)
    device = mesh.devices[1, 0, 1]

    def one_device(shape, sharding, callback):
        index = sharding.devices_indices_map(shape)[device]
        return jax.device_put(callback(index))

    monkeypatch.setattr(jax, "make_array_from_callback", one_device)
    params = load_tensors(reader, ROWS, abstract(lambda *names: NamedSharding(mesh, P(*names))))
    assert params["blocks"][0]["up"].shape == (LAYERS // 2, 2, WIDTH // 2, HIDDEN // 2)
    assert reader.elements["embed.weight"] == 24 * WIDTH // 4
    assert reader.elements["layers.0.up"] == reader.elements["layers.1.gate"] == 0
    assert reader.elements["layers.2.up"] == reader.elements["layers.3.gate"] == HIDDEN * WIDTH // 4
    assert reader.elements["layers.0.scale"] == 0
    assert reader.elements["layers.3.scale"] == WIDTH
    assert reader.elements["qkv.weight"] == 3 * WIDTH * WIDTH // 4
    assert (reader.elements["low"], reader.elements["high"]) == (0, 12 * WIDTH // 2)
    assert reader.elements["conv.weight"] == WIDTH * 4 // 2
    whole = expected_tree(checkpoint(tmp_path))
    np.testing.assert_array_equal(params["joined"], whole["joined"][12:, : WIDTH // 2])
    up = whole["blocks"][0]["up"][2:, :, : WIDTH // 2, HIDDEN // 2 :]
    np.testing.assert_array_equal(params["blocks"][0]["up"], up)


def test_parameters_do_not_alias_the_file(tmp_path):
    write_safetensors(tmp_path, {"a": np.ones(1024, np.float32)})
    tree = {"a": jax.ShapeDtypeStruct((1024,), jnp.float32)}
    params = load_tensors(open_checkpoint(tmp_path), [Row("a", "a")], tree)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\0" * 4096)
    np.testing.assert_array_equal(params["a"], 1)


def test_places_on_a_given_device(tmp_path):
    reader = ArrayTensors(tmp_path, {"a": np.ones(())})
    sharding = SingleDeviceSharding(jax.devices()[3])
    tree = {"a": jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)}
    assert load_tensors(reader, [Row("a", "a")], tree)["a"].devices() == {jax.devices()[3]}


WRONG_CHECKPOINTS = {
    "missing": ({"norm.weight": None}, "1 missing tensors ('norm.weight')"),
    "many missing": (
        {f"layers.{i}.scale": None for i in range(LAYERS)},
        "4 missing tensors ('layers.0.scale', 'layers.1.scale', 'layers.2.scale', …)",
    ),
    "unexpected": ({"extra": np.ones(2)}, "1 unexpected tensors ('extra')"),
    "shape": ({"low": np.ones((9, WIDTH))}, "'low' is [9, 8], not [8, 8]"),
    "transposed": ({"layers.1.up": np.ones((8, 16))}, "'layers.1.up' is [8, 16], not [16, 8]"),
    "fused shape": ({"qkv.weight": np.ones((16, 8))}, "'qkv.weight' is [16, 8], not [24, 8]"),
    "dtype": ({"low": np.ones((8, 8), np.int32)}, "'low' is int32, not float32"),
}


@pytest.mark.parametrize("case", WRONG_CHECKPOINTS)
def test_checkpoint_that_does_not_fit(case, tmp_path):
    changes, message = WRONG_CHECKPOINTS[case]
    reader = checkpoint(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        load_tensors(reader, ROWS, abstract())
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not any(reader.elements.values())  # Told before anything is read.


def test_all_problems_come_in_one_line(tmp_path):
    reader = checkpoint(tmp_path, **{"norm.weight": None, "extra": np.ones(2), "low": np.ones(3)})
    with pytest.raises(UserError) as caught:
        load_tensors(reader, ROWS, abstract())
    for part in ("missing tensors ('norm.weight')", "unexpected tensors ('extra')", "'low' is [3]"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ignored_tensors_may_be_left(tmp_path):
    reader = checkpoint(tmp_path, **{"head.weight": np.ones(2), "layers.0.inv_freq": np.ones(2)})
    params = load_tensors(reader, ROWS, abstract(), ignore=("head.weight", "*.inv_freq"))
    assert_trees_equal(params, expected_tree(checkpoint(tmp_path)))
    with pytest.raises(UserError, match="unexpected tensors"):
        load_tensors(reader, ROWS, abstract(), ignore=("head.weight",))


def without(target, index=None):
    return [r for r in ROWS if r.target != target or (index is not None and r.index != index)]


WRONG_MAPS = {
    "parameter unfilled": (without("bias"), "the key map does not fill ('bias')"),
    "unknown target": ([*ROWS, Row("x", "blocks.1.up")], "only in the key map ('blocks.1.up')"),
    "layer unfilled": (without("blocks.0.up", 2), "filled in part or twice ('blocks.0.up')"),
    "layer twice": (
        [*ROWS, Row("x", "blocks.0.scale", index=1)],
        "filled in part or twice ('blocks.0.scale')",
    ),
    "layer past the end": (
        [*ROWS, Row("x", "blocks.0.scale", index=LAYERS)],
        "filled in part or twice ('blocks.0.scale')",
    ),
    "filled twice": ([*ROWS, Row("x", "bias")], "filled in part or twice ('bias')"),
    "whole and layer": ([*ROWS, Row("x", "blocks.0.up")], "in part or twice ('blocks.0.up')"),
    "source twice": (
        [*without("bias"), Row("low", "bias")],
        "tensors used in part or twice ('low')",
    ),
    "piece left over": (
        [*without("attention.k"), Row("k", "attention.k")],
        "tensors used in part or twice ('qkv.weight')",
    ),
    "pieces overlap": (
        [*without("attention.k"), Row(Piece("qkv.weight", 0, 7, 15), "attention.k", TRANSPOSE)],
        "tensors used in part or twice ('qkv.weight')",
    ),
    "piece and whole": (
        [*without("attention.k"), Row("qkv.weight", "attention.k", TRANSPOSE)],
        "tensors used in part or twice ('qkv.weight')",
    ),
    "impossible transform": (
        [*without("joined"), Row(("low", "high"), "joined", Stack())],
        "'joined': Stack(axis=0) of 2 sources cannot give shape (24, 8)",
    ),
}


@pytest.mark.parametrize("case", WRONG_MAPS)
def test_map_that_is_no_bijection(case, tmp_path):
    rows, message = WRONG_MAPS[case]
    with pytest.raises(UserError) as caught:
        load_tensors(checkpoint(tmp_path), rows, abstract())
    assert message in str(caught.value)


def test_export_needs_a_bijection_too(tmp_path):
    params = load_tensors(checkpoint(tmp_path), ROWS, abstract())
    with pytest.raises(UserError, match=r"does not fill \('bias'\)"):
        export_tensors(params, without("bias"))
    del params["attention"]["k"]
    with pytest.raises(UserError, match=r"used in part or twice|'qkv\.weight' in part or twice"):
        export_tensors(params, without("attention.k"))
