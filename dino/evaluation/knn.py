"""Classification by weighted votes of the nearest training images (specification, section 6.1)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError

TEMPERATURE = 0.07
KS = (10, 20, 100, 200)
_PRECISION = jax.lax.Precision.HIGHEST  # A TPU's default would round similarities to bfloat16.


def knn_predict(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    ks: Sequence[int] = KS,
    *,
    classes: int | None = None,
    temperature: float = TEMPERATURE,
    batch: int = 256,
    chunk: int = 65_536,
) -> dict[int, np.ndarray]:
    """Class of each test feature for each number of neighbours.

    Features are scaled to length 1. A neighbour's vote is the softmax of its similarity by
    `temperature` among the max(ks) nearest; smaller k take a prefix of the same votes. Of equal
    scores the lower class wins.

    Args:
        train: float [N, D].
        labels: int [N].
        test: float [M, D].
        ks: Numbers of neighbours; those above N are left out.
        classes: How many there are; by default the largest label and one.
        temperature: Of the softmax.
        batch: Test features at a time.
        chunk: Training features compared at a time.

    Returns:
        k to int64 [M].

    Raises:
        UserError: Shapes do not fit, or no k is possible.
    """
    train, test, labels = check_features(train, labels, test)
    if any(k < 1 for k in ks):
        raise UserError(f"numbers of neighbours are 1 or more, not {min(ks)}")
    possible = tuple(sorted({k for k in ks if k <= len(train)}))
    if not possible:
        raise UserError(f"there are {len(train)} training images, fewer than any k of {list(ks)}")
    classes = int(labels.max()) + 1 if classes is None else classes
    most = possible[-1]
    chunk = max(min(chunk, len(train)), most)
    padding = -len(train) % chunk
    blocks = jnp.asarray(np.pad(train, ((0, padding), (0, 0)))).reshape(-1, chunk, train.shape[1])
    numbers = jnp.asarray(np.pad(labels, (0, padding), constant_values=-1), jnp.int32)
    predict = functools.partial(_predict, ks=possible, classes=classes, temperature=temperature)
    batch = min(batch, len(test))
    found = []
    for start in range(0, len(test), batch):
        part = test[start : start + batch]
        part = np.pad(part, ((0, batch - len(part)), (0, 0)))
        found.append(predict(blocks, numbers.reshape(-1, chunk), jnp.asarray(part)))
    rows = np.concatenate([np.asarray(part) for part in found], 1)[:, : len(test)]
    return {k: row.astype(np.int64) for k, row in zip(possible, rows, strict=True)}


@functools.partial(jax.jit, static_argnames=("ks", "classes", "temperature"))
def _predict(
    blocks: jax.Array,
    labels: jax.Array,
    queries: jax.Array,
    *,
    ks: tuple[int, ...],
    classes: int,
    temperature: float,
) -> jax.Array:
    """Blocks [C, n, D] of training features, labels [C, n] (-1: padding), queries [b, D] to
    classes [ks, b]."""
    most = ks[-1]
    queries = unit(queries)

    def nearer(
        best: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        features, numbers = block
        similar = jnp.matmul(queries, unit(features).T, precision=_PRECISION)
        similar = jnp.where(numbers >= 0, similar, -jnp.inf)
        values, places = jax.lax.top_k(similar, most)
        values = jnp.concatenate([best[0], values], 1)
        found = jnp.concatenate([best[1], numbers[places]], 1)
        values, places = jax.lax.top_k(values, most)
        return (values, jnp.take_along_axis(found, places, 1)), None

    shape = (len(queries), most)
    start = jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32)
    (similar, found), _ = jax.lax.scan(nearer, start, (blocks, labels))
    votes = jax.nn.softmax(similar / temperature, -1)
    rows = jnp.arange(len(queries))[:, None]

    def winner(k: int) -> jax.Array:
        scores = jnp.zeros((len(queries), classes)).at[rows, found[:, :k]].add(votes[:, :k])
        return jnp.argmax(scores, -1)

    return jnp.stack([winner(k) for k in ks])


def check_features(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns both features as float32 and the labels, or says what is wrong with them."""
    for name, array in (("training", train), ("test", test)):
        if array.ndim != 2 or not len(array):
            raise UserError(f"{name} features are [N, D], not {list(array.shape)}")
        if not np.isfinite(array).all():
            raise UserError(f"{name} features have values that are not finite")
    if train.shape[1] != test.shape[1]:
        raise UserError(
            f"training features have {train.shape[1]} values each, test features {test.shape[1]}"
        )
    if labels.shape != (len(train),):
        raise UserError(f"there are {len(train)} training features and {list(labels.shape)} labels")
    return train.astype(np.float32), test.astype(np.float32), labels.astype(np.int64)


def unit(x: jax.Array) -> jax.Array:
    """Vectors [..., D] scaled to length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
