"""Images by number, from folders and arrays: what every set of images looks like to the rest.

As for documents (`sources`), access is random, so that order, sharding and resuming are arithmetic
on indices. `image_records` reads record files, `image_sets` holds built-in sets, and
`image_corpus.open_images` picks one from a configuration.
"""

import abc
import functools
import logging
import os
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.file_sources import CorpusFile, files_digest
from common.data.images import SUFFIXES, WHITE, open_image, to_rgb, to_uint8
from common.data.sources import DamagedRecord, digest, record_keys
from common.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoding:
    """How encoded images become arrays; see `common.data.images.open_image`."""

    background: tuple[int, int, int] = WHITE
    stretch: bool = False


@dataclass(frozen=True)
class Labelling:
    """Classes by name, in the order of their numbers, and the number of each image's, int64 [N]."""

    classes: tuple[str, ...]
    labels: np.ndarray


class ImageSource(abc.ABC):
    """A fixed sequence of images, with or without labels."""

    @functools.cached_property
    def labelling(self) -> Labelling | None:
        """Classes and labels, or None. Read when first asked for, which training never does."""
        return None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; empty without labels."""
        return self.labelling.classes if self.labelling else ()

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [N], or None where images have no label."""
        return self.labelling.labels if self.labelling else None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records, damaged ones included."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> np.ndarray:
        """Image `index`, uint8 [H, W, 3].

        Raises:
            DamagedRecord: It cannot be read.
        """

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """Where image `index` comes from, for a person."""

    @abc.abstractmethod
    def keys(self) -> np.ndarray:
        """One uint64 per record that depends on its place in the set, not on the machine."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when the records may have changed."""


class ImageSelection(ImageSource):
    """Some images of another source, in the same order."""

    def __init__(self, source: ImageSource, indices: np.ndarray, label: str):
        self._source = source
        self._indices = indices
        self._label = label

    @functools.cached_property
    def labelling(self) -> Labelling | None:
        whole = self._source.labelling
        return whole and Labelling(whole.classes, whole.labels[self._indices])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._source[int(self._indices[index])]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))

    def keys(self) -> np.ndarray:
        return self._source.keys()[self._indices]

    def fingerprint(self) -> str:
        return digest(self._source.fingerprint(), self._label)


def find_images(path: str | os.PathLike[str] | None) -> list[CorpusFile]:
    """Lists the image files under a folder, sorted by name; or the one file that `path` is.

    Files are known by their suffix. Hidden names are left out, links to folders not followed, and
    links to files outside of the folder left out with a warning.

    Raises:
        UserError: Nothing is there, or no image.
    """
    if not path or "\0" in str(path):
        raise UserError(f"no folder of images at {str(path)!r}")
    root = os.path.expanduser(path)
    if os.path.isfile(root):
        return [CorpusFile(root, os.path.basename(root))]
    if not os.path.isdir(root):
        raise UserError(f"no images at '{path}': a folder was expected there")
    inside = os.path.join(os.path.realpath(root), "")
    files, outside = [], 0
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            file = os.path.join(folder, name)
            if os.path.islink(file) and not os.path.realpath(file).startswith(inside):
                outside += 1
                continue
            files.append(CorpusFile(file, Path(os.path.relpath(file, root)).as_posix()))
    if outside:
        log.warning("%s: %d links to images outside of it are left out", path, outside)
    if not files:
        raise UserError(f"no images under '{path}' (names that end in {', '.join(SUFFIXES)})")
    return sorted(files, key=lambda file: os.fsencode(file.name))


class ImageFolder(ImageSource):
    """Files of images. If every one lies in a subfolder, the topmost folder is its class.

    Args:
        files: As `find_images` lists them.
        decoding: How they are decoded.
        classes: "auto" takes folders for classes where there are no images beside them, "folders"
            asks for that, "none" does not.

    Raises:
        UserError: There should be folders, and there is an image beside them.
    """

    def __init__(
        self, files: list[CorpusFile], decoding: Decoding | None = None, classes: str = "auto"
    ):
        self._files = files
        self._decoding = decoding or Decoding()
        parts = [file.name.split("/") for file in files]
        loose = next((file for file, part in zip(files, parts) if len(part) == 1), None)
        if classes == "folders" and loose:
            raise UserError(f"{loose.path!r} lies in no class folder, as every image should")
        self._folders = None if loose or classes == "none" else [part[0] for part in parts]

    @functools.cached_property
    def labelling(self) -> Labelling | None:
        return None if self._folders is None else labelling_by_name(self._folders)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> np.ndarray:
        settings = self._decoding
        return open_image(
            self._files[index].path, background=settings.background, stretch=settings.stretch
        )

    def describe(self, index: int) -> str:
        return repr(self._files[index].path)

    def keys(self) -> np.ndarray:
        return record_keys([file.name for file in self._files], [1] * len(self))

    def fingerprint(self) -> str:
        return files_digest(self._files, "images", repr(self._decoding))


