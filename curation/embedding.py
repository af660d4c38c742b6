"""Embeddings of images and texts by any model of the workspace.

An image becomes the class token (or, of a model without one, the mean) of what `features` gives; a
text the mean of its tokens' last hidden states. Rows go to an `EmbeddingFolder`, from which a
stopped run goes on.
"""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from common.data.embedding_folder import EmbeddingFolder, Item
from common.data.image_sources import ImageSource
from common.data.image_transforms import center_crop, resize_shorter_side
from common.data.sources import DamagedRecord, DocumentSource
from common.data.tokenizers import Tokenizer
from common.sharding import batch_sharding, batch_shards, use_mesh

_RESIZED_BY = 256 / 224  # as in the published evaluations: less than all of an image is seen
_SHORTEST = 16  # tokens of the shortest rows; longer ones are its doubles
_READ = 16  # batches of texts that are put in the order of their lengths


class ImageRows:
    """Images of one size to rows, compiled for whole batches over a mesh."""

    def __init__(self, model: Any, mesh: Mesh, batch: int, size: int):
        graphdef, self._state = nnx.split(model)
        self._mesh, self.batch = mesh, -(-batch // batch_shards(mesh)) * batch_shards(mesh)
        self._size = size
        self._rows = jax.jit(functools.partial(_image_rows, graphdef))

    @property
    def width(self) -> int:
        """Numbers in a row."""
        images = jnp.zeros((self.batch, self._size, self._size, 3), jnp.uint8)
        with use_mesh(self._mesh):
            return jax.eval_shape(self._rows, self._state, images).shape[1]

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The middle square of an image: uint8 [size, size, 3]."""
        picture = resize_shorter_side(Image.fromarray(image), round(self._size * _RESIZED_BY))
        return np.asarray(center_crop(picture, self._size))

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared images to rows, float32 [B, D]."""
        batch = np.zeros((self.batch, self._size, self._size, 3), np.uint8)
        batch[: len(images)] = images
        with use_mesh(self._mesh):
            found = self._rows(self._state, jax.device_put(batch, batch_sharding(self._mesh)))
        return np.asarray(found)[: len(images)]


class TextRows:
    """Token ids to rows, compiled for a few lengths."""

    def __init__(self, model: Any, mesh: Mesh, batch: int, longest: int):
        graphdef, self._state = nnx.split(model)
        self._mesh, self.batch = mesh, -(-batch // batch_shards(mesh)) * batch_shards(mesh)
        self.longest = longest
        self._rows = jax.jit(functools.partial(_text_rows, graphdef))

    @property
    def width(self) -> int:
        """Numbers in a row."""
        tokens = jnp.zeros((self.batch, _SHORTEST), jnp.int32)
        with use_mesh(self._mesh):
            return jax.eval_shape(self._rows, self._state, tokens, tokens > 0).shape[1]

    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Token ids, none of them empty, to rows, float32 [B, D]."""
        length = _SHORTEST
        while length < max(map(len, texts)):
            length *= 2
        tokens = np.zeros((self.batch, length), np.int32)
        valid = np.zeros((self.batch, length), bool)
        valid[:, 0] = True
        for row, ids in enumerate(texts):
            tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
        with use_mesh(self._mesh):
            arrays = jax.device_put((tokens, valid), batch_sharding(self._mesh))
            found = self._rows(self._state, *arrays)
        return np.asarray(found)[: len(texts)]


def embed_images(
    source: ImageSource, folder: EmbeddingFolder, rows: ImageRows, threads: int = 4
) -> Iterator[int]:
    """Computes the images that are missing in a folder; yields how many were done.

    Images that cannot be read get no row; the index says why.
    """

    def read(number: int) -> tuple[np.ndarray | None, Item]:
        try:
            image = source[number]
            return rows.prepare(image), Item(image.shape[:2])
        except DamagedRecord as error:
            return None, Item(None, str(error))

    missing = folder.missing.tolist()
    with ThreadPoolExecutor(threads) as pool:
        for numbers in _parts(missing, rows.batch):
            images, items = zip(*pool.map(read, numbers))
            good = [image for image in images if image is not None]
            found = iter(rows(good) if good else ())
            values = [None if image is None else next(found) for image in images]
            folder.write(numbers, values, items)
            yield len(numbers)


def embed_texts(
    source: DocumentSource, folder: EmbeddingFolder, rows: TextRows, tokenizer: Tokenizer
) -> Iterator[int]:
    """Computes the texts that are missing in a folder; yields how many were done.

    A text is cut after `rows.longest` tokens; one without any, or that cannot be read, gets no row.
    """
    head = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    for numbers in _parts(folder.missing.tolist(), rows.batch * _READ):
        texts, read = zip(*(_read_text(source, number) for number in numbers))
        encoded = [(head + ids)[: rows.longest] for ids in tokenizer.encode_batch(texts)]
        items = [
            item if ids and (text or item.error) else Item(None, item.error or "no text")
            for text, ids, item in zip(texts, encoded, read)
        ]
        # Texts of like lengths together, so that little of a batch is padding.
        order = sorted(range(len(numbers)), key=lambda i: (len(encoded[i]), i))
        for part in _parts(order, rows.batch):
            good = [i for i in part if items[i].error is None]
            found = dict(zip(good, rows([encoded[i] for i in good]))) if good else {}
            folder.write(
                [numbers[i] for i in part],
                [found.get(i) for i in part],
                [items[i] for i in part],
            )
            yield len(part)


def _read_text(source: DocumentSource, number: int) -> tuple[str, Item]:
    try:
        return source[number], Item()
    except DamagedRecord as error:
        return "", Item(None, str(error))


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _image_rows(graphdef: Any, state: Any, images: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    found = model.features(model.normalize(images))
    token = getattr(found, "cls", None)
    return (found.pooled if token is None else token).astype(jnp.float32)


def _text_rows(graphdef: Any, state: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    if hasattr(model, "encode"):
        hidden = model.encode(tokens, valid=valid)
    else:
        hidden = model.hidden(tokens)  # What stands to the right of a text is not seen by it.
    weights = valid[..., None].astype(jnp.float32)
    total = jnp.sum(jnp.where(weights > 0, hidden.astype(jnp.float32), 0), axis=1)
    return total / jnp.sum(weights, axis=1)
