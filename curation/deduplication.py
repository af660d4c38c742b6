"""Near-duplicates: pairs above a similarity, their connected components, one kept of each.

The first half of DINOv2's data pipeline (arXiv:2304.07193, section 3): duplicates within the pool,
and images that are near a benchmark's own, with all that hang together with them.
"""

import numpy as np

from common.errors import UserError
from curation.similarity import Progress, check_rows, nearest_neighbours, pairs_above

_EDGES = 1 << 22  # pairs merged at once


def deduplicate(
    x: np.ndarray,
    threshold: float,
    *,
    groups: np.ndarray | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Keeps one row, the first, of each component of near-duplicates.

    See `duplicate_components` for the arguments.

    Returns:
      The rows that are kept: int64, ascending.
    """
    components = duplicate_components(x, threshold, groups=groups, progress=progress)
    return np.flatnonzero(components == np.arange(len(components)))


def duplicate_components(
    x: np.ndarray,
    threshold: float,
    *,
    groups: np.ndarray | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Connected components of the graph whose edges are pairs more similar than a threshold.

    Every pair is compared, in blocks on this process's devices. Neither the graph nor the
    similarities are ever held; a pool too large for all its pairs is compared within `groups`.

    Args:
      x: embeddings [N, D], an array or a memory map.
      threshold: of the cosine, in [-1, 1); DINOv2 takes 0.6 for its copy-detection embeddings.
      groups: integers [N], such as `Hierarchy.point_labels`: only rows of one group are compared.
      progress: called with (blocks done, blocks in all).

    Returns:
      For each row the lowest row of its component: int64 [N].

    Raises:
      UserError: shapes, dtype or threshold do not fit, or a row is zero or not finite.
    """
    check_rows(x, x)
    _check_threshold(threshold)
    order, labels = None, None
    if groups is not None:
        if groups.shape != (len(x),):
            raise UserError(f"{len(x)} rows need groups [{len(x)}], not {list(groups.shape)}")
        order = np.argsort(groups, kind="stable")
        labels = np.unique(groups[order], return_inverse=True)[1]
    components = Components(len(x))
    blocks = pairs_above(x, threshold, order=order, groups=labels, progress=progress)
    for start, column, found in blocks:
        _merge_block(components, start, column, found, order)
    return components.roots()


def decontaminate(
    x: np.ndarray,
    references: np.ndarray,
    threshold: float,
    *,
    components: np.ndarray | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Drops rows near any reference row, such as the images of a benchmark.

    Args:
      x: embeddings [N, D].
      references: [M, D], of the same model.
      threshold: of the cosine; DINOv2 takes 0.45.
      components: by `duplicate_components`; with them a whole component goes if one of it does.
      progress: called with (blocks done, blocks in all).

    Returns:
      The rows that are kept: int64, ascending.

    Raises:
      UserError: shapes, dtype or threshold do not fit, or a row is zero or not finite.
    """
    check_rows(x, references)
    _check_threshold(threshold)
    near = np.zeros(len(x), bool)
    if len(x) and len(references):
        found = nearest_neighbours(x, references, 1, progress=progress)
        near = found.similarities[:, 0] > threshold
    if components is not None:
        if components.shape != (len(x),):
            raise UserError(
                f"{len(x)} rows need components [{len(x)}], not {list(components.shape)}"
            )
        near = np.isin(components, components[near])
    return np.flatnonzero(~near)


class Components:
    """Union-find over 0 … n-1 that merges many pairs at once; a root is its set's lowest member."""

    def __init__(self, count: int):
        self._parent = np.arange(count)

    def find(self, members: np.ndarray) -> np.ndarray:
        """The roots of some members."""
        roots = self._parent[members]
        while np.any(self._parent[roots] != roots):
            roots = self._parent[roots]
        self._parent[members] = roots
        return roots

    def merge(self, a: np.ndarray, b: np.ndarray) -> None:
        """Puts the sets of `a[i]` and `b[i]` together for each i."""
        while True:
            a, b = self.find(a), self.find(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            # Every root points to something lower, so there are no circles whatever is merged.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def roots(self) -> np.ndarray:
        """The root of every member: int64 [n]."""
        return self.find(np.arange(len(self._parent)))


def _merge_block(
    components: Components, start: int, column: int, found: np.ndarray, order: np.ndarray | None
) -> None:
    """Merges the pairs of a block, of which there may be as many as it has places.

    One pair of each row and column joins most of what is to be joined, and few are left to list.
    """

    def merge(rows: np.ndarray, columns: np.ndarray) -> None:
        a, b = rows + start, columns + column
        components.merge(*((a, b) if order is None else (order[a], order[b])))

    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    merge(rows, np.argmax(found[rows], axis=1))
    merge(np.argmax(found[:, columns], axis=0), columns)
    tall = components.find(_numbers(rows + start, order))
    wide = components.find(_numbers(columns + column, order))
    step = max(1, _EDGES // max(1, len(columns)))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        apart = found[np.ix_(rows[part], columns)] & (tall[part, None] != wide[None])
        if apart.any():
            at, to = np.nonzero(apart)
            merge(rows[part][at], columns[to])


def _numbers(places: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    return places if order is None else order[places]


def _check_threshold(threshold: float) -> None:
    if not -1 <= threshold < 1:
        raise UserError(
            f"threshold {threshold}: cosines above it must exist, so give -1 to below 1"
        )
