"""Images to features: the view of an image in evaluation, and what stands in for a model."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from common.data.image_sources import ImageSource
from common.data.image_transforms import center_crop, resize_shorter_side
from common.data.pipeline import RowOrder
from common.data.sources import DamagedRecord
from common.errors import UserError
from common.models.vit import Tokens
from common.sharding import batch_shards, place_rows

_AHEAD = 2  # Batches that are decoded while the device works.
_TOGETHER = 64  # Batches of training whose records are asked for at once.


class FeatureModel(Protocol):
    """What is evaluated: a `dino.model.Backbone`, or `Pixels`."""

    def normalize(self, images: jax.Array) -> jax.Array:
        """Images [..., 3] from 0 to 255 to what `features` takes."""

    def features(
        self, images: jax.Array, layers: int | Sequence[int] = 1, norm: bool = True
    ) -> Tokens:
        """Class token and patches; tuples of them unless `layers` is 1."""


class Pixels:
    """The baseline that any features should beat: pixels themselves.

    An image's "class token" is all of its pixels, those of a patch are the patch's feature.

    Args:
        patch_size: Side of a patch.
        whole: False takes the mean colour for the class token, for images of several sizes.
    """

    def __init__(self, patch_size: int, whole: bool = True):
        self._patch = patch_size
        self._whole = whole

    def normalize(self, images: jax.Array) -> jax.Array:
        """Pixels from -1 to 1."""
        return images.astype(jnp.float32) / 127.5 - 1

    def features(
        self, images: jax.Array, layers: int | Sequence[int] = 1, norm: bool = True
    ) -> Tokens:
        """The same for each layer."""
        b, h, w, c = images.shape
        p = self._patch
        patches = images.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
        patches = patches.reshape(b, -1, p * p * c)
        cls = images.reshape(b, -1) if self._whole else images.mean((1, 2))
        none = jnp.zeros((b, 0, 1))
        if layers == 1:
            return Tokens(cls, none, patches)
        count = layers if isinstance(layers, int) else len(layers)
        return Tokens((cls,) * count, (none,) * count, (patches,) * count)


@dataclass(frozen=True)
class View:
    """How an image is seen: its shorter side resized, then its middle cut out; both in pixels."""

    resize: int
    crop: int

    def __call__(self, image: np.ndarray, place: int = 0) -> np.ndarray:
        """uint8 [H, W, 3] to uint8 [crop, crop, 3]; the same at any place of a sequence."""
        picture = resize_shorter_side(Image.fromarray(image), self.resize)
        return np.asarray(center_crop(picture, self.crop))


def view_for(
    image_size: int, patch_size: int, crop: int | None = None, resize: int | None = None
) -> View:
    """The view for a model: 224 of 256 pixels, or all of an image if the model takes fewer.

    Args:
        image_size: What the model was made for.
        patch_size: Side of its patches.
        crop, resize: Other sizes.

    Raises:
        UserError: The crop is not whole patches, or larger than what it is cut from.
    """
    if crop is None:
        crop = min(224, image_size) // patch_size * patch_size
    if resize is None:
        resize = crop * 256 // 224 if crop >= 224 else crop
    if crop < 1 or crop % patch_size:
        below = max(crop // patch_size, 1) * patch_size
        raise UserError(
            f"a crop of {crop} pixels is not whole patches of {patch_size}: use {below} or "
            f"{below + patch_size}"
        )
    if resize < crop:
        raise UserError(f"images resized to {resize} have no middle of {crop} pixels")
    return View(resize, crop)


@dataclass
class ImageFeatures:
    """Features of the images that could be read, in their order.

    Attributes:
        cls: float32 [layers, N, D], in order of depth.
        patch_mean: float32 [N, D], mean of the last layer's patches.
        indices: int64 [N], numbers of the images.
        labels: int64 [N], or None.
        classes: Names of the classes.
        damaged: Why images could not be read.
    """

    cls: np.ndarray
    patch_mean: np.ndarray
    indices: np.ndarray
    labels: np.ndarray | None
    classes: Sequence[str] = ()
    damaged: list[str] = field(default_factory=list)


def extract(
    model: FeatureModel,
    source: ImageSource,
    view: Callable[[np.ndarray, int], np.ndarray],
    *,
    layers: int = 1,
    batch: int = 64,
    error_budget: float = 0.01,
    mesh: jax.sharding.Mesh | None = None,
    title: str = "features",
) -> ImageFeatures:
    """Features of every image of `source`.

    Args:
        model: The model.
        source: The images.
        view: uint8 [H, W, 3], and its place in the order, to uint8 [S, S, 3].
        layers: How many of the last blocks' class tokens to keep.
        batch: Images at a time.
        error_budget: How many images may be damaged: below 1 a fraction, from 1 on a number.
        mesh: Of the model, to divide batches among its devices.
        title: Of the progress bar.

    Raises:
        UserError: More images are damaged than the budget allows.
    """
    reader = ImageReader(source, view, error_budget)
    kept, cls, means = [], [], []
    pending: tuple[int, Any] | None = None

    def collect() -> None:
        if pending is not None:
            count, (tokens, mean) = pending
            cls.append(np.asarray(tokens, np.float32)[:, :count])
            means.append(np.asarray(mean, np.float32)[:count])

    order = np.arange(len(source))
    with tqdm(total=len(source), desc=title, unit="image", disable=None) as bar:
        for indices, images in reader.batches(order, batch):
            started = pooled_features(model, filled(images, batch), layers, mesh)
            collect()  # Of the batch before, while the device works on this one.
            pending = len(indices), started
            kept.append(indices)
            bar.update(len(indices))
        collect()
    if not kept:
        raise UserError(f"none of {len(source)} images can be read: {reader.damaged[0]}")
    numbers = np.concatenate(kept)
    return ImageFeatures(
        np.concatenate(cls, 1),
        np.concatenate(means),
        numbers,
        None if source.labels is None else source.labels[numbers],
        source.classes,
        list(reader.damaged.values()),
    )


def pooled_features(
    model: FeatureModel, images: np.ndarray, layers: int, mesh: jax.sharding.Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """uint8 images [B, S, S, 3] to class tokens [layers, B, D] and mean patches [B, D]."""
    tokens = model.features(model.normalize(placed(images, mesh)), layers=layers)
    if layers == 1:
        return tokens.cls[None], tokens.patches.astype(jnp.float32).mean(1)
    return jnp.stack(tokens.cls), tokens.patches[-1].astype(jnp.float32).mean(1)


def placed(images: np.ndarray, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """Images on the mesh's devices: divided among them, or whole on each if they do not divide."""
    if mesh is None:
        return jnp.asarray(images)
    if len(images) % batch_shards(mesh):
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.device_put(images, whole)
    return place_rows(mesh, {"images": images})["images"]


