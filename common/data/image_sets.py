"""Sets of images that need no files beyond those of our dependencies: for demos and tests.

shapes   eight geometric shapes, drawn
glyphs   letters in the fonts that come with matplotlib, over pieces of its photograph

In both, place, size, angle and colours of an object vary so much that neighbours by raw pixels are
hardly ever of one class; and the object's own pixels are known, for dense tasks. An image depends
on its number alone.
"""

import abc
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.data.image_sources import ImageSource, Labelling
from common.data.images import open_image
from common.data.sources import digest, record_keys
from common.errors import UserError

_NOISE = 10.0  # Standard deviation of each value, of 255.
_CONTRAST = 90.0  # Least distance of an object's colour from its background's, of 255 √3.


class DrawnImages(ImageSource):
    """Images that are drawn when they are read: one object on a background.

    Args:
        size: Side in pixels.
        count: Number of images; their classes take turns.
        scale: Least and largest extent of an object, as a share of the side.

    Attributes:
        names: Of the classes.
    """

    names: tuple[str, ...]

    def __init__(self, size: int, count: int, scale: tuple[float, float] = (0.55, 0.85)):
        if size < 8 or count < 1:
            raise UserError(f"{count} drawn images of {size} pixels: draw 1 or more, from 8 pixels")
        self.size = size
        self.scale = scale
        self._count = count

    @functools.cached_property
    def labelling(self) -> Labelling:
        return Labelling(self.names, np.arange(self._count, dtype=np.int64) % len(self.names))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        return self.draw(index)[0]

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image `index`, uint8 [S, S, 3], and which of its pixels are the object's, bool [S, S]."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        rng = np.random.default_rng([index, *digest_number(type(self).__name__)])
        coverage = self._coverage(rng, index)
        background = self._background(rng)
        colour = self._colour(rng, background.mean((0, 1)))
        mixed = background + coverage[..., None] * (colour - background)
        mixed += rng.normal(0.0, _NOISE, mixed.shape)
        return np.clip(np.round(mixed), 0, 255).astype(np.uint8), coverage > 0.5

    def describe(self, index: int) -> str:
        return f"{type(self).__name__}, image {index}"

    def keys(self) -> np.ndarray:
        return record_keys([type(self).__name__], [len(self)])

    def fingerprint(self) -> str:
        return digest(type(self).__name__, f"{self.size} {len(self)} {self.scale}")

    @abc.abstractmethod
    def _coverage(self, rng: np.random.Generator, index: int) -> np.ndarray:
        """How much of each pixel the object of image `index` covers, float [S, S] from 0 to 1."""

    @abc.abstractmethod
    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """What lies behind it, float [S, S, 3] from 0 to 255."""

    def _colour(self, rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
        """A random colour that stands out from the mean [3] of the background."""
        while True:
            colour = rng.uniform(0, 255, 3)
            if np.linalg.norm(colour - background) > _CONTRAST:
                return colour

    def _extent(self, rng: np.random.Generator) -> tuple[float, tuple[float, float]]:
        """An object's extent, and its centre (x, y) such that it lies inside; both in pixels."""
        extent = rng.uniform(*self.scale) * self.size
        room = (self.size - extent) / 2
        centre = self.size / 2 + rng.uniform(-room, room, 2)
        return extent, (float(centre[0]), float(centre[1]))


class Shapes(DrawnImages):
    """Disks, squares and the like, turned by any angle, over waves of another colour."""

    names = ("disk", "square", "triangle", "ring", "plus", "star", "bar", "crescent")

    def _coverage(self, rng: np.random.Generator, index: int) -> np.ndarray:
        extent, centre = self._extent(rng)
        angle = rng.uniform(0, 2 * math.pi)
        fine = (np.arange(3 * self.size) + 0.5) / 3  # Three points to a pixel each way.
        x, y = (fine - centre[0]) * 2 / extent, (fine - centre[1])[:, None] * 2 / extent
        c, s = math.cos(angle), math.sin(angle)
        inside = _SHAPES[self.names[index % len(self.names)]](c * x + s * y, c * y - s * x)
        return inside.reshape(self.size, 3, self.size, 3).mean((1, 3))

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        angle, phase = rng.uniform(0, 2 * math.pi, 2)
        waves = rng.uniform(1.0, 4.0) * 2 * math.pi / self.size
        pixel = np.arange(self.size)
        wave = np.sin(waves * (math.cos(angle) * pixel + math.sin(angle) * pixel[:, None]) + phase)
        return rng.uniform(40, 215, 3) + wave[..., None] * rng.uniform(-40, 40, 3)


class Glyphs(DrawnImages):
    """Capital letters in many fonts, slightly turned, over small pieces of a photograph."""

    names = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

    def _coverage(self, rng: np.random.Generator, index: int) -> np.ndarray:
        extent, centre = self._extent(rng)
        letter = self.names[index % len(self.names)]
        font = _font(int(rng.integers(len(_font_files()))), max(4, round(extent)))
        side = 2 * self.size
        canvas = Image.new("L", (side, side))
        ImageDraw.Draw(canvas).text((side / 2, side / 2), letter, fill=255, font=font, anchor="mm")
        turned = canvas.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
        left, top = self.size - centre[0], self.size - centre[1]
        box = (round(left), round(top), round(left) + self.size, round(top) + self.size)
        return np.asarray(turned.crop(box), np.float64) / 255

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        photo = _photograph()
        side = min(int(rng.integers(self.size // 3, self.size)), *photo.shape[:2])
        top = int(rng.integers(photo.shape[0] - side + 1))
        left = int(rng.integers(photo.shape[1] - side + 1))
        piece = Image.fromarray(photo[top : top + side, left : left + side])
        piece = piece.resize((self.size, self.size), Image.Resampling.BILINEAR)
        # Its colours in another order, so that no hue goes with the photograph.
        return np.asarray(piece, np.float64)[..., rng.permutation(3)]


def digest_number(name: str) -> list[int]:
    """Two numbers that stand for a name, to seed with."""
    value = int(digest(name)[:16], 16)
    return [value >> 32, value & 0xFFFFFFFF]


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle = np.abs((np.arctan2(y, x) % (2 * math.pi / 5)) - math.pi / 5) / (math.pi / 5)
    return np.hypot(x, y) < 0.4 + 0.6 * angle**1.5


_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disk": lambda x, y: np.hypot(x, y) < 0.9,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.7,
    "triangle": lambda x, y: (y > -0.5) & (y < 1 - math.sqrt(3) * np.abs(x)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) < 0.2,
    "plus": lambda x, y: (
        (np.minimum(np.abs(x), np.abs(y)) < 0.25) & (np.maximum(np.abs(x), np.abs(y)) < 0.9)
    ),
    "star": _star,
    "bar": lambda x, y: (np.abs(x) < 0.95) & (np.abs(y) < 0.3),
    "crescent": lambda x, y: (np.hypot(x, y) < 0.9) & (np.hypot(x - 0.45, y) > 0.7),
}


@functools.cache
def _matplotlib_files() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path())


@functools.cache
def _font_files() -> tuple[Path, ...]:
    """The fonts that hold letters, by name."""
    folder = _matplotlib_files() / "fonts" / "ttf"
    names = [f"cm{kind}10.ttf" for kind in ("b", "r", "ss", "ti", "tt")]
    for pattern in ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf"):
        names += [path.name for path in folder.glob(pattern) if "Display" not in path.name]
    return tuple(folder / name for name in sorted(names, key=os.fsencode))


@functools.lru_cache(maxsize=1024)
def _font(number: int, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        str(_font_files()[number]), size, layout_engine=ImageFont.Layout.BASIC
    )


@functools.cache
def _photograph() -> np.ndarray:
    return open_image(_matplotlib_files() / "sample_data" / "grace_hopper.jpg")
