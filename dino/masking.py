"""Block masks of iBOT: which patches of the global crops the student does not see.

Images are masked by groups. Of a group of g images, with two global crops each, a share (half) of
the 2g crops is masked, one crop in each of as many equal steps of the masked share from `ratio[0]`
to `ratio[1]`; so the number of masked patches in a group hardly varies, and never exceeds a bound
that is known beforehand: arrays padded to it keep one shape. The reference's group is the part of
the batch on one device.
"""

import math
from dataclasses import dataclass

import numpy as np

_TRIES = 10
_SMALLEST_BLOCK = 4  # Patches.
_MASK_STREAM = 1  # Keeps the random numbers of masks apart from those of crops.


@dataclass(frozen=True)
class MaskConfig:
    """Which crops are masked, and how much of them.

    Attributes:
        probability: Share of a group's global crops that are masked.
        ratio: Least and largest masked share of a masked crop.
        largest_block: Most patches of one block, as a share of the crop's.
        aspect: Least height by width of a block; the largest is its inverse.
        group: Images masked together; it must divide the batch. None: the whole batch. Set it to
            the images of one device, or a part, and no device needs the tokens of another.
    """

    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    largest_block: float = 0.5
    aspect: float = 0.3
    group: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability {self.probability} is not between 0 and 1")
        if not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
            raise ValueError(f"ratio {self.ratio} is not two ascending numbers from 0 to 1")
        if not 0 < self.largest_block <= 1:
            raise ValueError(f"largest_block {self.largest_block} is not between 0 and 1")
        if not 0 < self.aspect <= 1:
            raise ValueError(f"aspect {self.aspect} is not between 0 and 1")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group {self.group} is not at least 1")


class GroupMasks:
    """Masks of one group of images after another.

    Args:
        config: What is masked.
        grid: Rows and columns of patches of a global crop.
        images: Images g in a group.
        crops: Global crops of each.

    Attributes:
        upper_bound: Most masked patches that a group can have.
        slots: `ceil(upper_bound / g)`: places for masked patches in each row of the padded list.
    """

    def __init__(self, config: MaskConfig, grid: tuple[int, int], images: int, crops: int = 2):
        self.config = config
        self.grid = grid
        self.images = images
        self.crops = crops
        patches = grid[0] * grid[1]
        masked = int(images * crops * config.probability)
        self._thresholds = np.linspace(*config.ratio, masked + 1)
        self.upper_bound = sum(int(patches * high) for high in self._thresholds[1:])
        self.slots = -(-self.upper_bound // images)

    def draw(self, seed: int, place: int) -> dict[str, np.ndarray]:
        """Masks of the group that begins at `place` of the run's sequence of images.

        Returns:
            `masks` bool [g, crops, N]; `masked_indices` int32 and `masked_weights` float32
            [g, slots], see `dino.data`.
        """
        rng = np.random.default_rng([seed, _MASK_STREAM, place])
        shape = (self.images, self.crops, self.grid[0] * self.grid[1])
        masks = np.zeros((shape[0] * shape[1], shape[2]), bool)
        where = rng.permutation(len(masks))
        for crop, low, high in zip(where, self._thresholds, self._thresholds[1:], strict=False):
            target = int(shape[2] * rng.uniform(low, high))
            masks[crop] = block_mask(rng, self.grid, target, self.config).ravel()
        return {"masks": masks.reshape(shape), **self._listed(masks)}

    def _listed(self, masks: np.ndarray) -> dict[str, np.ndarray]:
        """The masked patches by number, and one by how many there are in their crop; padded."""
        size = self.images * self.slots
        indices, weights = np.zeros(size, np.int32), np.zeros(size, np.float32)
        found = np.flatnonzero(masks)
        counts = masks.sum(-1)
        indices[: len(found)] = found
        weights[: len(found)] = 1.0 / counts[found // masks.shape[1]]
        return {
            "masked_indices": indices.reshape(self.images, self.slots),
            "masked_weights": weights.reshape(self.images, self.slots),
        }


def block_mask(
    rng: np.random.Generator, grid: tuple[int, int], target: int, config: MaskConfig
) -> np.ndarray:
    """Rectangles placed at random until `target` patches are covered, or none fits: bool [h, w]."""
    mask = np.zeros(grid, bool)
    largest = config.largest_block * grid[0] * grid[1]
    left = target
    while left > 0 and (added := _add_block(rng, mask, min(left, largest), config.aspect)):
        left -= added
    return mask


def _add_block(rng: np.random.Generator, mask: np.ndarray, most: float, aspect: float) -> int:
    """Covers one rectangle in place; returns how many patches it added, 0 if none was found."""
    height, width = mask.shape
    for _ in range(_TRIES):
        area = _SMALLEST_BLOCK + rng.random() * (most - _SMALLEST_BLOCK)
        ratio = math.exp(rng.uniform(math.log(aspect), -math.log(aspect)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h >= height or w >= width:
            continue
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        block = mask[top : top + h, left : left + w]
        added = h * w - int(block.sum())
        if 0 < added <= most:
            block[...] = True
            return added
    return 0
