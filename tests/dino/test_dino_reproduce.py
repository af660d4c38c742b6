"""`dino.reproduce` end to end in miniature, and the parts that decide what it says."""

import copy
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.sharding import use_mesh
from dino.experiments import claims, collapse, distilled, patches, resolution
from dino.experiments.bench import MAIN, PIXELS, RANDOM, WeightedLosses
from dino.experiments.config import PRESETS, smoke
from dino.experiments.sets import PixelClasses, drawn_set
from dino.presets import mask_group
from dino.reproduce import main
from dino.task import Pretraining

OVERRIDES = [
    "run.data.images.kind=shapes",
    "run.data.images.drawn_count=120",
    "run.model.backbone.width=16",
    "run.model.backbone.num_layers=1",
    "run.model.backbone.num_heads=2",
    "run.train.steps=2",
    "run.train.batch_size=8",
    "run.train.checkpoint_every=1",
    "run.train.log_every=1",
    "resolution.steps=1",
    "resolution.batch_size=8",
    # As large as the teacher: what is compiled for one serves both.
    "student.width=16",
    "student.num_layers=1",
    "scores.train_images=40",
    "scores.test_images=16",
    "scores.dense_images=8,8",
    "scores.neighbours=3",
    "scores.shown=2",
]


@pytest.mark.smoke
def test_reproduce(tmp_path, capsys, monkeypatch):
    # Eight virtual devices on the same cores would only compile longer.
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    folder = tmp_path / "run"
    arguments = [
        "--config=smoke",
        f"--workdir={folder}",
        *(f"--set={override}" for override in OVERRIDES),
    ]
    main(arguments)
    first = capsys.readouterr().out
    text = (folder / "report" / "results.json").read_text()
    document = json.loads(text)
    assert set(document) == {"claim", "setting", "expected", "measured", "holds"}
    assert document["holds"] == {e.name: e.holds(document["measured"]) for e in claims.EXPECTATIONS}
    assert "Smaller than in the paper" in document["setting"]
    for name, held in document["holds"].items():
        assert re.search(rf"^{'holds' if held else 'FAILS'}  {name}: ", first, re.MULTILINE)
    page = (folder / "report" / "README.md").read_text()
    pictures = re.findall(r"\((\w+\.png)\)", page)
    assert sorted(pictures) == ["centring.png", "knn.png", "koleo.png", "patches.png"]
    assert all((folder / "report" / picture).stat().st_size > 1_000 for picture in pictures)
    assert document["measured"]["pretraining"]["curve"]["images"] == [8, 16]

    # An experiment and one of its scores are lost; no training is. All else is taken as it is.
    (folder / "measurements" / "koleo.json").unlink()
    (folder / "measurements" / "model-koleo-none.json").unlink()
    main(arguments)
    second = capsys.readouterr().out
    assert "compiled the training step" not in second
    assert second.count("finished before") == 1
    assert json.loads((folder / "report" / "results.json").read_text()) == document


def measurements() -> dict:
    """Measurements in which all that the paper claims comes out."""
    untrained = {"knn": 0.3, "linear": 0.3}
    return {
        "pretraining": {
            "scores": {
                MAIN: {"knn": 0.6, "linear": 0.7},
                PIXELS: untrained,
                RANDOM: {"knn": 0.2, "linear": 0.25},
            }
        },
        "collapse": {
            "usage": {collapse.SINKHORN: 4.0, collapse.MOVING: 3.9, collapse.NONE: 0.1},
            "knn": {collapse.SINKHORN: 0.6, collapse.MOVING: 0.5, collapse.NONE: 0.2},
            "uniform": 4.1,
            "random": 0.2,
        },
        "koleo": {
            "nearest": [0.1, 0.4, 0.6],
            "effective_rank": [3.0, 9.0, 20.0],
            "precision@1": [0.5, 0.55, 0.5],
            "linear": [0.69, 0.7, 0.6],
        },
        "patches": {
            "patches": {patches.WITH: 0.4, patches.WITHOUT: 0.35},
            "knn": {patches.WITH: 0.6, patches.WITHOUT: 0.61},
        },
        "resolution": {
            "patches": {resolution.BEFORE: 0.4, resolution.AFTER: 0.45},
            "knn": {resolution.BEFORE: 0.5, resolution.AFTER: 0.5},
        },
        "distillation": {"knn": {distilled.DISTILLED: 0.5, distilled.SCRATCH: 0.4}},
    }


def held(measured: dict) -> dict[str, bool]:
    return {e.name: e.holds(measured) for e in claims.EXPECTATIONS}


