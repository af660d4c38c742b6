"""Hierarchical k-means against an account of the algorithm in numpy and float64."""

import jax
import numpy as np
import pytest

import curation
from common.errors import UserError
from common.sharding import make_mesh
from curation import hierarchy as module
from curation.greedy_seeding import greedy_plus_plus
from curation.hierarchy import HierarchyConfig, resample
from curation.lloyd import Assignment


def mixture(rows=1500, width=3, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.zipf(1.6, 12).clip(max=60)
    centres = 6 * rng.normal(size=(12, width))
    which = rng.choice(12, rows, p=sizes / sizes.sum())
    return (centres[which] + rng.normal(size=(rows, width))).astype(np.float32)


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(devices=jax.devices()[:1])


def account(points, level, k, steps, size, seed, iterations):
    """A level as the paper and its code have it; only seeds are drawn by our function."""
    centre = points.mean(axis=0, dtype=np.float64).astype(np.float32)
    chosen = np.arange(len(points))
    for step in range(steps + 1):
        sample = points[chosen]
        start = sample[greedy_plus_plus(sample - centre, k, (seed, level, step, 0))]
        centroids = iterate(sample.astype(np.float64), start.astype(np.float64), iterations)
        labels, distances = nearest(points.astype(np.float64), centroids)
        clustered = [np.flatnonzero(labels == c) for c in range(k)]
        members = [rows[np.argsort(distances[rows], kind="stable")] for rows in clustered]
        chosen = np.sort(np.concatenate([rows[:size] for rows in members]))
    return centroids, members


def iterate(x, centroids, iterations):
    labels, _ = nearest(x, centroids)
    for _ in range(iterations):
        centroids = np.stack(
            [
                x[labels == c].mean(axis=0) if np.any(labels == c) else centroids[c]
                for c in range(len(centroids))
            ]
        )
        labels, _ = nearest(x, centroids)
    return centroids


def nearest(x, centroids):
    apart = np.square(x[:, None] - centroids).sum(axis=2)
    return apart.argmin(axis=1), apart.min(axis=1)


@pytest.mark.parametrize("steps", [(0, 0, 0), (2, 3, 0)], ids=["plain", "resampled"])
def test_equals_the_account(steps, one_device):
    x, clusters, sizes = mixture(), (60, 20, 5), (4, 2, 2)
    have = curation.hierarchical_kmeans(
        x, clusters, steps, seed=7, sample_sizes=sizes, iterations=15, mesh=one_device
    )
    assert have.num_clusters == clusters
    points = x
    for number, level in enumerate(have.levels):
        k = clusters[number]
        centroids, members = account(points, number, k, steps[number], sizes[number], 7, 15)
        # Of two lone points either may be the seed: the last bit of their places decides which.
        below, points = points, level.centroids
        np.testing.assert_allclose(level.centroids, centroids, rtol=1e-5, atol=1e-5)
        for cluster, rows in enumerate(members):
            found = level.members(cluster)
            assert sorted(found) == sorted(rows)
            apart = np.square(below[found] - centroids[cluster]).sum(axis=1)
            assert np.all(np.diff(apart) >= -1e-5 * (1 + apart[1:])), "the nearest comes first"


@pytest.fixture(scope="module")
def reference(one_device):
    return curation.hierarchical_kmeans(
        mixture(), (60, 20), 2, seed=1, sample_sizes=(6, 2), iterations=6, mesh=one_device
    )


def same(have, want):
    for a, b in zip(have.levels, want.levels, strict=True):
        np.testing.assert_array_equal(a.centroids, b.centroids)
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_array_equal(a.indptr, b.indptr)
        np.testing.assert_array_equal(a.distances, b.distances)


def test_the_same_on_eight_devices_and_streamed(reference):
    options = {"seed": 1, "sample_sizes": (6, 2), "iterations": 6}
    same(curation.hierarchical_kmeans(mixture(), (60, 20), 2, **options), reference)
    same(curation.hierarchical_kmeans(mixture(), (60, 20), 2, memory=1, **options), reference)


class Interrupted(Exception):
    pass


def test_interrupted_again_and_again(reference, one_device, tmp_path, monkeypatch):
    monkeypatch.setattr("curation.checkpointing.SECONDS", 0.0)
    calls = []

    def interrupt(what, done, whole):
        calls.append((what, done))
        # Every few steps, whatever is going on; what was done before must not come again.
        if len(calls) % 7 == 0:
            raise Interrupted

    for _ in range(40):
        try:
            have = curation.hierarchical_kmeans(
                mixture(),
                (60, 20),
                2,
                seed=1,
                sample_sizes=(6, 2),
                iterations=6,
                mesh=one_device,
                checkpoints=tmp_path,
                report=interrupt,
            )
        except Interrupted:
            continue
        break
    same(have, reference)
    assert len(calls) > 7
    assert max(calls.count(call) for call in calls) <= 2  # The step that was interrupted.


def test_checkpoints_of_another_clustering_are_refused(one_device, tmp_path, monkeypatch):
    monkeypatch.setattr("curation.checkpointing.SECONDS", 0.0)
    options = {"sample_sizes": 2, "iterations": 2, "mesh": one_device, "checkpoints": tmp_path}
    curation.hierarchical_kmeans(mixture(), (60, 20), 1, seed=1, **options)
    for x, seed in ((mixture(), 2), (mixture(seed=5), 1)):
        with pytest.raises(UserError, match="belongs to another clustering"):
            curation.hierarchical_kmeans(x, (60, 20), 1, seed=seed, **options)
    for path in tmp_path.glob("*.npz"):  # Cut short, as if the disk had been full.
        path.write_bytes(path.read_bytes()[:-100])
    curation.hierarchical_kmeans(mixture(), (60, 20), 1, seed=2, **options)


def test_a_full_disk_leaves_the_last_state(one_device, tmp_path, monkeypatch):
    monkeypatch.setattr("curation.checkpointing.SECONDS", 0.0)
    curation.kmeans(mixture(), 9, iterations=3, mesh=one_device, checkpoints=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, data):
        raise OSError(28, "No space left on device")

    (tmp_path / "lloyd.npz").unlink()
    monkeypatch.setattr("curation.checkpointing.write_atomically", full)
    with pytest.raises(UserError, match="No space left"):
        curation.kmeans(mixture(), 9, iterations=3, mesh=one_device, checkpoints=tmp_path)
    assert (tmp_path / "seeds.npz").read_bytes() == before["seeds.npz"]


def test_random_resampling_and_small_clusters():
    rng = np.random.default_rng(0)
    labels = np.asarray([0, 0, 0, 2, 2, 3] * 5, np.int32)
    assignment = Assignment(labels, rng.random(30).astype(np.float32), 0.0)
    for strategy in ("c", "r"):
        rows = resample(assignment, 5, 6, strategy, (0,))
        np.testing.assert_array_equal(rows, np.sort(rows))
        assert np.bincount(labels[rows], minlength=5).tolist() == [6, 0, 6, 5, 0]
    other = [resample(assignment, 5, 6, "r", (seed,)).tolist() for seed in (0, 0, 1)]
    assert other[0] == other[1] != other[2]
    closest = resample(assignment, 5, 1, "c", (0,))
    distances = np.where(labels == 0, assignment.distances, np.inf)
    assert closest[labels[closest] == 0] == np.argmin(distances)


def test_published_defaults():
    config = HierarchyConfig((500, 50, 10))
    assert [config.steps_of(level) for level in range(3)] == [0, 9, 9]
    assert config.sample_of(0, 10_000) == 10
    assert config.sample_of(1, 500) == 5


def test_data_of_few_different_rows(one_device):
    x = np.repeat(np.eye(5, dtype=np.float32), 10, axis=0)
    have = curation.hierarchical_kmeans(x, (20, 3), 3, sample_sizes=2, mesh=one_device)
    assert have.num_clusters == (20, 3)
    assert have.levels[0].sizes.sum() == 50
    assert np.count_nonzero(have.levels[0].sizes) == 5


@pytest.mark.parametrize(
    ("clusters", "steps", "options", "message"),
    [
        ((20, 20), 0, {}, "fewer clusters than the one below"),
        ((10, 20), 0, {}, "fewer clusters than the one below"),
        ((), 0, {}, "at least one level"),
        ((2000, 10), 0, {}, "2000 clusters need"),
        ((20, 0), 0, {}, "whole number from 1"),
        ((20, 2.5), 0, {}, "whole numbers"),
        ((20, 5), (1, 2, 3), {}, "3 numbers for 2 levels"),
        ((20, 5), -1, {}, "0 or more"),
        ((20, 5), 1, {"strategy": "furthest"}, "closest"),
        ((20, 5), 1, {"seed": 1.5}, "seed"),
    ],
)
def test_mistakes_are_named(clusters, steps, options, message):
    with pytest.raises(UserError, match=message):
        curation.hierarchical_kmeans(mixture(), clusters, steps, **options)


def test_the_module_is_found_beside_the_function():
    assert callable(curation.hierarchical_kmeans)
    assert module.hierarchical_kmeans is curation.hierarchical_kmeans
