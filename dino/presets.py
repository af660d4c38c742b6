"""Training runs: a tiny one, one for a laptop, those of the paper, and how to go on from others."""

import dataclasses
import math
from collections.abc import Callable

from common.data.image_corpus import ImageConfig
from common.errors import UserError
from common.models.vit import ViTConfig
from common.sharding import MeshConfig
from common.train import OptimizerConfig, TrainConfig
from dino.augmentation import CropConfig
from dino.config import public, smoke_model
from dino.data import DataConfig
from dino.heads import HeadConfig
from dino.masking import MaskConfig
from dino.networks import NetworkConfig
from dino.objective import ObjectiveConfig

NOMINAL_EPOCH = 1250  # Steps; the paper counts its schedules in these, whatever the data.


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    Attributes:
      model: shape of backbone and heads.
      objective: what it minimises.
      data: images, their views, masks.
      train: steps, batch, optimizer, mesh, checkpoints.
      checkpoint: what to start from. The workdir of a run: its student, teacher and heads. Anything
        else that `dino.load` takes: a backbone, on which heads start afresh. Its shape takes the
        place of `model`'s, of which what only training knows stays (drop path, dtype, remat). None
        starts from fresh parameters.
      resample_positions: make the checkpoint's table of positions one for `image_size` of `model`,
        as the high-resolution stage does; otherwise it stays, and is resized in every step.
      reference_batch: the optimizer's learning rate is that of a batch of so many images; the run's
        is that times the root of batch_size / reference_batch (section 3.9). None: as it is.
      seed: of parameters, of the order of images, of views, masks and drop path.
    """

    model: NetworkConfig
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: str | None = None
    resample_positions: bool = False
    reference_batch: int | None = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train.accumulation != 1:
            raise UserError(
                "train.accumulation must be 1: Sinkhorn-Knopp and KoLeo are about a whole batch; "
                "use objective.loss_chunk, model.backbone.remat or more devices to save memory"
            )
        group = self.objective.koleo_group
        if isinstance(group, int) and self.objective.koleo_weight and self.train.batch_size % group:
            raise UserError(
                f"train.batch_size {self.train.batch_size} is not whole groups of "
                f"objective.koleo_group {group}"
            )
        if self.reference_batch is not None and self.reference_batch < 1:
            raise UserError("reference_batch must be at least 1, or none")


def training(config: Config) -> TrainConfig:
    """The run's settings as the Trainer takes them: the learning rate fits the batch."""
    if config.reference_batch is None:
        return config.train
    scale = math.sqrt(config.train.batch_size / config.reference_batch)
    rate = config.train.optimizer.learning_rate * scale
    optimizer = dataclasses.replace(config.train.optimizer, learning_rate=rate)
    return dataclasses.replace(config.train, optimizer=optimizer)


def mask_group(config: Config) -> int:
    """Images that are masked together."""
    return config.data.masks.group or config.train.batch_size


def smoke() -> Config:
    """Shows that everything runs: 66 k parameters, 30 steps on drawn shapes.

    `python -m dino.train --config=smoke --workdir=runs/dino-smoke`; 2 CPU cores, half a minute.
    """
    head = HeadConfig(prototypes=64, bottleneck=16, hidden=64)
    return Config(
        model=NetworkConfig(smoke_model(), head, head),
        objective=ObjectiveConfig(
            temperature_steps=15, momentum=(0.9, 1.0), freeze_last_layer_steps=2
        ),
        data=DataConfig(
            images=ImageConfig(kind="shapes", drawn_size=24, drawn_count=512),
            crops=CropConfig(global_size=16, local_size=8, local_crops=4),
        ),
        train=TrainConfig(
            steps=30,
            batch_size=16,
            log_every=1,
            checkpoint_every=15,
            optimizer=_optimizer(1e-3, warmup=5, weight_decay=0.4),
        ),
        reference_batch=None,
    )


def cpu() -> Config:
    """Learns from white letters in many fonts on a laptop: 0.2 M parameters, 1,500 steps of 256.

    `python -m dino.train --config=cpu --workdir=runs/dino-cpu`; 9 minutes on 2 CPU cores. Then
    `python -m dino.evaluate --checkpoint=runs/dino-cpu --task=knn --train=letter-scenes:train
    --test=letter-scenes:heldout --baselines=pixels,random`: 58 % are classified right by 20-NN,
    45 % by raw pixels (10-NN is their best), 23 % with random weights (see the README).

    The images are `letter-scenes`, which need no package that is not installed. For a run that is a
    thousand times shorter than the paper's, with few prototypes, the teacher's temperature and
    momentum are lower, LayerScale begins at 1, and crops keep more of an image that is small.
    """
    return small()


