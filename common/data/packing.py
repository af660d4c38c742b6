"""Documents packed into rows of equal length.

The plan is three arrays computed once from the document lengths; a row is then a gather from the
token array, so that rows can be read in any order and by any process.

Every piece of a document is a segment of its own: its positions count from 0, and attention,
recurrence and convolution start afresh, because no state is carried from row to row. The tokens at
the start of a continued piece are therefore predicted with less context than they had.
"""

from collections.abc import Iterator

import numpy as np

from common.data.rows import Batch, Rows
from common.data.token_store import TokenStore
from common.errors import UserError

STRATEGIES = ("split", "whole")


class PackedRows(Rows):
    """Rows of `length` positions from the documents of a `TokenStore`.

    Args:
        store: The tokenised documents, each [bos] + ids + [eos].
        length: Positions in a row, L.
        strategy: "split" lays the documents end to end and cuts at row ends, so that only the last
            row has padding. "whole" cuts no document that fits a row: longer ones give pieces of
            L, and pieces are placed best fit in order of decreasing length, padding at the ends.
            Either way every token but the first of a document is a target exactly once.
    """

    def __init__(self, store: TokenStore, length: int, strategy: str = "split"):
        if length < 1:
            raise UserError(f"a row of {length} positions was asked for; use 1 or more")
        if strategy not in STRATEGIES:
            raise UserError(f"packing strategy is '{strategy}'; use one of {', '.join(STRATEGIES)}")
        self.length = length
        self.store = store
        plan = _plan_split if strategy == "split" else _plan_whole
        # Piece p covers tokens [start, start + size); row r holds pieces [first[r], first[r + 1]).
        self._starts, self._sizes, self._first = plan(store.offsets, length)
        if not len(self):
            raise UserError("the corpus has no document with a token to predict")

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {name: array[0] for name, array in self.batch(np.array([index])).items()}

    @property
    def efficiency(self) -> float:
        """Share of the positions that hold a token."""
        return float(self._sizes.sum() / (len(self) * self.length))

    def batch(self, indices: np.ndarray) -> Batch:
        """Rows `indices` [B] as arrays [B, L]."""
        first, counts = self._first[indices], self._first[indices + 1] - self._first[indices]
        row = np.repeat(np.arange(len(indices)), counts)
        number = _count_within(counts)
        pieces = first[row] + number
        sizes = self._sizes[pieces]
        positions = _count_within(sizes)
        source = np.repeat(self._starts[pieces], sizes) + positions
        filled = np.bincount(row, sizes, len(indices)).astype(np.int64)
        # A row is filled from its start, so this mask in row-major order meets `source` in order.
        mask = np.arange(self.length) < filled[:, None]
        tokens = self.store.tokens
        return {
            "tokens": _place(mask, tokens[source], self.store.pad_id),
            "targets": _place(mask, tokens[source + 1], self.store.pad_id),
            "positions": _place(mask, positions, 0),
            "segment_ids": _place(mask, np.repeat(number + 1, sizes), 0),
            "weights": mask.astype(np.float32),
        }


def _place(mask: np.ndarray, values: np.ndarray, fill: int) -> np.ndarray:
    result = np.full(mask.shape, fill, np.int32)
    result[mask] = values
    return result


def _count_within(counts: np.ndarray) -> np.ndarray:
    """0, 1, …, counts[0] - 1, 0, 1, …, counts[1] - 1, and so on."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


Plan = tuple[np.ndarray, np.ndarray, np.ndarray]


def _plan_split(offsets: np.ndarray, length: int) -> Plan:
    """Cuts the stream of all predictions at document ends and at multiples of `length`."""
    sizes = np.maximum(np.diff(offsets) - 1, 0)
    document_edges = np.concatenate([[0], np.cumsum(sizes)])
    total = int(document_edges[-1])
    row_edges = np.arange(0, total, length)
    edges = np.union1d(document_edges, row_edges)
    cuts = edges[:-1]
    # Documents of no prediction share an edge with the next one; the last of them owns the piece.
    document = np.searchsorted(document_edges, cuts, side="right") - 1
    starts = offsets[document] + cuts - document_edges[document]
    first = np.append(np.searchsorted(cuts, row_edges), len(cuts))
    return starts, np.diff(edges), first


def _plan_whole(offsets: np.ndarray, length: int) -> Plan:
    """Cuts only documents longer than a row, then packs the pieces into rows."""
    sizes = np.maximum(np.diff(offsets) - 1, 0)
    counts = -(-sizes // length)
    within = _count_within(counts) * length
    starts = np.repeat(offsets[:-1], counts) + within
    piece_sizes = np.minimum(np.repeat(sizes, counts) - within, length)
    order = np.argsort(-piece_sizes, kind="stable")
    row_of = np.fromiter(_best_fit(piece_sizes[order].tolist(), length), np.int64, len(order))
    by_row = order[np.argsort(row_of, kind="stable")]
    rows = int(row_of.max(initial=-1)) + 1
    first = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    return starts[by_row], piece_sizes[by_row], first


def _best_fit(sizes: list[int], length: int) -> Iterator[int]:
    """Yields a row for each size: the fullest one with room for it, else a new one.

    Rows stand in lists by the room they have left; the bits of `rooms` say which lists have any,
    so that the search is two operations on one integer.
    """
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms, rows = 0, 0
    for size in sizes:
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row, rows = length, rows, rows + 1
        left = room - size
        if left:
            by_room[left].append(row)
            rooms |= 1 << left
        yield row
