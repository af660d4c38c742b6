"""How an image gets a size that a backbone takes: whole patches, without distortion to speak of."""

import dataclasses
from typing import Literal

import numpy as np
from PIL import Image

from common.data.image_transforms import center_crop, resize_shorter_side
from common.errors import UserError
from common.models.vit import ViTConfig

FITS = ("crop", "resize", "pad")
# The published evaluation's: the shorter side to 256, of which 224 are cut out (5.4).
CUT = 224
RESIZED_BY = 256 / 224


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is done to an image before it is normalised.

    Attributes:
      patch_size: sides become multiples of it.
      fit: "crop" resizes the shorter side to 256 / 224 of `size` and cuts the middle square of
        `size` out, as the published evaluation does. "resize" and "pad" keep all of the image: they
        resize the shorter side to `size`, if there is one, and then stretch each side to the
        nearest multiple, or put colour around up to the next one.
      size: pixels; None (not for "crop"): as large as the image is.
      longest: most pixels of the longer side, for "resize" and "pad"; larger images are shrunk.
      color: of what is put around, 0 … 255.
    """

    patch_size: int
    fit: Literal["crop", "resize", "pad"] = "crop"
    size: int | None = CUT
    longest: int = 1036
    color: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        p, size = self.patch_size, self.size
        if self.fit not in FITS:
            raise UserError(f"fit must be one of {', '.join(FITS)}, not {self.fit!r}")
        if self.longest < p:
            raise UserError(f"longest must be at least a patch of {p} pixels, not {self.longest}")
        if size is not None and size < 1:
            raise UserError(f"size must be positive, not {size}")
        if self.fit == "crop" and size is None:
            raise UserError("fit=crop needs a size; to keep images as they are, resize or pad them")
        if self.fit == "crop" and size is not None and size % p:
            near = sorted({max(size // p, 1) * p, -(-size // p) * p})
            raise UserError(
                f"size {size} is no multiple of the patch size {p}: take "
                f"{' or '.join(map(str, near))}, or resize or pad images instead (fit)"
            )

    def sizes_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what an image of this size becomes."""
        if self.fit == "crop":
            assert self.size is not None
            return self.size, self.size
        p = self.patch_size
        high, wide = self._scaled(height, width)
        if self.fit == "pad":
            return -(-high // p) * p, -(-wide // p) * p
        return max(round(high / p), 1) * p, max(round(wide / p), 1) * p

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 `[H, W, 3]` -> uint8 of whole patches; resizing averages, bicubically."""
        picture = Image.fromarray(image)
        if self.fit == "crop":
            assert self.size is not None
            resized = resize_shorter_side(picture, int(self.size * RESIZED_BY))
            return np.asarray(center_crop(resized, self.size))
        high, wide = self.sizes_of(*image.shape[:2])
        if self.fit == "resize":
            return np.asarray(_resized(picture, high, wide))
        scaled = _resized(picture, *self._scaled(*image.shape[:2]))
        result = np.empty((high, wide, 3), np.uint8)
        result[...] = self.color
        # As the published segmentation and depth code pads: half of it before the image.
        top, left = (high - scaled.height) // 2, (wide - scaled.width) // 2
        result[top : top + scaled.height, left : left + scaled.width] = np.asarray(scaled)
        return result

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """The sides before they are made whole patches."""
        scale = 1.0 if self.size is None else self.size / min(height, width)
        scale = min(scale, self.longest / max(height, width))
        return max(round(height * scale), 1), max(round(width * scale), 1)


def default_size(config: ViTConfig) -> int:
    """What images are cut to by default: 224 pixels, or less if the model was made for less."""
    size = min(CUT, config.image_size)
    return max(size // config.patch_size, 1) * config.patch_size


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    if (image.height, image.width) == (height, width):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)
