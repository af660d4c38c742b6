"""Batches: one order for any number of processes, exact and elastic resuming."""

import json
import time

import numpy as np
import pytest

from common.data.pipeline import batches, evaluation_batches
from common.data.rows import Rows
from common.errors import UserError

pytest.importorskip("grain")


class Numbers(Rows):
    """Row i says i; `broken` rows raise."""

    def __init__(self, size, broken=()):
        self.size, self.broken = size, broken

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.broken:
            raise UserError(f"row {index} is torn")
        return {"row": np.full(3, index), "weights": np.ones(3, np.float32)}


def take(iterator, count):
    return [next(iterator)["row"][:, 0] for _ in range(count)]


def start(process=0, processes=1, rows=53, **settings):
    defaults = {"global_batch": 8, "seed": 1}
    return batches(
        Numbers(rows), **defaults | settings, process_index=process, process_count=processes
    )


def side_by_side(processes, count, state=None, **settings):
    """The global batches of a run on that many processes, and each one's state."""
    iterators = [start(i, processes, **settings) for i in range(processes)]
    for iterator in iterators:
        if state is not None:
            iterator.set_state(state)
    parts = [take(iterator, count) for iterator in iterators]
    states = [iterator.get_state() for iterator in iterators]
    for iterator in iterators:
        iterator.close()
    return np.array([np.concatenate(step) for step in zip(*parts)]), states


@pytest.mark.smoke
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_side_by_side_are_one_process(processes):
    alone, (state,) = side_by_side(1, 20)
    together, states = side_by_side(processes, 20)
    np.testing.assert_array_equal(alone, together)
    assert states == [state] * processes


def test_every_epoch_has_every_row_once_in_its_own_order():
    seen = np.concatenate(take(start(global_batch=4), 53 * 2))
    first, second = seen[:53], seen[53:106]
    assert sorted(first) == sorted(second) == list(range(53))
    assert (first != second).mean() > 0.8
    assert (first != np.arange(53)).mean() > 0.8
    other = np.concatenate(take(start(global_batch=4, seed=2), 13))
    assert (other != first[:52]).mean() > 0.8


def test_without_shuffle():
    seen = np.concatenate(take(start(shuffle=False), 8))
    np.testing.assert_array_equal(seen, np.arange(64) % 53)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_state_is_of_batches_given_out(prefetch):
    iterator = start(prefetch=prefetch)
    expected = take(start(), 12)
    for step in range(6):
        state = json.loads(json.dumps(iterator.get_state()))
        assert state["next_row"] == step * 8
        resumed = start(prefetch=prefetch)
        resumed.set_state(state)
        assert resumed.get_state() == state
        np.testing.assert_array_equal(take(resumed, 3), expected[step : step + 3])
        resumed.close()
        next(iterator)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 8)])
def test_resume_on_another_process_count(before, after):
    expected, _ = side_by_side(1, 30)
    _, states = side_by_side(before, 11)
    resumed, _ = side_by_side(after, 19, states[-1])
    np.testing.assert_array_equal(resumed, expected[11:])


def test_resume_with_another_batch_size_goes_on_with_the_next_rows():
    expected = np.concatenate(take(start(), 10))
    iterator = start()
    take(iterator, 3)
    resumed = start(global_batch=4)
    resumed.set_state(iterator.get_state())
    np.testing.assert_array_equal(np.concatenate(take(resumed, 14)), expected[24:])


def test_set_state_backwards_and_use_after_close():
    iterator = start()
    first = iterator.get_state()
    expected = take(iterator, 5)
    iterator.set_state(first)
    np.testing.assert_array_equal(take(iterator, 2), expected[:2])
    iterator.close()
    np.testing.assert_array_equal(take(iterator, 3), expected[2:])


def test_state_of_other_data_is_refused():
    with pytest.raises(UserError, match="rows=53, this run has rows=54"):
        start(rows=54).set_state(start().get_state())
    with pytest.raises(UserError, match="seed=1, this run has seed=2"):
        start(seed=2).set_state(start().get_state())


def test_epochs_end():
    iterator = start(epochs=2)
    seen = np.concatenate([batch["row"][:, 0] for batch in iterator])
    assert len(seen) == 104
    assert sorted(seen[:53]) == list(range(53))
    state = iterator.get_state()
    assert state["next_row"] == 104
    resumed = start(epochs=2)
    resumed.set_state({**state, "next_row": 96})
    np.testing.assert_array_equal(take(resumed, 1)[0], seen[96:])
    with pytest.raises(StopIteration):
        next(resumed)


def test_fewer_rows_than_a_batch():
    counts = np.bincount(np.concatenate(take(start(rows=3), 3)), minlength=3)
    assert counts.tolist() == [8, 8, 8]
    with pytest.raises(UserError, match="3 rows in 2 epochs do not fill a batch of 8"):
        start(rows=3, epochs=2)


def test_errors_of_rows_come_through_and_threads_end():
    iterator = batches(
        Numbers(40, broken=(20,)),
        global_batch=4,
        seed=0,
        shuffle=False,
        process_index=0,
        process_count=1,
    )
    take(iterator, 5)
    with pytest.raises(UserError, match="row 20 is torn"):
        next(iterator)
    assert iterator.get_state()["next_row"] == 20
    started = time.monotonic()
    iterator.close()
    assert time.monotonic() - started < 5


def test_batch_must_divide():
    with pytest.raises(UserError, match="8 rows does not divide among 3 processes"):
        start(0, 3)
    with pytest.raises(UserError, match="does not divide"):
        evaluation_batches(Numbers(5), global_batch=3, process_index=0, process_count=2)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 7, 8, 17])
def test_evaluation_has_every_row_once(processes, size):
    parts = [
        evaluation_batches(Numbers(size), global_batch=8, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    for _ in range(2):
        steps = [
            {name: np.concatenate([piece[name] for piece in step]) for name in step[0]}
            for step in zip(*parts)
        ]
        assert len(steps) == -(-size // 8)
        rows = np.concatenate([step["row"][:, 0] for step in steps])
        weights = np.concatenate([step["weights"][:, 0] for step in steps])
        assert len(rows) % 8 == 0
        np.testing.assert_array_equal(rows[:size], np.arange(size))
        np.testing.assert_array_equal(weights, np.arange(len(rows)) < size)


def test_evaluation_of_a_part():
    part = evaluation_batches(
        Numbers(50), global_batch=4, max_rows=6, process_index=0, process_count=1
    )
    assert [batch["row"][:, 0].tolist() for batch in part] == [[0, 1, 2, 3], [4, 5, 0, 0]]


def test_processes_default_to_jax():
    iterator = batches(Numbers(9), global_batch=4, seed=0)
    assert len(take(iterator, 1)[0]) == 4
    iterator.close()