def small(steps: int = 1_500, batch_size: int = 256, size: int = 32) -> Config:
    """The recipe of `cpu`, for a run of another length.

    Args:
      steps: its length.
      batch_size: images of a step; Sinkhorn-Knopp has two views of each, and four for a prototype.
      size: pixels of images and of global crops.
    """
    crops = CropConfig(
        global_size=size,
        global_scale=(0.5, 1.0),
        local_size=size // 2,
        local_scale=(0.25, 0.5),
        local_crops=2,
        flip=0.0,  # A letter's mirror image may be another letter.
        saturation=0.0,
        hue=0.0,
        grayscale=0.0,
    )
    head = HeadConfig(prototypes=batch_size // 2, bottleneck=64, hidden=256)
    backbone = ViTConfig(
        width=64,
        num_layers=3,
        num_heads=2,
        patch_size=8,
        image_size=size,
        layer_scale=1.0,
    )
    return Config(
        model=NetworkConfig(backbone, head, head),
        objective=ObjectiveConfig(
            teacher_temperature=(0.025, 0.025),
            momentum=(0.98, 1.0),
            freeze_last_layer_steps=steps // 20,
            patch_embed_rate=1.0,
        ),
        data=DataConfig(images=small_images(size), crops=crops),
        train=TrainConfig(
            steps=steps,
            batch_size=batch_size,
            log_every=max(1, steps // 100),
            checkpoint_every=max(1, steps // 5),
            keep_checkpoints=6,
            optimizer=_optimizer(4e-3, warmup=steps // 10, weight_decay=0.1),
        ),
        reference_batch=256,
    )


def small_images(size: int = 32, split: str = "train") -> ImageConfig:
    """White letters of any place, size and font on black.

    Args:
      size: side in pixels.
      split: "train" or "heldout", a fifth of them.
    """
    return ImageConfig(
        "letter-scenes", drawn_size=size, drawn_count=10_000, split=split, heldout_fraction=0.2
    )


def vitl16_short() -> Config:
    """ViT-L/16 on ImageNet-1k with a moving centre and one head: the paper's short run.

    `python -m dino.train --config=vitl16_short --workdir=runs/vitl16 --set
    data.images.path=FOLDER`; a day on 32 A100; 81.6 % by k-NN, 82.9 % linear on ImageNet.
    """
    backbone = dataclasses.replace(
        _trained(public("l"), drop_path=0.3), patch_size=16, image_size=224
    )
    return _paper(
        NetworkConfig(backbone, HeadConfig(65_536, 256), None),
        ObjectiveConfig(centring="moving", momentum=(0.992, 1.0), layer_decay=0.9, koleo_group=64),
        epochs=100,
        warmup_epochs=10,
        batch_size=2048,
        learning_rate=4e-3,
        weight_decay=0.4,
        local_size=96,
    )


def vits14() -> Config:
    """ViT-S/14 from scratch by the recipe of the large ones; the published one was distilled."""
    return _scratch(public("s"), koleo_group=32)


def vitb14() -> Config:
    """ViT-B/14 from scratch by the recipe of the large ones; the published one was distilled."""
    return _scratch(public("b"), koleo_group=32)


def vitl14() -> Config:
    """ViT-L/14 with SwiGLU from scratch, as on ImageNet-22k and LVD-142M.

    `python -m dino.train --config=vitl14 --workdir=runs/vitl14 --set data.images.path=FOLDER`; on
    96 A100 3.3 days; on ImageNet-22k 82.0 % by k-NN, 84.5 % linear.
    """
    return _scratch(dataclasses.replace(public("l"), mlp="swiglu"), koleo_group=32)


def vitg14() -> Config:
    """ViT-g/14 from scratch, as the published one was trained on LVD-142M: 22,016 A100 hours.

    `python -m dino.train --config=vitg14 --workdir=runs/vitg14 --set data.images.path=FOLDER`;
    83.5 % by k-NN, 86.5 % linear.
    """
    return _scratch(public("g"), koleo_group=12)


def vitl14_518() -> Config:
    """The high-resolution stage of `vitl14`: 10,000 steps at 518 pixels; see `high_resolution`.

    `python -m dino.train --config=vitl14_518 --workdir=runs/vitl14-518 --set
    checkpoint=runs/vitl14 --set data.images.path=FOLDER`.
    """
    return high_resolution(vitl14())


def vitg14_518() -> Config:
    """The high-resolution stage of `vitg14`: 10,000 steps at 518 pixels; see `high_resolution`.

    `python -m dino.train --config=vitg14_518 --workdir=runs/vitg14-518 --set
    checkpoint=runs/vitg14 --set data.images.path=FOLDER`.
    """
    return high_resolution(vitg14())


def continued() -> Config:
    """Goes on from a published backbone on images of your own, with fresh heads (section 7.24).

    `python -m dino.train --config=continued --workdir=runs/mine --set checkpoint=dinov2-base --set
    data.images.path=FOLDER`. Heads learn alone for 1,500 steps; then the backbone too, at a low
    rate, behind a slow teacher. The settings are proposals: the paper has none.
    """
    head = HeadConfig(65_536, 256)
    backbone = _trained(public("b"), drop_path=0.1)
    return Config(
        model=NetworkConfig(backbone, head, head),
        objective=ObjectiveConfig(
            teacher_temperature=(0.04, 0.04),
            momentum=(0.999, 1.0),
            freeze_backbone_steps=1500,
            freeze_last_layer_steps=0,
        ),
        data=DataConfig(masks=MaskConfig(group=2)),
        train=TrainConfig(
            steps=20_000,
            batch_size=256,
            checkpoint_every=1000,
            optimizer=_optimizer(2e-5, warmup=1500, weight_decay=0.04),
            mesh=MeshConfig(data=1, fsdp=-1, most_fsdp=8),
        ),
        reference_batch=None,
    )


def high_resolution(config: Config, size: int = 518, steps: int = 10_000) -> Config:
    """A short run at a higher resolution, from where a run of `config` ended (section 3.12).

    All schedules are pressed into its steps. Local crops grow as the global ones do, to whole
    patches. The paper says that the learning rate is lower, not by how much: here by four.

    Args:
      config: of the run before.
      size: pixels of its global crops.
      steps: its length.
    """
    crops, patch = config.data.crops, config.model.backbone.patch_size
    local = round(crops.local_size * size / crops.global_size / patch) * patch
    crops = dataclasses.replace(crops, global_size=size, local_size=local)
    backbone = dataclasses.replace(config.model.backbone, image_size=size)
    slower = config.train.optimizer.learning_rate / 4
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, backbone=backbone),
        data=dataclasses.replace(config.data, crops=crops),
        train=dataclasses.replace(
            config.train,
            optimizer=dataclasses.replace(config.train.optimizer, learning_rate=slower),
        ),
        resample_positions=True,
    )
    return compressed(config, steps)


def compressed(config: Config, steps: int) -> Config:
    """A run of another length: warm-up, temperature and what is frozen at first keep their share.

    The paper counts these in steps, whatever the length of the run.
    """
    share = steps / config.train.steps

    def scaled(count: int) -> int:
        return round(count * share)

    optimizer, objective = config.train.optimizer, config.objective
    return dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train,
            steps=steps,
            optimizer=dataclasses.replace(optimizer, warmup_steps=scaled(optimizer.warmup_steps)),
        ),
        objective=dataclasses.replace(
            objective,
            temperature_steps=scaled(objective.temperature_steps),
            freeze_last_layer_steps=scaled(objective.freeze_last_layer_steps),
            freeze_backbone_steps=scaled(objective.freeze_backbone_steps),
        ),
    )


