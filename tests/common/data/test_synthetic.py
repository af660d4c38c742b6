"""The synthetic tasks: every answer can be read off the row."""

import numpy as np
import pytest

from common.data.pipeline import evaluation_batches
from common.data.synthetic import InductionHeads, SelectiveCopy
from common.errors import UserError


@pytest.mark.parametrize("length", [3, 4, 32, 256])
def test_induction(length):
    rows = InductionHeads(length, vocabulary=16, seed=3)
    places = set()
    for index in range(200):
        row = rows[index]
        first, last = np.flatnonzero(row["tokens"] == 16)[[0, -1]]
        assert last == length - 1
        assert row["targets"][-1] == row["tokens"][first + 1] < 16
        np.testing.assert_array_equal(row["targets"][:-1], row["tokens"][1:])
        assert row["weights"].tolist() == [0.0] * (length - 1) + [1.0]
        assert row["tokens"].max() < rows.vocab_size == 17
        places.add(int(first))
    assert len(places) > min(length - 2, 30) * 0.9


@pytest.mark.parametrize(("length", "copied"), [(2, 1), (32, 4), (64, 16), (32, 16)])
def test_selective_copy(length, copied):
    rows = SelectiveCopy(length, copied, vocabulary=16, seed=3)
    for index in range(50):
        row = rows[index]
        scored = row["weights"] > 0
        assert scored.sum() == copied
        assert (row["tokens"][scored] == 17).all()
        context = row["tokens"][~scored]
        np.testing.assert_array_equal(row["targets"][scored], context[context < 16])
        assert rows.vocab_size == 18


@pytest.mark.parametrize("task", [InductionHeads, SelectiveCopy])
def test_rows_depend_on_index_and_seed_alone(task):
    first, again, other = task(64, seed=1), task(64, seed=1, rows=100), task(64, seed=2)
    for index in (0, 7, 99):
        np.testing.assert_array_equal(first[index]["tokens"], again[index]["tokens"])
        assert (first[index]["tokens"] != other[index]["tokens"]).any()
    assert (first[0]["tokens"] != first[1]["tokens"]).any()
    with pytest.raises(IndexError):
        again[100]


def test_every_answer_is_equally_likely():
    rows = InductionHeads(32, vocabulary=4, rows=2000)
    counts = np.bincount(rows.batch(np.arange(2000))["targets"][:, -1], minlength=4)
    assert ((counts - 500) ** 2 / 500).sum() < 25


def test_batches_have_the_shapes_of_text():
    rows = SelectiveCopy(32, 4, rows=5)
    batch = next(iter(evaluation_batches(rows, global_batch=3, process_index=0, process_count=1)))
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ((3, 32), "int32")),
        "weights": ((3, 32), "float32"),
    }


def test_impossible_tasks():
    for make in (
        lambda: InductionHeads(2),
        lambda: InductionHeads(8, vocabulary=1),
        lambda: SelectiveCopy(31, 16),
        lambda: SelectiveCopy(31, 0),
    ):
        with pytest.raises(UserError):
            make()
