"""`python -m dino.evaluate`: every task on a tiny backbone, stored features, mistakes."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dino
from common.data.image_sets import Shapes
from dino import evaluate
from dino.config import BackboneConfig, smoke_model

MEASURED = ("mAP", "precision@1", "precision@5", "precision@10")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A backbone with random weights that see the whole image."""
    vit = dataclasses.replace(smoke_model(), num_layers=4, layer_scale=1.0)
    path = tmp_path_factory.mktemp("model") / "model"
    dino.save(dino.Backbone(BackboneConfig(vit), rngs=nnx.Rngs(0)), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two classes that differ in brightness, as folders: train and test."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for name, level in (("bright", 200), ("dark", 60)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = np.clip(rng.normal(level, 10, (18, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(root / part / name / f"{i}.png")
    return root


def scores_of(output, *arguments):
    evaluate.main([*arguments, f"--output={output}"])
    assert (output / "README.md").is_file()
    return json.loads((output / "scores.json").read_text())


def test_smoke_of_images(checkpoint, folders, tmp_path, capsys):
    found = scores_of(
        tmp_path,
        f"--checkpoint={checkpoint}",
        "--task=knn,logistic,retrieval,linear",
        f"--train={folders}/train",
        f"--test={folders}/test",
        "--baselines=pixels,random",
        "--ks=1,5,200",
        "--strengths=0.1,1",
        "--steps=30",
        "--head_batch=16",
        "--learning_rates=0.1,1",
        "--noaugment",
    )
    assert not found["damaged"]
    scores = found["scores"]
    assert set(scores) == {"knn", "logistic", "retrieval", "linear"}
    for task in scores.values():
        assert set(task) == {"model", "random trunk", "pixels"}
    assert set(scores["knn"]["model"]) == {"best_k", "k=1", "k=5"}
    # Brightness is easy, for pixels too.
    assert scores["knn"]["pixels"]["k=5"] == 1.0
    assert scores["logistic"]["model"]["accuracy"] >= 0.9
    assert set(scores["retrieval"]["model"]) == set(MEASURED)
    assert len(scores["linear"]["model"]["heads"]) == 8
    assert (tmp_path / "knn.png").is_file()
    assert "knn, pixels: best_k" in capsys.readouterr().out


def test_linear_heads_on_augmented_images_and_several_test_sets(checkpoint, folders, tmp_path):
    found = scores_of(
        tmp_path,
        f"--checkpoint={checkpoint}",
        "--task=linear",
        f"--train={folders}/train",
        f"--test={folders}/test,{folders}/train",
        "--steps=20",
        "--head_batch=16",
        "--learning_rates=0.1",
    )
    scores = found["scores"]["linear"]["model"]
    assert {f"{folders}/test", f"{folders}/train", "best", "heads"} == set(scores)
    assert scores[f"{folders}/test"] == max(scores["heads"].values()) >= 0.8


def test_smoke_of_segmentation(checkpoint, tmp_path):
    found = scores_of(
        tmp_path,
        f"--checkpoint={checkpoint}",
        "--task=segmentation",
        "--train=shapes:train",
        "--test=shapes:heldout",
        "--baselines=pixels",
        "--steps=3",
        "--head_batch=8",
        "--layers=4",
        "--max_images=20",
    )
    scores = found["scores"]["segmentation"]
    assert set(scores) == {"model", "pixels"}
    assert len(scores["model"]["IoU"]) == 9
    assert 0 < scores["model"]["mIoU"] < 1


def test_depth_of_folders(checkpoint, tmp_path):
    images, maps = tmp_path / "images", tmp_path / "maps"
    images.mkdir()
    maps.mkdir()
    source = Shapes(24, 4)
    for i in range(4):
        image, covered = source.draw(i)
        Image.fromarray(image).save(images / f"{i}.png")
        np.save(maps / f"{i}.npy", np.where(covered, 1.0, 3.0))
    found = scores_of(
        tmp_path / "report",
        f"--checkpoint={checkpoint}",
        "--task=depth",
        f"--train={images}",
        f"--train_maps={maps}",
        f"--test={images}",
        f"--test_maps={maps}",
        "--baselines=pixels",
        "--crop=16",
        "--steps=6",
        "--head_batch=8",
    )
    scores = found["scores"]["depth"]["model"]
    assert set(scores) == {"rmse", "abs_rel", "log10", "silog", "delta1"}
    assert 0 < scores["rmse"] < 9


def test_damaged_images_are_left_out_and_named(checkpoint, folders, tmp_path):
    root = tmp_path / "test" / "dark"
    root.mkdir(parents=True)
    (root / "0.png").write_bytes((folders / "test" / "dark" / "0.png").read_bytes())
    (root / "broken.png").write_bytes(b"no image")
    arguments = [
        f"--checkpoint={checkpoint}", f"--train={folders}/train", f"--test={tmp_path}/test",
        "--ks=1",
    ]  # fmt: skip
    found = scores_of(tmp_path / "report", *arguments, "--error_budget=1")
    assert len(found["damaged"]) == 1
    assert "broken.png" in found["damaged"][0]
    assert "broken.png" in (tmp_path / "report" / "README.md").read_text()
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*arguments, "--error_budget=0", f"--output={tmp_path}/again"])
    assert stop.value.code == 2


