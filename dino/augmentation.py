"""Multi-crop augmentation: two global and several local views of an image."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from common.data.image_transforms import (
    color_jitter,
    gaussian_blur,
    grayscale,
    random_flip,
    random_resized_crop,
    solarize,
)

# How often the first and second global crop and the local ones are blurred.
BLUR = {"as_trained": (0.0, 0.9, 0.5), "intended": (1.0, 0.1, 0.5)}


@dataclass(frozen=True)
class CropConfig:
    """The views of an image, as DINOv2 was trained.

    Attributes:
        global_size: Side of a global crop in pixels.
        global_scale: Least and largest share of the image's area in a global crop.
        local_size: Side of a local crop in pixels.
        local_scale: The same share for a local crop.
        local_crops: How many local crops an image has.
        aspect: Least and largest width by height of what is cut out.
        flip: Probability of a horizontal flip.
        jitter: Probability that brightness, contrast, saturation and hue change at all.
        brightness, contrast, saturation: Largest change of each as a factor's distance from 1.
        hue: Largest turn of the hue, 1 being the whole circle.
        grayscale: Probability that the colours go.
        blur: How often crops are blurred: first global, second global, local. "as_trained" is
            0, 0.9 and 0.5, which the published weights have seen; "intended" is 1, 0.1 and 0.5,
            which the recipe describes and the reference's code inverts.
        blur_sigma: Least and largest deviation of the blur in pixels; the paper's is for crops of
            224 pixels, of which two are little.
        solarize: Probability, for the second global crop, that values from 128 up are inverted.
    """

    global_size: int = 224
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_size: int = 98
    local_scale: tuple[float, float] = (0.05, 0.32)
    local_crops: int = 8
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: Literal["as_trained", "intended"] = "as_trained"
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.2

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is not a probability")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} {low}, {high} is not two ascending shares of an area")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma {self.blur_sigma} is not two ascending numbers above 0")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect {self.aspect} is not two ascending numbers above 0")
        if min(self.global_size, self.local_size) < 5 or self.local_crops < 0:
            raise ValueError("crops have at least 5 pixels, and there are not fewer than none")
        if min(self.brightness, self.contrast, self.saturation) < 0 or not 0 <= self.hue <= 0.5:
            raise ValueError("colours change by 0 or more, the hue by at most 0.5")


class MultiCrop:
    """Draws the views of an image; see `CropConfig`."""

    def __init__(self, config: CropConfig):
        self.config = config
        first, second, local = BLUR[config.blur]
        self._views = [
            _View(config.global_size, config.global_scale, first, 0.0),
            _View(config.global_size, config.global_scale, second, config.solarize),
            *[_View(config.local_size, config.local_scale, local, 0.0)] * config.local_crops,
        ]

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> dict[str, np.ndarray]:
        """Views of `image` [H, W, 3]: `global_crops` uint8 [2, Hg, Wg, 3] and `local_crops` uint8
        [V, Hl, Wl, 3]."""
        config = self.config
        picture = Image.fromarray(image)
        views = [self._draw(rng, picture, view) for view in self._views]
        local = np.empty((config.local_crops, config.local_size, config.local_size, 3), np.uint8)
        for place, view in zip(local, views[2:], strict=True):
            place[...] = view
        return {"global_crops": np.stack(views[:2]), "local_crops": local}

    def _draw(self, rng: np.random.Generator, image: Image.Image, view: "_View") -> np.ndarray:
        config = self.config
        image = random_resized_crop(rng, image, view.size, view.scale, config.aspect)
        image = random_flip(rng, image, config.flip)
        if rng.random() < config.jitter:
            image = color_jitter(
                rng, image, config.brightness, config.contrast, config.saturation, config.hue
            )
        if rng.random() < config.grayscale:
            image = grayscale(image)
        if rng.random() < view.blur:
            image = gaussian_blur(image, rng.uniform(*config.blur_sigma))
        if rng.random() < view.solarize:
            image = solarize(image)
        return np.asarray(image)


@dataclass(frozen=True)
class _View:
    """What differs between views: side, share of the image, and how often the last two happen."""

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float
