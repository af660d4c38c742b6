"""Features of many images: decoded by threads, computed by size, kept in a folder that resumes.

Images of one size make up batches, which are divided among all devices of this process; every size
is compiled once. What is done is on disk before the next batch comes.
"""

import dataclasses
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from common.data.embedding_folder import EmbeddingFolder, Item
from common.data.image_sources import ImageSource
from common.data.sources import DamagedRecord
from common.errors import UserError
from common.models.vit import ViT
from common.sharding import batch_sharding, batch_shards, use_mesh
from common.train.preemption import Preemption
from common.train.progress import Progress
from dino.model import Backbone
from dino.preparation import Preparation

What = Literal["cls", "patches", "pooled"]
WHATS = ("cls", "patches", "pooled")
_AHEAD = 3  # Batches that are decoded while one is computed.
_LEAST_BUDGET, _BUDGET = 10, 0.01

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Embedding:
    """What of an image is kept.

    Attributes:
      what: "cls" the class token, "pooled" the mean of the patches, "patches" each of them.
      layers: of how many of the last blocks, side by side, the final norm applied to each.
      dtype: in which they are kept.
    """

    what: What = "cls"
    layers: int = 1
    dtype: Literal["float32", "float16"] = "float32"

    def width(self, model: Backbone) -> int:
        """Numbers in a row."""
        return self.layers * model.config.width

    def of(self, model: ViT, images: jax.Array) -> jax.Array:
        """`[B, H, W, 3]` normalised -> `[B, D]`, or `[B, N, D]` of patches."""
        found = model.features(images, range(-self.layers, 0))
        tokens = found.cls if self.what == "cls" else found.patches
        rows = jnp.concatenate([token.astype(jnp.float32) for token in tokens], axis=-1)
        rows = rows.mean(axis=1) if self.what == "pooled" else rows
        return rows.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run went.

    Attributes:
      computed: images that this run computed.
      before: images that an earlier run had done.
      failed: what is wrong with each image that could not be read.
      seconds: that it took.
      finished: False where a signal stopped it.
    """

    computed: int
    before: int
    failed: dict[int, str]
    seconds: float
    finished: bool


class Embedder:
    """A backbone's features of prepared images, for batches of any size of image.

    Args:
      model: its parameters placed on `mesh`.
      embedding: what to keep.
      mesh: over whose devices batches are divided.
      batch: most images at a time, rounded up to whole devices.
    """

    def __init__(self, model: Backbone, embedding: Embedding, mesh: Mesh, batch: int):
        shards = batch_shards(mesh)
        self.batch = -(-batch // shards) * shards
        self._shards, self._mesh = shards, mesh
        graphdef, self._state = nnx.split(model)

        def rows(state: nnx.State, images: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, state)
            return embedding.of(model, model.normalize(images))

        self._rows = jax.jit(rows)

    def __call__(self, images: np.ndarray) -> jax.Array:
        """uint8 `[B, H, W, 3]` -> `[B', ...]`, on its way; B' >= B, what is more means nothing."""
        count, size = len(images), self._shards
        while size < count:
            size *= 2  # So that an odd number left over compiles few programs.
        size = min(size, self.batch)
        padded = np.concatenate([images, np.zeros((size - count, *images.shape[1:]), np.uint8)])
        with use_mesh(self._mesh):
            return self._rows(self._state, jax.device_put(padded, batch_sharding(self._mesh)))


