"""Scenes: one white object of any place, size and direction on black, with noise.

letter-scenes   capital letters in the fonts that come with matplotlib
shape-scenes    eight geometric shapes
animal-scenes   real silhouettes of animals (needs an optional asset)

All objects are of one brightness and all backgrounds of another: a model that learns to tell images
from one another without labels would do so by colours first, and look at no shape.
"""

import functools

import numpy as np
from PIL import Image

from common.data.image_assets import animals
from common.data.image_sets import DrawnImages, Glyphs, Shapes
from common.data.image_sources import ImageArrays, Labelling

_TURN = 15.0  # Degrees, at most, either way.


class WhiteOnBlack(DrawnImages):
    """What scenes have in common."""

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        return np.zeros((self.size, self.size, 3))

    def _colour(self, rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
        return np.full(3, 255.0)


class LetterScenes(WhiteOnBlack, Glyphs):
    """Letters, a little turned, in many fonts; see `DrawnImages`."""

    def __init__(self, size: int, count: int, scale: tuple[float, float] = (0.35, 0.7)):
        super().__init__(size, count, scale)


class ShapeScenes(WhiteOnBlack, Shapes):
    """Shapes turned by any angle; see `DrawnImages`."""

    def __init__(self, size: int, count: int, scale: tuple[float, float] = (0.25, 0.6)):
        super().__init__(size, count, scale)


class AnimalScenes(WhiteOnBlack):
    """Animals, either way round and a little turned.

    Each has a silhouette of its own; classes take turns. As `image_assets.animals` has them, they
    lie so much alike that neighbours by raw pixels are nearly always of one class.

    Args:
        size: Side in pixels.
        count: Number of images; at most as many as there are silhouettes.
        scale: Least and largest extent of an animal, as a share of the side.

    Raises:
        UserError: The asset is not installed; the message says how it comes.
    """

    def __init__(self, size: int, count: int, scale: tuple[float, float] = (0.35, 0.7)):
        self._silhouettes, self._order = _silhouettes()
        self.names = tuple(self._silhouettes.classes)
        super().__init__(size, min(count, len(self._silhouettes)), scale)

    @functools.cached_property
    def labelling(self) -> Labelling:
        labels = self._silhouettes.labels
        assert labels is not None
        return Labelling(self.names, labels[self._order[: len(self)]])

    def _coverage(self, rng: np.random.Generator, index: int) -> np.ndarray:
        extent, (x, y) = self._extent(rng)
        shape = self._silhouettes[int(self._order[index])][..., 0]
        rows, columns = np.nonzero(shape > 127)
        shape = shape[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        if rng.random() < 0.5:
            shape = shape[:, ::-1]
        height, width = (max(2, round(side * extent / max(shape.shape))) for side in shape.shape)
        animal = Image.fromarray(shape).resize((width, height), Image.Resampling.BOX)
        canvas = Image.new("L", (2 * self.size, 2 * self.size))
        canvas.paste(animal, (self.size - width // 2, self.size - height // 2))
        turned = canvas.rotate(rng.uniform(-_TURN, _TURN), Image.Resampling.BILINEAR)
        left, top = round(self.size - x), round(self.size - y)
        box = (left, top, left + self.size, top + self.size)
        return np.asarray(turned.crop(box), np.float64) / 255


@functools.cache
def _silhouettes() -> tuple[ImageArrays, np.ndarray]:
    """The silhouettes, and their numbers in an order in which classes take turns."""
    found = animals()
    assert found.labels is not None
    of_class = [np.flatnonzero(found.labels == c) for c in range(len(found.classes))]
    rank = np.empty(len(found), np.int64)
    for numbers in of_class:
        rank[numbers] = np.arange(len(numbers))
    return found, np.lexsort((found.labels, rank))
