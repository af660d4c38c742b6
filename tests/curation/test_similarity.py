"""Near-duplicates and retrieval beside plain numpy, with several blocks on several devices."""

import numpy as np
import pytest

from common.errors import UserError
from curation import (
    Hierarchy,
    Level,
    decontaminate,
    deduplicate,
    duplicate_components,
    retrieve,
    retrieve_clusters,
    similarity,
)
from curation.deduplication import Components
from curation.similarity import nearest_neighbours


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(similarity, "ROWS", 64)
    monkeypatch.setattr(similarity, "COLUMNS", 48)
    monkeypatch.setattr(similarity, "GROUP", 2)


def cosines(a, b):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


def clumps(count=200, width=6, seed=0):
    """Rows in pairs and chains of near-duplicates, in random order and of random lengths."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, width))
    source = rng.integers(0, count, count // 2)
    x[: count // 2] = x[source] + 0.05 * rng.normal(size=(count // 2, width))
    return rng.permutation(x * rng.uniform(0.1, 10, (count, 1)))


def literal_components(adjacency):
    """The lowest row that can be reached, by walking the graph."""
    found = np.arange(len(adjacency))
    for root in range(len(adjacency)):
        walk = [root] if found[root] == root else []
        while walk:
            for other in np.flatnonzero(adjacency[walk.pop()]):
                if found[other] > root:
                    found[other] = root
                    walk.append(other)
    return found


@pytest.mark.parametrize("count", [1, 2, 63, 200])
def test_components_are_those_of_the_whole_graph(count):
    x = clumps(count) if count > 2 else np.ones((count, 3))
    expected = literal_components(cosines(x, x) > 0.97)
    np.testing.assert_array_equal(duplicate_components(x, 0.97), expected)
    np.testing.assert_array_equal(deduplicate(x, 0.97), np.unique(expected))


def test_components_within_groups():
    x = clumps()
    groups = np.random.default_rng(1).integers(0, 3, len(x)) * 7 - 5
    together = groups[:, None] == groups[None]
    expected = literal_components((cosines(x, x) > 0.9) & together)
    np.testing.assert_array_equal(duplicate_components(x, 0.9, groups=groups), expected)


def test_all_rows_the_same_and_none():
    assert deduplicate(np.ones((300, 4), np.float16), 0.99).tolist() == [0]
    rows = np.eye(150, dtype=np.float32)
    assert deduplicate(rows, 0.5).tolist() == list(range(150))
    assert deduplicate(np.zeros((0, 4), np.float32), 0.5).tolist() == []


def test_union_of_random_pairs():
    rng = np.random.default_rng(0)
    for edges in (0, 10, 60, 400):
        a, b = rng.integers(0, 100, (2, edges))
        adjacency = np.zeros((100, 100), bool)
        adjacency[a, b] = adjacency[b, a] = True
        sets = Components(100)
        for part in np.array_split(np.arange(edges), 3):
            sets.merge(a[part], b[part])
        np.testing.assert_array_equal(sets.roots(), literal_components(adjacency))


def test_decontaminate():
    x, references = clumps(seed=2), clumps(40, seed=3)
    near = np.any(cosines(x, references) > 0.8, axis=1)
    assert 0 < near.sum() < len(x)
    np.testing.assert_array_equal(decontaminate(x, references, 0.8), np.flatnonzero(~near))
    components = duplicate_components(x, 0.9)
    gone = np.isin(components, components[near])
    assert gone.sum() > near.sum()
    found = decontaminate(x, references, 0.8, components=components)
    np.testing.assert_array_equal(found, np.flatnonzero(~gone))


@pytest.mark.parametrize(("queries", "pool", "k"), [(1, 1, 1), (70, 200, 5), (130, 101, 101)])
def test_neighbours(queries, pool, k):
    rng = np.random.default_rng(0)
    q, p = rng.normal(size=(queries, 6)), rng.normal(size=(pool, 6)).astype(np.float32)
    found, expected = nearest_neighbours(q, p, k), cosines(q, p)
    np.testing.assert_allclose(found.similarities, -np.sort(-expected, axis=1)[:, :k], atol=1e-6)
    chosen = np.take_along_axis(expected, found.indices, axis=1)
    np.testing.assert_allclose(chosen, found.similarities, atol=1e-6)
    assert all(len(set(row)) == k for row in found.indices.tolist())
    np.testing.assert_array_equal(retrieve(q, p, k), found.indices)


def test_equally_similar_rows_come_by_index():
    pool = np.tile(np.eye(3, dtype=np.float32), (80, 1))
    assert retrieve(pool[1:2], pool, 70)[0].tolist() == list(range(1, 211, 3))


def test_retrieve_clusters():
    """Clusters with more than three queries give members, equally many under a cap."""
    centroids = np.array([[0, 0], [10, 0], [0, 10]], np.float32)
    labels = np.repeat([0, 1, 2], [50, 20, 30])
    tree = Hierarchy([Level.from_assignment(centroids, labels, np.zeros(100))])
    queries = np.repeat(centroids, [4, 5, 3], axis=0) + 0.1
    taken = retrieve_clusters(queries, tree, per_cluster=25)
    assert np.bincount(labels[taken]).tolist() == [25, 20]
    assert len(set(taken.tolist())) == 45
    capped = retrieve_clusters(queries, tree, per_cluster=25, at_most=10, seed=3)
    assert np.bincount(labels[capped]).tolist() == [5, 5]
    assert set(capped.tolist()) != set(retrieve_clusters(queries, tree, at_most=10).tolist())
    everything = retrieve_clusters(queries, tree, more_than=2, at_most=None)
    assert everything.tolist() == list(range(100))


def test_bad_rows_are_named():
    x = np.ones((150, 3))
    x[99, 1] = np.nan
    with pytest.raises(UserError, match="row 99 of the embeddings is not finite"):
        deduplicate(x, 0.5)
    x[99] = 0
    with pytest.raises(UserError, match="query 99 of the embeddings is zero"):
        retrieve(x, np.ones((5, 3)), 2)
    x[99] = 1e300
    with pytest.raises(UserError, match=r"row 99 .* not finite"):
        deduplicate(x, 0.5)
    x[99] = 1e-30
    assert deduplicate(x, 0.5).tolist() == [0]


def test_bad_arguments():
    x = np.ones((4, 3))
    for call in (
        lambda: deduplicate(x, 1.0),
        lambda: deduplicate(x, float("nan")),
        lambda: deduplicate(x[0], 0.5),
        lambda: deduplicate(x.astype(int), 0.5),
        lambda: deduplicate(x, 0.5, groups=np.zeros(3, int)),
        lambda: retrieve(x, np.ones((4, 2)), 1),
        lambda: retrieve(x, x, 5),
        lambda: retrieve(x, x, 0),
        lambda: decontaminate(x, x, 0.5, components=np.zeros(3, int)),
    ):
        with pytest.raises(UserError):
            call()
