"""What a run starts from: fresh parameters, another run's, or a published backbone."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common import values
from common.checkpoint.store import CheckpointStore, load_params
from common.errors import UserError
from common.models.loading import read_json
from common.models.vit import ViTConfig
from common.nn.positions import resized_positions
from common.train.task import PureDict
from dino.checkpoint import load
from dino.config import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from dino.networks import NetworkConfig

# What a checkpoint does not decide: how a backbone is trained.
_OF_TRAINING = (
    "drop_path", "drop_path_groups", "dtype", "residual_dtype", "remat",
)  # fmt: skip

Start = Callable[[PureDict], PureDict]


def is_run(path: str | Path) -> bool:
    """Whether a path is the workdir of a run."""
    return (Path(path) / "checkpoints").is_dir()


def network_of_run(path: Path) -> NetworkConfig:
    """The shape of backbone and heads that a run's config.json states.

    Raises:
      UserError: it is no run of this package.
    """
    where = path / "config.json"
    data = read_json(where).get("model")
    if not isinstance(data, dict) or "backbone" not in data:
        raise UserError(f"{where} is not a run of dino")
    return values.decode(data, NetworkConfig, "model", str(where))


def resolve(
    wanted: NetworkConfig,
    checkpoint: str | None,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    *,
    resample: bool = False,
) -> tuple[NetworkConfig, Start | None]:
    """The shape of a run's networks, and what gives a new run its parameters.

    Args:
      wanted: as configured; it keeps what a checkpoint does not decide.
      checkpoint: see `dino.presets.Config`.
      workdir: of the run; one that is resumed has its shape there, and needs no checkpoint.
      mesh: where parameters go.
      resample: the table of positions becomes one for `wanted.backbone.image_size`.

    Returns:
      The shape, and a function for the Trainer (None: all parameters are fresh).

    Raises:
      UserError: the checkpoint is missing, damaged, or of another kind of model.
    """
    if resample and checkpoint is None:
        raise UserError("resample_positions goes on from another run: set checkpoint")
    if checkpoint is None:
        return wanted, None
    if CheckpointStore(workdir / "checkpoints").latest() is not None:
        return _trained_as(network_of_run(workdir), wanted.backbone), None
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"no checkpoint at {checkpoint}: check the path")
    if is_run(path):
        network = network_of_run(path)
        read = _of_run(path)
    else:
        backbone = load(path, param_dtype="float32", mesh=mesh)
        network = dataclasses.replace(wanted, backbone=backbone.config)
        read = _of_backbone(backbone)
    target = _trained_as(network, wanted.backbone)
    if resample:
        size = wanted.backbone.image_size
        target = dataclasses.replace(
            target, backbone=dataclasses.replace(target.backbone, image_size=size)
        )
    if target.backbone.table_size == network.backbone.table_size:
        return target, read
    return target, _resampled(read, network.backbone, target.backbone)


def _trained_as(network: NetworkConfig, wanted: ViTConfig) -> NetworkConfig:
    changes = {name: getattr(wanted, name) for name in _OF_TRAINING}
    return dataclasses.replace(network, backbone=dataclasses.replace(network.backbone, **changes))


def _of_run(path: Path) -> Start:
    """Student, teacher and heads of a run's newest checkpoint."""

    def read(abstract: PureDict) -> PureDict:
        return load_params(path / "checkpoints", abstract)

    return read


def _of_backbone(backbone: Any) -> Start:
    """A backbone for student and teacher; the heads are left to be fresh."""
    params = nnx.to_pure_dict(nnx.state(backbone, nnx.Param))
    params = in_imagenet_colors(params, backbone.backbone_config)

    def read(abstract: PureDict) -> PureDict:
        there = abstract["student"]["backbone"]
        # A mask token that the checkpoint has not stays fresh.
        chosen = {name: leaf for name, leaf in params.items() if name in there}

        def placed() -> PureDict:
            return jax.tree.map(
                lambda value, leaf: jnp.copy(
                    jax.device_put(value.astype(leaf.dtype), leaf.sharding)
                ),
                chosen,
                {name: there[name] for name in chosen},
            )

        return {"student": {"backbone": placed()}, "teacher": {"backbone": placed()}}

    return read


def in_imagenet_colors(params: PureDict, config: BackboneConfig) -> PureDict:
    """The same backbone for images normalised by ImageNet's mean and deviation.

    Exact: the patch embedding is linear in the pixels.
    """
    own = (config.image_mean, config.image_std)
    if own == (IMAGENET_MEAN, IMAGENET_STD):
        return params
    mean, std = (jnp.asarray(x, jnp.float32) for x in own)
    target_mean = jnp.asarray(IMAGENET_MEAN, jnp.float32)
    target_std = jnp.asarray(IMAGENET_STD, jnp.float32)
    embed = params["patch_embed"]
    kernel = embed["kernel"].reshape(-1, 3, embed["kernel"].shape[-1])  # Channels last.
    bias = embed["bias"] + jnp.einsum("c,pcd->d", (target_mean - mean) / std, kernel)
    kernel = (kernel * (target_std / std)[:, None]).reshape(embed["kernel"].shape)
    return {**params, "patch_embed": {"kernel": kernel, "bias": bias}}


def _resampled(read: Start, there: ViTConfig, here: ViTConfig) -> Start:
    """Reads parameters of one table of positions, and makes them those of another.

    By the model's own manner of resizing, so that at the new size it computes what it did before.
    """
    size, target = there.table_size, here.table_size
    rows = 1 + size * size

    def table(leaf: jax.Array) -> jax.Array:
        grid = leaf[1:].reshape(size, size, -1)
        grid = resized_positions(grid, (target, target), there.interpolation)
        return jnp.concatenate([leaf[:1], grid.reshape(target * target, -1)]).astype(leaf.dtype)

    def resampled(abstract: PureDict) -> PureDict:
        def old(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            # Small, and cut by width alone: it lies as the new one does.
            return jax.ShapeDtypeStruct((rows, leaf.shape[1]), leaf.dtype, sharding=leaf.sharding)

        params = read(_with_positions(abstract, old))
        wanted = {who: abstract[who]["backbone"]["pos_embed"].sharding for who in params}
        resize = {who: jax.jit(table, out_shardings=wanted[who]) for who in params}
        return {who: _with_positions({who: tree}, resize[who])[who] for who, tree in params.items()}

    return resampled


def _with_positions(params: Mapping[str, Any], change: Callable[[Any], Any]) -> PureDict:
    """`{student: ..., teacher: ...}` with each table of positions changed."""
    return {
        who: {
            **tree,
            "backbone": {**tree["backbone"], "pos_embed": change(tree["backbone"]["pos_embed"])},
        }
        for who, tree in params.items()
    }
