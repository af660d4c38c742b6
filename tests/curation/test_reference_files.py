"""Results and configurations of the paper's own code, read without running what is in them."""

import io
import os
import pickle

import numpy as np
import pytest

from common.errors import UserError
from curation import Hierarchy, Level, load
from curation.reference_files import (
    _ArrayUnpickler,
    load_reference,
    read_reference_config,
    save_reference,
)


def object_array(clusters):
    array = np.empty(len(clusters), object)
    for k, members in enumerate(clusters):
        array[k] = members
    return array


def write_level(folder, clusters, centroids=None, **options):
    folder.mkdir(parents=True)
    np.save(folder / "sorted_clusters.npy", clusters, allow_pickle=True, **options)
    if centroids is not None:
        np.save(folder / "centroids.npy", centroids)


def test_levels_with_empty_clusters_of_the_wrong_dtype(tmp_path):
    low = [np.array([4, 0]), np.array([]), np.array([1, 2, 3], np.int32)]
    write_level(tmp_path / "level1", object_array(low), np.arange(6.0).reshape(3, 2))
    write_level(tmp_path / "level2", object_array([np.array([2, 0, 1])]), np.ones((1, 2)))
    found = load(tmp_path)
    assert found.num_clusters == (3, 1)
    assert [found.levels[0].members(k).tolist() for k in range(3)] == [[4, 0], [], [1, 2, 3]]
    assert found.levels[1].members(0).tolist() == [2, 0, 1]
    assert found.levels[0].centroids.dtype == np.float32
    assert found.levels[0].distances is None


@pytest.mark.parametrize(
    "clusters",
    [
        np.array([[3, 1], [0, 2]], object),
        np.array([[3, 1], [0, 2]]),
        object_array([[3, 1], [0, 2]]),
        object_array([np.array([3, 1], object), np.array([0, 2], ">i4")]),
        object_array([np.array([np.int64(3), np.int64(1)], object), np.array([0, 2], np.uint8)]),
    ],
)
def test_clusters_of_equal_size_in_all_their_forms(tmp_path, clusters):
    write_level(tmp_path / "level1", clusters)
    found = load_reference(tmp_path)
    assert [found.levels[0].members(k).tolist() for k in range(2)] == [[3, 1], [0, 2]]
    assert found.levels[0].centroids is None


def test_last_step_stands_for_a_lost_link(tmp_path):
    for step, clusters in ((2, [[0, 1], [2]]), (10, [[1], [2, 0]])):
        write_level(tmp_path / "level1" / f"step{step}", object_array(clusters))
    os.symlink("/nowhere/sorted_clusters.npy", tmp_path / "level1" / "sorted_clusters.npy")
    assert load(tmp_path).levels[0].members(1).tolist() == [2, 0]


