"""A small student learns from a large frozen teacher (section 3.13)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from common.models.loading import Placement
from common.sharding import shard
from common.train import Batch
from common.train.frozen import Frozen
from common.train.task import PureDict
from dino.checkpoint import load
from dino.flops import training_flops, views_in
from dino.networks import RULES, Network, NetworkConfig, Pair
from dino.objective import ObjectiveConfig
from dino.presets import Config
from dino.starting import is_run, network_of_run
from dino.task import Pretraining


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Who teaches.

    Attributes:
      checkpoint: the workdir of a run of `dino.train`, whose teacher it is, with its heads; or
        anything else that `dino.load` takes, which has no heads (see `heads`).
      preset: of `dino.train`, by which a teacher is trained first, in the run's own folder, where
        no checkpoint is named.
      heads: "checkpoint": those that the teacher was trained with. "random": fresh ones, which stay
        as they are: random projections of the teacher's features, in place of heads that were never
        published. A proposal: nobody has said how well it does.
      dtype: of its weights and of what it computes.
    """

    checkpoint: str | None = None
    preset: str | None = None
    heads: Literal["checkpoint", "random"] = "checkpoint"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class DistillationConfig(Config):
    """A run of distillation.

    Attributes:
      teacher: who teaches.
    """

    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)


class Distillation(Pretraining):
    """The losses of pretraining, against a frozen teacher's targets.

    The student sees no masks and drops no path; the patch loss is about all patches of the global
    views. The tree `teacher` of the parameters is here the student's own moving average, which is
    what a run is for; the frozen network is state beside them.

    Args:
      model: shape of the student and its heads.
      objective, steps: as for `Pretraining`.
      teacher: the frozen network; may be abstract where nothing is run.
      teacher_config: its shape.
    """

    def __init__(
        self,
        model: NetworkConfig,
        objective: ObjectiveConfig,
        steps: int,
        teacher: Network,
        teacher_config: NetworkConfig,
    ):
        check_teacher(model, teacher_config)
        super().__init__(model, objective, steps, mask_group=1)
        self._frozen = Frozen(teacher)
        self._teacher_config = teacher_config

    def build(self, rngs: nnx.Rngs) -> Pair:
        pair = super().build(rngs)
        pair.frozen = self._frozen.room()
        return pair

    def initial_rest(self, abstract: PureDict) -> PureDict:
        return {"frozen": self._frozen.weights(abstract["frozen"])}

    def flops_per_step(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> float | None:
        views = views_in(batch)
        patch = self.model.backbone.patch_size
        patches = 2 * (views.global_size[0] // patch) * (views.global_size[1] // patch)
        views = dataclasses.replace(views, patches=patches)
        student = dataclasses.replace(self.model.backbone, drop_path=0.0)
        model = dataclasses.replace(self.model, backbone=student)
        return training_flops(model, self._teacher_config, views)

    def _teacher(self, model: Any) -> Network:
        return self._frozen.model(model.frozen)

    def _drop_path(self, key: jax.Array) -> jax.Array | None:
        return None

    def _masks(self, batch: Batch) -> jax.Array | None:
        return None

    def _chosen(self, patches: jax.Array, batch: Batch) -> jax.Array:
        """All of them: `[2B, N, D] -> [B, 2N, D]`."""
        rows = len(batch["global_crops"])
        return shard(patches.reshape(rows, -1, patches.shape[-1]), "batch", None, None)

    def _patch_weights(self, batch: Batch, places: int) -> jax.Array:
        rows = len(batch["global_crops"])
        return jnp.full((rows, places), np.float32(2 / places))


def check_teacher(student: NetworkConfig, teacher: NetworkConfig) -> None:
    """Raises UserError unless the teacher's targets are such as the student can learn."""
    pairs = {
        "dino_head.prototypes": (student.dino_head.prototypes, teacher.dino_head.prototypes),
        "ibot_head.prototypes": (student.patch_head.prototypes, teacher.patch_head.prototypes),
        "backbone.patch_size": (student.backbone.patch_size, teacher.backbone.patch_size),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise UserError(
                f"model.{name} is {ours}, but the teacher's is {theirs}: they must be the same, "
                f"--set model.{name}={theirs}"
            )


def load_teacher(
    settings: TeacherConfig, student: NetworkConfig, mesh: jax.sharding.Mesh, seed: int
) -> tuple[Network, NetworkConfig]:
    """The frozen teacher, on the mesh, and its shape.

    Args:
      settings: with a checkpoint.
      student: gives random heads their shapes.
      mesh: where its weights go.
      seed: of random heads.

    Raises:
      UserError: nothing there, or no heads.
    """
    assert settings.checkpoint is not None
    path, dtype = Path(settings.checkpoint), settings.dtype
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: check teacher.checkpoint")

    def frozen(config: NetworkConfig) -> NetworkConfig:
        backbone = dataclasses.replace(config.backbone, dtype=dtype, remat="none", drop_path=0.0)
        return dataclasses.replace(config, backbone=backbone)

    if is_run(path) and settings.heads == "checkpoint":
        config = frozen(network_of_run(path))
        placement = Placement(dtype, mesh, RULES)
        build = lambda: Network(config, rngs=nnx.Rngs(0))  # noqa: E731
        return placement.from_params(build, path / "checkpoints", ("teacher",)), config
    if settings.heads == "checkpoint":
        raise UserError(
            f"{path} has no heads, as published backbones have not: name the workdir of a run, or "
            "set teacher.heads=random"
        )
    backbone = load(path, dtype=dtype, mesh=mesh, rules=RULES)
    config = frozen(dataclasses.replace(student, backbone=backbone.config))
    network = _with_random_heads(config, seed)
    nnx.update(network.backbone, nnx.state(backbone, nnx.Param))
    return network, config


def _with_random_heads(config: NetworkConfig, seed: int) -> Network:
    network = Network(config, rngs=nnx.Rngs(seed))
    dtype = config.backbone.dtype
    nnx.update(network, jax.tree.map(lambda x: x.astype(dtype), nnx.state(network, nnx.Param)))
    return network