def test_stored_features(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    features = (labels[:, None] * 4 + rng.normal(size=(40, 5))).astype(np.float32)
    arguments = []
    for name, array in (
        ("train_features", features[::2]),
        ("train_labels", labels[::2]),
        ("test_features", features[1::2]),
        ("test_labels", labels[1::2]),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        arguments.append(f"--{name}={tmp_path}/{name}.npy")
    found = scores_of(
        tmp_path / "report",
        *arguments,
        "--task=knn,logistic,retrieval,linear",
        "--ks=3",
        "--strengths=1",
        "--steps=40",
        "--head_batch=20",
        "--metric=mean_per_class",
    )
    scores = found["scores"]
    assert scores["logistic"]["features"]["mean_per_class"] >= 0.9
    assert scores["linear"]["features"]["test"] >= 0.8
    assert scores["knn"]["features"]["k=3"] >= 0.8


def test_ground_truth_of_file_names(checkpoint, folders, tmp_path):
    truth = tmp_path / "truth.json"
    entries = [
        {"query": f"{name}/{i}.png", "easy": [f"{name}/0.png", f"{name}/1.png"]}
        for name in ("bright", "dark")
        for i in range(6)
    ]
    truth.write_text(json.dumps(entries))
    arguments = [
        f"--checkpoint={checkpoint}", "--task=retrieval", f"--train={folders}/train",
        f"--test={folders}/test", f"--ground_truth={truth}",
    ]  # fmt: skip
    with pytest.raises(SystemExit):  # Nothing is hard.
        evaluate.main([*arguments, f"--output={tmp_path}/report"])
    for entry in entries:
        entry["hard"] = [entry["query"].replace(".png", "") + ".png"]
    truth.write_text(json.dumps(entries))
    scores = scores_of(tmp_path / "report", *arguments)["scores"]["retrieval"]["model"]
    assert 0 < scores["hard mAP"] <= 1
    assert 0 < scores["medium mAP"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=nn"], "--task=nn is none of"),
        ([], "--checkpoint is missing"),
        (["--checkpoint=x", "--train=y"], "--test is missing"),
        (["--checkpoint=nowhere", "--train=shapes", "--test=shapes"], "no checkpoint at nowhere"),
        (["--train_features=x.npy"], "--train_features needs --test_features too"),
        (["--train_features=x", "--test_features=y", "--task=depth"], "needs images"),
        (["--train_features=no.npy", "--test_features=no.npy"], "no whole .npy file"),
        (["--ks=a", "--checkpoint=MODEL", "--train=shapes", "--test=shapes"], "takes numbers"),
        (["--crop=15", "--checkpoint=MODEL", "--train=shapes", "--test=shapes"], "not whole patch"),
        (["--checkpoint=MODEL", "--train=nowhere", "--test=shapes"], "a folder was expected"),
        (["--checkpoint=MODEL", "--train=a", "--test=a", "--baselines=pixel"], "neither pixels"),
        (["--temperature=0"], "above 0"),
        (["--layers=3"], "1 or 4"),
    ],
)
def test_mistakes_are_one_line(checkpoint, arguments, message, capsys, tmp_path):
    given = [text.replace("MODEL", str(checkpoint)) for text in arguments]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*given, f"--output={tmp_path}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())
