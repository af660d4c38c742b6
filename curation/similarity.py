"""Cosine similarities between large sets of rows, exactly, a block of both at a time on devices.

Rows come from arrays or memory maps; each block is brought to unit length in float32 and checked on
its way. Blocks of queries are divided among this process's devices.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.errors import UserError

ROWS = 4096  # queries of a block
COLUMNS = 8192  # rows of the other side that a block meets in one step
GROUP = 8  # such steps in one call, so that a device computes longer than it waits for rows

Progress = Callable[[int, int], None]


class Neighbours(NamedTuple):
    """The most similar rows of a pool: `indices` int64 [Q, k], `similarities` float32 [Q, k]."""

    indices: np.ndarray
    similarities: np.ndarray


def nearest_neighbours(
    queries: np.ndarray, pool: np.ndarray, k: int, *, progress: Progress | None = None
) -> Neighbours:
    """Finds the k rows of the pool of highest cosine similarity to each query, highest first.

    Of equally similar rows that of the lowest index comes first.

    Args:
      queries: [Q, D], any floating dtype.
      pool: [N, D].
      k: at most N.
      progress: called with (blocks done, blocks in all).

    Raises:
      UserError: shapes or k do not fit, or a row is zero or not finite.
    """
    check_rows(queries, pool)
    if not 1 <= k <= len(pool):
        raise UserError(f"{k} neighbours from a pool of {len(pool)} rows: give 1 to {len(pool)}")
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    indices = np.zeros((len(queries), k), np.int64)
    place = _placement()
    columns = min(COLUMNS, -(-len(pool) // 8) * 8)
    starts = range(0, len(queries), ROWS)
    groups = range(0, len(pool), columns * GROUP)
    for g, first in enumerate(groups):
        group = unit_rows(pool, first, first + columns * GROUP, "row")
        tiles = _padded(group, -(-len(group) // columns) * columns).reshape(
            -1, columns, pool.shape[1]
        )
        tiles = jax.device_put(tiles, place.everywhere)
        for b, start in enumerate(starts):
            stop = min(start + ROWS, len(queries))
            block = _padded(unit_rows(queries, start, stop, "query"), place.rows(len(queries)))
            found, where = _most_similar(
                jax.device_put(block, place.by_row), tiles, len(group), min(k, len(group))
            )
            # The rows of earlier groups come first, so that ties go to the lowest index.
            both = np.concatenate([similarities[start:stop], found[: stop - start]], axis=1)
            ids = np.concatenate(
                [indices[start:stop], np.asarray(where)[: stop - start] + first], 1
            )
            best = np.argsort(-both, axis=1, kind="stable")[:, :k]
            similarities[start:stop] = np.take_along_axis(both, best, 1)
            indices[start:stop] = np.take_along_axis(ids, best, 1)
            if progress is not None:
                progress(g * len(starts) + b + 1, len(groups) * len(starts))
    return Neighbours(indices, similarities)


def pairs_above(
    x: np.ndarray,
    threshold: float,
    *,
    order: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields where pairs of rows are more similar than a threshold.

    Args:
      x: [N, D].
      threshold: of the cosine.
      order: row numbers [M] to look at instead of all; places below are places in it.
      groups: integers [M], ascending: only pairs of one group are looked at.
      progress: called with (blocks done, blocks in all).

    Yields:
      `(first place of the rows, first place of the columns, bool [R, C])` for every block with such
      a pair. A pair is told once, the lower place as the row.
    """
    count = len(x) if order is None else len(order)
    place = _placement()
    rows, columns = place.rows(count), min(COLUMNS, -(-count // 8) * 8)
    blocks = [
        (start, column)
        for start in range(0, count, rows)
        for column in range(start // columns * columns, count, columns)
        if groups is None or groups[column] <= groups[min(start + rows, count) - 1]
    ]

    @functools.lru_cache(maxsize=16)
    def of(start: int, size: int, by_row: bool) -> tuple[jax.Array, jax.Array]:
        stop = min(start + size, count)
        block = _padded(unit_rows(x, start, stop, "row", order), size)
        label = np.full(size, -1 if by_row else -2, np.int64)
        label[: stop - start] = 0 if groups is None else groups[start:stop]
        sharding = place.by_row if by_row else place.everywhere
        return jax.device_put((block, label.astype(np.int32)), sharding)

    limit = np.float32(threshold)
    pending: list[tuple[int, int, jax.Array, jax.Array]] = []
    for done, (start, column) in enumerate(blocks, 1):
        found = _above(*of(start, rows, True), *of(column, columns, False), column - start, limit)
        pending.append((start, column, *found))
        # The next block is under way on the devices while this one's answer is fetched.
        if len(pending) > 1 or done == len(blocks):
            yield from _with_pairs(pending if done == len(blocks) else [pending.pop(0)])
        if progress is not None:
            progress(done, len(blocks))


def unit_rows(
    x: np.ndarray, start: int, stop: int, name: str, order: np.ndarray | None = None
) -> np.ndarray:
    """Reads rows `start:stop` (of `order`, if given) at unit length, float32 [R, D].

    Raises:
      UserError: a row is zero or not finite; it is named by its number in `x`.
    """
    part = x[start:stop] if order is None else x[order[start:stop]]
    with np.errstate(over="ignore"):  # What float32 cannot hold is found below.
        rows = np.asarray(part, np.float32)
    # By the largest entry first, for the square of a large number is none in float32.
    largest = np.max(np.abs(rows), axis=1, keepdims=True, initial=0)
    bad = np.flatnonzero(~(np.isfinite(largest[:, 0]) & (largest[:, 0] > 0)))
    if len(bad):
        place = start + int(bad[0])
        number = place if order is None else int(order[place])
        what = "is zero, so it has no direction" if largest[bad[0]] == 0 else "is not finite"
        raise UserError(f"{name} {number} of the embeddings {what}: leave it out")
    rows = rows / largest
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def check_rows(queries: np.ndarray, pool: np.ndarray) -> None:
    """UserError unless both are [*, D] of real floating numbers with the same D."""
    for name, array in (("queries", queries), ("pool", pool)):
        if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(
                f"{name} must be floating numbers [N, D], not {array.dtype} {list(array.shape)}"
            )
    if queries.shape[1] != pool.shape[1]:
        raise UserError(
            f"queries have {queries.shape[1]} dimensions and the pool {pool.shape[1]}: "
            "embed both with the same model"
        )


class _Placement(NamedTuple):
    """How blocks lie on this process's devices."""

    by_row: NamedSharding
    everywhere: NamedSharding
    devices: int

    def rows(self, count: int) -> int:
        """Rows of a block of one static shape: divisible by the devices, small for small data."""
        unit = 8 * self.devices
        return min(-(-ROWS // unit), -(-max(count, 1) // unit)) * unit


def _placement() -> _Placement:
    devices = jax.local_devices()
    mesh = Mesh(np.asarray(devices), ("rows",))
    return _Placement(
        NamedSharding(mesh, PartitionSpec("rows")),
        NamedSharding(mesh, PartitionSpec()),
        len(devices),
    )


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


@functools.partial(jax.jit, static_argnames="k")
def _most_similar(
    queries: jax.Array, tiles: jax.Array, count: int, k: int
) -> tuple[jax.Array, jax.Array]:
    """The k most similar of the first `count` rows of tiles [T, C, D]: values and places [R, k]."""
    columns = tiles.shape[1]

    def step(best, tile_and_first):
        tile, first = tile_and_first
        place = first + jnp.arange(columns)
        found = jnp.where(place < count, _cosines(queries, tile), -jnp.inf)
        values, at = jax.lax.top_k(found, min(k, columns))
        values = jnp.concatenate([best[0], values], axis=1)
        places = jnp.concatenate([best[1], place[at]], axis=1)
        values, at = jax.lax.top_k(values, k)
        return (values, jnp.take_along_axis(places, at, axis=1)), None

    empty = (
        jnp.full((len(queries), k), -jnp.inf),
        jnp.zeros((len(queries), k), jnp.int32),
    )
    firsts = columns * jnp.arange(len(tiles))
    return jax.lax.scan(step, empty, (tiles, firsts))[0]


@jax.jit
def _above(
    rows: jax.Array,
    row_groups: jax.Array,
    columns: jax.Array,
    column_groups: jax.Array,
    ahead: jax.Array,
    threshold: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Whether there is any pair, and which [R, C] in bits; columns are `ahead` of the rows."""
    later = ahead + jnp.arange(len(columns))[None] > jnp.arange(len(rows))[:, None]
    together = row_groups[:, None] == column_groups[None]
    found = (_cosines(rows, columns) > threshold) & later & together
    return jnp.any(found), jnp.packbits(found, axis=1)


def _cosines(rows: jax.Array, columns: jax.Array) -> jax.Array:
    return jax.lax.dot_general(
        rows, columns, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )


def _with_pairs(
    results: list[tuple[int, int, jax.Array, jax.Array]],
) -> Iterator[tuple[int, int, np.ndarray]]:
    for start, column, some, bits in results:
        if some:
            yield start, column, np.unpackbits(np.asarray(bits), axis=1).astype(bool)
