"""What a run minimises, and how its teacher moves meanwhile: settings and schedules."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from common.errors import UserError
from common.train.schedules import half_cosine
from dino.sinkhorn import Scope


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Losses and teacher (section 3).

    Attributes:
      dino_weight, ibot_weight, koleo_weight: of the three losses.
      centring: what keeps the teacher from saying the same of every image: "sinkhorn", "moving" (a
        moving mean of its logits is taken off), or "none", to see it collapse.
      sinkhorn_iterations: turns of Sinkhorn-Knopp.
      sinkhorn_scope: over which rows prototypes are balanced: those of all devices ("global", the
        paper's, and the same on any number of devices), or of each device ("per_device").
      koleo_group: KoLeo's neighbours are looked for among so many consecutive images of the batch,
        whatever the devices are; "device": among those of the same device; None: of the whole
        batch. The paper's runs had 32 (ViT-L) and 12 (ViT-g) images on a device.
      centre_momentum: of the moving mean.
      student_temperature: of the student's softmax.
      teacher_temperature: of the teacher's, first and last.
      temperature_steps: steps of its linear rise.
      momentum: of the teacher, at the first step and at the last, on half a cosine between.
      freeze_last_layer_steps: before that many steps prototypes stay as they are.
      freeze_backbone_steps: likewise the backbone, while fresh heads learn (section 7.24).
      layer_decay: factor of the learning rate from each block to the one below it.
      patch_embed_rate: further factor of the patch embedding's.
      loss_chunk: views, or masked patches of an image, whose student logits exist at a time; None
        for all.
    """

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    centring: Literal["sinkhorn", "moving", "none"] = "sinkhorn"
    sinkhorn_iterations: int = 3
    sinkhorn_scope: Scope = "global"
    koleo_group: int | Literal["device"] | None = None
    centre_momentum: float = 0.9
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    temperature_steps: int = 37_500
    momentum: tuple[float, float] = (0.994, 1.0)
    freeze_last_layer_steps: int = 1250
    freeze_backbone_steps: int = 0
    layer_decay: float = 1.0
    patch_embed_rate: float = 0.2
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        if min(self.dino_weight, self.ibot_weight, self.koleo_weight) < 0:
            raise UserError("objective: the weights of the losses must not be negative")
        if min(self.student_temperature, *self.teacher_temperature) <= 0:
            raise UserError("objective: temperatures must be positive")
        if not all(0 <= m <= 1 for m in (*self.momentum, self.centre_momentum)):
            raise UserError("objective.momentum and centre_momentum must lie in [0, 1]")
        if self.sinkhorn_iterations < 1:
            raise UserError("objective.sinkhorn_iterations must be at least 1")
        if isinstance(self.koleo_group, int) and self.koleo_group < 2:
            raise UserError(
                f"objective.koleo_group is {self.koleo_group}, but an image needs a neighbour: use "
                "2 or more, 'device', or none"
            )
        if not 0 < self.layer_decay <= 1 or self.patch_embed_rate < 0:
            raise UserError("objective.layer_decay must lie in (0, 1], patch_embed_rate from 0 on")


def teacher_temperature(config: ObjectiveConfig) -> optax.Schedule:
    """The teacher's temperature as a function of the updates made before: linear, then constant.

    The rise includes both of its ends, as all of the paper's do (section 3.9).
    """
    first, last = config.teacher_temperature
    rise = max(1, config.temperature_steps - 1)

    def temperature(count: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.minimum(jnp.asarray(count, jnp.float32) / rise, 1.0)
        if config.temperature_steps < 1:
            done = jnp.ones_like(done)
        return first + (last - first) * done

    return temperature


def teacher_renewal(config: ObjectiveConfig, steps: int) -> optax.Schedule:
    """1 - momentum as a function of the updates made before: what a teacher takes of its student.

    Its own schedule, for a momentum near 1 would lose its digits.
    """
    first, last = config.momentum
    return half_cosine(1.0 - first, 1.0 - last, steps)
