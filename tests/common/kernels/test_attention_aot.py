"""Attention and decode attention compiled for accelerators that are not here."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from common.kernels import attention, decode_attention
from common.nn.attention import Attention, AttentionState
from common.nn.layout import chunk_layout, sequence_layout
from common.sharding import (
    DEFAULT_RULES,
    MeshConfig,
    batch_sharding,
    compile_for,
    make_mesh,
    state_shardings,
    topology,
    use_mesh,
)

pytestmark = pytest.mark.compile

DEVICES = ["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "h100:1"]
KERNEL = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}

# Batch, T, S, H, K, h and options.
CASES = {
    "local": ((2, 8192, 8192, 10, 1, 256), {"window": 2049}),
    "soft cap": ((2, 4096, 4096, 16, 8, 128), {"causal": True, "softcap": 50.0}),
    "cross": ((2, 1024, 3000, 12, 12, 64), {}),
}


def kernels(compiled, platform):
    return compiled.as_text().count(f'custom_call_target="{KERNEL[platform]}"')


def has_square(compiled, queries, keys):
    """Whether any array has as many rows as queries and columns as keys."""
    return bool(re.search(rf"\[(?:\d+,)*{queries},{keys}\]", compiled.as_text()))


def both_ways(options, q, k, v, d_out, extra):
    out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, **options, **extra), q, k, v)
    return out, pullback(d_out)


def compiled_alone(name, shape, options, dtype=jnp.bfloat16, **extra):
    where = topology(name)
    alone = SingleDeviceSharding(where.devices[0])

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=alone)

    batch, queries, keys, heads, kv_heads, width = shape
    q, k = array(batch, queries, heads, width), array(batch, keys, kv_heads, width)
    given = {name: array(*size, dtype=kind) for name, (size, kind) in extra.items()}
    function = functools.partial(both_ways, options)
    return where.platform, compile_for(where, function, q, k, k, q, given)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_three_kernels_and_no_scores_in_memory(case, name):
    shape, options = CASES[case]
    platform, compiled = compiled_alone(name, shape, options)
    assert kernels(compiled, platform) == 3
    assert not has_square(compiled, *shape[1:3])
    # Transposed operands and one number a query: a few times what goes in, 128 lanes the least.
    batch, queries, keys, heads, kv_heads, width = shape
    operands = 2 * batch * max(width, 128) * (queries * heads + keys * kv_heads)
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * operands


@pytest.mark.parametrize("name", ["v5e:1x1", "h100:1"])
@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"window": (100, 40)}, {"segment_ids": ((2, 600), jnp.int32)}),
        ({"softcap": 5.0}, {"mask": ((2, 1, 600, 600), jnp.bool_)}),
        ({"causal": True}, {"mask": ((600,), jnp.bool_), "offset": ((), jnp.int32)}),
    ],
)
def test_masks_segments_and_offsets_compile(options, extra, name):
    shape = (2, 600, 600, 4, 2, 80)
    platform, compiled = compiled_alone(name, shape, options, jnp.float32, **extra)
    assert kernels(compiled, platform) == 3


@pytest.mark.parametrize("name", ["v5e:1x1", "h100:1"])
def test_vmap_and_full_precision_compile(name):
    where = topology(name)
    alone = SingleDeviceSharding(where.devices[0])
    x = jax.ShapeDtypeStruct((3, 1, 512, 2, 64), jnp.float32, sharding=alone)

    def squared(q, k, v):
        return jnp.sum(jax.vmap(lambda *x: attention(*x, window=100))(q, k, v) ** 2)

    with jax.default_matmul_precision("highest"):
        compiled = compile_for(where, jax.grad(squared, argnums=(0, 1, 2)), x, x, x)
    assert kernels(compiled, where.platform) == 3


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(
    "shape",
    [
        (8, 1, 2048, 10, 1, 256),
        (8, 1, 8192, 32, 8, 128),
        (4, 5, 1000, 8, 4, 128),
        (16, 1, 4096, 8, 4, 256),
    ],
)
def test_decoding_reads_the_cache_as_it_lies(shape, name):
    """No copy of the cache: the program's own memory is small beside it."""
    where = topology(name)
    alone = SingleDeviceSharding(where.devices[0])
    batch, queries, slots, heads, kv_heads, width = shape

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=alone)

    q, own = array(batch, queries, heads, width), array(batch, queries, kv_heads, width)
    cache, lengths = array(batch, kv_heads, slots, width), array(batch, dtype=jnp.int32)

    def step(q, keys, values, lengths, k, v):
        return decode_attention(q, keys, values, lengths, new=(k, v), window=slots + 1)

    compiled = compile_for(where, step, q, cache, cache, lengths, own, own)
    assert kernels(compiled, where.platform) == 1
    held = 2 * 2 * batch * slots * kv_heads * width
    assert compiled.memory_analysis().temp_size_in_bytes < held / 4


LAYERS = [
    ("v5e:4x4", MeshConfig(data=8, tensor=2), 1),
    ("v5e:4x4", MeshConfig(data=2, tensor=2, context=4), 2),
    ("h100:8", MeshConfig(data=2, tensor=4), 2),
    ("h100:8", MeshConfig(data=2, tensor=2, context=2), 1),
]


def abstract_layer(mesh, kv_heads):
    module = nnx.eval_shape(
        lambda: Attention(
            1024,
            num_heads=8,
            num_kv_heads=kv_heads,
            head_dim=128,
            window=513,
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


@pytest.mark.parametrize(("name", "sizes", "kv_heads"), LAYERS)
def test_a_sharded_layer_trains(name, sizes, kv_heads):
    where = topology(name)
    mesh = make_mesh(sizes, where.devices)
    batch, length = mesh.shape["data"], 2048
    with use_mesh(mesh):
        graph, parameters = abstract_layer(mesh, kv_heads)
        rows = NamedSharding(mesh, P("data", "context"))
        x = jax.ShapeDtypeStruct((batch, length, 1024), jnp.bfloat16, sharding=rows)
        segments = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows)

        def loss(parameters, x, segments):
            layout = sequence_layout(segments, None, segments)
            out, _ = nnx.merge(graph, parameters)(x, layout)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        compiled = compile_for(where, jax.grad(loss, argnums=(0, 1)), parameters, x, segments)
    assert kernels(compiled, where.platform) == 3
    text = compiled.as_text()
    assert "all-to-all" not in text, "queries stay with their keys"
    assert not has_square(compiled, length // mesh.shape["context"], length)


@pytest.mark.parametrize("name", ["v5e:4x4", "h100:8"])
def test_a_sharded_layer_decodes(name):
    where = topology(name)
    mesh = make_mesh(MeshConfig(data=-1, tensor=2), where.devices)
    batch = 2 * mesh.shape["data"]
    with use_mesh(mesh):
        graph, parameters = abstract_layer(mesh, 2)
        rows = batch_sharding(mesh)
        heads = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
        x = jax.ShapeDtypeStruct((batch, 1, 1024), jnp.bfloat16, sharding=rows)
        cached = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)
        ring = jax.ShapeDtypeStruct((batch, 2, 512, 128), jnp.bfloat16, sharding=heads)

        def step(parameters, x, cached, keys, values):
            layout = chunk_layout(x[..., 0], cached, cached, None, None, fresh=False)
            return nnx.merge(graph, parameters)(x, layout, AttentionState(keys, values))

        compiled = compile_for(where, step, parameters, x, cached, ring, ring)
    assert kernels(compiled, where.platform) == 1
