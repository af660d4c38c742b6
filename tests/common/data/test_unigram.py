"""The unigram baseline."""

import math

import numpy as np
import pytest

from common.data.packing import PackedRows
from common.data.token_store import TokenStore
from common.data.unigram import count_targets, unigram_cross_entropy


def test_by_hand():
    # Smoothed: 4/7, 2/7, 1/7.
    loss = unigram_cross_entropy(np.array([3, 1, 0]), np.array([1, 0, 1]))
    assert loss == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2)


def test_uniform_counts_give_log_v():
    assert unigram_cross_entropy(np.full(50, 9), np.arange(50)) == pytest.approx(math.log(50))


@pytest.mark.parametrize("strategy", ["split", "whole"])
def test_rows_and_store_count_the_same(strategy):
    generator = np.random.default_rng(0)
    documents = [[2, *generator.integers(3, 30, n), 1] for n in generator.integers(0, 50, 80)]
    store = TokenStore.of(documents, 30)
    rows = PackedRows(store, 16, strategy)
    np.testing.assert_array_equal(count_targets(rows, 30), store.target_counts())
    assert count_targets(rows, 30, max_rows=2).sum() == rows.batch(np.arange(2))["weights"].sum()
