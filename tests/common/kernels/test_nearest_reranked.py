"""The re-ranked search finds what float64 finds, where bfloat16 alone does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.kernels.nearest_centroid import gpu, nearest_centroid, tpu, xla
from common.kernels.nearest_centroid.reranked import (
    marked_first,
    nearest_float32,
    nearest_of_all,
    nearest_of_moved,
    nearest_reranked,
)


def oracle(x, c):
    x, c = x.astype(np.float64), c.astype(np.float64)
    index = np.argmin(0.5 * np.square(c).sum(axis=1) - x @ c.T, axis=1)
    return index, np.square(x - c[index]).sum(axis=1)


def draw(kind, rows=2000, centroids=300, width=64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, width))
    if kind == "unit":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    c = x[rng.choice(rows, centroids, replace=False)] + 0.01 * rng.normal(size=(centroids, width))
    if kind == "close":
        c = c[0] + 0.05 * rng.normal(size=c.shape)
    return x.astype(np.float32), c.astype(np.float32)


@pytest.mark.parametrize("kind", ["gaussian", "unit", "close"])
def test_winners_are_those_of_float64(kind):
    x, c = draw(kind)
    want, distance = oracle(x, c)
    rough, _ = nearest_centroid(jnp.asarray(x, jnp.bfloat16), jnp.asarray(c, jnp.bfloat16))
    assert np.sum(np.asarray(rough) != want) > 5, "the data is too easy"
    for search in (nearest_reranked, nearest_float32):
        index, have = jax.jit(search)(x, c)
        np.testing.assert_array_equal(index, want)
        np.testing.assert_allclose(have, distance, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "unit", "close"])
@pytest.mark.parametrize("how", ["a little", "far", "onto others"])
def test_winners_where_some_centroids_moved(kind, how):
    x, c = draw(kind)
    search = jax.jit(nearest_of_moved, static_argnames="most")
    known, rng = nearest_of_all(x, c), np.random.default_rng(1)
    for count in (3, 40, 0, 39):
        which = rng.choice(len(c), count, replace=False)
        after = c.copy()
        if how == "onto others":
            after[which] = c[rng.permutation(len(c))[:count]]
        else:
            after[which] += {"a little": 0.02, "far": 2.0}[how] * rng.normal(size=(count, 64))
        moved, c = np.any(after != c, axis=1), after
        known = search(x, c, moved, known, most=40)
        want, _ = oracle(x, c)
        np.testing.assert_array_equal(c[known.index], c[want])  # Some lie on one another.
        scores = 0.5 * np.square(c).sum(axis=1) - x @ c.T
        rounding = 0.02 * np.abs(scores).max()
        own = np.arange(len(x)), np.asarray(known.index)
        np.testing.assert_allclose(known.score, scores[own], atol=rounding)
        scores[own] = np.inf
        assert np.all(known.following <= scores.min(axis=1) + rounding)


def test_of_equal_ones_the_first():
    x, c = draw("gaussian", 200, 20)
    index, _ = nearest_reranked(x, np.concatenate([c, c]))
    assert int(index.max()) < 20


@pytest.mark.parametrize(("rows", "centroids"), [(1, 1), (5, 1), (130, 3)])
def test_few(rows, centroids):
    x, c = draw("gaussian", rows=max(rows, centroids), centroids=centroids, width=3)
    index, distance = nearest_reranked(x[:rows], c)
    want, least = oracle(x[:rows], c)
    np.testing.assert_array_equal(index, want)
    np.testing.assert_allclose(distance, least, rtol=1e-4, atol=1e-6)


# Blocks smaller than the problem, none of which divide it; one part and several.
FORMS = {
    "xla in tiles": lambda *operands: xla.tiled(*operands, tile=(64, 50), two=True),
    "xla whole": lambda *operands: xla.tiled(*operands, tile=(1024, 1024), two=True),
    "xla of few centroids": lambda *operands: xla.tiled(*operands, tile=(256, 7), two=True),
    "tpu": lambda *operands: tpu._search(*operands, (128, 128, 128, 64), True, True),
    "gpu": lambda *operands: gpu._search(*operands, (64, 32, 16, 4, 2), True, True),
    "gpu in one part": lambda *operands: gpu._search(*operands, (64, 256, 16, 4, 2), True, True),
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_two_least_scores(form):
    x, c = draw("gaussian", 150, 150, 150)
    c[7] = c[30]
    half = 0.5 * np.square(c).sum(axis=1)
    index, score, following = FORMS[form](x, c, half)
    scores = half - x @ c.T
    np.testing.assert_array_equal(index, scores.argmin(axis=1))
    np.testing.assert_allclose([score, following], np.sort(scores, axis=1)[:, :2].T, atol=1e-4)


def test_the_kernels_have_two_scores_as_well():
    x, c = (jnp.asarray(array, jnp.bfloat16) for array in draw("gaussian", 40, 20, 8))
    half = 0.5 * jnp.sum(jnp.square(c.astype(jnp.float32)), axis=1)
    want = xla.search_two(x, c, half)
    for kernel in (tpu, gpu):
        have = kernel.search_two(x, c, half, interpret=True)
        np.testing.assert_array_equal(have[0], want[0])
        np.testing.assert_allclose(have[1:], want[1:], atol=1e-5)


def test_contenders(monkeypatch):
    x, c = draw("gaussian", 150, 120, 8)
    half = 0.5 * np.square(c).sum(axis=1)
    scores = half - x @ c.T
    limit = scores.min(axis=1) + np.linspace(-0.5, 1.5, 150).astype(np.float32)
    for most in (1 << 16, 50, 7):
        monkeypatch.setattr(xla, "_MOST_CONTENDERS", most)
        first, last, count, *least = xla.contenders(x, c, half, limit)
        within = scores <= limit[:, None]
        np.testing.assert_array_equal(count, within.sum(axis=1))
        some = within.any(axis=1)
        assert not some.all()
        np.testing.assert_array_equal(least[0], scores.argmin(axis=1))
        np.testing.assert_allclose(least[1:], np.sort(scores, axis=1)[:, :2].T, atol=1e-4)
        np.testing.assert_array_equal(first[some], within.argmax(axis=1)[some])
        np.testing.assert_array_equal(last[some], 119 - within[:, ::-1].argmax(axis=1)[some])


def test_marked_first():
    marked = np.asarray([False, True, True, False, True])
    order, count = marked_first(marked)
    assert int(count) == 3
    assert order[:3].tolist() == [1, 2, 4]
    assert int(marked_first(np.zeros(4, bool))[1]) == 0
