"""`python -m dino.embed`: features of a folder of images, and pictures of what they show."""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from common.checkpoint.fingerprint import fingerprints
from common.data.embedding_folder import FEATURES, INDEX, EmbeddingFolder
from common.data.file_sources import find_files
from common.data.image_records import ImageRecords
from common.data.image_sources import Decoding, ImageFolder, ImageSource, find_images, open_arrays
from common.data.images import image_size
from common.data.sources import DamagedRecord
from common.errors import UserError
from common.launch import Run, launch
from common.sharding import make_mesh
from dino.checkpoint import load
from dino.embedding import WHATS, Embedder, Embedding, embed_images
from dino.model import Backbone
from dino.pictures import attention_colors, principal_colors, side_by_side
from dino.preparation import FITS, Preparation, default_size

EXAMPLES = [
    "python -m dino.embed --checkpoint=dinov2_vitb14_pretrain.pth --images=photos "
    "--output=features",
    "python -m dino.embed --checkpoint=facebook/dinov2-with-registers-large --images=photos "
    "--output=dense --what=patches --fit=resize --size=518 --stored_dtype=float16",
    "python -m dino.embed --checkpoint=runs/dino-train-cpu --images=photos --output=seen "
    "--pictures=8 --attention_maps=8",
]
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "what to load: anything dino.load takes", required=True, **_own
)
IMAGES = flags.DEFINE_string(
    "images", None, "a folder of image files, an .npz or .npy of images, or array_record files",
    required=True, **_own,
)  # fmt: skip
OUTPUT = flags.DEFINE_string(
    "output", None, "the folder to write; the same command goes on where it stopped",
    required=True, **_own,
)  # fmt: skip
WHAT: Any = flags.DEFINE_enum(
    "what", "cls", WHATS,
    "what is kept of an image: its class token, every patch, or the mean of the patches", **_own,
)  # fmt: skip
LAYERS = flags.DEFINE_integer("layers", 1, "of how many of the last blocks, side by side", **_own)
FIT: Any = flags.DEFINE_enum(
    "fit", "crop", FITS,
    "how images become whole patches: crop the middle square, resize to the nearest multiple, or "
    "pad to the next", **_own,
)  # fmt: skip
SIZE = flags.DEFINE_integer(
    "size", None, "shorter side in pixels; default 224 (or what a smaller model was made for) for "
    "crop, else the image's own", **_own,
)  # fmt: skip
LONGEST = flags.DEFINE_integer(
    "longest", 1036, "most pixels of the longer side, for resize and pad", **_own
)
BATCH = flags.DEFINE_integer("batch", 32, "images computed at a time, on all devices", **_own)
DTYPE: Any = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute dtype", **_own)
STORED_DTYPE: Any = flags.DEFINE_enum(
    "stored_dtype", "float32", ["float32", "float16"], "dtype of features.npy", **_own
)
POSITIONS: Any = flags.DEFINE_enum(
    "position_interpolation", "hub", ["hub", "hf"], "as trained, or as transformers does", **_own
)
NUM_HEADS = flags.DEFINE_integer(
    "num_heads", None, "of an original checkpoint whose heads are not 64 wide", **_own
)
ERROR_BUDGET = flags.DEFINE_float(
    "error_budget", None, "how many images may be unreadable: below 1 a share, from 1 on a number; "
    "default one in a hundred, and at least ten", **_own,
)  # fmt: skip
STRETCH = flags.DEFINE_bool(
    "stretch", False, "scale images of more than 8 bits from their own extremes", **_own
)
THREADS = flags.DEFINE_integer("threads", None, "that decode; default one for each core", **_own)
PICTURES = flags.DEFINE_integer("pictures", 0, "colour the patches of so many images", **_own)
FOREGROUND = flags.DEFINE_bool(
    "foreground", True, "colour the subject alone, by the first component's sign", **_own
)
ATTENTION_MAPS = flags.DEFINE_integer(
    "attention_maps", 0, "show where the class token looks in so many images", **_own
)
ATTENTION_BLOCK = flags.DEFINE_integer("attention_block", -1, "in which block", **_own)
PICTURE_SIZE = flags.DEFINE_integer(
    "picture_size", None, "shorter side in pictures; default 448, or twice a small model's", **_own
)


