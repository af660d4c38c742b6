"""`decode_attention` against a float64 oracle: rings of unlike fill, own keys, windows, kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.kernels import decode_attention
from common.kernels.decode_attention import ring

FORMS = ["reference", "xla", "tpu", "gpu"]
NEW = "new"  # stands for own keys that are not in the cache yet

# Batch, T, S, H, K, h, the rows' lengths, and options.
CASES = {
    "one block": ((3, 1, 40, 4, 1, 64), [0, 5, 40], {}),
    "wrapped ring and own keys": ((3, 1, 300, 4, 2, 64), [17, 300, 1000], {"new": NEW}),
    "several queries": ((3, 3, 300, 4, 2, 64), [2, 300, 777], {"new": NEW, "window": 40}),
    "several queries in the cache": ((2, 2, 100, 4, 4, 64), [2, 90], {"softcap": 3.0}),
    "from a start": (
        (3, 1, 700, 4, 2, 64),
        [17, 640, 1000],
        {"new": NEW, "starts": [3, 640, 990], "scale": 0.5},
    ),
    "a window of a long cache": ((2, 4, 700, 2, 1, 128), [650, 9], {"window": 100}),
}


def draw(batch, queries, slots, heads, kv_heads, width, lengths, options, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, queries, heads, width))
    keys, values = rng.normal(size=(2, batch, kv_heads, slots, width))
    options = dict(options)
    if options.get("new") is NEW:
        options["new"] = tuple(rng.normal(size=(2, batch, queries, kv_heads, width)))
    if "starts" in options:
        options["starts"] = np.array(options["starts"])
    return (q, keys, values, np.array(lengths)), options


def oracle(
    q, keys, values, lengths, *, new=None, starts=None, window=None, softcap=None, scale=None
):
    """Attends one query and head at a time to the keys that the docstring lists."""
    batch, queries, heads, width = q.shape
    kv_heads, slots = keys.shape[1:3]
    out = np.zeros(q.shape)
    for b, t, head in np.ndindex(batch, queries, heads):
        k = head // (heads // kv_heads)
        own = lengths[b] + t if new is not None else lengths[b] - queries + t
        oldest = own - window + 1 if window is not None else 0
        first = max(0, lengths[b] - slots, oldest, 0 if starts is None else starts[b])
        seen = [(keys[b, k, p % slots], values[b, k, p % slots])
                for p in range(first, lengths[b]) if p <= own]  # fmt: skip
        if new is not None:
            seen += [(new[0][b, u, k], new[1][b, u, k])
                     for u in range(t + 1) if lengths[b] + u >= oldest]  # fmt: skip
        if seen:
            chosen, held = (np.stack(part) for part in zip(*seen))
            scores = chosen @ q[b, t, head] * (width**-0.5 if scale is None else scale)
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[b, t, head] = weights / weights.sum() @ held
    return out


def cast(tree, dtype=jnp.float32):
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype if x.dtype == np.float64 else jnp.int32), tree
    )


def run(arrays, options, dtype=jnp.float32, **kwargs):
    static = {n: options[n] for n in options if n not in ("new", "starts")}
    given = cast({n: options[n] for n in options if n in ("new", "starts")}, dtype)
    call = jax.jit(functools.partial(decode_attention, **static, **kwargs))
    return call(*cast(arrays, dtype), **given)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_equals_oracle(case, name):
    shape, lengths, options = CASES[case]
    arrays, options = draw(*shape, lengths, options)
    have = run(arrays, options, implementation=name)
    np.testing.assert_allclose(have, oracle(*arrays, **options), rtol=2e-5, atol=2e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("name", FORMS)
def test_bfloat16(name):
    arrays, options = draw(2, 1, 130, 4, 2, 64, [50, 200], {"new": NEW})
    rounded = jax.tree.map(
        lambda x: (
            np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) if x.dtype == np.float64 else x
        ),
        (arrays, options),
    )
    have = run(*rounded, dtype=jnp.bfloat16, implementation=name)
    assert have.dtype == jnp.bfloat16
    want = oracle(*rounded[0], **rounded[1])
    np.testing.assert_allclose(have.astype(jnp.float32), want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_empty_slots_are_never_read_into_the_result(name):
    """Beyond a row's tokens the cache may hold anything: here a kernel would carry NaN on."""
    arrays, options = draw(2, 1, 2304, 2, 1, 128, [100, 1200], {})
    q, keys, values, lengths = arrays
    clean = run(arrays, options, implementation=name)
    values[0, :, 1024:] = (
        np.nan
    )  # Whole blocks: within one, the unseen are masked, which NaN passes.
    np.testing.assert_array_equal(
        run((q, keys, values, lengths), options, implementation=name)[0], clean[0]
    )


def test_gradient_is_that_of_plain_jax():
    arrays, options = draw(2, 1, 40, 4, 2, 64, [17, 90], {"new": NEW})
    q, keys, values, lengths = cast(arrays)
    new = cast(options["new"])

    def loss(name, *x):
        return jnp.sum(decode_attention(*x[:3], lengths, new=x[3], implementation=name) ** 2)

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1, 2, 3)))(q, keys, values, new)
        for name in ("reference", "gpu")
    ]
    for want, have in zip(*(jax.tree.leaves(g) for g in gradients), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)


def test_blocks_hold_every_visible_position():
    slots, block = 20, 6
    low, lengths = (np.ravel(x) for x in np.meshgrid(np.arange(45), np.arange(45)))
    chosen = (low <= lengths) & (lengths - low <= slots)
    low, lengths = low[chosen], lengths[chosen]
    first, count = ring.blocks(jnp.array(low), jnp.array(lengths), slots, block)
    for row in range(low.size):
        needed = {p % slots // block for p in range(low[row], lengths[row])}
        visited = {int(first[row] + n) % 4 for n in range(int(count[row]))}
        assert needed == visited
        assert len(visited) == count[row]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (2, 3, 4)}, "needs q"),
        ({"q": (3, 1, 4, 8)}, "alike in batch"),
        ({"q": (2, 1, 3, 8)}, "multiple of key heads"),
        ({"lengths": (3,)}, "needs lengths"),
        ({"new": (2, 2, 2, 8)}, "needs new keys"),
        ({"window": 0}, "at least 1 key"),
        ({"implementation": "fast"}, "no implementation 'fast'"),
    ],
)
def test_mistakes_are_named(changes, message):
    shapes = {"q": (2, 1, 4, 8), "keys": (2, 2, 9, 8), "lengths": (2,)}
    arrays = {n: jnp.zeros(changes.get(n, s)) for n, s in shapes.items()}
    arrays["lengths"] = arrays["lengths"].astype(int)
    options = {n: changes[n] for n in ("window", "implementation") if n in changes}
    if "new" in changes:
        options["new"] = (jnp.zeros(changes["new"]),) * 2
    with pytest.raises(UserError, match=message):
        decode_attention(arrays["q"], arrays["keys"], arrays["keys"], arrays["lengths"], **options)