def embed_images(
    source: ImageSource,
    folder: EmbeddingFolder,
    embedder: Embedder,
    preparation: Preparation,
    sizes: Sequence[tuple[int, int]],
    *,
    error_budget: float | None = None,
    threads: int = 4,
) -> Outcome:
    """Computes what is missing in `folder`, and finishes it.

    Args:
      source: the images.
      folder: where the rows go.
      embedder: computes them.
      preparation: of each image.
      sizes: of the prepared images.
      error_budget: how many images may be unreadable: below 1 a share of them, from 1 on a number;
        None: one in a hundred, and at least ten.
      threads: that decode.

    Raises:
      UserError: more images than that could not be read, or none could.
    """
    started, missing = time.perf_counter(), folder.missing
    allowed = _allowed(error_budget, len(source))
    _check_budget(folder, allowed, len(source))
    order = sorted(missing.tolist(), key=lambda n: (sizes[n], n))
    batches = list(_batches(order, sizes, embedder.batch))
    progress = Progress(0, len(order), unit="images", counted="image")
    computed, stopped = 0, False

    def read(number: int) -> tuple[np.ndarray | None, Item]:
        try:
            image = source[number]
            prepared = preparation(image)
            height, width = image.shape[:2]
            if prepared.shape[:2] != tuple(sizes[number]):
                raise DamagedRecord(f"{source.describe(number)}: its size has changed")
            return prepared, Item((height, width))
        except DamagedRecord as error:
            return None, Item(None, str(error))

    def keep(numbers: Sequence[int], results: Sequence[tuple], rows: jax.Array | None) -> None:
        nonlocal computed
        values = iter(()) if rows is None else iter(np.asarray(rows))
        each = [None if image is None else next(values) for image, _ in results]
        folder.write(numbers, each, [item for _, item in results])
        for _, item in results:
            if item.error is not None:
                log.warning("%s (left out)", item.error)
        _check_budget(folder, allowed, len(source))
        computed += len(numbers)
        rate = computed / (time.perf_counter() - started)
        progress.update(computed, {"perf/images_per_second": rate})

    with ThreadPoolExecutor(threads, "decode") as pool, Preemption() as preemption:
        try:
            waiting: tuple | None = None
            for numbers, futures in _ahead(pool, read, batches):
                results = [future.result() for future in futures]
                images = [image for image, _ in results if image is not None]
                rows = embedder(np.stack(images)) if images else None
                # The devices work on this batch while the one before is written.
                if waiting is not None:
                    keep(*waiting)
                waiting = (numbers, results, rows)
                if preemption.reached(computed):
                    stopped = True
                    break
            if waiting is not None:
                keep(*waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            progress.close()
    stopped = stopped and len(folder.missing) > 0
    if not stopped:
        if len(folder.failed) == len(source):
            raise UserError(f"none of {len(source)} images can be read: {folder.failed[0]}")
        folder.finish()
    seconds = time.perf_counter() - started
    before = len(source) - len(missing)
    return Outcome(computed, before, folder.failed, seconds, not stopped)


def _ahead(
    pool: ThreadPoolExecutor, read: Callable, batches: Sequence[list[int]]
) -> Iterator[tuple[list[int], list[Future]]]:
    """Each batch with its images on their way, the next ones on theirs already."""
    queue: deque = deque()
    coming = iter(batches)
    for numbers in itertools.chain(coming, [None] * _AHEAD):
        if numbers is not None:
            queue.append((numbers, [pool.submit(read, number) for number in numbers]))
        if queue and (len(queue) > _AHEAD or numbers is None):
            yield queue.popleft()


def _batches(
    order: Sequence[int], sizes: Sequence[tuple[int, int]], most: int
) -> Iterator[list[int]]:
    for _, group in itertools.groupby(order, key=lambda n: sizes[n]):
        same = list(group)
        yield from (same[start : start + most] for start in range(0, len(same), most))


def _allowed(error_budget: float | None, images: int) -> int:
    if error_budget is None:
        return max(_LEAST_BUDGET, int(_BUDGET * images))
    if error_budget < 0:
        raise UserError(f"error_budget is {error_budget}; use 0 or more")
    return int(error_budget if error_budget >= 1 else error_budget * images)


def _check_budget(folder: EmbeddingFolder, allowed: int, images: int) -> None:
    failed = folder.failed
    if len(failed) > allowed:
        raise UserError(
            f"{list(failed.values())[-1]} (unreadable image number {len(failed)} of {images} "
            f"images; error_budget allows {allowed}; what is done is kept)"
        )
