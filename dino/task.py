"""The training step of DINOv2: a student learns what its own moving average says of other views."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from common.models.vit import Tokens
from common.sharding import shard, ways
from common.train import Batch, Loss, Task
from common.train.task import Path, PureDict
from dino.data import normalize
from dino.flops import training_flops, views_in
from dino.heads import ProjectionHead
from dino.losses import dino_loss, ibot_loss, koleo_loss
from dino.networks import RULES, Centre, Network, NetworkConfig, Pair, gather_patches
from dino.objective import ObjectiveConfig, teacher_renewal, teacher_temperature
from dino.sinkhorn import centred_softmax, moved_centre, sinkhorn_knopp

HEADS = ("dino_head", "ibot_head")
_FIRST = ("patch_embed", "pos_embed", "cls_token", "mask_token", "register_tokens")


class Pretraining(Task):
    """Image-level and patch-level self-distillation with KoLeo (section 3.1).

    Batches are those of `dino.data`. The parameters are two trees, `student` and `teacher`, each of
    `backbone`, `dino_head` and `ibot_head`; the teacher's do not train, but move towards the
    student's after every update.

    Args:
      model: shape of the backbone and its heads.
      objective: what is minimised.
      steps: length of the run, on which the teacher's momentum depends.
      mask_group: images whose masked patches are one list.
    """

    rules = RULES
    unit = "images"

    def __init__(
        self, model: NetworkConfig, objective: ObjectiveConfig, steps: int, mask_group: int
    ):
        self.model = model
        self.objective = objective
        self._mask_group = mask_group
        self._temperature = teacher_temperature(objective)
        self._renewal = teacher_renewal(objective, steps)

    def build(self, rngs: nnx.Rngs) -> Pair:
        centres = self.objective.centring == "moving"
        return Pair(self.model, centres=centres, rngs=rngs)

    def loss(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        """The sum of the images' losses, in nats; metrics are its parts without their weights."""
        objective = self.objective
        rows = len(batch["global_crops"])
        check_koleo(objective, rows)
        count = model.updates[...]
        model.updates[...] = count + 1
        of_teacher = self._teacher(model)
        of_images, of_patches = self._targets(model, of_teacher, batch, self._temperature(count))
        tokens, cls, patches = self._student(model.student, batch, self._drop_path(key))
        options: Any = {
            "temperature": objective.student_temperature,
            "chunk": objective.loss_chunk,
        }
        z, table = _through(model.student.dino_head, cls)
        on_global, on_local = dino_loss(z, table, of_images, **options)
        z, table = _through(model.student.patch_head, patches)
        weights = self._patch_weights(batch, z.shape[1])
        # Over both global views of every image, masked or not.
        ibot = ibot_loss(z, table, of_patches, weights, **options) / 2
        views = tokens.cls.reshape(rows, 2, -1)
        koleo = sum(jnp.sum(koleo_loss(views[:, v], group=objective.koleo_group)) for v in (0, 1))
        dino = jnp.sum(on_global + on_local)
        total = (
            objective.dino_weight * dino
            + objective.ibot_weight * ibot
            + objective.koleo_weight * koleo
        )
        metrics = {
            "dino_global": jnp.sum(on_global),
            "dino_local": jnp.sum(on_local),
            "ibot": ibot,
            "koleo": koleo,
            "teacher_temperature": rows * self._temperature(count),
            **_usage(of_images),
        }
        return Loss(total=total, weight=jnp.float32(rows), metrics=metrics)

    def trainable(self, path: Path, variable: nnx.Variable) -> bool:
        return path[0] == "student"

    def decays(self, path: Path, variable: nnx.Variable) -> bool:
        """All but biases, norms and the branches' factors; tokens, positions and prototypes too."""
        names = [str(name) for name in path]
        return not (
            names[-1].endswith("bias") or any("norm" in name or "gamma" in name for name in names)
        )

    def trains_from(self, path: Path, variable: nnx.Variable) -> int:
        if path[1] == "backbone":
            return self.objective.freeze_backbone_steps
        return self.objective.freeze_last_layer_steps if "last_layer" in path else 0

    def learning_rate_factor(self, path: Path, variable: nnx.Variable) -> Any:
        """Layer-wise decay from the last block down; less still for the patch embedding."""
        decay, depth = self.objective.layer_decay, self.model.backbone.num_layers
        if path[1] != "backbone" or path[2] == "norm":
            return 1.0
        if path[2] == "blocks":
            if decay == 1.0:
                return 1.0
            factors = decay ** np.arange(depth, 0, -1)
            return factors.reshape(depth, *[1] * (len(variable.shape) - 1)).astype(np.float32)
        if path[2] not in _FIRST:
            raise ValueError(f"what is {path} of the backbone? It has no learning rate")
        own = self.objective.patch_embed_rate if path[2] == "patch_embed" else 1.0
        return decay ** (depth + 1) * own

    def clip_group(self, path: Path, variable: nnx.Variable) -> str:
        return path[1]

    def after_update(self, params: PureDict, extra: Any, step: jax.Array) -> tuple[PureDict, Any]:
        """Moves the teacher: `t + (1 - momentum) (s - t)`, of all parameters."""
        share = self._renewal(step - 1)
        teacher = jax.tree.map(
            lambda t, s: t + (share * (s - t)).astype(t.dtype), params["teacher"], params["student"]
        )
        return {**params, "teacher": teacher}, extra

    def flops_per_step(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> float | None:
        return training_flops(self.model, self.model, views_in(batch))

    def _drop_path(self, key: jax.Array) -> jax.Array | None:
        """The key of what the student leaves out; None: nothing."""
        return key

    def _teacher(self, model: Any) -> Network:
        """Who gives the targets."""
        return model.teacher

    def _student(
        self, student: Network, batch: Batch, key: jax.Array | None
    ) -> tuple[Tokens, jax.Array, jax.Array]:
        """The global views' tokens, all views' class tokens, and the patches to be learnt."""
        rows = len(batch["global_crops"])
        on_global, on_local = (None, None) if key is None else jax.random.split(key)
        masks = self._masks(batch)
        tokens = student.backbone(views_of(batch["global_crops"]), masks=masks, key=on_global)
        cls = tokens.cls.reshape(rows, 2, -1)
        if batch["local_crops"].shape[1]:
            local = student.backbone(views_of(batch["local_crops"]), key=on_local)
            cls = jnp.concatenate([cls, local.cls.reshape(rows, -1, cls.shape[-1])], axis=1)
        return tokens, cls, self._chosen(tokens.patches, batch)

    def _targets(
        self, model: Any, teacher: Network, batch: Batch, temperature: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What the teacher says of the global views `[B, 2, K]`, of patches `[B, S, K']`."""
        tokens = teacher.backbone(views_of(batch["global_crops"]))
        rows = len(batch["global_crops"])
        patches = self._chosen(tokens.patches, batch)
        valid = self._patch_weights(batch, patches.shape[1]) > 0
        images = teacher.dino_head(tokens.cls.reshape(rows, 2, -1))
        said = teacher.patch_head(patches)
        found = (
            self._assigned(images, None, model.dino_centre, temperature),
            self._assigned(said, valid, model.ibot_centre, temperature),
        )
        return jax.lax.stop_gradient(found)

    def _assigned(
        self,
        logits: jax.Array,
        valid: jax.Array | None,
        centre: Centre | None,
        temperature: jax.Array,
    ) -> jax.Array:
        """Targets of logits `[B, S, K]`; a moving centre goes to where the next step finds it."""
        objective = self.objective
        rows = logits.reshape(-1, logits.shape[-1])
        valid = None if valid is None else valid.reshape(-1)
        if objective.centring == "sinkhorn":
            found = sinkhorn_knopp(
                rows,
                temperature,
                valid=valid,
                iterations=objective.sinkhorn_iterations,
                scope=objective.sinkhorn_scope,
            )
        elif centre is None:
            found = centred_softmax(rows, jnp.zeros(()), temperature)
        else:
            found = centred_softmax(rows, centre[...], temperature)
            momentum = objective.centre_momentum
            centre[...] = moved_centre(centre[...], rows, valid=valid, momentum=momentum)
        return shard(found.reshape(logits.shape), "batch", None, "vocab")

    def _masks(self, batch: Batch) -> jax.Array | None:
        """`[2B, N]`: the patches that the student does not see."""
        return flat(batch["masks"])

    def _chosen(self, patches: jax.Array, batch: Batch) -> jax.Array:
        """The patches `[B, S, D]` that the patch loss is about, of `[2B, N, D]`."""
        return gather_patches(patches, batch["masked_indices"], self._mask_group)

    def _patch_weights(self, batch: Batch, places: int) -> jax.Array:
        """`[B, S]`: 1 / (patches of the same view that the loss is about); padding: 0."""
        return batch["masked_weights"]


def check_koleo(objective: ObjectiveConfig, rows: int) -> None:
    """Raises UserError unless a batch of so many images gives each of them a neighbour."""
    group = objective.koleo_group
    if not objective.koleo_weight:
        return
    if isinstance(group, int) and rows % group:
        raise UserError(
            f"a batch of {rows} images is not whole groups of objective.koleo_group {group}"
        )
    shards = ways("batch") if group == "device" else 1
    if rows // shards < 2:
        raise UserError(
            f"KoLeo needs two images or more {'on a device' if shards > 1 else 'in a batch'}, not "
            f"{rows // shards}: use a larger batch, or objective.koleo_weight=0"
        )


def flat(x: jax.Array) -> jax.Array:
    """`[B, V, ...] -> [B V, ...]`, image by image, so that rows stay on their device."""
    return x.reshape(-1, *x.shape[2:])


def views_of(crops: jax.Array) -> jax.Array:
    """Crops `[B, V, H, W, 3]` as the model takes them: `[B V, H, W, 3]` fp32, normalised."""
    return normalize(shard(flat(crops), "batch", None, None, None))


def _through(head: ProjectionHead, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit vectors of features `[B, S, D]`, and the table that makes logits of them."""
    return head.bottleneck(x), head.last_layer.table()


def _usage(targets: jax.Array) -> dict[str, jax.Array]:
    """Entropies of image targets `[B, 2, K]`: of each, and of their mean (prototypes in use)."""
    rows, views = targets.shape[:2]

    def entropy(p: jax.Array) -> jax.Array:
        return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)

    return {
        "target_entropy": jnp.sum(entropy(targets)) / views,
        "usage_entropy": rows * entropy(jnp.mean(targets, axis=(0, 1))),
    }
