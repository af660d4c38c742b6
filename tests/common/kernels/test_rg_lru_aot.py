"""`rg_lru` compiled for accelerators that are not here."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from common.kernels import rg_lru
from common.nn.layout import sequence_layout
from common.nn.recurrence import RecurrentBlock
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


def kernels(compiled, platform):
    return compiled.as_text().count(f'custom_call_target="{KERNEL[platform]}"')


def both_ways(v, gate_x, gate_a, a_param, h0, reset, dh, dh_last):
    function = functools.partial(rg_lru, reset=reset)
    outputs, pullback = jax.vjp(function, v, gate_x, gate_a, a_param, h0)
    return outputs, pullback((dh, dh_last))


def compiled_alone(name, shape, gate_dtype=jnp.bfloat16):
    """Both directions on one device."""
    where = topology(name)
    alone = SingleDeviceSharding(where.devices[0])

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=alone)

    batch, length, width = shape
    wide, gate = array(shape, jnp.bfloat16), array(shape, gate_dtype)
    flat, rate = array((batch, width), jnp.float32), array((width,), jnp.float32)
    reset = array((batch, length), bool)
    operands = wide, gate, gate, rate, flat, reset, wide, flat
    return where.platform, compile_for(where, both_ways, *operands)


@pytest.mark.parametrize("name", DEVICES)
def test_one_kernel_each_way_and_no_gates_in_memory(name):
    platform, compiled = compiled_alone(name, (8, 2048, 2560))
    assert kernels(compiled, platform) == 2
    assert "f32[8,2048,2560]" not in compiled.as_text()
    # Beside arguments and results: a number a step, a few a channel.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.parametrize("shape", [(3, 1000, 2600), (1, 9, 5)])
@pytest.mark.parametrize("name", DEVICES)
def test_ragged(name, shape):
    platform, compiled = compiled_alone(name, shape, jnp.float32)
    assert kernels(compiled, platform) >= 2


def test_few_channels_walk_in_stretches_on_a_gpu():
    platform, compiled = compiled_alone("h100:1", (1, 8192, 2560))
    assert kernels(compiled, platform) == 4
    assert "f32[1,8192,2560]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.parametrize(
    ("name", "sizes", "count"),
    [
        ("v5e:2x2", MeshConfig(data=1, fsdp=2, tensor=2), 2),
        ("v5e:2x2", MeshConfig(data=1, fsdp=2, context=2), 4),  # once more, for the states
        ("h100:8", MeshConfig(data=2, fsdp=2, tensor=2), 4),  # few channels: in stretches
    ],
)
def test_recurrent_block_on_a_mesh(name, sizes, count):
    """Each device runs the kernel on its own rows, steps and channels."""
    where = topology(name)
    mesh = make_mesh(sizes, where.devices)
    batch, length, width = 8, 1024, 512
    block = functools.partial(RecurrentBlock, width, width, 4, dtype=jnp.bfloat16)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: block(rngs=nnx.Rngs(0))))

    def loss(params, x, tokens):
        nnx.replace_by_pure_dict(state, params)
        y, _ = nnx.merge(graphdef, state)(x, sequence_layout(tokens, segment_ids=tokens))
        return jnp.mean(y.astype(jnp.float32) ** 2)

    def array(like, sharding):
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)

    shardings = state_shardings(state, mesh, DEFAULT_RULES)
    params = jax.tree.map(array, nnx.to_pure_dict(state), shardings)
    x = jax.ShapeDtypeStruct((batch, length, width), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    rows = batch_sharding(mesh)
    with use_mesh(mesh):
        gradient = jax.grad(loss, argnums=(0, 1))
        compiled = compile_for(where, gradient, params, array(x, rows), array(tokens, rows))
    assert kernels(compiled, where.platform) == count
    shard = f"bf16[{batch // mesh.shape['data'] // mesh.shape['fsdp']},"
    shard += f"{length // sizes.context},{width // sizes.tensor}]"
    calls = [line for line in compiled.as_text().splitlines() if KERNEL[where.platform] in line]
    assert all(shard in line for line in calls if "_ends" not in line)
    if sizes.context == 1:
        assert not re.search(r"\w+\[\d+,1024,\d+\]\S* all-gather", compiled.as_text())
