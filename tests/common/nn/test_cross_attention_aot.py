"""The cross attention layer compiled for accelerators that are not here: kernels, and no scores."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common.nn.cross_attention import CrossAttention, CrossKeys, CrossStates
from common.sharding import (
    DEFAULT_RULES,
    MeshConfig,
    compile_for,
    make_mesh,
    state_shardings,
    topology,
    use_mesh,
)

pytestmark = pytest.mark.compile

KERNEL = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
WIDTH, MEMORY, HEADS, KV_HEADS, HEAD = 2304, 3584, 8, 4, 256  # 9B-2B's
SOURCE, TARGET = 2048, 1024


def kernels(compiled, platform):
    return compiled.as_text().count(f'custom_call_target="{KERNEL[platform]}"')


def abstract_layer(mesh):
    module = nnx.eval_shape(
        lambda: CrossAttention(
            WIDTH,
            MEMORY,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD,
            softcap=50.0,
            dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )
    )
    graph, state = nnx.split(module)
    parameters = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nnx.to_pure_dict(state),
        state_shardings(state, mesh, DEFAULT_RULES),
    )
    return graph, parameters


def arrays(mesh, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v5e:4x4", MeshConfig(data=2, tensor=2, context=4)),
        ("h100:8", MeshConfig(data=1, tensor=8)),
    ],
)
def test_it_trains(name, sizes):
    where = topology(name)
    mesh = make_mesh(sizes, where.devices)
    rows = arrays(mesh, "data", "context")
    batch = mesh.shape["data"]
    with use_mesh(mesh):
        graph, parameters = abstract_layer(mesh)

        def loss(parameters, x, states, segments, own):
            out = nnx.merge(graph, parameters)(x, CrossStates(states, segments, own))
            return jnp.sum(out.astype(jnp.float32) ** 2)

        compiled = compile_for(
            where,
            jax.grad(loss, argnums=(0, 1, 2)),
            parameters,
            rows((batch, TARGET, WIDTH), jnp.bfloat16),
            rows((batch, SOURCE, MEMORY), jnp.float32),
            rows((batch, SOURCE), jnp.int32),
            rows((batch, TARGET), jnp.int32),
        )
    assert kernels(compiled, where.platform) == 3
    queries = TARGET // mesh.shape["context"]
    assert not re.search(rf"\[(?:\d+,)*{queries},{SOURCE}\]", compiled.as_text())


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", ["v5e:2x2", "h100:4"])
def test_it_decodes(name, beams):
    """One kernel, which reads the keys once for all beams, as they lie."""
    where = topology(name)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), where.devices)
    batch, length = 2, 16_384
    with use_mesh(mesh):
        graph, parameters = abstract_layer(mesh)
        heads = arrays(mesh, "data", "tensor")((batch, KV_HEADS, length, HEAD), jnp.bfloat16)

        def step(parameters, x, keys, values, lengths):
            return nnx.merge(graph, parameters)(x, CrossKeys(keys, values, lengths))

        compiled = compile_for(
            where,
            step,
            parameters,
            arrays(mesh, "data")((batch * beams, 1, WIDTH), jnp.bfloat16),
            heads,
            heads,
            arrays(mesh, "data")((batch,), jnp.int32),
        )
    assert kernels(compiled, where.platform) == 1
    held = 2 * 2 * length * KV_HEADS // 2 * HEAD
    assert compiled.memory_analysis().temp_size_in_bytes < held / 2
