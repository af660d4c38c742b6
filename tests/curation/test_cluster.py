"""`python -m curation.cluster`: the command, killed and taken up again, and in two processes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from process_group import QUICK_COMPILATION, ROOT, ProcessGroup

import curation
from curation import cluster

CONFIG = """
n_levels: 2
n_iters: 4
n_clusters: [12, 5]
n_splits: [3, 1]
n_resampling_steps: [1, 2]
sample_size: [1, 3]
sampling_strategy: c
"""


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    rng = np.random.default_rng(0)
    centres = 4 * rng.normal(size=(20, 6))
    x = centres[rng.integers(0, 20, 3000)] + rng.normal(size=(3000, 6))
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, x.astype(np.float32))
    return path


def arguments(embeddings, output, *more):
    return [
        f"--embeddings={embeddings}",
        f"--output={output}",
        "--clusters=40,8",
        "--resampling_steps=1,2",
        "--sample_sizes=9,2",
        "--iterations=5",
        "--seed=3",
        *more,
    ]


@pytest.fixture(scope="module")
def reference(embeddings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    cluster.main(arguments(embeddings, folder))
    return folder


def same(have, want):
    have, want = curation.load(have), curation.load(want)
    for a, b in zip(have.levels, want.levels, strict=True):
        np.testing.assert_array_equal(a.centroids, b.centroids)
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_array_equal(a.indptr, b.indptr)


@pytest.mark.smoke
def test_smoke_cluster(embeddings, reference, capsys):
    found = curation.load(reference)
    want = curation.hierarchical_kmeans(
        embeddings, (40, 8), (1, 2), seed=3, sample_sizes=(9, 2), iterations=5
    )
    assert found.num_clusters == (40, 8)
    np.testing.assert_array_equal(found.levels[0].centroids, want.levels[0].centroids)
    np.testing.assert_array_equal(found.levels[1].indices, want.levels[1].indices)
    assert found.settings["seed"] == 3
    assert sorted(path.name for path in reference.iterdir()) == [
        "level1",
        "level2",
        "manifest.json",
        "report",
    ]
    report = (reference / "report" / "README.md").read_text()
    assert "3000 rows in" in report
    assert all(column in report for column in ("members", "empty", "inertia"))
    assert len(curation.balanced_sample(found, 400)) == 400
    with pytest.raises(SystemExit) as ended:
        cluster.main(arguments(embeddings, reference))
    assert ended.value.code == 2
    assert "holds clusters already" in capsys.readouterr().err


def test_the_reference_configuration_and_a_subset(embeddings, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    np.save(tmp_path / "subset.npy", np.arange(0, 3000, 2))
    cluster.main(
        [
            f"--embeddings={embeddings}",
            f"--output={tmp_path / 'out'}",
            f"--reference_config={tmp_path / 'config.yaml'}",
            f"--subset={tmp_path / 'subset.npy'}",
        ]
    )
    found = curation.load(tmp_path / "out")
    assert found.num_points == 1500
    assert found.num_clusters == (36, 5)
    assert found.levels[0].sizes.min() > 0
    x, lowest = np.load(embeddings)[::2], found.levels[0]
    for number in range(36):
        members = lowest.members(number)
        apart = np.square(x[members] - lowest.centroids[number]).sum(axis=1)
        np.testing.assert_allclose(np.sort(apart), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clusters=40,forty"], "whole numbers"),
        (["--clusters=8,40"], "fewer clusters"),
        (["--clusters=4000,8"], "has 3000"),
        (["--memory=0"], "--memory must be positive"),
        (["--init=best"], "init"),
        (["--embeddings=/nowhere.npy"], "No such file"),
        (["--subset=/nowhere.npy"], "No such file"),
    ],
)
def test_mistakes_are_named(embeddings, tmp_path, more, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cluster.main(arguments(embeddings, tmp_path / "out", *more))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_killed_and_taken_up_again(embeddings, reference, tmp_path):
    command = [sys.executable, "-m", "curation.cluster"]
    command += arguments(embeddings, tmp_path / "out", "--checkpoint_seconds=0")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK_COMPILATION}
    states = tmp_path / "out" / cluster.CHECKPOINTS
    for state in ("level1_step0/lloyd.npz", "level2_step1/seeds.npz"):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while not (states / state).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out" / "manifest.json").exists()
    assert (states / "level1.npz").exists()
    cluster.main(arguments(embeddings, tmp_path / "out", "--checkpoint_seconds=0"))
    same(tmp_path / "out", reference)
    assert not states.exists()


def test_two_processes_of_four_devices(embeddings, reference, tmp_path):
    # Little memory, so that each process reads its own rows of every chunk.
    more = ["--memory=1e-9", "--checkpoint_seconds=0"]
    with ProcessGroup(
        ["-m", "curation.cluster", *arguments(embeddings, tmp_path / "out", *more)],
        tmp_path / "processes",
    ) as processes:
        assert processes.ended() == [0, 0], str(processes)
    same(tmp_path / "out", reference)
