"""Packing against a slow version that goes token by token."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.packing import PackedRows
from common.data.token_store import TokenStore
from common.errors import UserError

DOCUMENTS = st.lists(st.lists(st.integers(3, 99), max_size=20), min_size=1, max_size=12)


def store_of(documents):
    return TokenStore.of(documents, 100)


def pack_slowly(documents, length):
    """The "split" strategy, one token at a time."""
    rows, row, segment = [], [], 0
    for document in documents:
        position, segment = 0, segment + 1
        for token, target in itertools.pairwise(document):
            row.append((token, target, position, segment, 1.0))
            position += 1
            if len(row) == length:
                rows.append(row)
                row, position, segment = [], 0, 1
        if not position:
            # Nothing of this document is in the row: its number goes to the next one.
            segment -= 1
    if row:
        rows.append(row + [(0, 0, 0, 0, 0.0)] * (length - len(row)))
    return np.array(rows)


FIELDS = ("tokens", "targets", "positions", "segment_ids", "weights")


@settings(max_examples=300)
@given(documents=DOCUMENTS, length=st.integers(1, 9))
def test_split_equals_the_slow_version(documents, length):
    expected = pack_slowly(documents, length)
    if not len(expected):
        with pytest.raises(UserError, match="no document"):
            PackedRows(store_of(documents), length)
        return
    rows = PackedRows(store_of(documents), length)
    assert len(rows) == len(expected)
    batch = rows.batch(np.arange(len(rows)))
    for number, name in enumerate(FIELDS):
        np.testing.assert_array_equal(batch[name], expected[:, :, number], err_msg=name)


def segments(rows):
    """(tokens, targets, positions) of every segment of every row."""
    for index in range(len(rows)):
        row = rows[index]
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            assert inside.any()
            yield tuple(row[name][inside].tolist() for name in FIELDS[:3])


@settings(max_examples=300)
@given(documents=DOCUMENTS, length=st.integers(1, 9))
def test_whole_keeps_documents_together(documents, length):
    expected = []
    for document in documents:
        for start in range(0, len(document) - 1, length):
            piece = document[start : start + length + 1]
            expected.append((piece[:-1], piece[1:], list(range(len(piece) - 1))))
    if not expected:
        return
    rows = PackedRows(store_of(documents), length, "whole")
    assert sorted(segments(rows)) == sorted(expected)
    batch = rows.batch(np.arange(len(rows)))
    np.testing.assert_array_equal(batch["weights"], batch["segment_ids"] > 0)
    assert (np.diff(batch["weights"], axis=1) <= 0).all(), "padding is at the end"
    assert not batch["tokens"][batch["weights"] == 0].any()
    sizes = [len(piece[0]) for piece in expected]
    assert len(rows) <= max(1, 2 * sum(sizes) / length), "two rows that fit one are never left"


def test_whole_fits_tightly():
    lengths = np.random.default_rng(0).integers(2, 40, 3000)
    rows = PackedRows(store_of([[2] * n for n in lengths]), 64, "whole")
    assert rows.efficiency > 0.995


def test_batch_equals_single_rows_in_any_order():
    documents = [list(range(3, 3 + n)) for n in (5, 1, 30, 2, 9, 17)]
    for strategy in ("split", "whole"):
        rows = PackedRows(store_of(documents), 8, strategy)
        order = np.array([3, 0, 0, 5, len(rows) - 1])
        batch = rows.batch(order)
        for place, index in enumerate(order):
            for name, array in rows[int(index)].items():
                np.testing.assert_array_equal(batch[name][place], array)
        assert {name: array.dtype for name, array in batch.items()} == {
            **dict.fromkeys(FIELDS[:4], np.dtype(np.int32)),
            "weights": np.dtype(np.float32),
        }


def test_bad_arguments():
    store = store_of([[2, 5, 1]])
    with pytest.raises(UserError, match="0 positions"):
        PackedRows(store, 0)
    with pytest.raises(UserError, match="split, whole"):
        PackedRows(store, 4, "best")
    with pytest.raises(IndexError):
        PackedRows(store, 4)[1]