def test_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    levels = [
        Level.from_assignment(rng.normal(size=(k, 3)), rng.integers(0, k, n), rng.random(n))
        for n, k in ((80, 9), (9, 4), (4, 2))
    ]
    save_reference(Hierarchy(levels), tmp_path)
    with open(tmp_path / "level1" / "sorted_clusters.npy", "rb") as stream:
        theirs = np.load(stream, allow_pickle=True)  # As the paper's code reads it.
    assert theirs.dtype == object
    for mine, found in zip(levels, load(tmp_path).levels, strict=True):
        np.testing.assert_array_equal(mine.indptr, found.indptr)
        np.testing.assert_array_equal(mine.indices, found.indices)
        np.testing.assert_array_equal(mine.centroids, found.centroids)
    with pytest.raises(UserError, match="level1 is there already"):
        save_reference(Hierarchy(levels), tmp_path)


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_run(tmp_path):
    write_level(tmp_path / "level1", object_array([Runs(tmp_path / "ran"), np.array([0])]))
    with pytest.raises(UserError, match=r"wants to run .*mkdir: refused"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_names_cannot_be_changed():
    """A pickle that hangs a state on a name of NumPy, or calls what is no function."""
    for payload in (
        b"cnumpy\nndarray\n}(S'a'\nS'b'\nub.",
        b"cnumpy\ndtype\n}(S'a'\nS'b'\nub.",
        b"cnumpy\nndarray\n(S'a'\ntR.",
    ):
        with pytest.raises(pickle.UnpicklingError):
            _ArrayUnpickler(io.BytesIO(payload)).load()


@pytest.mark.parametrize(
    "clusters",
    [
        [np.array([0, 1]), np.array([1])],
        [np.array([0, 3]), np.array([1])],
        [np.array([0.0, 1.0]), np.array([2])],
        [np.array([[0, 1]]), np.array([2])],
        [np.array(["0"])],
        ["01"],
        [{0: 1}],
        [[0, True]],
    ],
)
def test_what_is_no_partition_is_refused(tmp_path, clusters):
    write_level(tmp_path / "level1", object_array(clusters))
    with pytest.raises(UserError, match=r"level1/sorted_clusters\.npy"):
        load(tmp_path)


def test_damaged_files(tmp_path):
    write_level(tmp_path / "level1", object_array([np.arange(500)]), np.ones((2, 3)))
    with pytest.raises(UserError, match="needs centroids"):
        load(tmp_path)
    np.save(tmp_path / "level1" / "centroids.npy", object_array([0]), allow_pickle=True)
    with pytest.raises(UserError, match=r"centroids\.npy is truncated or damaged"):
        load(tmp_path)
    (tmp_path / "level1" / "centroids.npy").unlink()
    file = tmp_path / "level1" / "sorted_clusters.npy"
    for size in (2000, 200, 100, 60, 5, 0):
        os.truncate(file, size)
        with pytest.raises(UserError, match=r"sorted_clusters\.npy"):
            load_reference(tmp_path)
    file.unlink()
    with pytest.raises(UserError):
        load(tmp_path)


def test_one_list_told_often_is_no_bomb(tmp_path):
    """A pickle that refers to one long list many times claims more members than it has bytes."""
    many = list(range(2000))
    write_level(tmp_path / "level1", object_array([many] * 50_000))
    with pytest.raises(UserError, match="more members than bytes"):
        load(tmp_path)


PUBLISHED = """
n_levels: 4
n_iters: 50
n_clusters: [100_000, 500_000, 50_000, 10_000]
n_splits: [100, 1, 1, 1]
n_resampling_steps: [1, 10, 10, 10]
sample_size: [1, 10, 5, 3]
subset_indices_path: null
checkpoint_period: 10_000
dtype: float64
nnodes: [16, 2, 1, 1]
sampling_strategy: c
slurm_partition: null
"""


def test_published_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text(PUBLISHED)
    found = read_reference_config(tmp_path / "config.yaml")
    assert found.clusters == (100_000, 500_000, 50_000, 10_000)
    assert found.splits == (100, 1, 1, 1)
    assert found.resampling_steps == (1, 10, 10, 10)
    assert found.sample_sizes == (1, 10, 5, 3)
    assert (found.iterations, found.strategy, found.subset) == (50, "c", None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("n_levels: 4", "n_levels: 3"), "n_clusters has 4 entries for 3 levels"),
        (("n_levels: 4", "n_levels: many"), "n_levels must be"),
        (("10_000]", "0]"), "n_clusters must be a list"),
        (("strategy: c", "strategy: f"), "sampling_strategy must be"),
        (("float64", "int8"), "dtype must be"),
        (("n_levels: 4", "n_levels: !!python/object/apply:os.getcwd []"), "cannot be read as YAML"),
        ((PUBLISHED, "- 1"), "holds no keys"),
        ((PUBLISHED, "a: [" * 5000), "cannot be read as YAML"),
    ],
)
def test_bad_configurations(tmp_path, change, told):
    (tmp_path / "config.yaml").write_text(PUBLISHED.replace(*change))
    with pytest.raises(UserError, match=told):
        read_reference_config(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_reference_config(tmp_path / "none.yaml")
