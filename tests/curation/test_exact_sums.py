"""Sums by cluster: worth what float64 says, and the same in any order and in any parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curation import exact_sums


def draw(rows=3000, width=5, clusters=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    labels = rng.integers(0, clusters, rows).astype(np.int32)
    return x, labels


def added(x, labels, span, clusters=4, step=None):
    sums = exact_sums.zeros(clusters, x.shape[1])
    step = step or len(x)
    for i in range(0, len(x), step):
        sums = exact_sums.add_rows(sums, x[i : i + step], labels[i : i + step], span)
        sums = exact_sums.carry(sums)
    return sums


@pytest.mark.parametrize("scale", [1e-12, 1.0, 3e30])
def test_means_are_those_of_float64(scale):
    x, labels = draw()
    x = (x * scale).astype(np.float32)
    span = exact_sums.span_of(float(np.abs(x).max()))
    have = exact_sums.means(
        added(x, labels, span), jnp.asarray(np.bincount(labels, minlength=4)), span
    )
    want = np.stack([x[labels == k].astype(np.float64).mean(axis=0) for k in range(4)])
    np.testing.assert_allclose(have, want, rtol=3e-6, atol=1e-9 * scale)


def test_order_and_parts_change_no_bit():
    x, labels = draw()
    span = exact_sums.span_of(float(np.abs(x).max()))
    want = added(x, labels, span)
    order = np.random.default_rng(1).permutation(len(x))
    halves = [added(x[rows], labels[rows], span) for rows in np.split(order, 2)]
    parts = jax.tree.map(lambda *digits: jnp.stack(digits), *halves)
    for have in (added(x[order], labels[order], span, step=77), exact_sums.total(parts)):
        jax.tree.map(np.testing.assert_array_equal, have, want)


def test_as_many_rows_of_the_largest_number_as_may_be_added_at_once():
    x = np.full((exact_sums.MOST_ROWS, 1), -0.999999, np.float32)
    labels = np.zeros(len(x), np.int32)
    span = exact_sums.span_of(1.0)
    sums = added(x, labels, span, clusters=1)
    mean = exact_sums.means(sums, jnp.asarray([len(x)]), span)
    np.testing.assert_allclose(mean, x[:1], rtol=1e-6)


def test_numbers_far_below_the_span_keep_their_precision():
    x = np.asarray([[1e-6], [3e-6], [1.0]], np.float32)
    span = exact_sums.span_of(1.0)
    sums = added(x, np.asarray([0, 0, 1], np.int32), span, clusters=2)
    mean = exact_sums.means(sums, jnp.asarray([2, 1]), span)
    np.testing.assert_allclose(mean[0], 2e-6, rtol=1e-5)


def test_labels_behind_the_last_cluster_are_left_out():
    x, labels = draw(100)
    span = exact_sums.span_of(8.0)
    masked = np.where(np.arange(100) < 60, labels, 4).astype(np.int32)
    jax.tree.map(
        np.testing.assert_array_equal,
        added(x, masked, span),
        added(x[:60], labels[:60], span),
    )
