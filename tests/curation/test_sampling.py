"""Balanced sampling: known answers, a literal account of the recursion, and what always holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from curation import Hierarchy, Level, balanced_sample, flat_sample
from curation import sampling as module
from curation.sampling import water_fill


def of_lists(clusters):
    """A level of given member lists, nearest first."""
    indptr = np.cumsum([0] + [len(members) for members in clusters])
    return Level(None, indptr, np.array([i for members in clusters for i in members], np.int64))


TOY = Hierarchy(
    [
        of_lists([[0, 1, 2, 3, 4], [5, 6], list(range(7, 15)), [15], [16, 17, 18], [19, 20]]),
        of_lists([[0, 1], [2], [3, 4, 5]]),
    ]
)


def fill(capacities, budget, seed=0):
    priorities = np.random.default_rng(seed).permutation(len(capacities))
    ends = np.array([0, len(capacities)])
    return water_fill(np.array(capacities), ends, np.array([budget]), priorities).tolist()


@pytest.mark.parametrize(
    ("capacities", "budget", "quotas"),
    [
        ([5, 3, 10, 1], 12, [4, 3, 4, 1]),
        ([5, 3, 10, 1], 19, [5, 3, 10, 1]),
        ([5, 3, 10, 1], 100, [5, 3, 10, 1]),
        ([100, 1, 1, 1], 50, [47, 1, 1, 1]),
        ([], 4, []),
        ([0, 0], 4, [0, 0]),
        ([3, 4], 0, [0, 0]),
    ],
)
def test_water_fill(capacities, budget, quotas):
    assert fill(capacities, budget) == quotas


def test_the_remainder_goes_to_random_children_with_room():
    found = {tuple(fill([5, 3, 10, 1], 3, seed)) for seed in range(60)}
    assert {sum(q) for q in found} == {3}
    assert len(found) == 4
    assert {max(q) for q in found} == {1}
    found = {tuple(fill([7, 7, 7], 10, seed)) for seed in range(40)}
    assert found == {(4, 3, 3), (3, 4, 3), (3, 3, 4)}
    found = {tuple(fill([0, 0, 4, 4], 5, seed)) for seed in range(40)}
    assert found == {(0, 0, 3, 2), (0, 0, 2, 3)}


@pytest.mark.parametrize(
    ("size", "ids"),
    [
        (15, [0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 15, 16, 17, 19, 20]),
        (18, [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16, 17, 18, 19, 20]),
        (21, list(range(21))),
        (30, list(range(21))),
        (0, []),
    ],
)
def test_closest_points_of_two_levels(size, ids):
    found = balanced_sample(TOY, size, "c")
    assert found.dtype == np.int64
    assert found.tolist() == ids


def test_points_repeated_up_to_the_multiplier():
    found = balanced_sample(TOY, 30, "c", multiplier=2)
    assert len(found) == 30
    times = np.bincount(found, minlength=21)
    assert times.max() == 2
    assert times[[0, 5, 6, 7, 8, 15, 16, 19, 20]].tolist() == [2] * 9


def literal_fill(capacities, budget):
    """Quotas without the remainder, the remainder, and the children that may have it."""
    if sum(capacities) <= budget:
        return list(capacities), 0, []
    t = max(t for t in range(budget + 1) if sum(min(t, a) for a in capacities) <= budget)
    quotas = [min(t, a) for a in capacities]
    return quotas, budget - sum(quotas), [j for j, a in enumerate(capacities) if a > t]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 12), max_size=7), min_size=1, max_size=5),
    st.lists(st.integers(0, 60), min_size=5, max_size=5),
    st.integers(0, 1000),
)
def test_water_fill_is_the_literal_one(families, budgets, seed):
    """Several parents at once, some childless, equal the definition for each one alone."""
    capacities = np.array([a for family in families for a in family], np.int64)
    indptr = np.cumsum([0] + [len(family) for family in families])
    priorities = np.random.default_rng(seed).permutation(len(capacities))
    quotas = water_fill(capacities, indptr, np.array(budgets[: len(families)]), priorities)
    for family, budget, start, end in zip(families, budgets, indptr, indptr[1:]):
        base, remainder, eligible = literal_fill(family, budget)
        first = sorted(eligible, key=lambda j: priorities[start + j])[:remainder]
        expected = [q + (j in first) for j, q in enumerate(base)]
        assert quotas[start:end].tolist() == expected


@st.composite
def hierarchies(draw):
    """Random trees with empty clusters on any level."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    members, levels = draw(st.integers(0, 60)), []
    for clusters in draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)):
        levels.append(
            Level.from_assignment(
                np.zeros((clusters, 1)), rng.integers(0, clusters, members), rng.random(members)
            )
        )
        members = clusters
    return Hierarchy(levels)


