"""Training rows by number: what a pipeline batches, whatever the rows are made of."""

import abc

import numpy as np

Batch = dict[str, np.ndarray]
"""Named arrays with a leading batch dimension. For text, all of shape [B, L]:

tokens, targets     int32; the target of a token is the token after it
positions           int32; from 0 within each document or piece of one
segment_ids         int32; 1, 2, … within a row, 0 where there is padding
weights             float32; 0 where there is nothing to predict
"""


class Rows(abc.ABC):
    """A fixed number of equally shaped rows, each computed from its index alone."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Batch:
        """Row `index`, without a batch dimension."""

    def batch(self, indices: np.ndarray) -> Batch:
        """Rows `indices` [B] stacked; override where all at once is faster."""
        rows = [self[int(index)] for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def training_batch(self, indices: np.ndarray, start: int, local_rows: np.ndarray) -> Batch:
        """Rows `indices` of a run's batch; override where they are not the same in every epoch.

        Args:
            indices: int64 [B], this process's rows.
            start: Place of the batch's first row in the endless sequence of the run's rows.
            local_rows: int64 [B], which of the batch's rows they are.
        """
        return self.batch(indices)
