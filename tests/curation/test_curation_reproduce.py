"""The experiments' own parts, and the launcher from flags to report at a tiny size."""

import json

import numpy as np
import pytest

from curation.experiments import claims, density, documents, pictures, plane
from curation.experiments.concepts import long_tailed
from curation.experiments.config import PRESETS, ConceptsConfig, DocumentsConfig, PicturesConfig
from curation.reproduce import main


def test_divergence_is_that_of_a_kernel_estimate():
    """Beside the definition, point by point of a coarse part of the grid."""
    points = np.random.default_rng(0).normal(size=(7, 2))
    grid = np.arange(-3, 3, 0.02)
    apart = (grid[::50, None, None] - points[:, 0]) ** 2 + (
        grid[None, ::50, None] - points[:, 1]
    ) ** 2
    expected = np.exp(-apart / (2 * 0.5**2)).sum(axis=-1)
    x, y = (np.exp(-((grid[:, None] - p) ** 2) / 0.5) for p in points.T)
    np.testing.assert_allclose((x @ y.T)[::50, ::50], expected, rtol=1e-9)
    whole = x @ y.T
    shares = whole / whole.sum()
    kl = np.sum(shares * np.log(shares * shares.size))
    assert plane.divergence(points) == pytest.approx(kl, rel=1e-6)
    lattice = np.stack(np.meshgrid(*[np.linspace(-4, 4, 60)] * 2), -1).reshape(-1, 2)
    assert plane.divergence(lattice) < 1e-3


def test_the_simulated_distribution():
    """Its divergence is the published one within what other seeds give."""
    points = plane.simulated(np.random.RandomState(0))
    assert points.shape == (9000, 2)
    assert 0.92 < plane.divergence(points) < 0.97
    assert np.abs(points[8500:]).max() <= 3


def test_boxes_and_their_ratio():
    x = density.boxes(3, 400, 20, seed=0)
    assert x.shape == (420, 3)
    assert density.ratio(x) == 20
    assert np.ptp(x[:400], axis=0).max() < 1


def test_concepts_follow_zipf():
    x, labels = long_tailed(ConceptsConfig(), 0)
    sizes = np.bincount(labels)
    assert len(x) == len(labels) == sizes.sum()
    assert (sizes[0], sizes[1], sizes[-1]) == (2223, 1111, 44)


def test_split_is_long_tailed_and_apart():
    labels = np.arange(2000) % 10
    config = PicturesConfig()
    pool, test = pictures.split(labels, config, 0)
    assert not set(pool) & set(test)
    assert np.bincount(labels[test]).tolist() == [50] * 10
    assert sorted(np.bincount(labels[pool]).tolist(), reverse=True)[:3] == [120, 78, 51]
    assert np.bincount(labels[pool]).min() == 3


def test_classifier_separates_what_is_separate():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    x = np.eye(3)[labels] * 4 + 0.1 * rng.normal(size=(60, 3))
    np.testing.assert_array_equal(pictures.classify(x[:30], labels[:30], x[30:], 3), labels[30:])


def test_cut_out_is_the_object_in_its_proportions():
    mask = np.zeros((20, 20), bool)
    mask[3:11, 5:9] = True
    found = pictures.cut_out(mask).reshape(8, 8)
    assert found[:, 2:6].min() == 1
    assert found[:, :2].max() == found[:, 6:].max() == 0


def test_pieces_of_the_library_and_their_vectors():
    config = DocumentsConfig(packages=3, largest=30, smallest=9)
    texts, labels, packages = documents.pieces(config)
    assert len(texts) == len(labels)
    assert len(packages) == 3
    sizes = np.bincount(labels)
    assert np.all(np.diff(sizes) <= 0)
    pool = documents.long_tail(labels, config, 0)
    assert np.sort(np.bincount(labels[pool])).tolist() == [13, 20, 30]
    x = documents.vectors([*texts[:40], texts[0]], 8)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(x[0], x[-1], atol=1e-6)


def test_expectations_are_decided_by_measurements():
    assert claims.falls([3, 2, 1])
    assert not claims.falls([3, 1, 1])
    values = {"data": 1.0, **{name: sum(band) / 2 for name, band in claims.BANDS.items()}}
    found = {"plane": {"divergence": values, "uniform_deviation": 0.01}}
    bands = next(e for e in claims.EXPECTATIONS if e.name == "plane_bands")
    assert bands.holds(found)
    values["two levels"] = 0.2
    assert not bands.holds(found)


def test_presets_build():
    for preset in PRESETS.values():
        assert preset().plane.seeds


def test_reproduce_smoke(tmp_path, capsys):
    """Every experiment, shrunk; measured once, and reported with what did not come out."""
    shrunk = {
        "plane.iterations": 2, "plane.resamplings": 1, "plane.uniform_draws": 2,
        "density.dimensions": "2", "density.large": 3000, "density.small": 100,
        "density.clusters": "40,10", "density.iterations": "3,3",
        "concepts.seeds": "0", "concepts.points": 1700, "concepts.size": 200,
        "pictures.seeds": "0", "pictures.kind": "letters", "pictures.largest": 60,
        "pictures.held_out": 10, "documents.seeds": "0", "documents.packages": 3,
        "documents.largest": 60, "documents.clusters": "40,6",
    }  # fmt: skip
    command = ["--config=smoke", f"--workdir={tmp_path}/run"]
    for name, value in shrunk.items():
        command.append(f"--set={name}={value}")
    main(command)
    out = capsys.readouterr().out
    assert "expected outcomes came out" in out
    report = tmp_path / "run" / "report"
    found = json.loads((report / "results.json").read_text())
    assert set(found) == {"claim", "setting", "expected", "measured", "holds"}
    assert set(found["holds"]) == {e.name for e in claims.EXPECTATIONS}
    assert found["holds"]["plane_order"]
    for name in ("plane", "exponent", "concepts", "pictures", "documents"):
        assert (report / f"{name}.png").stat().st_size > 5000
    main(command)
    assert "measured before" in capsys.readouterr().out