@settings(max_examples=150, deadline=None)
@given(
    hierarchies(),
    st.integers(0, 80),
    st.sampled_from("rc"),
    st.integers(0, 99),
    st.integers(1, 3),
)
def test_what_always_holds(hierarchy, size, strategy, seed, multiplier):
    found = balanced_sample(hierarchy, size, strategy, seed, multiplier=multiplier)
    times = np.bincount(found, minlength=hierarchy.num_points)
    # The quota exactly, no repeats beyond what is allowed, a shorter one only of a smaller pool.
    assert len(found) == min(size, hierarchy.num_points * multiplier)
    assert times.max(initial=0) <= multiplier
    assert np.all(np.diff(found) >= 0)
    # Among siblings on every level nobody has two more than one that could have had more.
    counts = hierarchy.point_counts()
    for number, level in enumerate(hierarchy.levels, 1):
        given_ = np.bincount(
            hierarchy.point_labels(number), weights=times, minlength=level.num_clusters
        )
        room = given_ < counts[number - 1] * multiplier
        above = hierarchy.levels[number : number + 1]
        parents = above[0].labels() if above else np.zeros(level.num_clusters, int)
        for parent in np.unique(parents):
            siblings = parents == parent
            if np.any(siblings & room):
                assert given_[siblings].max() <= given_[siblings & room].min() + 1
    # In a cluster of the lowest level all points are taken equally often, but for one time.
    low = hierarchy.levels[0]
    for k in range(low.num_clusters):
        inside = times[low.members(k)]
        if len(inside):
            assert inside.max() - inside.min() <= 1
            assert strategy == "r" or np.all(np.diff(inside) <= 0)


@settings(max_examples=60, deadline=None)
@given(hierarchies(), st.integers(0, 60), st.sampled_from("rc"), st.integers(1, 2))
def test_larger_samples_contain_smaller_ones(hierarchy, size, strategy, multiplier):
    small, large = (
        np.bincount(
            balanced_sample(hierarchy, n, strategy, 5, multiplier=multiplier),
            minlength=hierarchy.num_points,
        )
        for n in (size, size + 7)
    )
    assert np.all(small <= large)


def test_flat_sampling_shares_among_the_clusters_of_one_level():
    times = np.bincount(flat_sample(TOY, 12, level=1), minlength=21)
    assert np.bincount(TOY.point_labels(1), weights=times).max() <= 3
    times = np.bincount(flat_sample(TOY, 12, level=2), minlength=21)
    assert np.bincount(TOY.point_labels(2), weights=times).tolist() == [4, 4, 4]
    assert flat_sample(TOY, 6, level=2, strategy="c").tolist() == [0, 1, 7, 8, 15, 16]
    assert flat_sample(TOY, 50, level=1).tolist() == list(range(21))


def test_random_points_are_uniform():
    """Every point of a cluster comes equally often over seeds, within five standard errors."""
    one = Hierarchy([of_lists([list(range(10))])])
    times = sum(np.bincount(balanced_sample(one, 3, seed=s), minlength=10) for s in range(600))
    assert np.all(np.abs(times - 180) < 5 * np.sqrt(600 * 0.3 * 0.7))


def test_the_same_seed_gives_the_same_sample(monkeypatch):
    """However many points are ranked together, and if too few were at first."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 40, 2000)
    tree = Hierarchy([Level.from_assignment(np.zeros((40, 1)), labels, rng.random(2000))])
    whole = balanced_sample(tree, 500, seed=11)
    assert not np.array_equal(whole, balanced_sample(tree, 500, seed=12))
    monkeypatch.setattr(module, "_CHUNK", 64)
    np.testing.assert_array_equal(whole, balanced_sample(tree, 500, seed=11))
    monkeypatch.setattr(module, "_DEVIATIONS", -6)
    np.testing.assert_array_equal(whole, balanced_sample(tree, 500, seed=11))


def test_bad_requests():
    for wrong in ({"size": -1}, {"strategy": "f"}, {"multiplier": 0}, {"seed": -1}):
        with pytest.raises(UserError):
            balanced_sample(TOY, **({"size": 3} | wrong))
    with pytest.raises(UserError, match="levels count from 1"):
        flat_sample(TOY, 3, level=3)
