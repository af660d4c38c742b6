"""Logical axes to partition specs: collisions, indivisible sizes, stacks, activations."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from common.sharding import (
    DEFAULT_RULES,
    MeshConfig,
    Rules,
    make_mesh,
    partition_spec,
    shard,
    state_shardings,
    use_mesh,
    variable_axes,
)


@pytest.fixture(name="mesh")
def _mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (4, 6), PartitionSpec("fsdp", "tensor")),
        (("embed", "mlp"), (3, 6), PartitionSpec(None, "tensor")),
        (("heads", "mlp"), (4, 6), PartitionSpec("tensor")),  # one mesh axis, used once
        (("batch", "embed"), (4, 6), PartitionSpec(("data", "fsdp"))),
        (("batch", None), (6, 6), PartitionSpec("data")),  # 6 divides by 2, not by 4
        (("batch", "seq"), (8, 6), PartitionSpec(("data", "fsdp"))),  # context is 1 here
        (("layers", "head_dim"), (4, 4), PartitionSpec()),
        ((), (), PartitionSpec()),
    ],
)
def test_partition_spec(mesh, axes, shape, expected):
    assert partition_spec(axes, shape, mesh, DEFAULT_RULES) == expected


def test_dropped_axis_is_logged_once(mesh, caplog):
    with caplog.at_level("INFO", "common.sharding.rules"):
        for _ in range(3):
            partition_spec(("embed",), (77,), mesh, DEFAULT_RULES)
    assert [r.getMessage() for r in caplog.records if "77" in r.getMessage()] == [
        "dimension 'embed' of (77,) is not split over 'fsdp': 77 does not divide by 2"
    ]


def test_rules_are_frozen_and_name_the_nearest():
    rules = DEFAULT_RULES.replace(experts="tensor", embed=None)
    assert rules["experts"] == "tensor"
    assert DEFAULT_RULES["embed"] == "fsdp"
    assert hash(Rules({"a": "data"})) == hash(Rules({"a": "data"}))
    assert Rules({"a": "data"}) != Rules({"a": "fsdp"})
    with pytest.raises(KeyError, match="did you mean 'embed'"):
        rules["embde"]


def test_variable_axes_adds_the_stacked_dimension():
    assert variable_axes(nnx.Param(jnp.ones((3, 4)), axes=("embed", None))) == ("embed", None)
    assert variable_axes(nnx.Param(jnp.ones((3, 4)), axes=("embed",))) == ("layers", "embed")
    assert variable_axes(nnx.Param(jnp.ones((3, 4)))) == (None, None)
    with pytest.raises(ValueError, match="more than"):
        variable_axes(nnx.Param(jnp.ones(3), axes=("embed", "mlp")))


def test_state_shardings_mirror_the_pure_dict(mesh):
    class Part(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((4, 8)), axes=("embed", "mlp"))
            self.more = nnx.List([nnx.Param(jnp.ones((3, 4)), axes=("embed",))])

    state = nnx.state(nnx.eval_shape(Part))
    shardings = state_shardings(state, mesh, DEFAULT_RULES)
    assert jax.tree.structure(shardings) == jax.tree.structure(nnx.to_pure_dict(state))
    assert shardings["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert shardings["more"][0].spec == PartitionSpec(None, "fsdp")


def test_shard_constrains_inside_a_mesh_only(mesh):
    def double(x):
        return shard(x * 2, "batch", "mlp")

    x = jnp.ones((8, 4))
    assert len(jax.jit(double)(x).sharding.device_set) == 1
    with use_mesh(mesh):
        y = jax.jit(double)(x)
    assert y.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")
    assert len(jax.jit(double)(x).sharding.device_set) == 1
    with use_mesh(mesh, DEFAULT_RULES.replace(mlp=None)):
        # Another function: rules are not part of what `jit` remembers a trace by.
        y = jax.jit(lambda x: double(x))(x)
    assert y.sharding.spec == PartitionSpec(("data", "fsdp"))


def test_shard_leaves_manual_axes_alone(mesh):
    def body(x):
        return shard(x + 1, "batch", "mlp")

    spec = PartitionSpec("data")
    with use_mesh(mesh):
        f = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"data"})
        y = jax.jit(f)(jnp.zeros((8, 4)))
    assert (y == 1).all()


def test_shard_refuses_a_wrong_number_of_names(mesh):
    with use_mesh(mesh), pytest.raises(ValueError, match="axis names"):
        jax.jit(lambda x: shard(x, "batch"))(jnp.ones((8, 4)))


def test_one_device_needs_no_constraint():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with use_mesh(mesh):
        text = jax.jit(lambda x: shard(x, "batch", "mlp")).lower(jnp.ones((8, 4))).as_text()
    assert "sharding_constraint" not in text
