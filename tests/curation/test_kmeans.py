"""`kmeans` beside scikit-learn's: the same iterations, as good results; any mesh, any chunks."""

import functools
import importlib.util

import jax
import numpy as np
import pytest
from sklearn import cluster, datasets

import curation
from common.errors import UserError
from common.sharding import MeshConfig, make_mesh
from curation import lloyd
from curation.embeddings import open_embeddings, scan
from curation.lloyd import _farthest


@functools.cache
def mixture(rows=5000, width=40, modes=30, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(modes, width))
    x = centres[rng.integers(0, modes, rows)] + 0.6 * rng.normal(size=(rows, width))
    return (x + offset).astype(np.float32)


def rings():
    rng = np.random.default_rng(1)
    radius = np.concatenate([rng.uniform(0.7, 1, size) for size in (4000, 100, 900)])
    centre = np.repeat([[-2.2, 1], [0, 1], [1.2, 0.2]], [4000, 100, 900], axis=0)
    angle = rng.uniform(0, 2 * np.pi, len(radius))
    return centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


DATA = {
    "mixture": lambda: mixture(),
    "far from the origin": lambda: mixture(offset=30.0),
    "digits": lambda: datasets.load_digits().data,
    "rings": rings,
    "no clusters": lambda: np.random.default_rng(2).uniform(size=(4000, 16)).astype(np.float16),
}


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.smoke
def test_smoke_kmeans(one_device):
    x = mixture(600, 8, 5)
    found = curation.kmeans(x, 5, seed=1, mesh=one_device)
    assert found.centroids.shape == (5, 8)
    assert found.labels.shape == (600,)
    apart = np.square(x[:, None] - found.centroids).sum(axis=2)
    np.testing.assert_array_equal(found.labels, apart.argmin(axis=1))
    np.testing.assert_allclose(found.inertia, apart.min(axis=1).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.distances, apart.min(axis=1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["mixture", "far from the origin", "rings"])
def test_iterations_equal_those_of_scikit_learn(name, precision, one_device):
    x = np.asarray(DATA[name](), np.float64)
    start = x[np.random.default_rng(0).choice(len(x), 25, replace=False)]
    want = cluster.KMeans(25, init=start, n_init=1, max_iter=12, tol=0).fit(x)
    have = curation.kmeans(
        x, 25, init=start, iterations=12, tolerance=0, precision=precision, mesh=one_device
    )
    np.testing.assert_allclose(have.centroids, want.cluster_centers_, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(have.labels, want.labels_)
    assert have.inertia == pytest.approx(want.inertia_, rel=1e-5)


@pytest.mark.parametrize("name", sorted(DATA))
def test_as_good_as_the_best_of_scikit_learn_and_faiss(name, one_device):
    """Eight starts and thirty iterations each; faiss takes part where it is installed."""
    x = DATA[name]()
    fit = cluster.KMeans(40, n_init=8, max_iter=30, tol=0, random_state=0).fit(x.astype("f8"))
    best = fit.inertia_
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        rows = np.ascontiguousarray(x, np.float32)
        other = faiss.Kmeans(
            x.shape[1], 40, niter=30, nredo=8, seed=1,
            max_points_per_centroid=len(x), min_points_per_centroid=1,
        )  # fmt: skip
        other.train(rows)
        apart = np.square(rows[:, None].astype("f8") - other.centroids).sum(axis=2)
        best = min(best, apart.min(axis=1).sum())
    have = curation.kmeans(x, 40, iterations=30, tolerance=0, restarts=8, mesh=one_device)
    assert have.inertia <= 1.01 * best


@pytest.fixture(scope="module")
def reference(one_device):
    return curation.kmeans(mixture(), 30, seed=3, iterations=8, mesh=one_device)


@pytest.mark.parametrize(
    ("config", "memory"),
    [
        (MeshConfig(data=8), None),
        (MeshConfig(data=2, fsdp=2, tensor=2), None),
        (MeshConfig(data=2), 1),
        (MeshConfig(data=1), 1),
    ],
    ids=["eight", "every axis", "streamed over two", "streamed"],
)
def test_the_same_on_any_mesh_and_streamed(config, memory, reference, tmp_path):
    x = mixture()
    np.save(tmp_path / "x.npy", x)
    devices = np.prod(config.sizes)
    mesh = make_mesh(config, jax.devices()[:devices])
    have = curation.kmeans(tmp_path / "x.npy", 30, seed=3, iterations=8, mesh=mesh, memory=memory)
    np.testing.assert_array_equal(have.labels, reference.labels)
    np.testing.assert_array_equal(have.centroids, reference.centroids)
    np.testing.assert_array_equal(have.distances, reference.distances)
    assert have.inertia == reference.inertia


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("modes", [30, 3])
def test_looking_at_moved_centroids_alone_changes_nothing(devices, modes, monkeypatch):
    x, mesh = mixture(modes=modes), make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    options = {"seed": 2, "init": "random", "iterations": 40, "tolerance": 0, "mesh": mesh}
    monkeypatch.setattr(lloyd, "_WORTH_IT", 1 << 62)
    want = curation.kmeans(x, 64, **options)
    seen = []
    assign = lloyd.assignment.assign

    def watched(*arguments, most_moved, **others):
        seen.append(most_moved)
        return assign(*arguments, most_moved=most_moved, **others)

    monkeypatch.setattr(lloyd, "_WORTH_IT", 0)
    monkeypatch.setattr(lloyd.assignment, "assign", watched)
    have = curation.kmeans(x, 64, **options)
    assert len({most for most in seen if most}) > 1
    np.testing.assert_array_equal(have.labels, want.labels)
    np.testing.assert_array_equal(have.centroids, want.centroids)
    assert have.inertia == want.inertia
    assert have.iterations == want.iterations


def test_the_seed_decides(one_device, reference):
    again = curation.kmeans(mixture(), 30, seed=3, iterations=8, mesh=one_device)
    other = curation.kmeans(mixture(), 30, seed=4, iterations=8, mesh=one_device)
    np.testing.assert_array_equal(again.centroids, reference.centroids)
    assert not np.array_equal(other.centroids, reference.centroids)


def test_tolerance_ends_early(one_device):
    x = mixture()
    start = x[:30]
    exact = curation.kmeans(x, 30, init=start, tolerance=0, mesh=one_device)
    early = curation.kmeans(x, 30, init=start, tolerance=0.5, mesh=one_device)
    assert early.iterations < exact.iterations
    assert exact.converged
    assert early.converged
    # Nothing moves any more.
    after = curation.kmeans(x, 30, init=exact.centroids, iterations=1, mesh=one_device)
    np.testing.assert_allclose(after.centroids, exact.centroids, atol=1e-6)


def test_restarts_keep_the_best(one_device):
    x = mixture(400, 8, 12)
    several = curation.kmeans(x, 12, seed=5, init="random", restarts=4, mesh=one_device)
    first = curation.kmeans(x, 12, seed=5, init="random", mesh=one_device)
    assert several.inertia <= first.inertia


def test_empty_clusters(one_device):
    x = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    x[-1] = 9.0
    start = np.stack([x[0], x[0], x[0] + 50, x[5]])
    kept = curation.kmeans(x, 4, init=start, empty="keep", iterations=1, mesh=one_device)
    np.testing.assert_allclose(kept.centroids[1:3], start[1:3], atol=1e-5)
    repaired = curation.kmeans(x, 4, init=start, mesh=one_device)
    assert np.bincount(repaired.labels, minlength=4).min() > 0
    assert np.any(np.all(np.abs(repaired.centroids - 9) < 1e-5, axis=1))
    want = cluster.KMeans(4, init=start, n_init=1).fit(x)
    assert repaired.inertia <= want.inertia_ * (1 + 1e-6)


def test_fewer_different_rows_than_clusters(one_device):
    x = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    found = curation.kmeans(x, 6, mesh=one_device)
    assert found.inertia == 0
    assert len(set(found.labels.tolist())) == 3
    same = curation.kmeans(np.full((5, 2), 3.5, np.float32), 2, mesh=one_device)
    np.testing.assert_array_equal(same.centroids, 3.5)


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (7, 7), (4097, 1)])
def test_edges(rows, k, one_device):
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    found = curation.kmeans(x, k, mesh=one_device)
    if k == 1:
        np.testing.assert_allclose(found.centroids[0], x.mean(axis=0), atol=1e-6)
    else:
        assert found.inertia == 0
        assert sorted(found.labels) == list(range(k))


