"""Training batches: the views of each image, and the masks of its global ones.

A batch of B images, all of whose arrays have B rows, so that they are divided among devices alike.
N is the number of patches of a global crop, row by row of its grid; V the number of local crops.

    global_crops    uint8 [B, 2, Hg, Wg, 3]   two global views
    local_crops     uint8 [B, V, Hl, Wl, 3]   the local views
    masks           bool [B, 2, N]            patches of the global views hidden from the student
    masked_indices  int32 [B, S]              the masked patches by number, padded; see below
    masked_weights  float32 [B, S]            1 / (masked patches in the same view), padding: 0

`normalize` turns crops into what the model takes; the step calls it, since a quarter of the bytes
goes to the devices so.

**The padded list.** Images are masked in groups of g (`MaskConfig.group`), g consecutive rows of
the batch. The g rows of `masked_indices`, one after another, are one list of g S places. Each holds
the number of a masked patch among the group's tokens [g, 2, N] flattened, `(image * 2 + view) * N +
patch`, ascending; behind them is padding: index 0 of weight 0. S depends on the configuration
alone, g S is at least `GroupMasks.upper_bound` (and exceeds it by less than g). So with G = B / g,

    tokens = patches.reshape(G, g * 2 * N, D)                      # patches [B, 2, N, D]
    indices = batch["masked_indices"].reshape(G, g * S)
    masked = jnp.take_along_axis(tokens, indices[..., None], 1)    # [G, g * S, D]
    valid = batch["masked_weights"] > 0                            # [B, S]

and no device needs another's tokens if its rows are whole groups.

**What a batch depends on.** The order of images on the seed (see `common.data.pipeline`); an
image's views on the seed and the image's place in that order, hence on epoch and image; a group's
masks on the seed and the place of its first image. Not on processes, devices or threads, nor on
what was read before: a run resumes exactly.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from dino.augmentation import CropConfig
from dino.masking import GroupMasks, MaskConfig

MEAN = (0.485, 0.456, 0.406)  # Of ImageNet's red, green and blue, from 0 to 1.
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataConfig:
    """What a run is trained on.

    Attributes:
        crops: The views of an image.
        masks: The patches that the student does not see.
    """

    crops: CropConfig = field(default_factory=CropConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)


def normalize(images: jax.Array) -> jax.Array:
    """Images [..., 3] from 0 to 255 with ImageNet's mean taken off, by its deviation: float32."""
    mean, std = jnp.array(MEAN, jnp.float32) * 255, jnp.array(STD, jnp.float32) * 255
    return (images.astype(jnp.float32) - mean) / std


def group_masks(config: DataConfig, patch_size: int, batch: int) -> GroupMasks:
    """What draws the masks of a batch's groups.

    Raises:
        UserError: Crops are not whole patches, or the batch is not whole groups.
    """
    for name in ("global_size", "local_size"):
        size = getattr(config.crops, name)
        if size % patch_size:
            raise UserError(f"crops.{name} {size} is not a multiple of the patch size {patch_size}")
    group = batch if config.masks.group is None else config.masks.group
    if batch % group:
        raise UserError(f"a batch of {batch} images is not whole groups of masks.group {group}")
    side = config.crops.global_size // patch_size
    return GroupMasks(config.masks, (side, side), group)


def batch_shapes(
    config: DataConfig, patch_size: int, batch: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a training batch of `batch` images; see the top of this module."""
    crops, masks = config.crops, group_masks(config, patch_size, batch)
    patches = masks.grid[0] * masks.grid[1]
    shapes = {
        "global_crops": ((2, crops.global_size, crops.global_size, 3), np.uint8),
        "local_crops": ((crops.local_crops, crops.local_size, crops.local_size, 3), np.uint8),
        "masks": ((2, patches), np.bool_),
        "masked_indices": ((masks.slots,), np.int32),
        "masked_weights": ((masks.slots,), np.float32),
    }
    return {name: jax.ShapeDtypeStruct((batch, *s), t) for name, (s, t) in shapes.items()}
