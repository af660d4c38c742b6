"""Layers written out on a CPU and looped over elsewhere are the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.nn.stack import _MOST_WRITTEN_OUT, scan_layers


def layers(depth: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(depth, 8, 8)).astype(np.float32) / 8**0.5


def loss(weights: jax.Array, policy: str) -> jax.Array:
    x = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)

    def body(x, w):
        x = jnp.tanh(x @ w)
        return x, x.sum()

    x, sums = scan_layers(body, x, weights, policy)
    return jnp.sum(x * x) + jnp.sum(sums * jnp.arange(len(weights)))


@pytest.mark.parametrize("policy", ["none", "full", "dots"])
@pytest.mark.parametrize("depth", [3, _MOST_WRITTEN_OUT + 1])
def test_written_out_or_in_a_loop(policy, depth):
    step = jax.value_and_grad(lambda weights: loss(weights, policy))
    looped = jax.jit(step).lower(layers(depth))
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        written = jax.jit(step).lower(layers(depth))
    assert "stablehlo.while" in looped.as_text()
    assert ("stablehlo.while" in written.as_text()) == (depth > _MOST_WRITTEN_OUT)
    for have, want in zip(written.compile()(layers(depth)), looped.compile()(layers(depth))):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def test_the_bound_counts_blocks():
    def body(x, w):
        return x @ w, None

    def lowered(blocks: int) -> str:
        return (
            jax.jit(lambda w: scan_layers(body, np.eye(8), w, blocks=blocks))
            .lower(layers(3))
            .as_text()
        )

    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert "stablehlo.while" not in lowered(_MOST_WRITTEN_OUT // 3)
        assert "stablehlo.while" in lowered(_MOST_WRITTEN_OUT // 3 + 1)
