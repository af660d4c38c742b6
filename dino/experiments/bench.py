"""The trainings of the experiments, each done once, and the scores of what they made."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.checkpoint.store import CheckpointStore, load_params
from common.data.image_sources import HealthyImages
from common.launch.experiments import Stopped, measured
from common.train import Batch, Loss, TrainResult, read_metrics
from dino.checkpoint import load
from dino.config import BackboneConfig
from dino.evaluation.features import FeatureModel, Pixels
from dino.experiments.config import ReproduceConfig
from dino.experiments.scoring import Scorer
from dino.experiments.sets import drawn_set
from dino.model import Backbone
from dino.networks import Pair
from dino.presets import Config, mask_group
from dino.task import Pretraining
from dino.train import train

MAIN, PIXELS, RANDOM = "main", "pixels", "random"


class Weights(nnx.Variable):
    """Weights of the losses."""


class WeightedLosses(Pretraining):
    """Pretraining whose losses' weights are data: arms that differ in them share a program."""

    def build(self, rngs: nnx.Rngs) -> Pair:
        pair = super().build(rngs)
        own = self.objective
        weights = (own.dino_weight, own.ibot_weight, own.koleo_weight)
        pair.weights = Weights(jnp.array(weights, jnp.float32))
        return pair

    def loss(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        found = super().loss(model, batch, key)
        parts, weights = found.metrics, model.weights[...]
        dino = parts["dino_global"] + parts["dino_local"]
        total = weights[0] * dino + weights[1] * parts["ibot"] + weights[2] * parts["koleo"]
        return dataclasses.replace(found, total=total)


class Bench:
    """Where the models of all experiments are made and measured.

    Args:
      config: of the experiments.
      folder: keeps trainings and measurements.
      resume_command: printed when a signal stops a training.
    """

    def __init__(self, config: ReproduceConfig, folder: Path, resume_command: str | None = None):
        self.config, self.folder = config, folder
        self.resume_command = resume_command

    # Images.

    @functools.cached_property
    def images(self) -> HealthyImages:
        """What all trainings but the finish are done on."""
        return HealthyImages(drawn_set(self.config.run.data.images, "train").images)

    @functools.cached_property
    def large_images(self) -> HealthyImages:
        """The same images, drawn larger; as many as the finish can see."""
        finish = self.config.finish
        most = finish.train.steps * finish.train.batch_size
        return HealthyImages(drawn_set(finish.data.images, "train", most).images)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Measures at the size of the trainings."""
        return self._scorer(self.config.run)

    @functools.cached_property
    def large_scorer(self) -> Scorer:
        """Measures at the size of the finish."""
        return self._scorer(self.config.finish)

    def _scorer(self, config: Config) -> Scorer:
        scores = self.config.scores
        train, test = (
            drawn_set(config.data.images, split, most)
            for split, most in (("train", scores.train_images), ("heldout", scores.test_images))
        )
        return Scorer(train, test, scores, config.model.backbone.patch_size)

    # Trainings.

    def path(self, name: str) -> Path:
        """Folder of a training."""
        return self.folder / "runs" / name

    def changed(self, **fields: Any) -> Config:
        """The run with some fields of its objective changed."""
        run = self.config.seeded
        return dataclasses.replace(run, objective=dataclasses.replace(run.objective, **fields))

    def trained(self, name: str, config: Config | None = None) -> Path:
        """The folder of a finished pretraining; None: the one that others are compared with.

        Raises:
          Stopped: a signal came before its end.
        """
        config = self.config.seeded if config is None else config

        def task_of(config: Config, mesh: jax.sharding.Mesh) -> WeightedLosses:
            steps = config.train.steps
            return WeightedLosses(config.model, config.objective, steps, mask_group(config))

        def run() -> TrainResult:
            return train(
                config,
                self.path(name),
                self.resume_command,
                task_of=task_of,
                images=self.images,
            )

        return self.done(name, run)

    def done(self, name: str, run: Callable[[], TrainResult]) -> Path:
        """Runs a training unless it is finished; returns its folder.

        Raises:
          Stopped: a signal came before its end.
        """
        print(f"\n{name}: training in {self.path(name)}", flush=True)
        if run().preempted:
            raise Stopped
        return self.path(name)

    # Models and scores.

    def scores(self, name: str, config: Config | None = None) -> dict[str, Any]:
        """Trains an arm and scores its teacher, both once.

        Returns:
          What `Scorer.score` gives, and the last `loss`, `usage_entropy` and `target_entropy` of
          the training, with their curves over `steps`.
        """
        return measured(self.folder, f"model-{name}", lambda: self._scores(name, config))

    def _scores(self, name: str, config: Config | None) -> dict[str, Any]:
        path = self.trained(name, config)
        return {**self.scorer.score(load(path)), **curves(path)}

    def baseline(self, name: str) -> dict[str, Any]:
        """Scores of pixels, or of the model's shape with random weights."""
        return measured(self.folder, f"model-{name}", lambda: self.scorer.score(self._model(name)))

    def _model(self, name: str) -> FeatureModel:
        vit = self.config.run.model.backbone
        if name == PIXELS:
            return Pixels(vit.patch_size)
        # Blocks that count in full: training starts from smaller ones.
        vit = dataclasses.replace(vit, layer_scale=vit.layer_scale and 1.0)
        return Backbone(BackboneConfig(vit), rngs=nnx.Rngs(self.config.seed))

    def knn_over_steps(self) -> dict[str, list[float]]:
        """k-NN by the teachers of the main run's checkpoints: `images` seen, and `knn`."""
        path = self.trained(MAIN)
        store, model = CheckpointStore(path / "checkpoints"), load(path)
        params = nnx.state(model, nnx.Param)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(params)
        )
        found: dict[str, list[float]] = {"images": [], "knn": []}
        for step in store.steps():
            values = load_params(store.path(step), abstract, ("teacher", "backbone"))
            nnx.replace_by_pure_dict(params, jax.tree.map(jnp.asarray, values))
            nnx.update(model, params)
            found["images"].append(step * self.config.run.train.batch_size)
            found["knn"].append(self.scorer.knn(model))
        return found


def curves(path: Path) -> dict[str, Any]:
    """Last values and curves of a training's metrics."""
    lines = read_metrics(path)
    names = ("loss", "usage_entropy", "target_entropy")
    return {
        **{name: lines[-1][name] for name in names},
        "steps": [line["step"] for line in lines],
        "usage_curve": [line["usage_entropy"] for line in lines],
    }
