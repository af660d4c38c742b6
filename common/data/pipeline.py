"""Rows to batches: shuffled over the whole corpus, divided among processes, exactly resumable.

Batch s of a run holds the places [s G, (s + 1) G) of one endless order of rows, and each process
reads those places within it that its devices hold (by default the i-th of n equal parts). The order
depends on the seed alone. The state is therefore one number, the same in every process, and a run
may go on with another number of processes (or another batch size) with exactly the rows that it
would have seen next; the global batch is the same whatever n is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.data.rows import Batch, Rows
from common.data.shuffle import permute
from common.errors import UserError


@dataclass(frozen=True)
class RowOrder:
    """The endless (or `epochs` long) sequence of row numbers that a run goes through."""

    rows: int
    seed: int
    shuffle: bool = True

    def at(self, places: np.ndarray) -> np.ndarray:
        """Row numbers at `places` of the sequence, int64 [N]; every epoch has its own order."""
        epochs, within = np.divmod(places, self.rows)
        if not self.shuffle:
            return within
        result = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            seed = (self.seed << 32) + int(epoch)
            result[chosen] = permute(within[chosen], self.rows, seed)
        return result


class BatchIterator:
    """This process's part of every batch, read ahead by grain's threads.

    `get_state` tells of batches given out, never of batches read ahead.
    """

    def __init__(
        self,
        rows: Rows,
        order: RowOrder,
        *,
        global_batch: int,
        total: int | None,
        local_rows: np.ndarray,
        prefetch: int,
    ):
        self._rows = rows
        self._order = order
        self._global_batch = global_batch
        self._total = total
        self._local_rows = local_rows
        self._prefetch = prefetch
        self._start = 0
        self._reader: Any = None

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        if self._reader is None:
            self._reader = self._open_reader()
        return next(self._reader)

    def get_state(self) -> dict[str, Any]:
        """JSON-able state: the next row of the sequence, and what the sequence was made from."""
        consumed = 0 if self._reader is None else self._reader.get_state()["next_index"]
        return {
            "next_row": self._start + consumed * self._global_batch,
            "rows": self._order.rows,
            "seed": self._order.seed,
            "shuffle": self._order.shuffle,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called, in this or any other number of processes.

        Raises:
            UserError: The state belongs to other rows or another order.
        """
        own = self.get_state()
        for name in ("rows", "seed", "shuffle"):
            if state[name] != own[name]:
                raise UserError(
                    f"cannot resume the data: the checkpoint has {name}={state[name]},"
                    f" this run has {name}={own[name]}; use the same corpus and settings"
                )
        self.close()
        self._start = int(state["next_row"])

    def close(self) -> None:
        """Stops the reading threads; the iterator can still go on from where it is."""
        if self._reader is not None:
            self._start = self.get_state()["next_row"]
            self._reader.close()
            self._reader = None

    def _open_reader(self) -> Any:
        import grain

        steps = _Steps(self._rows, self._order, self._start, self._global_batch, self._local_rows)
        left = None if self._total is None else (self._total - self._start) // self._global_batch
        dataset = grain.MapDataset.source(steps)
        if left is not None:
            dataset = dataset[: max(left, 0)]
        threads = min(self._prefetch, 4)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._prefetch)
        return iter(dataset.to_iter_dataset(options))


class _Steps:
    """One process's part of each batch, by batch number: the random access that grain reads."""

    def __init__(
        self, rows: Rows, order: RowOrder, start: int, global_batch: int, local_rows: np.ndarray
    ):
        self._rows = rows
        self._order = order
        self._global_batch = global_batch
        self._start = start
        self._local_rows = local_rows

    def __len__(self) -> int:
        last = self._start + int(self._local_rows[-1])
        return (2**62 - last) // self._global_batch  # Longer than any run.

    def __getitem__(self, step: int) -> Batch:
        start = self._start + step * self._global_batch
        indices = self._order.at(start + self._local_rows)
        return self._rows.training_batch(indices, start, self._local_rows)


def batches(
    rows: Rows,
    *,
    global_batch: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    local_rows: np.ndarray | None = None,
    prefetch: int = 2,
) -> BatchIterator:
    """Training batches: this process's rows of each global batch, stacked.

    Args:
        rows: Where rows come from.
        global_batch: Rows per step over all processes.
        seed: Decides the order of rows, in every epoch another.
        shuffle: False goes through the rows in their own order.
        epochs: How often to go through the rows; None never ends. Epochs follow one another
            without a gap; what does not fill a batch at the very end is left out.
        process_index: This process; None asks JAX.
        process_count: How many there are; None asks JAX.
        local_rows: Which rows of each batch are this process's, ascending (see
            `common.sharding.local_rows`); None takes its part of as many equal ones.
        prefetch: Batches to read ahead on threads; 0 reads when asked.

    Raises:
        UserError: The batch does not divide among the processes, or there are too few rows.
    """
    if local_rows is None:
        local_rows = _own_part(global_batch, process_index, process_count)
    total = None if epochs is None else epochs * len(rows)
    if not len(rows) or (total is not None and total < global_batch):
        raise UserError(
            f"{len(rows)} rows{'' if epochs is None else f' in {epochs} epochs'} do not fill a"
            f" batch of {global_batch}; use a smaller batch, shorter rows or more text"
        )
    return BatchIterator(
        rows,
        RowOrder(len(rows), seed, shuffle),
        global_batch=global_batch,
        total=total,
        local_rows=local_rows,
        prefetch=prefetch,
    )


class EvaluationBatches:
    """Every row once, in order, each time it is iterated; the last batch is filled up with zeros.

    All processes give out the same number of batches. A row of zeros has weight 0 everywhere.
    """

    def __init__(self, rows: Rows, global_batch: int, limit: int, local_rows: np.ndarray):
        self._rows = rows
        self._global_batch = global_batch
        self._limit = limit
        self._local_rows = local_rows

    def __len__(self) -> int:
        return -(-self._limit // self._global_batch)

    def __iter__(self) -> Iterator[Batch]:
        local = len(self._local_rows)
        for step in range(len(self)):
            places = step * self._global_batch + self._local_rows
            present = places[places < self._limit]  # The first ones: they ascend.
            # A process with no rows left reads one only to learn the shapes.
            batch = self._rows.batch(present if len(present) else np.zeros(1, np.int64))
            yield {name: _fill(array[: len(present)], local) for name, array in batch.items()}


def evaluation_batches(
    rows: Rows,
    *,
    global_batch: int,
    max_rows: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    local_rows: np.ndarray | None = None,
) -> EvaluationBatches:
    """Batches that hold each of the first `max_rows` rows exactly once; see `EvaluationBatches`.

    The process's part is said as for `batches`.

    Raises:
        UserError: The batch does not divide among the processes.
    """
    if local_rows is None:
        local_rows = _own_part(global_batch, process_index, process_count)
    limit = len(rows) if max_rows is None else min(max_rows, len(rows))
    return EvaluationBatches(rows, global_batch, limit, local_rows)


def _fill(array: np.ndarray, rows: int) -> np.ndarray:
    missing = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, missing)


def _own_part(global_batch: int, index: int | None, count: int | None) -> np.ndarray:
    """The `index`-th of `count` equal parts of a batch's rows."""
    if index is None or count is None:
        import jax

        index = jax.process_index() if index is None else index
        count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ValueError(f"process {index} of {count}")
    if global_batch < 1 or global_batch % count:
        raise UserError(
            f"a batch of {global_batch} rows does not divide among {count} processes;"
            f" use a multiple of {count}"
        )
    local = global_batch // count
    return np.arange(index * local, (index + 1) * local)
