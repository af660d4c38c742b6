"""What the contenders of the DINOv2 benchmark are given: shapes, images, a training batch."""

import dataclasses
from typing import Literal

import numpy as np

from common.models.vit import ViTConfig
from common.train import OptimizerConfig
from dino.augmentation import CropConfig
from dino.config import public
from dino.data import DataConfig, batch_shapes
from dino.heads import HeadConfig
from dino.masking import GroupMasks, MaskConfig
from dino.networks import NetworkConfig
from dino.objective import ObjectiveConfig

REGISTERS = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """One measurement.

    Attributes:
        task: "features", "features, registers", or "train".
        model: Of `MODELS`.
        dtype: Compute dtype. Features keep their parameters in it, training in float32.
        batch: Images.
        size: Side of the images, or of the global crops, in pixels.
        drop_path: Share of the rows that leave out a branch in training.
    """

    task: str
    model: str
    dtype: Literal["float32", "bfloat16"]
    batch: int
    size: int
    drop_path: float = 0.0

    @property
    def local_size(self) -> int:
        """Of a local crop: 98 beside global ones of 224, as in the paper."""
        patch = MODELS[self.model].patch_size
        return max(patch, int(98 / 224 * self.size / patch + 0.5) * patch)

    @property
    def name(self) -> str:
        """The task in words."""
        return f"{self.task}, drop path {self.drop_path}" if self.drop_path else self.task


_TINY = ViTConfig(width=32, num_layers=2, num_heads=2, patch_size=14, image_size=56)
MODELS = {"tiny": _TINY, **{size: public(size) for size in ("s", "b", "l")}}


def backbone(setting: Setting) -> ViTConfig:
    """The backbone whose features are taken; its factors of branches are 1, so that all count."""
    registers = REGISTERS if "registers" in setting.task else 0
    # As the library resizes positions.
    manner: Literal["antialias", "size"] = "antialias" if registers else "size"
    return dataclasses.replace(
        MODELS[setting.model],
        registers=registers,
        interpolation=manner,
        layer_scale=1.0,
        dtype=setting.dtype,
    )


def images(setting: Setting) -> np.ndarray:
    """`[B, H, W, 3]` fp32, normalised."""
    shape = (setting.batch, setting.size, setting.size, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# --- Training ---

LOCAL_CROPS = 8


def network(setting: Setting, prototypes: int) -> NetworkConfig:
    """The network that trains; the global crops have the size of its table of positions."""
    small = setting.model == "tiny"
    head = HeadConfig(prototypes, 32, 64) if small else HeadConfig(prototypes, 256)
    vit = dataclasses.replace(
        MODELS[setting.model],
        image_size=setting.size,
        dtype=setting.dtype,
        drop_path=setting.drop_path,
        layer_scale=0.1,
    )
    return NetworkConfig(vit, head, head)


OBJECTIVE = ObjectiveConfig(freeze_last_layer_steps=0, momentum=(0.994, 0.994))
OPTIMIZER = OptimizerConfig(
    learning_rate=2e-4, schedule="constant", b2=0.999, weight_decay=0.04, clip_norm=3.0
)


def training_batch(setting: Setting) -> dict[str, np.ndarray]:
    """A batch as `dino.data` describes it, of noise."""
    rng = np.random.default_rng(1)
    crops = CropConfig(
        global_size=setting.size, local_size=setting.local_size, local_crops=LOCAL_CROPS
    )
    patch = MODELS[setting.model].patch_size
    side = setting.size // patch
    masks = GroupMasks(MaskConfig(), (side, side), setting.batch).draw(0, 0)
    shapes = batch_shapes(DataConfig(crops=crops), patch, setting.batch)
    crop = {
        name: rng.integers(0, 256, shapes[name].shape, np.uint8)
        for name in ("global_crops", "local_crops")
    }
    return crop | masks