def _main(run: Run) -> None:
    for flag in (LAYERS, BATCH):
        if flag.value < 1:
            raise UserError(f"--{flag.name} must be at least 1, not {flag.value}")
    source, names, files = _open(IMAGES.value, Decoding(stretch=STRETCH.value))
    mesh = make_mesh()
    model = load(
        CHECKPOINT.value,
        POSITIONS.value,
        dtype=DTYPE.value,
        num_heads=NUM_HEADS.value,
        mesh=mesh,
    )
    if LAYERS.value > model.config.num_layers:
        raise UserError(f"--layers={LAYERS.value}: the model has {model.config.num_layers} blocks")
    size = SIZE.value
    if size is None and FIT.value == "crop":
        size = default_size(model.config)
    preparation = Preparation(model.config.patch_size, FIT.value, size, LONGEST.value)
    embedding = Embedding(WHAT.value, LAYERS.value, STORED_DTYPE.value)
    threads = THREADS.value or os.cpu_count() or 1
    sizes = _sizes(source, files, preparation, threads)
    with _folder(model, embedding, preparation, source, names, sizes) as folder:
        done = len(names) - len(folder.missing)
        if folder.complete:
            print(f"{folder.path} is complete: nothing is left to compute")
        else:
            print(f"{len(names)} images" + (f", {done} of them done before" if done else ""))
            embedder = Embedder(model, embedding, mesh, BATCH.value)
            outcome = embed_images(
                source,
                folder,
                embedder,
                preparation,
                sizes,
                error_budget=ERROR_BUDGET.value,
                threads=threads,
            )
            if not outcome.finished:
                print(f"stopped after {outcome.computed} images; go on with: {run.command}")
                return
            rate = outcome.computed / outcome.seconds
            print(f"{outcome.computed} images in {outcome.seconds:.1f} s, {rate:.3g} a second, "
                  "compilation included")  # fmt: skip
        failed = folder.failed
    _pictures(model, source, names, set(failed))
    features = np.load(folder.path / FEATURES, mmap_mode="r")
    if failed:
        print(f"{len(failed)} images could not be read; {folder.path / INDEX} names them:")
        for number in sorted(failed)[:10]:
            print(f"  {failed[number]}")
    print(f"{folder.path / FEATURES}: {features.dtype} {list(features.shape)}, "
          f"rows of images in {folder.path / INDEX}")  # fmt: skip


def _open(path: str, decoding: Decoding) -> tuple[ImageSource, list[str], list[Path] | None]:
    """The images, what the index calls them, and their files if each has one."""
    if path.endswith((".npz", ".npy")):
        arrays = open_arrays(path, decoding)
        return arrays, [str(n) for n in range(len(arrays))], None
    if "array_record" in os.path.basename(path):
        records = ImageRecords(find_files(path, "*.array_record*"), decoding)
        return records, [records.describe(n) for n in range(len(records))], None
    found = find_images(path)
    names = [file.name for file in found]
    return ImageFolder(found, decoding, "none"), names, [Path(file.path) for file in found]


def _sizes(
    source: ImageSource, files: list[Path] | None, preparation: Preparation, threads: int
) -> list[tuple[int, int]]:
    """Height and width of every prepared image; of an unreadable one those of a patch."""
    if preparation.fit == "crop":
        return [preparation.sizes_of(1, 1)] * len(source)

    def size(number: int) -> tuple[int, int]:
        try:
            if files is not None:
                return preparation.sizes_of(*image_size(files[number]))
            height, width = source[number].shape[:2]
        except DamagedRecord:
            return preparation.patch_size, preparation.patch_size
        return preparation.sizes_of(height, width)

    with ThreadPoolExecutor(threads, "sizes") as pool:
        return list(pool.map(size, range(len(source))))


