"""Greedy k-means++ that draws candidates for several seeds at once, against the sequential one."""

import collections
import itertools
import math

import numpy as np
import pytest

from curation import greedy_seeding
from curation.checkpointing import Checkpoints
from curation.greedy_seeding import candidates_of, greedy_plus_plus


def _exact_distribution(x: np.ndarray, weights: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """Probability of each sequence of seeds, by going through all draws of all steps."""
    candidates = candidates_of(k)
    apart = np.square(x[:, None] - x[None]).sum(axis=2)
    states = {(i,): float(p) for i, p in enumerate(weights / weights.sum()) if p}
    for _ in range(1, k):
        following: dict[tuple[int, ...], float] = collections.defaultdict(float)
        for seeds, probability in states.items():
            nearest = apart[list(seeds)].min(axis=0)
            part = weights * nearest / np.sum(weights * nearest)
            left = np.sum(weights * np.minimum(nearest, apart), axis=1)
            for drawn in itertools.product(np.flatnonzero(part), repeat=candidates):
                best = min(drawn, key=lambda row: left[row])
                following[*seeds, int(best)] += probability * float(np.prod(part[list(drawn)]))
        states = following
    return dict(states)


def test_seeds_are_distributed_as_the_sequential_method_has_them(monkeypatch) -> None:
    # Of 16 candidates there would be too many draws to go through.
    monkeypatch.setattr(greedy_seeding, "_FEW", 0)
    x = np.asarray([[0.0, 0.0], [1.0, 0.2], [1.3, 2.0], [3.0, 1.0], [4.0, 3.5]], np.float32)
    weights = np.asarray([1.0, 3.0, 1.0, 2.0, 1.0], np.float32)
    draws = 2000
    expected = _exact_distribution(x, weights, 3)
    assert sum(expected.values()) == pytest.approx(1)
    found = collections.Counter(
        tuple(greedy_plus_plus(x, 3, (7, i), weights).tolist()) for i in range(draws)
    )
    assert set(found) <= set(expected)
    common = {seeds: p * draws for seeds, p in expected.items() if p * draws >= 8}
    statistic = sum((found[seeds] - mean) ** 2 / mean for seeds, mean in common.items())
    # Chi-square has this mean and this deviation; drawing without rejection exceeds it many times.
    assert statistic < len(common) + 5 * math.sqrt(2 * len(common))


@pytest.mark.parametrize("width", [2, 40])
def test_seeds_leave_as_little_as_the_sequential_methods(width: int) -> None:
    rng = np.random.default_rng(width)
    centres = rng.normal(size=(60, width)) * 6
    x = (centres[rng.integers(60, size=3000)] + rng.normal(size=(3000, width))).astype(np.float32)
    k, candidates = 150, candidates_of(150)

    def potential(seeds: np.ndarray) -> float:
        return float(np.square(x[:, None] - x[seeds][None]).sum(axis=2).min(axis=1).sum())

    def sequential(seed: int) -> np.ndarray:
        draw = np.random.default_rng(seed)
        seeds = [int(draw.integers(len(x)))]
        nearest = np.square(x - x[seeds[0]]).sum(axis=1)
        while len(seeds) < k:
            drawn = draw.choice(len(x), candidates, p=nearest / nearest.sum())
            nearer = np.minimum(np.square(x[drawn][:, None] - x[None]).sum(axis=2), nearest)
            best = int(np.argmin(nearer.sum(axis=1)))
            seeds.append(int(drawn[best]))
            nearest = nearer[best].astype(np.float64)
        return np.asarray(seeds)

    ours = [potential(greedy_plus_plus(x, k, (i,))) for i in range(6)]
    theirs = [potential(sequential(i)) for i in range(6)]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.02)


def test_rows_without_weight_are_never_seeds_and_seeds_differ() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 24)).astype(np.float32)
    weights = (rng.random(500) < 0.5).astype(np.float32)
    seeds = greedy_plus_plus(x, 200, (1,), weights)
    assert len(set(seeds.tolist())) == 200
    assert (weights[seeds] > 0).all()


def test_fewer_different_rows_than_seeds() -> None:
    x = np.repeat(np.asarray([[0.0], [5.0], [9.0]], np.float32), 20, axis=0)
    seeds = greedy_plus_plus(x, 10, (0,))
    assert sorted({float(x[row, 0]) for row in seeds[:3]}) == [0.0, 5.0, 9.0]
    assert ((seeds >= 0) & (seeds < 60)).all()


def test_tiny_distances_come_to_an_end() -> None:
    x = (np.arange(40, dtype=np.float32)[:, None] * np.float32(1e-22)).astype(np.float32)
    seeds = greedy_plus_plus(x, 12, (0,))
    assert seeds.shape == (12,)


def test_goes_on_from_its_checkpoint_with_the_same_seeds(tmp_path) -> None:
    x = np.random.default_rng(3).normal(size=(4000, 20)).astype(np.float32)
    whole = greedy_plus_plus(x, 600, (5,))
    checkpoints = Checkpoints(tmp_path, {"k": 600}, seconds=0.0)

    class Stopped(Exception):
        pass

    def stop(_: str, done: int, __: int) -> None:
        if done >= 512:
            raise Stopped

    with pytest.raises(Stopped):
        greedy_plus_plus(x, 600, (5,), checkpoints=checkpoints, report=stop)
    kept = checkpoints.load("seeding")
    assert kept is not None
    assert int(kept["done"]) == 256
    np.testing.assert_array_equal(greedy_plus_plus(x, 600, (5,), checkpoints=checkpoints), whole)