class ImageArrays(ImageSource):
    """Images in one array: [N, H, W] grey or [N, H, W, C] of 1 to 4 channels.

    Args:
        images: uint8, or what `to_uint8` scales.
        labels: Integers [N], or None.
        classes: Names of the classes; by default their numbers.
        name: What the array is called in messages and keys.
        decoding: Background and scaling.

    Raises:
        UserError: Shapes, types or numbers do not fit.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        classes: Sequence[str] | None = None,
        name: str = "images",
        decoding: Decoding | None = None,
    ):
        channels = images.shape[3] if images.ndim == 4 else 1
        if images.ndim not in (3, 4) or not 1 <= channels <= 4 or 0 in images.shape[1:]:
            raise UserError(
                f"{name} has shape {images.shape}; images are [N, H, W] or [N, H, W, 1 to 4]"
            )
        if images.dtype.kind not in "buif":
            raise UserError(f"{name} has {images.dtype} values; use numbers")
        self._images = images
        self._name = name
        self._decoding = decoding or Decoding()
        self._given = None
        if labels is not None:
            checked = _checked_labels(labels, len(images), name)
            count = int(checked.max(initial=-1)) + 1
            names = tuple(map(str, range(count) if classes is None else classes))
            if len(names) < count:
                raise UserError(f"{name}: label {count - 1} for {len(names)} classes")
            self._given = Labelling(names, checked)

    @functools.cached_property
    def labelling(self) -> Labelling | None:
        return self._given

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            values = to_uint8(np.asarray(self._images[index]), self._decoding.stretch)
        except ValueError as error:
            raise DamagedRecord(f"{self.describe(index)}: {error}") from error
        return to_rgb(values, self._decoding.background)

    def describe(self, index: int) -> str:
        return f"{self._name}, image {index}"

    def keys(self) -> np.ndarray:
        return record_keys(["images"], [len(self)])

    def fingerprint(self) -> str:
        # All of a small array, a spread of the images of a large one.
        step = max(1, len(self) // 1024)
        content = np.ascontiguousarray(self._images[::step]).tobytes()
        return digest("arrays", repr(self._images.shape), repr(self._decoding), content)


def open_arrays(path: str | None, decoding: Decoding | None = None) -> ImageArrays:
    """Reads images from an .npz file (arrays `images` and, where there are some, `labels`) or an
    .npy file, which is not read before it is needed.

    Raises:
        UserError: It is no such file.
    """
    file = os.path.expanduser(path or "")
    if "\0" in file or not os.path.isfile(file):
        raise UserError(f"no file at '{path}': an .npz or .npy file of images was expected there")
    try:
        if not zipfile.is_zipfile(file):
            images = np.load(file, mmap_mode="r", allow_pickle=False)
            return ImageArrays(images, name=repr(file), decoding=decoding)
        with np.load(file, allow_pickle=False) as arrays:
            if "images" not in arrays:
                raise UserError(f"'{path}' has no array 'images'; it has {', '.join(arrays)}")
            labels = arrays.get("labels")
            images = arrays["images"]
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own.
        raise UserError(f"'{path}' is no whole file of arrays: {error}") from error
    return ImageArrays(images, labels, name=repr(file), decoding=decoding)


class HealthyImages:
    """Reads images by number, another one in the place of each damaged one, within a budget.

    The substitute is the next image that can be read, so that what a number gives depends on the
    source alone. Every damaged image is named once in the log. Threads may share it.

    Args:
        source: Where the images come from.
        error_budget: How many may be damaged: below 1 a fraction of the source, from 1 on a number.
        cache_bytes: Decoded images are kept until they take so much memory: a small set is decoded
            once, not in every epoch.

    Attributes:
        damaged: What is wrong with each damaged image met so far, by number.
    """

    def __init__(self, source: ImageSource, error_budget: float = 0.0, cache_bytes: int = 0):
        if error_budget < 0:
            raise UserError(f"error_budget is {error_budget}; use 0 or more")
        self.source = source
        self.damaged: dict[int, str] = {}
        self._kept: dict[int, np.ndarray] = {}
        self._room = cache_bytes
        self._allowed = int(error_budget if error_budget >= 1 else error_budget * len(source))
        self._lock = threading.Lock()

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Returns image `index`, or the next good one after it, and its number.

        Raises:
            UserError: More images are damaged than the budget allows.
        """
        for number in (*range(index, len(self.source)), *range(index)):
            if number in self.damaged:
                continue
            try:
                return self._image(number), number
            except DamagedRecord as error:
                self._count(number, error)
        raise UserError(f"none of {len(self.source)} images can be read: {self.damaged[index]}")

    def _image(self, number: int) -> np.ndarray:
        kept = self._kept.get(number)
        if kept is not None:
            return kept
        image = self.source[number]
        with self._lock:
            if image.nbytes <= self._room and number not in self._kept:
                self._room -= image.nbytes
                self._kept[number] = image
        return image

    def _count(self, number: int, error: DamagedRecord) -> None:
        with self._lock:
            if number in self.damaged:
                return
            self.damaged[number] = str(error)
            count = len(self.damaged)
        if count > self._allowed:
            raise UserError(self._refusal(error, count)) from error
        log.warning("%s (skipped; %d of %d allowed)", error, count, self._allowed)

    def _refusal(self, error: DamagedRecord, count: int) -> str:
        if not self._allowed:
            return f"{error} (repair or remove it, or set error_budget to skip damaged images)"
        return (
            f"{error} (damaged image number {count} of {len(self.source)} images;"
            f" error_budget allows {self._allowed})"
        )


def labelling_by_name(names: Sequence[str]) -> Labelling:
    """Classes in the order of their bytes, and labels, of images whose classes are `names`."""
    classes = tuple(sorted(set(names), key=os.fsencode))
    number = {name: i for i, name in enumerate(classes)}
    return Labelling(classes, np.array([number[name] for name in names], np.int64))


def _checked_labels(labels: Any, images: int, name: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{name}: labels are {labels.dtype} {labels.shape}; "
            f"one whole number for each of {images} images was expected"
        )
    if (labels < 0).any():
        raise UserError(f"{name}: labels are numbers of classes, from 0")
    return labels.astype(np.int64)
