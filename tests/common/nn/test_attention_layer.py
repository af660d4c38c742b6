"""The attention layer over a mesh: equal to one device, heads and keys where they are needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import common.nn.attention as layers
from common.kernels import attention
from common.nn.attention import Attention
from common.nn.layout import chunk_layout, sequence_layout
from common.sharding import MeshConfig, make_mesh, use_mesh

WIDTH, LENGTH, BATCH = 32, 24, 4

# Key heads beside 8 query heads, and a mesh of 8 devices.
MESHES = {
    "context and one key head": (1, MeshConfig(data=2, tensor=2, context=2)),
    "key heads divide": (4, MeshConfig(data=1, tensor=4, context=2)),
    "key heads are copied": (2, MeshConfig(data=2, tensor=4)),
    "heads whole": (2, MeshConfig(data=-1, tensor=1, context=4)),
}


def layer(kv_heads, heads=8):
    return Attention(
        WIDTH,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=4,
        window=7,
        softcap=3.0,
        rngs=nnx.Rngs(0),
    )


def split(kv_heads, **sizes):
    graph, state = nnx.split(layer(kv_heads, **sizes))
    return graph, nnx.to_pure_dict(state)


def merged(graph, parameters):
    return nnx.merge(graph, parameters)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def gradients(graph):
    segments = jnp.asarray(np.arange(LENGTH) // 10)[None].repeat(BATCH, 0)

    def loss(parameters, x):
        layout = sequence_layout(x[..., 0], None, segments)
        out, _ = merged(graph, parameters)(x, layout)
        return jnp.sum(out**2), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def steps(graph):
    """A first chunk, a second one behind it, and one token."""

    def run(parameters, x):
        module = merged(graph, parameters)
        state, cached, outs = module.init_state(BATCH, None), jnp.zeros(BATCH, jnp.int32), []
        for begin, end in ((0, 9), (9, 14), (14, 15)):
            chunk = x[:, begin:end]
            layout = chunk_layout(
                chunk[..., 0], cached + begin, cached, None, None, fresh=begin == 0
            )
            out, state = module(chunk, layout, state)
            outs.append(out)
        return jnp.concatenate(outs, axis=1), state

    return jax.jit(run)


@pytest.mark.parametrize("case", MESHES)
@pytest.mark.parametrize("program", [gradients, steps])
def test_mesh_equals_one_device(program, case):
    kv_heads, sizes = MESHES[case]
    graph, parameters = split(kv_heads)
    x = draw(1, BATCH, LENGTH, WIDTH)
    alone = program(graph)(parameters, x)
    with use_mesh(make_mesh(sizes, jax.devices()[:8])):
        together = program(graph)(parameters, x)
    for have, want in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-5)


def test_heads_that_do_not_divide_stay_whole():
    graph, parameters = split(1, heads=6)
    x = draw(1, BATCH, LENGTH, WIDTH)
    alone = gradients(graph)(parameters, x)
    with use_mesh(make_mesh(MeshConfig(data=2, tensor=4), jax.devices()[:8])):
        together = gradients(graph)(parameters, x)
    for have, want in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "queries", "keys"),
    [
        ("context and one key head", (2, 12, 4, 4), (2, 24, 1, 4)),
        ("key heads divide", (4, 12, 2, 4), (4, 24, 1, 4)),
        ("key heads are copied", (2, 24, 2, 4), (2, 24, 1, 4)),
    ],
)
def test_each_device_holds_what_it_works_on(case, queries, keys, monkeypatch):
    seen = []

    def recorded(q, k, v, **options):
        seen.append((q.shape, k.shape, v.shape))
        return attention(q, k, v, **options)

    monkeypatch.setattr(layers, "attention", recorded)
    kv_heads, sizes = MESHES[case]
    graph, parameters = split(kv_heads)
    with use_mesh(make_mesh(sizes, jax.devices()[:8])):
        gradients(graph).lower(parameters, draw(1, BATCH, LENGTH, WIDTH))
    assert set(seen) == {(queries, keys, keys)}
