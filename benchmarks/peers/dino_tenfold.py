"""Our side of the DINOv2 benchmark: `Backbone.features`, and the trainer's step."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dino
from benchmarks.peers import dino_workload as workload
from benchmarks.peers.contender import Run
from benchmarks.peers.dino_workload import Setting
from benchmarks.peers.trainer_step import trainer_step
from common.train import ModelParts
from dino.flops import training_flops, views_in
from dino.task import Pretraining


class Tenfold:
    """Features of the weights in a folder, and training steps from given parameters.

    Args:
        prototypes: Of each head.
        unroll: Trains without a loop over blocks; None: on a CPU.
    """

    def __init__(self, prototypes: int, *, unroll: bool | None = None):
        self._prototypes = prototypes
        self._unroll = jax.default_backend() == "cpu" if unroll is None else unroll
        self.compile_seconds = 0.0

    def describe(self) -> str:
        blocks = "model.backbone.unroll" if self._unroll else "a loop over blocks"
        return f"jax {jax.__version__}; `Backbone.features`, the trainer's step with {blocks}"

    def features(self, setting: Setting, folder: Path, images: np.ndarray) -> np.ndarray:
        """`[B, T, D]` fp32: all tokens of the last block behind the final norm."""
        found = self._backbone(setting, folder).features(jnp.asarray(images))
        tokens = (found.cls[:, None], found.registers, found.patches)
        return np.asarray(jnp.concatenate(tokens, axis=1).astype(jnp.float32))

    def prepare_features(self, setting: Setting, folder: Path | None, images: np.ndarray) -> Run:
        """One repeat: features of the images, which lie on the device; no folder: any weights."""
        model, placed = self._backbone(setting, folder), jnp.asarray(images)

        def run() -> float:
            start = time.perf_counter()
            jax.block_until_ready(model.features(placed))
            return time.perf_counter() - start

        return self._warm(run)

    def loss(self, setting: Setting, params: Any, batch: dict[str, np.ndarray]) -> dict[str, float]:
        """The first step's loss and its parts, means over images."""
        parts = ModelParts(self._task(setting), seed=0)

        def of(params: Any, batch: Any) -> Any:
            model = parts.merge(params, parts.fresh()[1])
            return parts.task.loss(model, batch, jax.random.key(0))

        found = jax.jit(of)(params, batch)
        names = ("dino_global", "dino_local", "ibot", "koleo")
        sums = {"loss": found.total, **{name: found.metrics[name] for name in names}}
        return {name: float(value) / setting.batch for name, value in sums.items()}

    def prepare_train(self, setting: Setting, params: Any, batch: dict[str, np.ndarray]) -> Run:
        """One repeat: an optimizer step, the teacher's move included."""
        start = time.perf_counter()
        run = trainer_step(self._task(setting), params, batch, workload.OPTIMIZER)
        self.compile_seconds += time.perf_counter() - start
        return self._warm(run)

    def fresh_params(self, setting: Setting) -> Any:
        """Parameters of student and teacher, whose prototypes and tokens differ."""
        params = jax.jit(ModelParts(self._task(setting), seed=0).fresh)()[0]
        teacher = jax.tree.map(lambda x: x * 1.02, params["teacher"])
        return {**params, "teacher": teacher}

    def flops(self, setting: Setting) -> float:
        """Of one repeat, counted by hand."""
        if setting.task != "train":
            size = (setting.size, setting.size)
            return setting.batch * workload.backbone(setting).flops(*size)
        config = workload.network(setting, self._prototypes)
        return training_flops(config, config, views_in(workload.training_batch(setting)))

    def close(self) -> None:
        jax.clear_caches()

    def _task(self, setting: Setting) -> Pretraining:
        config = workload.network(setting, self._prototypes)
        vit = dataclasses.replace(config.backbone, unroll=self._unroll)
        config = dataclasses.replace(config, backbone=vit)
        return Pretraining(config, workload.OBJECTIVE, 10_000, setting.batch)

    def _backbone(self, setting: Setting, folder: Path | None) -> dino.Backbone:
        if folder is None:
            return _fresh_backbone(setting, setting.dtype)
        return dino.load(folder, position_interpolation="hf", dtype=setting.dtype)

    def _warm(self, run: Run) -> Run:
        start = time.perf_counter()
        run()
        self.compile_seconds += time.perf_counter() - start
        return run


def save_backbone(setting: Setting, folder: Path) -> None:
    """Writes random weights as the transformers library reads them."""
    dino.save(_fresh_backbone(setting, "float32"), folder, "huggingface")


def _fresh_backbone(setting: Setting, param_dtype: str) -> dino.Backbone:
    config = dino.BackboneConfig(workload.backbone(setting))

    @jax.jit
    def make() -> nnx.State:
        state = nnx.state(dino.Backbone(config, rngs=nnx.Rngs(0)))
        return jax.tree.map(lambda x: x.astype(param_dtype), state)

    model = nnx.eval_shape(lambda: dino.Backbone(config, rngs=nnx.Rngs(0)))
    nnx.update(model, make())
    return model
