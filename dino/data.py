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

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from common.data.image_corpus import ImageConfig, open_images
from common.data.image_sources import HealthyImages, ImageSource
from common.data.pipeline import BatchIterator, batches
from common.data.rows import Batch, Rows
from common.errors import UserError
from dino.augmentation import CropConfig, MultiCrop
from dino.masking import GroupMasks, MaskConfig

MEAN = (0.485, 0.456, 0.406)  # Of ImageNet's red, green and blue, from 0 to 1.
STD = (0.229, 0.224, 0.225)
_CROP_STREAM = 0  # Keeps the random numbers of crops apart from those of masks.


@dataclass(frozen=True)
class DataConfig:
    """What a run is trained on.

    Attributes:
        images: Where the images are.
        crops: The views of an image.
        masks: The patches that the student does not see.
        threads: Threads that decode and crop the images of a batch; 0: one for each processor.
        prefetch: Batches made ahead.
        cache_megabytes: Memory for decoded images, so that a small set is decoded once.
    """

    images: ImageConfig = field(default_factory=ImageConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    threads: int = 0
    prefetch: int = 2
    cache_megabytes: int = 256

    def __post_init__(self) -> None:
        if min(self.threads, self.prefetch, self.cache_megabytes) < 0:
            raise ValueError("threads, prefetch and cache_megabytes are 0 or more")


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


class MultiCropRows(Rows):
    """Images as rows of training batches, other views and masks in every epoch.

    Args:
        images: The images.
        config: Views and masks.
        patch_size: Side of a patch in pixels.
        seed: Decides views and masks.
        batch: Images of a global batch.
    """

    def __init__(
        self, images: HealthyImages, config: DataConfig, *, patch_size: int, seed: int, batch: int
    ):
        self._images = images
        self._crop = MultiCrop(config.crops)
        self._masks = group_masks(config, patch_size, batch)
        self._seed = seed % 2**63  # NumPy takes no negative ones.
        self._pool = ThreadPoolExecutor(config.threads or os.cpu_count() or 1, "crops")

    def __len__(self) -> int:
        return len(self._images.source)

    def __getitem__(self, index: int) -> Batch:
        """The views of image `index` in the first place of a run; no masks, which groups have."""
        return self._views(index, 0)

    def training_batch(self, indices: np.ndarray, start: int, local_rows: np.ndarray) -> Batch:
        views = self._pool.map(self._views, indices.tolist(), (start + local_rows).tolist())
        masks = self._group_rows(start, local_rows)
        rows = list(views)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | masks

    def _views(self, index: int, place: int) -> Batch:
        image, _ = self._images.read(index)
        return self._crop(np.random.default_rng([self._seed, _CROP_STREAM, place]), image)

    def _group_rows(self, start: int, local_rows: np.ndarray) -> Batch:
        """Masks of the rows; a group is drawn whole, also where other processes have a part."""
        groups, within = np.divmod(local_rows, self._masks.images)
        parts = []
        for group in np.unique(groups):
            drawn = self._masks.draw(self._seed, start + int(group) * self._masks.images)
            parts.append({name: array[within[groups == group]] for name, array in drawn.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def training_images(config: DataConfig, source: ImageSource | None = None) -> HealthyImages:
    """The images of a run (`source`, if they are open already), its damaged ones counted."""
    if source is None:
        source = open_images(config.images)
    return HealthyImages(source, config.images.error_budget, config.cache_megabytes << 20)


def training_batches(
    config: DataConfig,
    *,
    patch_size: int,
    batch: int,
    seed: int,
    local_rows: np.ndarray | None = None,
    source: ImageSource | HealthyImages | None = None,
) -> BatchIterator:
    """Batches without end, as this module's beginning describes them, for the Trainer.

    Args:
        config: Images, views and masks.
        patch_size: Side of a patch in pixels.
        batch: Images of a global batch.
        seed: Of order, views and masks.
        local_rows: This process's rows of each batch, see `common.data.pipeline.batches`.
        source: The images, if they are open already.

    Raises:
        UserError: Images are missing, or crops, groups, batch and processes do not fit.
    """
    images = source if isinstance(source, HealthyImages) else training_images(config, source)
    rows = MultiCropRows(images, config, patch_size=patch_size, seed=seed, batch=batch)
    return batches(
        rows, global_batch=batch, seed=seed, local_rows=local_rows, prefetch=config.prefetch
    )
