"""`per_shard`: functions that see one device's part, named by logical axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.sharding import DEFAULT_RULES, MeshConfig, make_mesh, per_shard, use_mesh, ways

X = np.arange(8 * 6 * 12, dtype=np.float32).reshape(8, 6, 12)
AXES = ("batch", "seq", "lru")
seen: list[tuple] = []


def doubled(x, bias):
    seen.append((x.shape, None if bias is None else bias.shape))
    return 2 * x if bias is None else 2 * x + bias


def call(x, bias):
    return per_shard(doubled, (x, bias), (AXES, None if bias is None else ("lru",)), AXES)


def run(sizes: MeshConfig, x, bias=None):
    seen.clear()
    with use_mesh(make_mesh(sizes, jax.devices()[:8])):
        return jax.jit(call)(x, bias)


def test_no_mesh_is_a_plain_call():
    np.testing.assert_array_equal(call(X, None), 2 * X)


def test_each_device_sees_its_part():
    bias = np.arange(12, dtype=np.float32)
    result = run(MeshConfig(data=2, fsdp=2, tensor=2), X, bias)
    np.testing.assert_array_equal(result, 2 * X + bias)
    assert seen[-1] == ((2, 6, 6), (6,))


def test_an_axis_that_does_not_divide_is_left_out_for_all():
    """A bias of 12 would divide by 4, but the width of 6 beside it under the same name does not."""

    def product(x, w):
        seen.append((x.shape, w.shape))
        return x[..., :1] * w

    seen.clear()
    with use_mesh(make_mesh(MeshConfig(data=2, tensor=4), jax.devices()[:8])):
        result = jax.jit(
            lambda x, w: per_shard(product, (x, w), (AXES, ("lru",)), ("batch", "seq", None))
        )(X[..., :6], np.ones(12, np.float32))
    assert seen[-1] == ((4, 6, 6), (12,))
    np.testing.assert_array_equal(result, np.repeat(X[..., :1], 12, axis=-1))


def test_sequence_names_its_axis():
    def total(x, *, axis_name):
        seen.append((x.shape, axis_name))
        here = x.sum(axis=1)
        return here if axis_name is None else jax.lax.psum(here, axis_name)

    def over(sizes):
        seen.clear()
        with use_mesh(make_mesh(sizes, jax.devices()[:8])):
            return jax.jit(
                lambda x: per_shard(total, (x,), (AXES,), ("batch", "lru"), sequence="seq")
            )(X)

    np.testing.assert_array_equal(over(MeshConfig(data=4, context=2)), X.sum(axis=1))
    assert seen[-1] == ((2, 3, 12), "context")
    np.testing.assert_array_equal(over(MeshConfig(data=8)), X.sum(axis=1))
    assert seen[-1] == ((1, 6, 12), None)


def test_gradient_of_what_every_device_holds():
    """A bias held whole by the batch's devices gets the sum of their gradients."""
    bias = jnp.ones(12)
    with use_mesh(make_mesh(MeshConfig(data=4, tensor=2), jax.devices()[:8])):
        gradient = jax.jit(jax.grad(lambda b: (call(X, b) ** 2).sum()))(bias)
    expected = jax.grad(lambda b: ((2 * X + b) ** 2).sum())(bias)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_a_sequence_on_two_mesh_axes_is_refused():
    rules = DEFAULT_RULES.replace(seq=("context", "tensor"))
    mesh = make_mesh(MeshConfig(context=2, tensor=3, data=1), jax.devices()[:6])
    with use_mesh(mesh, rules), pytest.raises(ValueError, match="one mesh axis"):
        per_shard(lambda x, axis_name: x, (X,), (AXES,), AXES, sequence="seq")


def test_ways_a_name_is_cut():
    assert ways("batch") == 1
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    with use_mesh(mesh):
        assert [ways(name) for name in ("batch", "kv_heads", "seq", "layers")] == [4, 2, 1, 1]
        inside = jax.shard_map(
            lambda x: x * ways("kv_heads"), in_specs=jax.P(), out_specs=jax.P(), check_vma=False
        )
        assert jax.jit(inside)(jnp.ones(())) == 1, "a manual axis is cut already"
