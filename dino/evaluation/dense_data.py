"""Images with a map: the class of every pixel, or its depth."""

import abc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.data.file_sources import CorpusFile
from common.data.image_corpus import DRAWN
from common.data.image_sets import DrawnImages
from common.data.image_sources import find_images
from common.data.image_transforms import turn_hue
from common.data.images import open_image, open_map
from common.data.sources import DamagedRecord
from common.errors import UserError, nearest

IGNORED = 255  # The label of pixels that count for nothing.
Pair = tuple[np.ndarray, np.ndarray]
"""An image uint8 [H, W, 3] and its map [H, W]: int32 labels, or float32 depths (0: unknown)."""


class DenseSource(abc.ABC):
    """Pairs of an image and its map, by number."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of pairs."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Pair:
        """Image and map.

        Raises:
            DamagedRecord: One cannot be read, or they are of different sizes.
        """


class PairedFolders(DenseSource):
    """A folder of images, and one of maps under the same names, whatever their suffixes.

    Args:
        images, maps: The folders.
        read: A map's file to its array.
        suffixes: What a map's file may end in.

    Raises:
        UserError: A folder is missing, or an image's map.
    """

    def __init__(
        self,
        images: str,
        maps: str,
        read: Callable[[Path], np.ndarray],
        suffixes: tuple[str, ...] = (".png", ".tif", ".tiff", ".npy"),
    ):
        self._images = find_images(images)
        root = Path(maps).expanduser()
        if not root.is_dir():
            raise UserError(f"no maps at '{maps}': a folder was expected there")
        self._read = read
        self._maps = [self._map_of(file, root, suffixes) for file in self._images]

    @staticmethod
    def _map_of(image: CorpusFile, root: Path, suffixes: tuple[str, ...]) -> Path:
        stem = os.path.splitext(image.name)[0]
        for suffix in suffixes:
            path = root / (stem + suffix)
            if path.is_file():
                return path
        raise UserError(f"{image.path!r} has no map '{stem}' ({', '.join(suffixes)}) in '{root}'")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Pair:
        image, values = open_image(self._images[index].path), self._read(self._maps[index])
        if values.shape != image.shape[:2]:
            raise DamagedRecord(
                f"'{self._maps[index]}' is {list(values.shape)}, its image "
                f"{list(image.shape[:2])} pixels"
            )
        return image, values


class DrawnLabels(DenseSource):
    """Drawn images: pixels of an object have its class and one, the background 0."""

    def __init__(self, images: DrawnImages, numbers: np.ndarray):
        self._images = images
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Pair:
        number = int(self._numbers[index])
        image, covered = self._images.draw(number)
        return image, np.where(covered, self._images.labelling.labels[number] + 1, 0).astype(
            np.int32
        )


class _Few(DenseSource):
    """Some pairs of another source."""

    def __init__(self, source: DenseSource, numbers: np.ndarray):
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Pair:
        return self._source[int(self._numbers[index])]


def spread(source: DenseSource, most: int | None) -> DenseSource:
    """At most `most` pairs at equal distances, or all of them."""
    if most is None or most >= len(source):
        return source
    return _Few(source, np.arange(most) * len(source) // most)


def read_labels(path: Path, reduce_zero: bool = False) -> np.ndarray:
    """A label map, int32 [H, W]. With `reduce_zero` label 0 is ignored and others are one less."""
    values = open_map(path)
    if values.dtype.kind not in "uib" or (values.size and values.min() < 0):
        raise DamagedRecord(f"'{path}': labels are whole numbers from 0")
    labels = values.astype(np.int32)
    if reduce_zero:
        labels = np.where((labels == 0) | (labels == IGNORED), IGNORED + 1, labels) - 1
    return labels


def read_depth(path: Path, scale: float) -> np.ndarray:
    """A depth map in metres, float32 [H, W]: a .npy file, or an image of depths times `scale`."""
    if path.suffix == ".npy":
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedRecord(f"'{path}': no whole .npy file ({error})") from error
        if values.ndim != 2 or values.dtype.kind not in "uif":
            raise DamagedRecord(f"'{path}': depths are numbers [H, W]")
    else:
        values = open_map(path) / scale
    depths = values.astype(np.float32)
    return np.where(np.isfinite(depths) & (depths > 0), depths, 0)


def open_labels(
    images: str, maps: str | None, *, reduce_zero: bool = False, drawn: tuple[int, int] = (32, 1024)
) -> DenseSource:
    """Labelled images: two folders, or drawn ones, whose two parts differ.

    Args:
        images: A folder; or "shapes:train", "glyphs:heldout" and the like.
        maps: The folder of label maps.
        reduce_zero: See `read_labels`.
        drawn: Side and number of drawn images; a quarter as many are held out.
    """
    kind, _, part = images.partition(":")
    if maps is not None:
        return PairedFolders(images, maps, lambda path: read_labels(path, reduce_zero))
    names = [f"{kind}:{part}" for kind in DRAWN for part in ("train", "heldout")]
    if images not in names:
        raise UserError(
            f"'{images}' needs a folder of label maps beside it{nearest(images, names)}"
        )
    size, count = drawn
    total = count + count // 4
    source = DRAWN[kind](size, total)
    numbers = np.arange(count) if part == "train" else np.arange(count, total)
    return DrawnLabels(source, numbers)


def resized(image: np.ndarray, values: np.ndarray, size: tuple[int, int]) -> Pair:
    """Both at another height and width: the image smoothly, the map by its nearest values."""
    swapped = size[::-1]
    picture = Image.fromarray(image).resize(swapped, Image.Resampling.BILINEAR)
    kind: Any = np.float32 if values.dtype.kind == "f" else np.int32
    labels = Image.fromarray(values.astype(kind)).resize(swapped, Image.Resampling.NEAREST)
    return np.asarray(picture), np.asarray(labels)


def random_crop(
    rng: np.random.Generator,
    image: np.ndarray,
    values: np.ndarray,
    size: tuple[int, int],
    fill: int,
) -> Pair:
    """A random part of both; what is too small is filled up, the image with 0, the map `fill`."""
    pad = [(0, max(0, wanted - have)) for wanted, have in zip(size, values.shape)]
    image = np.pad(image, [*pad, (0, 0)])
    values = np.pad(values, pad, constant_values=fill)
    top, left = (int(rng.integers(h - s + 1)) for h, s in zip(values.shape, size))
    window = slice(top, top + size[0]), slice(left, left + size[1])
    return image[window], values[window]


def photometric_distortion(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Each half the time: brightness by up to 32 of 255, contrast and saturation by a factor from
    0.5 to 1.5, hue by up to a tenth of the circle."""
    values = image.astype(np.float32)
    if rng.random() < 0.5:
        values = values + rng.uniform(-32, 32)
    if rng.random() < 0.5:
        values = values * rng.uniform(0.5, 1.5)
    if rng.random() < 0.5:
        grey = values @ np.array([0.299, 0.587, 0.114], np.float32)
        values = grey[..., None] + (values - grey[..., None]) * rng.uniform(0.5, 1.5)
    picture = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        picture = np.asarray(turn_hue(Image.fromarray(picture), rng.uniform(-0.1, 0.1)))
    return picture
