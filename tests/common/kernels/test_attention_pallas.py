"""The attention kernels for TPU and GPU, interpreted, against a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import check, draw, oracle, random_mask, random_segments, run

from common.errors import UserError
from common.kernels import attention, tuning

# Small, so that few keys fill several tiles, and not square. A TPU's lanes are 128.
BLOCKS = {"tpu": {"queries": 128, "keys": 256}, "gpu": {"queries": 32, "keys": 16}}

PREFIX = jnp.tril(jnp.ones((90, 90), bool)).at[:, :25].set(True)

# Batch, T, S, H, K, h and options, for each kernel as long as makes several of its tiles.
CASES = {
    "tpu": {
        "causal": ((1, 300, 300, 4, 2, 16), {"causal": True}),
        "window and soft cap": ((1, 530, 530, 2, 1, 8), {"window": 130, "softcap": 2.0}),
        "pair": ((1, 520, 520, 2, 1, 8), {"window": (30, 70), "scale": 1.5}),
        "mask": ((2, 33, 300, 4, 2, 8), {"mask": random_mask((2, 4, 33, 300))}),
        "segments": ((2, 290, 290, 2, 1, 8), {"segment_ids": random_segments(2, 290)}),
        "cross": ((1, 140, 530, 2, 1, 80), {}),
        "offset": ((1, 130, 700, 2, 1, 8), {"window": 200, "offset": jnp.int32(290)}),
    },
    "gpu": {
        "causal": ((1, 75, 75, 4, 2, 16), {"causal": True}),
        "window and soft cap": ((1, 100, 100, 2, 1, 8), {"window": 39, "softcap": 2.0}),
        "pair": ((1, 130, 130, 2, 1, 8), {"window": (20, 60), "scale": 1.5}),
        "mask": ((2, 33, 50, 4, 2, 8), {"mask": random_mask((2, 4, 33, 50))}),
        "segments": ((2, 70, 70, 2, 1, 8), {"segment_ids": random_segments(2, 70)}),
        "cross": ((1, 40, 100, 2, 1, 80), {}),
        "offset": ((1, 40, 200, 2, 1, 8), {"window": 90, "offset": jnp.int32(85)}),
    },
}  # fmt: skip
SAME = {
    "prefix": ((1, 90, 90, 2, 1, 8), {"mask": PREFIX}),
    "key mask": ((2, 20, 70, 2, 1, 8), {"mask": jnp.arange(70) % 3 > 0}),
    "row mask": ((1, 20, 70, 2, 1, 8), {"mask": random_mask((1, 1, 20, 1))}),
    "one query": ((2, 1, 40, 4, 1, 8), {"causal": True, "window": 9}),
}


@pytest.fixture(params=["tpu", "gpu"])
def name(request, monkeypatch):
    """A kernel, its blocks small."""

    def blocks(folder, kernel, dtype, shape, default):
        return {**default, **BLOCKS[request.param]}

    monkeypatch.setattr(tuning, "blocks", blocks)
    return request.param


@pytest.mark.parametrize("case", [*CASES["tpu"], *SAME])
def test_equals_oracle(case, name):
    shape, options = {**CASES[name], **SAME}[case]
    arrays = draw(*shape)
    check(run(arrays, implementation=name, **options), oracle(*arrays, **options))


@pytest.mark.smoke
def test_bfloat16(name):
    def rounded(value):
        return np.asarray(jnp.asarray(value, jnp.bfloat16), np.float64)

    arrays = tuple(rounded(value) for value in draw(1, 140, 140, 4, 2, 64))
    have = run(arrays, jnp.bfloat16, window=50, implementation=name)
    assert {value.dtype for value in have} == {jnp.dtype(jnp.bfloat16)}
    check(have, oracle(*arrays, window=50), 0.03)


def test_queries_without_keys_give_zeros(name):
    """More queries than keys, causal: the first ones stand before every key."""
    arrays = draw(1, 300, 140, 2, 1, 8)
    have = run(arrays, implementation=name, causal=True)
    check(have, oracle(*arrays, causal=True))
    assert not np.asarray(have[0])[:, :160].any()
    assert not np.asarray(have[1])[:, :160].any()
    arrays = draw(1, 20, 40, 2, 1, 8)
    for value in run(arrays, implementation=name, mask=jnp.zeros((1, 1, 1, 1), bool)):
        np.testing.assert_array_equal(value, np.zeros(value.shape))


def test_far_tiles_are_never_touched(name):
    """A tile that is computed and masked would carry NaN on: zero times NaN."""
    q, k, v, d_out = (jnp.asarray(value, jnp.float32) for value in draw(1, 800, 800, 1, 1, 8))

    @jax.jit
    def both(k, v, q, d_out):
        def call(q, k, v):
            return attention(q, k, v, window=100, implementation=name)

        out, pullback = jax.vjp(call, q, k, v)
        return out, *pullback(d_out)

    clean = both(k, v, q, d_out)
    broken = both(k.at[:, :256].set(jnp.nan), v.at[:, :256].set(jnp.nan), q, d_out)
    for have, want in zip(broken[:2], clean[:2], strict=True):  # out, dq
        np.testing.assert_array_equal(have[:, 512:], want[:, 512:])
    broken = both(k, v, q.at[:, 512:].set(jnp.nan), d_out.at[:, 512:].set(jnp.nan))
    for have, want in zip(broken[2:], clean[2:], strict=True):  # dk, dv
        np.testing.assert_array_equal(have[:, :256], want[:, :256])


def test_vmap_over_leading_axes(name):
    stacked = [draw(1, 40, 40, 2, 1, 8, seed) for seed in range(2)]
    operands = [jnp.stack([jnp.asarray(one[i], jnp.float32) for one in stacked]) for i in range(4)]

    @jax.jit
    @jax.vmap
    def mapped(q, k, v, d_out):
        def call(q, k, v):
            return attention(q, k, v, window=16, implementation=name)

        out, pullback = jax.vjp(call, q, k, v)
        return out, *pullback(d_out)

    for i, have in enumerate(zip(*mapped(*operands), strict=True)):
        check(have, oracle(*stacked[i], window=16))


def test_heads_too_wide_have_no_kernel(name):
    x = jnp.zeros((1, 4, 1, 320))
    with pytest.raises(UserError, match=f"no {name} kernel"):
        attention(x, x, x, implementation=name)
    assert attention(x, x, x).shape == x.shape
