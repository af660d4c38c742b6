"""The experiments' own parts, and the launcher from flags to report at a tiny size."""

import json
from pathlib import Path

import numpy as np
import pytest

import dino.evaluate
import dino.presets
from common.errors import UserError
from common.launch import config as configs
from curation.experiments import claims, density, documents, features, pictures, plane, report
from curation.experiments.concepts import long_tailed
from curation.experiments.config import (
    PRESETS,
    ConceptsConfig,
    DocumentsConfig,
    FeaturesConfig,
    PicturesConfig,
)
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


FEATURES = FeaturesConfig(
    seeds=(0, 1), largest=40, smallest=5, size=60, known=4, held_out=3, clusters=(40, 20), steps=20
)


def fake_dino(calls):
    """Stands for the commands: notes them, and scores a run by how even its images are."""

    def command(arguments):
        calls.append(list(arguments))
        flags = dict(a.removeprefix("--").split("=", 1) for a in arguments[1:] if "--set" not in a)
        if arguments[0] == "dino.train":
            Path(flags["workdir"]).mkdir(parents=True, exist_ok=True)
            return
        folder = Path(flags["output"])
        folder.mkdir()
        model = {"knn": {"best_k": 10, "k=10": 0.5}, "logistic": {"accuracy": 0.6, "strength": 1}}
        if "random" not in str(folder):
            model["knn"]["k=10"] = 0.7
        scores = {task: {"model": found} for task, found in model.items()}
        (folder / "scores.json").write_text(json.dumps({"scores": scores, "damaged": []}))

    return command


def test_dino_learns_from_samples_of_equal_size(tmp_path):
    calls = []
    found = features.measure_features(FEATURES, tmp_path, fake_dino(calls))
    assert [call[0] for call in calls] == ["dino.train", "dino.evaluate"] * 4
    known, test = (np.load(tmp_path / "seed1" / f"{name}.npz") for name in ("known", "test"))
    assert np.bincount(known["labels"]).tolist() == [4] * 10
    assert np.bincount(test["labels"]).tolist() == [3] * 10
    for name in ("random_sample", "two_levels"):
        images = np.load(tmp_path / "seed1" / f"{name}.npz")["images"]
        assert (images.shape, images.dtype) == ((60, 28, 28, 3), np.uint8)
    curated, random = features.CURATED, features.RANDOM
    assert found["divergence"][curated] < found["divergence"][random]
    assert found["accuracy"]["knn"] == {random: 0.5, curated: 0.7}
    assert found["each"]["logistic"][curated] == [0.6, 0.6]
    holds = {e.name: e.holds({"features": found}) for e in claims.OF_FEATURES}
    assert holds["features_knn"]
    assert not holds["features_logistic"]
    assert len(report._features(found).rows) == 2


def test_commands_are_those_of_dino(tmp_path):
    """Its launchers take every flag: the settings are fields of its configuration."""
    np.savez(tmp_path / "x.npz", images=np.zeros((9, 28, 28, 3), np.uint8))
    arguments = features.training(FEATURES, tmp_path / "x.npz", tmp_path / "run", 3)
    changes = [a.removeprefix("--set=") for a in arguments if a.startswith("--set=")]
    made = configs.apply_overrides(dino.presets.smoke(), changes)
    assert made.seed == 3
    assert made.train.steps == 20
    assert made.model.backbone.image_size == made.data.crops.global_size == 28
    names = [
        a.removeprefix("--").partition("=")[0]
        for a in features.evaluation(tmp_path / "run", tmp_path)
    ]
    assert all(name in dino.evaluate.OPTIONS for name in names[1:])


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"dino.evaluate failed: .*checkpoint"):
        features.run(["dino.evaluate", "--task=knn", f"--output={tmp_path}"])


def test_features_need_enough_images():
    with pytest.raises(UserError, match=r"class . has 9 images, and 40"):
        features.split(np.arange(90) % 10, FEATURES, 0)


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
