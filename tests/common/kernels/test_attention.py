"""`attention` against a float64 oracle: values, gradients, masks, dtypes, transforms, sharding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import check, draw, oracle, random_mask, random_segments, run
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from common.kernels import attention
from common.kernels.attention import blocked, direct, xla
from common.kernels.attention.options import Options

FORMS = ("direct", "squares", "strips")


def use(form: str, monkeypatch) -> None:
    """Has the plain XLA form cut as `form` says: squares of 128, or strips of 64 queries."""
    monkeypatch.setattr(xla, "_form", lambda *_: direct if form == "direct" else blocked)
    monkeypatch.setattr(blocked, "_WORTH_SKIPPING", 0.0 if form == "strips" else 1e9)
    monkeypatch.setattr(blocked, "_STRIP", 64)


CASES = {
    "plain": ((2, 9, 9, 4, 4, 8), {}),
    "one query": ((2, 1, 40, 4, 2, 8), {"causal": True}),
    "causal": ((2, 37, 37, 4, 2, 8), {"causal": True}),
    "window": ((1, 150, 150, 4, 1, 4), {"window": 11}),
    "window of one": ((1, 21, 21, 2, 1, 4), {"window": 1}),
    "pair": ((1, 290, 290, 2, 2, 4), {"window": (30, 50)}),
    "causal pair": ((1, 40, 40, 2, 2, 4), {"window": (7, 9), "causal": True}),
    "more keys": ((1, 140, 300, 4, 2, 4), {"causal": True, "window": 100}),
    "more queries": ((1, 300, 140, 2, 1, 4), {"causal": True}),
    "soft cap": ((1, 150, 150, 2, 1, 4), {"softcap": 2.0, "scale": 1.5, "causal": True}),
    "mask": ((2, 33, 20, 4, 2, 4), {"mask": random_mask((2, 4, 33, 20))}),
    "row mask": ((2, 130, 270, 4, 2, 4), {"mask": random_mask((2, 1, 130, 270))}),
    "key mask": ((2, 130, 14, 4, 2, 4), {"mask": jnp.arange(14) % 3 > 0}),
    "segments": (
        (2, 200, 200, 4, 2, 4),
        {"segment_ids": random_segments(2, 200), "causal": True, "softcap": 5.0},
    ),
    "segment pair": (
        (2, 30, 145, 2, 2, 4),
        {"segment_ids": (random_segments(2, 30), random_segments(2, 145, 4))},
    ),
}


@pytest.mark.parametrize("form", ["reference", *FORMS])
@pytest.mark.parametrize("case", CASES)
def test_equals_oracle(case, form, monkeypatch):
    shape, options = CASES[case]
    arrays = draw(*shape)
    if form in FORMS:
        use(form, monkeypatch)
    name = "reference" if form == "reference" else "xla"
    check(run(arrays, implementation=name, **options), oracle(*arrays, **options))


@pytest.mark.smoke
def test_smoke_attention_values_and_gradients():
    arrays = draw(2, 140, 140, 4, 2, 8)
    options = {"causal": True, "window": 20, "softcap": 4.0}
    check(run(arrays, **options), oracle(*arrays, **options))


def test_long_causal_takes_wide_tiles():
    arrays = draw(1, 2100, 2100, 1, 1, 4)
    tiles = blocked.tiling(Options(1.0, None, None, 0), 2100, 2100)
    assert tiles.block_q == 256
    assert tiles.work() < 0.7
    q, k, v, d_out = (jnp.asarray(value, jnp.float32) for value in arrays)
    both = jax.jit(
        lambda name, q, k, v: jax.vjp(
            lambda q, k, v: attention(q, k, v, causal=True, implementation=name), q, k, v
        )[1](d_out),
        static_argnums=0,
    )
    for have, want in zip(both("xla", q, k, v), both("reference", q, k, v), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form, monkeypatch):
    use(form, monkeypatch)

    def rounded(value):
        return np.asarray(jnp.asarray(value, jnp.bfloat16), np.float64)

    arrays = tuple(rounded(value) for value in draw(2, 140, 140, 4, 2, 16))
    have = run(arrays, jnp.bfloat16, causal=True)
    assert {value.dtype for value in have} == {jnp.dtype(jnp.bfloat16)}
    check(have, oracle(*arrays, causal=True), 0.03)


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_queries_without_keys_give_zeros(form, monkeypatch):
    if form in FORMS:
        use(form, monkeypatch)
    name = "reference" if form == "reference" else "xla"
    arrays = draw(1, 150, 150, 2, 1, 4)
    mask = jnp.ones((150, 150), bool).at[7].set(False).at[140:].set(False)
    out, dq, _, _ = run(arrays, implementation=name, mask=mask, softcap=3.0)
    for value in (out, dq):
        assert not np.asarray(value)[:, 7].any()
        assert not np.asarray(value)[:, 140:].any()
        assert np.asarray(value)[:, 8].any()
    everything = run(arrays, implementation=name, mask=jnp.zeros((1, 1, 1, 1), bool))
    for value in everything:
        np.testing.assert_array_equal(value, np.zeros(value.shape))


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"causal": True}, {"is_causal": True}),
        ({"window": 20}, {"local_window_size": (19, 0)}),
        ({"window": (9, 4), "scale": 0.3}, {"local_window_size": (9, 4), "scale": 0.3}),
    ],
)
def test_equals_jax_nn(options, theirs):
    q, k, v, _ = (jnp.asarray(value, jnp.float32) for value in draw(2, 200, 200, 4, 2, 8))
    want = jax.nn.dot_product_attention(q, k, v, **theirs)
    np.testing.assert_allclose(attention(q, k, v, **options), want, rtol=1e-5, atol=1e-5)


def test_local_attention_never_touches_far_tiles():
    q, k, v, _ = (jnp.asarray(value, jnp.float32) for value in draw(1, 1024, 1024, 2, 1, 4))
    broken = v.at[:, :256].set(jnp.nan)  # Even a weight of zero would carry these on.
    local = jax.jit(lambda v: attention(q, k, v, window=100))
    np.testing.assert_array_equal(local(broken)[:, 512:], local(v)[:, 512:])
    assert np.isfinite(np.asarray(local(broken)[:, 512:])).all()


def test_local_attention_memory_grows_with_the_window_alone():
    temporary = {}
    for length in (2048, 8192):
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        grad = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, window=128)), argnums=(0, 1, 2))
        compiled = jax.jit(grad).lower(shape, shape, shape).compile()
        temporary[length] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[8192] < 5 * temporary[2048]
    assert temporary[8192] < 8192 * 8192


@pytest.mark.parametrize("length", [24, 300])
def test_vmap_over_leading_axes(length):
    stacked = [draw(1, length, length, 2, 1, 4, seed) for seed in range(2)]
    operands = [jnp.stack([jnp.asarray(one[i], jnp.float32) for one in stacked]) for i in range(4)]

    @jax.jit
    @jax.vmap
    def mapped(q, k, v, d_out):
        out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, window=16), q, k, v)
        return out, *pullback(d_out)

    for i, have in enumerate(zip(*mapped(*operands), strict=True)):
        check(have, oracle(*stacked[i], window=16))


@pytest.mark.parametrize("length", [24, 300])
def test_sharded_over_batch_and_heads_without_gathering(length):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("data", None, "tensor", None))
    arrays = draw(4, length, length, 4, 2, 4)
    segments = random_segments(4, length)
    operands = [jax.device_put(jnp.asarray(value, jnp.float32), sharding) for value in arrays]
    rows = jax.device_put(segments, NamedSharding(mesh, P("data", None)))

    def both(q, k, v, d_out, rows):
        def call(q, k, v):
            return attention(q, k, v, causal=True, window=50, segment_ids=rows)

        out, pullback = jax.vjp(call, q, k, v)
        return out, *pullback(d_out)

    compiled = jax.jit(both).lower(*operands, rows).compile()
    assert not re.findall(r"(all-gather|all-to-all|all-reduce)\(", compiled.as_text())
    want = oracle(*arrays, causal=True, window=50, segment_ids=segments)
    check(compiled(*operands, rows), want)


def test_form_follows_shape():
    def form(queries, keys, before=None, after=None, heads=1):
        q, k = (jax.ShapeDtypeStruct((1, heads, 1, n, 8), jnp.float32) for n in (queries, keys))
        return xla._form(Options(1.0, None, before, after), q, k)

    assert form(1, 8192, after=0) is direct
    assert form(64, 64) is direct
    assert form(257, 257) is direct, "padding to whole tiles would cost more than it saves"
    assert form(512, 512, after=0) is blocked
    assert form(384, 384, before=63, after=0) is blocked
    assert form(512, 512, before=255, after=255, heads=16) is direct
    assert form(1370, 1370) is direct
    assert form(1370, 1370, heads=6) is blocked, "in strips, whose scores are fewer"
    assert form(4096, 4096) is blocked


def test_strips_hold_all_keys_and_divide_the_queries_evenly():
    tiles = blocked.tiling(Options(1.0, None, None, None), 1370, 1300)
    assert (tiles.block_q, tiles.block_k) == (229, 1300)
    assert tiles.blocks == (6, 1)
    square = blocked.tiling(Options(1.0, None, 100, 100), 1370, 1370)
    assert (square.block_q, square.block_k) == (128, 128)
    long = blocked.tiling(Options(1.0, None, None, None), 9000, 9000)
    assert (long.block_q, long.block_k) == (256, 256), "a strip's scores would be too many"


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 3, 2, 4), (1, 3, 2, 4, 1), (1, 3, 2, 4)), {}, "needs q"),
        (((1, 3, 2, 4), (1, 3, 2, 4), (1, 4, 2, 4)), {}, "one shape"),
        (((1, 3, 2, 4), (2, 3, 2, 4), (2, 3, 2, 4)), {}, "alike in batch"),
        (((1, 3, 3, 4), (1, 3, 2, 4), (1, 3, 2, 4)), {}, "multiple of key heads"),
        (((1, 3, 2, 4),) * 3, {"window": 0}, "at least 1 key"),
        (((1, 3, 2, 4),) * 3, {"window": (1, -1)}, "both >= 0"),
        (((1, 3, 2, 4),) * 3, {"mask": jnp.ones((3, 3))}, "boolean mask"),
        (((1, 3, 2, 4),) * 3, {"mask": jnp.ones((3, 2), bool)}, "broadcastable"),
        (((1, 3, 2, 4),) * 3, {"segment_ids": jnp.ones((1, 4), int)}, "segment_ids"),
        (((1, 3, 2, 4),) * 3, {"implementation": "fast"}, "no implementation 'fast'"),
    ],
)
def test_mistakes_are_named(shapes, options, message):
    with pytest.raises(UserError, match=message):
        attention(*(jnp.zeros(shape) for shape in shapes), **options)
