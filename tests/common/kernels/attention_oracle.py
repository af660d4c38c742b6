"""Attention in float64, pair by pair as its contract says, and what compares with it."""

import jax
import jax.numpy as jnp
import numpy as np

from common.kernels import attention


def draw(batch, queries, keys, heads, kv_heads, width, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(batch, queries, heads, width)),
        rng.normal(size=(batch, keys, kv_heads, width)),
        rng.normal(size=(batch, keys, kv_heads, width)),
        rng.normal(size=(batch, queries, heads, width)),
    )


def visible(queries, keys, causal=False, window=None, mask=None, segment_ids=None, offset=None):
    """Returns what is allowed, `[B|1, H|1, T, S]`, as the docstring says it."""
    offset = keys - queries if offset is None else int(offset)
    distance = np.arange(queries)[:, None] + offset - np.arange(keys)[None]
    seen = np.ones((queries, keys), bool)
    if causal or isinstance(window, int):
        seen &= distance >= 0
    if isinstance(window, int):
        seen &= distance < window
    if isinstance(window, tuple):
        seen &= (distance <= window[0]) & (distance >= -window[1])
    seen = seen[None, None]
    if mask is not None:
        seen = seen & np.asarray(mask)
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        query, key = (np.asarray(ids) for ids in pair)
        seen = seen & (query[:, None, :, None] == key[:, None, None, :])
    return seen


def oracle(q, k, v, d_out, *, softcap=None, scale=None, **limits):
    """Returns `(out, dq, dk, dv)` in float64."""
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide_k, wide_v = (np.repeat(value, group, axis=2) for value in (k, v))
    scores = scale * np.einsum("bthd,bshd->bhts", q, wide_k)
    slope = scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
        slope = scale * (1 - (scores / softcap) ** 2)
    seen = visible(q.shape[1], k.shape[1], **limits)
    weights = np.where(seen, np.exp(scores - scores.max()), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    out = np.einsum("bhts,bshd->bthd", weights, wide_v)
    d_weights = np.einsum("bthd,bshd->bhts", d_out, wide_v)
    d_scores = slope * weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))

    def fold(value):
        return value.reshape(*k.shape[:3], group, k.shape[3]).sum(3)

    return (
        out,
        np.einsum("bhts,bshd->bthd", d_scores, wide_k),
        fold(np.einsum("bhts,bthd->bshd", d_scores, q)),
        fold(np.einsum("bhts,bthd->bshd", weights, d_out)),
    )


def run(arrays, dtype=jnp.float32, **options):
    """Returns `(out, dq, dk, dv)` of ours."""
    q, k, v, d_out = (jnp.asarray(value, dtype) for value in arrays)

    @jax.jit
    def both(q, k, v, d_out):
        out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, **options), q, k, v)
        return out, *pullback(d_out)

    return both(q, k, v, d_out)


def check(have, want, tolerance=2e-5):
    for name, value, expected in zip(("out", "dq", "dk", "dv"), have, want, strict=True):
        assert np.isfinite(np.asarray(value, np.float32)).all(), name
        np.testing.assert_allclose(
            np.asarray(value, np.float32), expected, rtol=tolerance, atol=tolerance, err_msg=name
        )


def random_mask(shape, seed=1):
    mask = np.random.default_rng(seed).random(shape) < 0.4
    mask[..., 5, :] = False  # One query sees nothing.
    return jnp.asarray(mask)


def random_segments(batch, length, seed=2):
    return jnp.asarray(np.cumsum(np.random.default_rng(seed).random((batch, length)) < 0.05, 1))