def test_normalized_rows_are_clustered_by_direction(one_device):
    x = mixture(500, 8, 4)
    x = x * np.random.default_rng(0).uniform(0.1, 10, (500, 1)).astype(np.float32)
    found = curation.kmeans(x, 4, normalize=True, mesh=one_device)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    again = curation.kmeans(unit, 4, mesh=one_device)
    np.testing.assert_array_equal(found.labels, again.labels)


def test_farthest_rows():
    distances = np.asarray([1, 5, 3, 5, 0, 5], np.float32)
    assert _farthest(distances, 2).tolist() == [1, 3]
    assert _farthest(distances, 4).tolist() == [1, 3, 5, 2]
    assert _farthest(distances, 9).tolist() == [1, 3, 5, 2, 0, 4]


def spoilt(index, value):
    x = np.ones((20, 3), np.float32)
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("x", "k", "options", "message"),
    [
        (spoilt((4, 1), np.nan), 2, {}, "row 4 .*NaN"),
        (spoilt((4, 1), -np.inf), 2, {}, "row 4 .*infinity"),
        (spoilt([3, 9], np.nan), 2, {}, "row 3 .* and 1 others"),
        (spoilt(7, 0.0), 2, {"normalize": True}, "row 7 .* is zero"),
        (np.full((5, 2), 1e200), 2, {}, "too large"),
        (np.ones((20, 3), np.int32), 2, {}, "int32"),
        (np.ones(20), 2, {}, r"matrix \[N, D\]"),
        (np.ones((0, 3)), 1, {}, "nothing to cluster"),
        (np.ones((20, 3)), 21, {}, "21 clusters .* has 20"),
        (np.ones((20, 3)), 0, {}, "whole number from 1"),
        (np.ones((20, 3)), 2.0, {}, "whole number from 1"),
        (np.ones((20, 3)), 2, {"seed": -1}, "seed"),
        (np.ones((20, 3)), 2, {"init": "kmeans"}, "init is one of"),
        (np.ones((20, 3)), 2, {"init": np.ones((3, 3))}, r"init must be \[2, 3\]"),
        (np.ones((20, 3)), 2, {"iterations": -1}, "iterations"),
    ],
)
def test_mistakes_are_named(x, k, options, message):
    with pytest.raises(UserError, match=message):
        curation.kmeans(x, k, **options)


def test_files_that_are_none(tmp_path):
    good = tmp_path / "good.npy"
    np.save(good, np.ones((100, 8), np.float32))
    cut = tmp_path / "cut.npy"
    cut.write_bytes(good.read_bytes()[:1500])
    text = tmp_path / "text.npy"
    text.write_text("hello")
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.asarray([{"a": 1}], object))
    for path, message in (
        (cut, "truncated"),
        (text, "not a .npy file"),
        (pickled, "damaged"),
        (tmp_path / "none.npy", "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            open_embeddings(path)


def test_a_subset_of_rows():
    x = mixture(100, 4, 3)
    rows = np.asarray([5, 3, 90])
    part = open_embeddings(x, subset=rows)
    assert part.rows == 3
    np.testing.assert_array_equal(part.read(1, 9), x[[3, 90]])
    with pytest.raises(UserError, match="row 100"):
        open_embeddings(x, subset=np.asarray([100]))


def test_data_far_away_loses_nothing():
    x = mixture(300, 4, 3).astype(np.float64) + 1e6
    data = scan(open_embeddings(x))
    np.testing.assert_allclose(data.read(0, 300), x - data.centre.astype(np.float64), atol=1e-6)
