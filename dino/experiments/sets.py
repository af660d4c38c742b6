"""The images of the experiments, drawn once for all of them, with the class of every pixel."""

import dataclasses

import numpy as np

from common.data.image_corpus import DRAWN, ImageConfig
from common.data.image_sources import ImageArrays
from common.data.sources import selected
from dino.evaluation.dense_data import DenseSource, Pair


@dataclasses.dataclass(frozen=True)
class DrawnSet:
    """Images of one split.

    Attributes:
      pixels: uint8 `[N, S, S, 3]`.
      covered: bool `[N, S, S]`, the object's pixels.
      labels: int64 `[N]`.
      classes: their names.
    """

    pixels: np.ndarray
    covered: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @property
    def images(self) -> ImageArrays:
        """As a set of images."""
        return ImageArrays(self.pixels, self.labels, classes=self.classes)

    def first(self, count: int) -> "DrawnSet":
        """The first `count` images (classes take turns)."""
        return DrawnSet(
            self.pixels[:count], self.covered[:count], self.labels[:count], self.classes
        )


def drawn_set(config: ImageConfig, split: str, most: int | None = None) -> DrawnSet:
    """Draws the images of a split, at most the first `most`."""
    source = DRAWN[config.kind](config.drawn_size, config.drawn_count)
    numbers = selected(source.keys, split, config.heldout_fraction, None, "max_images")
    numbers = np.arange(len(source)) if numbers is None else numbers
    numbers = numbers[:most]
    pairs = [source.draw(int(number)) for number in numbers]
    pixels, covered = (np.stack(part) for part in zip(*pairs, strict=True))
    return DrawnSet(pixels, covered, source.labelling.labels[numbers], source.names)


class PixelClasses(DenseSource):
    """The class of each pixel: that of the object, from 1 on, and 0 behind it."""

    def __init__(self, images: DrawnSet):
        self._images = images

    def __len__(self) -> int:
        return len(self._images.labels)

    def __getitem__(self, index: int) -> Pair:
        classes = np.where(self._images.covered[index], self._images.labels[index] + 1, 0)
        return self._images.pixels[index], classes.astype(np.int32)
