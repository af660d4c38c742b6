"""The container of a hierarchy and its folder: round trips, and files that are not whole."""

import json
import os
import shutil

import numpy as np
import pytest

from common.errors import UserError
from curation import Hierarchy, Level, load, save


def level(rng, members, clusters, width=3):
    labels = rng.integers(0, clusters, members)
    distances = rng.random(members).astype(np.float32)
    return Level.from_assignment(rng.normal(size=(clusters, width)), labels, distances)


@pytest.fixture
def hierarchy():
    rng = np.random.default_rng(0)
    return Hierarchy([level(rng, 200, 30), level(rng, 30, 8), level(rng, 8, 3)], {"seed": 0})


def test_members_are_sorted_by_distance_and_ties_by_index():
    labels = np.array([1, 0, 1, 1, 0])
    distances = np.array([2.0, 5.0, 1.0, 2.0, 5.0], np.float32)
    found = Level.from_assignment(np.zeros((3, 2)), labels, distances)
    assert found.members(0).tolist() == [1, 4]
    assert found.members(1).tolist() == [2, 0, 3]
    assert found.members(2).tolist() == []
    np.testing.assert_array_equal(found.sizes, [2, 3, 0])
    np.testing.assert_array_equal(found.labels(), labels)
    np.testing.assert_array_equal(found.distances, [5, 5, 1, 2, 2])


def test_points_under_clusters(hierarchy):
    labels = hierarchy.levels[0].labels()
    for number, above in enumerate(hierarchy.levels, 1):
        if number > 1:
            labels = above.labels()[labels]
        np.testing.assert_array_equal(hierarchy.point_labels(number), labels)
        counts = np.bincount(labels, minlength=above.num_clusters)
        np.testing.assert_array_equal(hierarchy.point_counts()[number - 1], counts)
        flat = hierarchy.flattened(number)
        flat.check()
        np.testing.assert_array_equal(flat.labels(), labels)
    with pytest.raises(UserError, match="levels count from 1"):
        hierarchy.point_labels(0)


def test_flattened_members_follow_the_tree():
    low = Level.from_assignment(np.zeros((3, 1)), np.array([0, 1, 1, 2]), np.array([0, 2, 1, 0.0]))
    high = Level.from_assignment(np.zeros((1, 1)), np.array([0, 0, 0]), np.array([2, 0, 1.0]))
    assert Hierarchy([low, high]).flattened(2).members(0).tolist() == [2, 1, 3, 0]


def test_round_trip(hierarchy, tmp_path):
    save(hierarchy, tmp_path / "a")
    found = load(tmp_path / "a")
    assert found.settings == {"seed": 0}
    assert found.num_clusters == (30, 8, 3)
    for mine, theirs in zip(hierarchy.levels, found.levels, strict=True):
        for name in ("centroids", "indptr", "indices", "distances"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
            assert getattr(mine, name).dtype == getattr(theirs, name).dtype
    assert isinstance(found.levels[0].indices.base, np.memmap)
    sizes = np.load(tmp_path / "a" / "level1" / "sizes.npy")
    np.testing.assert_array_equal(sizes, hierarchy.levels[0].sizes)
    assert not (tmp_path / "a" / ".unfinished").exists()


def test_unknown_arrays_are_left_out(tmp_path):
    bare = Level(None, np.array([0, 2]), np.array([1, 0]))
    save(Hierarchy([bare]), tmp_path)
    found = load(tmp_path).levels[0]
    assert found.centroids is None
    assert found.distances is None
    assert found.indices.tolist() == [1, 0]


def test_empty_level(tmp_path):
    save(Hierarchy([Level(None, np.zeros(1, np.int64), np.zeros(0, np.int32))]), tmp_path)
    assert load(tmp_path).num_points == 0


def test_nothing_is_written_over(hierarchy, tmp_path):
    save(hierarchy, tmp_path)
    with pytest.raises(UserError, match="holds clusters already"):
        save(hierarchy, tmp_path)
    (tmp_path / "other" / "level2").mkdir(parents=True)
    with pytest.raises(UserError, match="level2 is there"):
        save(hierarchy, tmp_path / "other")
    assert (tmp_path / "other" / "level2").exists()


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_killed_while_saving_leaves_nothing_that_loads(hierarchy, tmp_path, monkeypatch, renames):
    """Whatever was moved into place, no manifest stands there, and saving again works."""
    rename, done = os.rename, []

    def killed(*paths):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(paths)
        rename(*paths)

    monkeypatch.setattr(os, "rename", killed)
    monkeypatch.setattr("curation.hierarchy_files.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        save(hierarchy, tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="holds no clusters"):
        load(tmp_path)
    save(hierarchy, tmp_path)
    assert load(tmp_path).num_clusters == (30, 8, 3)


def test_disk_full(hierarchy, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save(hierarchy, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "level1" / "indices.npy", 200),
        lambda folder: (folder / "level2" / "indptr.npy").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text('{"format": "tenfold-hierarchy-1"}'),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: _flip(folder / "level1" / "distances.npy"),
        lambda folder: shutil.rmtree(folder / "level3"),
    ],
)
def test_damage_is_found(hierarchy, tmp_path, damage):
    save(hierarchy, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError):
        load(tmp_path)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_hostile_folder(hierarchy, tmp_path):
    """Arrays that are consistent with the manifest but no partition, and names that lead out."""
    bad = Level(None, np.array([0, 2]), np.array([1, 1]))
    save(Hierarchy([bad]), tmp_path / "twice")
    with pytest.raises(UserError, match="in no cluster"):
        load(tmp_path / "twice")
    far = Level(None, np.array([0, 2]), np.array([0, 1 << 40]))
    save(Hierarchy([far]), tmp_path / "far")
    with pytest.raises(UserError, match="must lie in"):
        load(tmp_path / "far")
    save(hierarchy, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["files"]["../twice/manifest.json"] = [1, 1]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside"):
        load(tmp_path / "out")


def test_levels_that_do_not_fit():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="groups 9 clusters, but level 1 has 8"):
        Hierarchy([level(rng, 50, 8), level(rng, 9, 2)])
    with pytest.raises(UserError, match="labels must lie"):
        Level.from_assignment(np.zeros((2, 1)), np.array([0, 2]), np.zeros(2))
    with pytest.raises(UserError, match="indptr"):
        Level(None, np.zeros(2), np.zeros(2, np.int64))
