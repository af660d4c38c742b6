"""One configuration for every kind of set of images, and the function that opens it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from common.data import image_assets
from common.data.file_sources import find_files
from common.data.image_records import ImageRecords, PreparedImages
from common.data.image_scenes import AnimalScenes, LetterScenes, ShapeScenes
from common.data.image_sets import Glyphs, Shapes
from common.data.image_sources import (
    Decoding,
    ImageFolder,
    ImageSelection,
    ImageSource,
    find_images,
    open_arrays,
)
from common.data.images import WHITE
from common.data.record_sources import tfds_folder
from common.data.sources import selected
from common.errors import UserError, nearest

BUILT_IN = (
    "shapes", "glyphs", "shape-scenes", "letter-scenes", "animal-scenes", "animals", "digits",
    "faces", "small-digits",
)  # fmt: skip
KINDS = ("folder", "arrays", "array_record", "tfds", *BUILT_IN)
DRAWN: Mapping[str, type[Shapes | Glyphs | AnimalScenes]] = {
    "shapes": Shapes,
    "glyphs": Glyphs,
    "shape-scenes": ShapeScenes,
    "letter-scenes": LetterScenes,
    "animal-scenes": AnimalScenes,
}
_ASSETS = {
    "animals": image_assets.animals,
    "digits": image_assets.digits,
    "faces": image_assets.faces,
    "small-digits": image_assets.small_digits,
}


@dataclass(frozen=True)
class ImageConfig:
    """Where images come from and which of them to take.

    Attributes:
        kind: "folder" (of image files), "arrays" (.npz or .npy), "array_record" (of encoded
            images, see `ImageRecords`), "tfds" (prepared), or a set that comes with packages:
            "shapes" or "glyphs" (see `common.data.image_sets`), "shape-scenes" or "letter-scenes"
            (see `common.data.image_scenes`), and with packages that not every machine has,
            "animal-scenes", "animals", "digits", "small-digits" or "faces" (see
            `common.data.image_assets`).
        path: A folder or file; for array_record also a glob pattern, for tfds the folder of the
            prepared version. Sets that come with packages have none.
        classes: For a folder: "auto", "folders" or "none", see `ImageFolder`.
        field: The tfds feature with the image.
        label_field: The tfds feature with the label; one that is not there means no labels.
        subset: For tfds: which of the prepared splits to read.
        drawn_size: Side of drawn images in pixels.
        drawn_count: How many are drawn.
        split: "train", "heldout" or "all" of what was found; the first two are disjoint.
        heldout_fraction: Share of the images that "heldout" gets and "train" does not.
        max_images: Takes at most this many images, spread over the set.
        error_budget: How many images may be damaged and skipped: below 1 a fraction of them, from
            1 on a number.
        background: Red, green and blue under transparent images.
        stretch: Scale images of more than 8 bits from their own least and largest value.
    """

    kind: str = "folder"
    path: str | None = None
    classes: str = "auto"
    field: str = "image"
    label_field: str = "label"
    subset: str = "train"
    drawn_size: int = 32
    drawn_count: int = 16_384
    split: str = "train"
    heldout_fraction: float = 0.0
    max_images: int | None = None
    error_budget: float = 0.01
    background: tuple[int, int, int] = WHITE
    stretch: bool = False


def open_images(config: ImageConfig) -> ImageSource:
    """Opens the images that `config` describes.

    Raises:
        UserError: They are missing, unreadable, of another kind, or none are in this split.
    """
    if not all(0 <= value <= 255 for value in config.background):
        raise UserError(f"background {config.background} is not three numbers from 0 to 255")
    source = _open_kind(config)
    if not len(source):
        raise UserError(f"{_name(config)} holds no images")
    indices = selected(
        source.keys, config.split, config.heldout_fraction, config.max_images, "max_images"
    )
    if indices is None:
        return source
    if not len(indices):
        raise UserError(
            f"{_name(config)} holds no images in split '{config.split}' ({len(source)} in all); "
            "change heldout_fraction"
        )
    label = f"{config.split}:{config.heldout_fraction}:{config.max_images}"
    return ImageSelection(source, indices, label)


def _open_kind(config: ImageConfig) -> ImageSource:
    decoding = Decoding(config.background, config.stretch)
    if config.kind == "folder":
        if config.classes not in ("auto", "folders", "none"):
            raise UserError(f"classes is '{config.classes}'; use auto, folders or none")
        return ImageFolder(find_images(config.path), decoding, config.classes)
    if config.kind == "arrays":
        return open_arrays(config.path, decoding)
    if config.kind in DRAWN:
        return DRAWN[config.kind](config.drawn_size, config.drawn_count)
    if config.kind == "array_record":
        return ImageRecords(find_files(config.path, "*.array_record*"), decoding)
    if config.kind == "tfds":
        folder = tfds_folder(config.path)
        return PreparedImages(folder, config.field, config.label_field, config.subset, decoding)
    if config.kind in _ASSETS:
        return _ASSETS[config.kind]()
    raise UserError(f"no kind of images '{config.kind}'{nearest(config.kind, KINDS)}")


def _name(config: ImageConfig) -> str:
    return f"the set of images '{config.kind}'" + (f" at '{config.path}'" if config.path else "")


def parse_images(text: str) -> ImageConfig:
    """The configuration that a short name stands for, as commands take it.

    A folder of images (or of a prepared tfds dataset, `FOLDER@SUBSET` for another subset than
    "train"), an .npz or .npy file, array_record files (by a name with "array_record" in it), or a
    set that comes with packages, `NAME`, `NAME:train` or `NAME:heldout`.
    """
    name, _, split = text.partition(":")
    if name in BUILT_IN and split in ("", "train", "heldout"):
        share = 0.2 if split else 0.0
        return ImageConfig(name, split=split or "all", heldout_fraction=share)
    path, at, subset = text.rpartition("@")
    if not at or os.path.exists(os.path.expanduser(text)):
        path, subset = text, "train"
    if os.path.isfile(os.path.join(os.path.expanduser(path), "dataset_info.json")):
        return ImageConfig("tfds", path, subset=subset, split="all")
    if "array_record" in os.path.basename(text):
        return ImageConfig("array_record", text, split="all")
    if text.endswith((".npz", ".npy")):
        return ImageConfig("arrays", text, split="all")
    return ImageConfig("folder", text, split="all")
