"""Balanced sampling from the top of a hierarchy down to its points (arXiv:2405.15613, section 3).

A budget at a node is shared among its children as water fills vessels: all get equally much, but
none more than it holds, and what is left over by less than one each goes to random ones. Below the
lowest level stand points, of which each cluster gives random ones or those nearest to its centroid.

Every level is done at once, without recursion. Who comes first in a random choice follows from the
seed and the node's or point's own number alone; so a larger sample of the same seed contains the
smaller one, and 1e8 of 1e9 points need no more than a part of them in memory.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from common.data.shuffle import mix
from common.errors import UserError
from curation.clusters import Hierarchy, Level

Strategy = Literal["r", "c"]
_CHUNK = 1 << 24  # points ranked together
_DEVIATIONS = 6  # standard deviations to spare in guessing which points a random choice needs


def balanced_sample(
    hierarchy: Hierarchy,
    size: int,
    strategy: Strategy = "r",
    seed: int = 0,
    *,
    multiplier: int = 1,
) -> np.ndarray:
    """Samples points so that clusters of every level are as equally represented as can be.

    Args:
      hierarchy: the clusters.
      size: points to take. If there are fewer, all are taken.
      strategy: "r" takes random points of a cluster of the lowest level, "c" the closest to its
        centroid.
      seed: of all random choices; "c" has them too, where a budget does not divide evenly.
      multiplier: how often one point may be taken.

    Returns:
      int64, ascending: `min(size, points * multiplier)` row numbers of the embeddings.

    Raises:
      UserError: a size, strategy, seed or multiplier that makes no sense.
    """
    _check(size, strategy, seed, multiplier)
    levels, counts = hierarchy.levels, hierarchy.point_counts()
    # The root is the parent of all clusters of the top level.
    budgets = _share(counts[-1] * multiplier, size, seed, len(levels))
    for number in range(len(levels) - 1, 0, -1):
        level = levels[number]
        children = np.asarray(level.indices)
        quotas = water_fill(
            counts[number - 1][children] * multiplier,
            level.indptr,
            budgets,
            _priorities(seed, number, children),
        )
        budgets = np.empty_like(quotas)
        budgets[children] = quotas
    return _take(levels[0], budgets, strategy, seed)


def flat_sample(
    hierarchy: Hierarchy,
    size: int,
    level: int = 1,
    strategy: Strategy = "r",
    seed: int = 0,
    *,
    multiplier: int = 1,
) -> np.ndarray:
    """Samples equally from the clusters of one level (counted from 1), as a baseline.

    Inside a cluster it is blind to the levels below: "c", above level 1, takes points of the
    children nearest to the centroid first. See `balanced_sample` for the rest.
    """
    _check(size, strategy, seed, multiplier)
    flat = hierarchy.flattened(level)
    budgets = _share(flat.sizes * multiplier, size, seed, level)
    return _take(flat, budgets, strategy, seed)


def sample_clusters(level: Level, most: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """Samples random members, equally many of each cluster but at most `most` [K] of it.

    Returns:
      int64, ascending: `min(size, sum of most)` members, each once.
    """
    quotas = _share(np.minimum(most, level.sizes), size, seed, 1)
    return _take(level, quotas, "r", seed)


def water_fill(
    capacities: np.ndarray, indptr: np.ndarray, budgets: np.ndarray, priorities: np.ndarray
) -> np.ndarray:
    """Shares each parent's budget among its children.

    Child j of a parent gets `min(t, capacities[j])` for the largest integer t that the budget
    allows; what remains of it goes, one each, to the children of the smallest priorities among
    those that hold more than t.

    Args:
      capacities: int64 [M], children of one parent standing together.
      indptr: int64 [P + 1]: the children of parent p are `indptr[p] : indptr[p + 1]`.
      budgets: int64 [P].
      priorities: [M].

    Returns:
      int64 [M]; a parent's children together get `min(budget, sum of capacities)`.
    """
    if not len(capacities):
        return np.zeros(0, np.int64)
    children = np.diff(indptr)
    parent = np.repeat(np.arange(len(children)), children)
    order = np.lexsort((capacities, parent))
    ascending = capacities[order]
    # What the smaller children of the same parent hold together, and how many are left with this.
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(ascending)])
    smaller = before[:-1] - before[indptr[:-1]][parent]
    left = indptr[1:][parent] - np.arange(len(parent))
    even = (budgets[parent] - smaller) // left
    # The first child that holds more than an even share is where the water stands.
    over = np.flatnonzero(even < ascending)[::-1]
    first = np.full(len(children), -1)
    first[parent[over]] = over
    limited = first >= 0
    share = np.full(len(children), np.iinfo(np.int64).max)
    share[limited] = even[first[limited]]
    remainder = np.zeros(len(children), np.int64)
    remainder[limited] = (budgets[parent] - smaller - left * even)[first[limited]]

    quotas = np.minimum(capacities, share[parent])
    eligible = np.flatnonzero((capacities > share[parent]) & (remainder[parent] > 0))
    ranked = eligible[np.lexsort((priorities[eligible], parent[eligible]))]
    winners = _rank(parent[ranked]) < remainder[parent[ranked]]
    quotas[ranked[winners]] += 1
    return quotas


def _share(capacities: np.ndarray, size: int, seed: int, level: int) -> np.ndarray:
    """`water_fill` for one parent, whose children are clusters 0, 1, … of a level."""
    return water_fill(
        capacities,
        np.array([0, len(capacities)], np.int64),
        np.array([size], np.int64),
        _priorities(seed, level, np.arange(len(capacities))),
    )


def _take(level: Level, quotas: np.ndarray, strategy: Strategy, seed: int) -> np.ndarray:
    """Takes as many points of each cluster as its quota says: every one equally often, but one."""
    parts = [np.zeros(0, np.int64)]
    for start, stop in _portions(level.indptr):
        ends = level.indptr[start : stop + 1]
        members = np.asarray(level.indices[ends[0] : ends[-1]])
        sizes = np.diff(ends)
        copies, rest = np.divmod(quotas[start:stop], np.maximum(sizes, 1))
        if strategy == "c":
            first = np.repeat(ends[:-1] - ends[0], rest)
            once = first + _rank(np.repeat(np.arange(len(rest)), rest))
        else:
            once = _random_of_each(members, sizes, rest, seed)
        parts.append(members[once].astype(np.int64))
        if copies.any():
            parts.append(np.repeat(members, np.repeat(copies, sizes)).astype(np.int64))
    return np.sort(np.concatenate(parts))


def _random_of_each(
    members: np.ndarray, sizes: np.ndarray, wanted: np.ndarray, seed: int
) -> np.ndarray:
    """Places of random members: `wanted` [K] of each of K clusters that stand one after another."""
    priorities = _priorities(seed, 0, members)
    # Most members need not be sorted: those beyond where the wanted ones surely end.
    ample = (wanted + _DEVIATIONS * np.sqrt(wanted) + 16) / np.maximum(sizes, 1)
    ample[wanted == 0] = -1
    for bound in (ample, np.where(wanted > 0, 1.0, -1.0)):
        near = priorities * 2.0**-64 <= np.repeat(bound, sizes)
        places = np.flatnonzero(near)
        cluster = np.repeat(np.arange(len(sizes)), sizes)[places]
        if np.all(np.bincount(cluster, minlength=len(sizes)) >= wanted):
            break
    key = priorities[places] >> np.uint64(24) | cluster.astype(np.uint64) << np.uint64(40)
    order = np.argsort(key, kind="stable")
    cluster = cluster[order]
    return places[order[_rank(cluster) < wanted[cluster]]]


def _portions(indptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of clusters with at most `_CHUNK` points together, or of one large cluster."""
    start, clusters = 0, len(indptr) - 1
    while start < clusters:
        stop = int(np.searchsorted(indptr, indptr[start] + _CHUNK, side="right")) - 1
        stop = min(max(stop, start + 1), start + _CHUNK, clusters)
        yield start, stop
        start = stop


def _rank(groups: np.ndarray) -> np.ndarray:
    """The place of each element in its group, where groups are ascending numbers."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups, side="left")


def _priorities(seed: int, level: int, numbers: np.ndarray) -> np.ndarray:
    """Random uint64 that follow from seed, level and number alone."""
    stream = np.random.SeedSequence([seed, level]).generate_state(1, np.uint64)
    return mix(numbers.astype(np.uint64) ^ stream)


def _check(size: int, strategy: str, seed: int, multiplier: int) -> None:
    if size < 0:
        raise UserError(f"a sample of {size} points: give a size of 0 or more")
    if strategy not in ("r", "c"):
        raise UserError(f"strategy '{strategy}': give 'r' (random) or 'c' (closest)")
    if seed < 0:
        raise UserError(f"seed {seed}: give 0 or more")
    if multiplier < 1:
        raise UserError(f"multiplier {multiplier}: a point can be taken 1 time or more")