def _optimizer(
    learning_rate: float, *, warmup: int, weight_decay: float, batch_size: int | None = None
) -> OptimizerConfig:
    """AdamW of section 3.9; the rate falls to 1e-6 by the end, the decay rises from 0.04."""
    peak = learning_rate * math.sqrt((batch_size or 1024) / 1024)
    return OptimizerConfig(
        learning_rate=learning_rate,
        warmup_steps=warmup,
        warmup_from_zero=True,
        final_fraction=1e-6 / peak,
        b2=0.999,
        weight_decay=0.04,
        final_weight_decay=weight_decay,
        clip_norm=3.0,
    )


def _trained(vit: ViTConfig, drop_path: float) -> ViTConfig:
    """A backbone as it is trained: at 224 pixels, in bfloat16."""
    return dataclasses.replace(vit, image_size=224, drop_path=drop_path, dtype="bfloat16")


def _scratch(vit: ViTConfig, koleo_group: int) -> Config:
    """The recipe of ViT-L and ViT-g (section 3.10)."""
    return _paper(
        NetworkConfig(_trained(vit, drop_path=0.4)),
        ObjectiveConfig(koleo_group=koleo_group),
        epochs=500,
        warmup_epochs=80,
        batch_size=3072,
        learning_rate=2e-4,
        weight_decay=0.2,
    )


def _paper(
    model: NetworkConfig,
    objective: ObjectiveConfig,
    *,
    epochs: int,
    warmup_epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    local_size: int = 98,
) -> Config:
    """What all of the paper's runs share."""
    optimizer = _optimizer(
        learning_rate,
        warmup=warmup_epochs * NOMINAL_EPOCH,
        weight_decay=weight_decay,
        batch_size=batch_size,
    )
    return Config(
        model=model,
        objective=objective,
        data=DataConfig(
            images=ImageConfig(kind="folder", path="data/images"),
            crops=CropConfig(local_size=local_size),
            # Whole groups lie on every device for whatever number of them the batch divides by.
            masks=MaskConfig(group=2),
        ),
        train=TrainConfig(
            steps=epochs * NOMINAL_EPOCH,
            batch_size=batch_size,
            log_every=10,
            checkpoint_every=NOMINAL_EPOCH,
            optimizer=optimizer,
            mesh=MeshConfig(data=1, fsdp=-1, most_fsdp=8),
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__: preset
    for preset in (
        smoke,
        cpu,
        vits14,
        vitb14,
        vitl14,
        vitg14,
        vitl16_short,
        vitl14_518,
        vitg14_518,
        continued,
    )
}
