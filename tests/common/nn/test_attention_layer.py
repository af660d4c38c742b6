"""The attention layer over a mesh: equal to one device, heads and keys where they are needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import common.nn.attention as layers
from common.kernels import attention
from common.nn.attention import Attention, whole_tiles
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


def layer(kv_heads, heads=8, **options):
    return Attention(
        WIDTH,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=4,
        rngs=nnx.Rngs(0),
        **{"window": 7, "softcap": 3.0, **options},
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


@pytest.mark.parametrize("case", MESHES)
def test_bidirectional_mesh_equals_one_device(case):
    kv_heads, sizes = MESHES[case]
    graph, parameters = split(kv_heads, causal=False, window=3)
    x = draw(1, BATCH, LENGTH, WIDTH)
    alone = gradients(graph)(parameters, x)
    with use_mesh(make_mesh(sizes, jax.devices()[:8])):
        together = gradients(graph)(parameters, x)
    for have, want in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-5)


def sees(module, segments=None):
    """`[T, S]`: True where the output at t changes with the input at s."""
    x = draw(2, 1, 12, WIDTH)
    layout = sequence_layout(x[..., 0], None, segments)
    call = jax.jit(lambda x: module(x, layout)[0][0])
    base = call(x)
    return np.stack(
        [np.any(np.asarray(call(x.at[0, s].add(1.0)) != base), axis=-1) for s in range(12)], axis=1
    )


DISTANCE = np.arange(12)[:, None] - np.arange(12)[None]  # how far the key is behind the query


@pytest.mark.parametrize(
    ("causal", "window", "seen"),
    [
        (True, None, DISTANCE >= 0),
        (True, 3, (DISTANCE >= 0) & (DISTANCE <= 2)),
        (False, None, DISTANCE > -99),
        (False, 3, abs(DISTANCE) <= 3),
        (False, 0, DISTANCE == 0),
        (False, (1, 4), (DISTANCE <= 1) & (DISTANCE >= -4)),
    ],
)
def test_window(causal, window, seen):
    module = layer(2, causal=causal, window=window)
    np.testing.assert_array_equal(sees(module), seen)
    documents = np.repeat([1, 2], [5, 7])[None]
    together = documents[0][:, None] == documents[0][None]
    np.testing.assert_array_equal(sees(module, documents), seen & together)


def test_bidirectional_has_no_cache():
    with pytest.raises(ValueError, match="no decode cache"):
        layer(2, causal=False, window=3).init_state(1, 8)
    with pytest.raises(ValueError, match="own key"):
        layer(2, window=0)


def test_norms_scale_and_biases_equal_the_formula():
    heads, length = 4, 6
    options = {"softcap": None, "window": None, "qk_norm": True, "qkv_bias": True}
    module = layer(heads, heads=heads, query_scale=0.7, rope_base=100.0, **options)
    for seed, linear in enumerate((module.q, module.k, module.v)):
        linear.bias[...] = draw(seed, 16)
    module.q_norm.scale[...], module.k_norm.scale[...] = draw(3, 4), draw(4, 4)
    x = draw(5, 1, length, WIDTH)
    with jax.default_matmul_precision("highest"):
        out, _ = module(x, sequence_layout(x[..., 0]))

    def projected(linear, norm=None):
        y = np.asarray(x[0] @ linear.kernel[...] + linear.bias[...], np.float64)
        y = y.reshape(length, heads, 4)
        if norm is None:
            return y
        y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6) * (1 + np.asarray(norm.scale[...]))
        angles = np.arange(length)[:, None, None] * np.array([1.0, 0.1])
        a, b = y[..., :2], y[..., 2:]
        sin, cos = np.sin(angles), np.cos(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    q, k = projected(module.q, module.q_norm), projected(module.k, module.k_norm)
    scores = 0.7 * np.einsum("tnh,snh->nts", q, k)
    weights = np.exp(scores) * (DISTANCE[:length, :length] >= 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("nts,snh->tnh", weights, projected(module.v)).reshape(length, 16)
    np.testing.assert_allclose(out[0], expected @ np.asarray(module.o.kernel[...]), atol=2e-5)


@pytest.mark.parametrize(("needed", "slots"), [(1, 1), (100, 100), (129, 144), (2048, 2048)])
def test_large_rings_fill_whole_tiles(needed, slots):
    assert whole_tiles(needed) == slots