def test_all_outcomes_can_come_out():
    assert all(held(measurements()).values())


@pytest.mark.parametrize(
    ("path", "value", "failing"),
    [
        (("pretraining", "scores", PIXELS, "knn"), 0.56, {"pixels_do_not_solve_it", "beats_pixels",
                                                         "centring_learns"}),
        (("pretraining", "scores", RANDOM, "knn"), 0.56, {"beats_random_weights"}),
        (("pretraining", "scores", MAIN, "linear"), 0.32, {"linear_beats_pixels"}),
        (("pretraining", "scores", RANDOM, "linear"), 0.66, {"linear_beats_random_weights"}),
        (("collapse", "usage", collapse.MOVING), 3.0, {"centring_uses_prototypes"}),
        (("collapse", "knn", collapse.MOVING), 0.25, {"centring_learns"}),
        (("collapse", "usage", collapse.NONE), 1.0, {"no_centring_collapses"}),
        (("collapse", "knn", collapse.NONE), 0.4, {"no_centring_learns_nothing"}),
        (("koleo", "nearest"), [0.4, 0.4, 0.6], {"koleo_spreads"}),
        (("koleo", "effective_rank"), [9.5, 9.0, 20.0], {"koleo_raises_rank"}),
        (("koleo", "precision@1"), [0.6, 0.55, 0.5], {"koleo_retrieves"}),
        (("koleo", "linear"), [0.75, 0.7, 0.6], {"koleo_classifies_alike"}),
        (("patches", "patches", patches.WITHOUT), 0.39, {"patches_improve"}),
        (("patches", "knn", patches.WITHOUT), 0.65, {"patches_keep_images"}),
        (("resolution", "patches", resolution.AFTER), 0.4, {"finish_improves_patches"}),
        (("resolution", "knn", resolution.AFTER), 0.48, {"finish_keeps_images"}),
        (("distillation", "knn", distilled.DISTILLED), 0.39, {"distilled_beats_scratch"}),
    ],
)  # fmt: skip
def test_each_outcome_follows_from_its_measurement(path, value, failing):
    found = copy.deepcopy(measurements())
    place = found
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert {name for name, came in held(found).items() if not came} == failing


def test_pixels_have_the_class_of_their_object():
    config = dataclasses.replace(
        smoke().run.data.images, kind="shapes", drawn_size=16, drawn_count=60
    )
    train, test = (drawn_set(config, split) for split in ("train", "heldout"))
    assert len(train.labels) + len(test.labels) == 60
    dense = PixelClasses(train.first(5))
    assert len(dense) == 5
    image, classes = dense[2]
    np.testing.assert_array_equal(image, train.images[2])
    assert set(np.unique(classes)) == {0, train.labels[2] + 1}
    np.testing.assert_array_equal(classes > 0, train.covered[2])


def test_weights_that_are_data_are_the_same_loss():
    """What arms share a program by is the loss of the task they stand for."""
    config = PRESETS["smoke"]().run
    objective = dataclasses.replace(config.objective, ibot_weight=0.3, koleo_weight=0.7)
    arguments = (config.model, objective, 10, mask_group(config))
    images, side, local = 4, 32, 16
    rng = np.random.default_rng(0)
    batch = {
        "global_crops": jnp.asarray(rng.integers(0, 255, (images, 2, side, side, 3)), jnp.uint8),
        "local_crops": jnp.asarray(rng.integers(0, 255, (images, 2, local, local, 3)), jnp.uint8),
        "masks": jnp.zeros((images, 2, 16), bool).at[0, 0, :2].set(True),
        "masked_indices": jnp.zeros((images, 2), jnp.int32).at[0].set(jnp.array([0, 1])),
        "masked_weights": jnp.zeros((images, 2), jnp.float32).at[0].set(0.5),
    }
    totals = []
    for kind in (Pretraining, WeightedLosses):
        task = kind(*arguments[:3], images)
        model = task.build(nnx.Rngs(0))
        mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
        with use_mesh(mesh, task.rules):
            totals.append(float(task.loss(model, batch, jax.random.key(0)).total))
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.data.images.split=all", "must be train"),
        ("run.data.images.kind=folder", "must be one of"),
        ("koleo=0.0,0.05", "koleo must be 0 and a weight above"),
        ("run.objective.centring=none", "must be Sinkhorn-Knopp's"),
        ("resolution.size=32", "resolution.size must be above"),
        ("scores.neighbours=0", "neighbours"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        main(["--config=smoke", f"--workdir={tmp_path / 'run'}", f"--set={change}"])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