def _folder(
    model: Backbone,
    embedding: Embedding,
    preparation: Preparation,
    source: ImageSource,
    names: list[str],
    sizes: list[tuple[int, int]],
) -> EmbeddingFolder:
    p = preparation.patch_size
    grids = np.array([(height // p, width // p) for height, width in sizes])
    width = embedding.width(model)
    rows = np.ones(len(names), np.int64)
    shape: tuple[int, ...] = (width,)
    if embedding.what == "patches" and preparation.fit == "crop":
        shape = (int(grids[0].prod()), width)
    elif embedding.what == "patches":
        rows = grids.prod(axis=1)
    settings = {
        "checkpoint": _weights(model),
        "images": source.fingerprint(),
        "count": len(names),
        "what": embedding.what,
        "layers": embedding.layers,
        "width": width,
        "stored_dtype": embedding.dtype,
        "fit": preparation.fit,
        "size": preparation.size,
        "longest": preparation.longest if preparation.fit != "crop" else None,
        "dtype": model.config.dtype,
        "interpolation": model.config.interpolation,
    }
    return EmbeddingFolder(
        OUTPUT.value, settings, names, rows, shape, np.dtype(embedding.dtype), grids
    )


def _weights(model: Backbone) -> str:
    """A digest of the parameters, wherever they were loaded from."""
    leaves = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(nnx.state(model))}
    text = f"{sorted(fingerprints(leaves).items())}{model.backbone_config.image_mean}"
    return hashlib.sha256(f"{text}{model.backbone_config.image_std}".encode()).hexdigest()[:16]


def _pictures(model: Backbone, source: ImageSource, names: list[str], failed: set[int]) -> None:
    """The pictures that were asked for, of the first images that can be read."""
    most = max(PICTURES.value, ATTENTION_MAPS.value)
    if most < 1:
        return
    size = PICTURE_SIZE.value or min(448, 2 * model.config.image_size)
    p = model.config.patch_size
    preparation = Preparation(p, "resize", max(size, p), 4 * max(size, p))
    chosen = [n for n in range(len(source)) if n not in failed][:most]
    images = [preparation(source[n]) for n in chosen]
    grids = [(image.shape[0] // p, image.shape[1] // p) for image in images]
    folder = Path(OUTPUT.value) / "pictures"
    folder.mkdir(exist_ok=True)
    prepared = [model.normalize(jnp.asarray(image))[None] for image in images]
    if PICTURES.value > 0:
        count = PICTURES.value
        patches = [np.asarray(model.features(x).patches[0], np.float32) for x in prepared[:count]]
        for n, image, colors in zip(
            chosen, images, principal_colors(patches, grids[:count], FOREGROUND.value)
        ):
            side_by_side(image, [colors]).save(folder / f"{_stem(n, names)}-pca.png")
    for n, image, grid, x in list(zip(chosen, images, grids, prepared))[: ATTENTION_MAPS.value]:
        maps = model.attention_maps(x, ATTENTION_BLOCK.value)
        heads = np.asarray(maps[0, :, 0, model.config.prefix :])
        shown = [attention_colors(weights, grid) for weights in (heads.mean(0), *heads)]
        side_by_side(image, shown).save(folder / f"{_stem(n, names)}-attention.png")
    print(f"{folder}: pictures of {len(chosen)} images")


def _stem(number: int, names: list[str]) -> str:
    """A file name that tells the image, whatever it is called."""
    plain = re.sub(r"[^\w.-]+", "_", Path(names[number]).stem)[:60]
    return f"{number:06}-{plain}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="dino",
        verb="embed",
        description=(
            "Computes features of images into a mapped array and an index. The same command goes "
            "on where a run stopped."
        ),
        examples=EXAMPLES,
        flags=OPTIONS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