class ImageReader:
    """Decodes records on threads, batch after batch, without the damaged ones.

    Args:
        source: Records by number, an `ImageSource` or the like.
        load: Called with a record and its place in the order; its results are stacked.
        error_budget: How many may be damaged: below 1 a fraction, from 1 on a number.

    Attributes:
        damaged: Why records could not be read, by number.
    """

    def __init__(self, source: Any, load: Callable[[Any, int], Any], error_budget: float):
        if error_budget < 0:
            raise UserError(f"error_budget is {error_budget}; use 0 or more")
        self._source = source
        self._load = load
        self._allowed = int(error_budget if error_budget >= 1 else error_budget * len(source))
        self.damaged: dict[int, str] = {}

    def batches(
        self, order: np.ndarray, batch: int, first: int = 0
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Numbers and stacked records of `batch` at a time in `order`.

        Where some are damaged, and at the end, they are fewer. Places count from `first`.
        """
        starts = iter(range(0, len(order), batch))
        queue: list[tuple[np.ndarray, list[Future[Any]]]] = []
        with ThreadPoolExecutor(os.cpu_count() or 1, "decode") as pool:
            while True:
                for start in itertools.islice(starts, _AHEAD + 1 - len(queue)):
                    chunk = order[start : start + batch]
                    futures = [
                        pool.submit(self._read, int(index), first + start + i)
                        for i, index in enumerate(chunk)
                    ]
                    queue.append((chunk, futures))
                if not queue:
                    return
                yield from self._finished(*queue.pop(0))

    def training_batches(
        self, order: RowOrder, batch: int, steps: int | None = None
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """`steps` batches (None: without end) of exactly `batch` records from an endless order.

        A damaged one gives its place to another of its batch.
        """
        step = 0
        while steps is None or step < steps:
            ahead = _TOGETHER if steps is None else min(_TOGETHER, steps - step)
            first, seen = step * batch, 0
            for numbers, records in self.batches(
                order.at(np.arange(first, first + ahead * batch)), batch, first
            ):
                whole = np.arange(batch) % len(numbers)
                yield numbers[whole], jax.tree.map(lambda x, rows=whole: x[rows], records)
                seen += 1
            if not seen:
                raise UserError(f"no image can be read: {next(iter(self.damaged.values()))}")
            step += seen

    def _read(self, index: int, place: int) -> Any:
        return self._load(self._source[index], place)

    def _finished(
        self, chunk: np.ndarray, futures: list[Future[Any]]
    ) -> Iterator[tuple[np.ndarray, Any]]:
        good, records = [], []
        for index, future in zip(chunk.tolist(), futures, strict=True):
            try:
                records.append(future.result())
                good.append(index)
            except DamagedRecord as error:
                self._count(index, error)
        if good:
            yield np.array(good), jax.tree.map(lambda *parts: np.stack(parts), *records)

    def _count(self, index: int, error: DamagedRecord) -> None:
        self.damaged[index] = str(error)
        if len(self.damaged) > self._allowed:
            raise UserError(
                f"{error} (damaged image number {len(self.damaged)} of {len(self._source)}; "
                f"--error_budget allows {self._allowed})"
            ) from error


def filled(images: np.ndarray, batch: int) -> np.ndarray:
    """The images with zeros behind them, so that every batch has one shape."""
    return np.pad(images, [(0, batch - len(images))] + [(0, 0)] * (images.ndim - 1))
