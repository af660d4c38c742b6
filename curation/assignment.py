"""One pass of k-means over rows on devices: the nearest centroid of each, and sums by cluster.

Compiled once for a chunk's shape; what a pass gathers grows from chunk to chunk, apart on each
device, and meets in `totals`. Sums are exact, so that a pass need only take rows that go to another
cluster out of the sum of the one before, and that a centroid whose rows stayed is the same to the
last bit: a pass that knows what the one before found looks at the centroids that moved, and at the
others only where those leave it open. Distances are `measure`d where they are wanted, which is
seldom.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.kernels.nearest_centroid.reranked import (
    Nearest,
    Rounded,
    Take,
    marked_first,
    nearest_float32,
    nearest_of_all,
    nearest_of_moved,
    rounded,
    squared_distance,
)
from common.sharding import MESH_AXES
from curation import exact_sums
from curation.exact_sums import Sums

Precision = Literal["bfloat16", "float32"]
_MOVED = 256  # rows taken into other sums at a time
_ROWS = PartitionSpec(MESH_AXES)
_ALL = PartitionSpec()


class Pass(NamedTuple):
    """What passes have gathered so far; the first dimension is that of the devices.

    Attributes:
      sums: of the rows of each cluster, on the grid of the data's span.
      counts: rows of each cluster `[P, K]`.
      changed: rows whose cluster is another than in the pass before `[P]`.
    """

    sums: Sums
    counts: jax.Array
    changed: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def start(mesh: Mesh, clusters: int, width: int) -> Pass:
    """Returns a pass over nothing so far."""
    empty = Pass(
        exact_sums.zeros(clusters, width, (mesh.size,)),
        jnp.zeros((mesh.size, clusters), jnp.int32),
        jnp.zeros((mesh.size,), jnp.int32),
    )
    return lax.with_sharding_constraint(empty, NamedSharding(mesh, _ROWS))


@functools.partial(jax.jit, static_argnames=("mesh", "block"))
def round_rows(x: jax.Array, *, mesh: Mesh, block: int) -> Rounded:
    """Rounds rows `[R, D]`, divided over the mesh, for passes that come back to them."""

    def here(x):
        parts = lax.map(rounded, x.reshape(-1, block, x.shape[1]))
        return jax.tree.map(lambda part: part.reshape(len(x), *part.shape[2:]), parts)

    return jax.shard_map(here, mesh=mesh, in_specs=_ROWS, out_specs=_ROWS, check_vma=False)(x)


def again(so_far: Pass) -> Pass:
    """Returns where the next pass over the same rows starts."""
    return so_far._replace(changed=jnp.zeros_like(so_far.changed))


@functools.partial(
    jax.jit,
    static_argnames=("mesh", "block", "precision", "update", "most_moved"),
    donate_argnames=("so_far", "previous"),
)
def assign(
    so_far: Pass,
    x: jax.Array,
    previous: Nearest,
    valid: jax.Array,
    centroids: jax.Array,
    moved: jax.Array,
    span: jax.Array,
    short: Rounded | None = None,
    *,
    mesh: Mesh,
    block: int,
    precision: Precision,
    update: bool = True,
    most_moved: int | None = None,
) -> tuple[Pass, Nearest]:
    """Assigns a chunk's rows: returns what was found of each too, `[R]`.

    Args:
      so_far: of the chunks before, and of the pass before.
      x: rows `[R, D]`, divided over all axes of the mesh.
      previous: what the pass before found of them `[R]`; labels are K in the first one. Scores are
        None where they are not kept.
      valid: how many of the rows there are; behind them, labels are K.
      centroids: `[K, D]`, of float32.
      moved: which of them are not where they were in the pass before `[K]`, bool.
      span: of the data.
      short: the rows, rounded before.
      mesh, block: where, and rows at a time.
      precision: whether the search goes by bfloat16 first; winners are float32's in any case.
      update: whether sums and counts are wanted.
      most_moved: no more centroids moved; None if they may all have, or scores are not known.
    """
    here = functools.partial(
        _assign_shard, block=block, precision=precision, update=update, most_moved=most_moved
    )
    return jax.shard_map(
        here,
        mesh=mesh,
        in_specs=(_ROWS, _ROWS, _ROWS, _ALL, _ALL, _ALL, _ALL, _ROWS),
        out_specs=(_ROWS, _ROWS),
        check_vma=False,
    )(so_far, x, previous, valid, centroids, moved, span, short)


@functools.partial(jax.jit, static_argnames=("mesh", "block"))
def measure(
    x: jax.Array, labels: jax.Array, centroids: jax.Array, *, mesh: Mesh, block: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the squared distances of rows to their centroids, and the sums of each block of them.

    Args:
      x, labels: rows `[R, D]` and who they belong to `[R]`; those with a label of K have none.
      centroids: `[K, D]`, of float32.
      mesh, block: as for `assign`.
    """
    return jax.shard_map(
        functools.partial(_measure_shard, block=block),
        mesh=mesh,
        in_specs=(_ROWS, _ROWS, _ALL),
        out_specs=(_ROWS, _ROWS),
        check_vma=False,
    )(x, labels, centroids)


@functools.partial(jax.jit, static_argnums=0)
def totals(mesh: Mesh, parts: Pass) -> Pass:
    """Adds up what the devices have gathered."""
    whole = Pass(
        exact_sums.total(parts.sums), jnp.sum(parts.counts, axis=0), jnp.sum(parts.changed)
    )
    return lax.with_sharding_constraint(whole, NamedSharding(mesh, _ALL))


@jax.jit
def move_rows(whole: Pass, x: jax.Array, old: jax.Array, new: jax.Array, span: jax.Array) -> Pass:
    """Takes rows `[E, D]` from one cluster into another; a new label of K leaves a row out."""
    there = new < whole.counts.shape[0]
    old = jnp.where(there, old, whole.counts.shape[0])
    sums = exact_sums.carry(exact_sums.move_rows(whole.sums, x, old, new, span))
    counts = whole.counts.at[old].add(-1, mode="drop").at[new].add(1, mode="drop")
    return Pass(sums, counts, whole.changed)


class Step(NamedTuple):
    """What an iteration does to centroids.

    Attributes:
      centroids: the mean of each cluster, the old centroid of empty ones `[K, D]`.
      shift: the squared distances that they moved, summed.
      moved: which ones did at all `[K]`, bool.
      count: how many.
    """

    centroids: jax.Array
    shift: jax.Array
    moved: jax.Array
    count: jax.Array


@jax.jit
def move_centroids(whole: Pass, centroids: jax.Array, span: jax.Array) -> Step:
    """Moves each centroid to the mean of its rows."""
    means = exact_sums.means(whole.sums, whole.counts, span)
    after = jnp.where(whole.counts[:, None] > 0, means, centroids)
    moved = jnp.any(after != centroids, axis=1)
    return Step(after, jnp.sum(jnp.square(after - centroids)), moved, jnp.sum(moved))


def _assign_shard(
    so_far, x, previous, valid, centroids, there_moved, span, short,
    *, block, precision, update, most_moved,
):  # fmt: skip
    """One device's part: `x [R, D]`, sums with a leading dimension of one."""

    def search(part, known, near):
        if precision == "float32":
            return known._replace(index=nearest_float32(part, centroids)[0])
        if most_moved is None:
            found = nearest_of_all(part, centroids, near)
            return known._replace(index=found.index) if known.score is None else found
        return nearest_of_moved(part, centroids, there_moved, known, near, most=most_moved)

    rows, clusters = x.shape[0], centroids.shape[0]
    shard = lax.axis_index(MESH_AXES).astype(jnp.int32)
    valid = jnp.clip(valid - shard * rows, 0, rows)
    blocks = (valid + block - 1) // block
    in_group = max(1, exact_sums.MOST_ROWS // (2 * block))  # a row may go and come
    sums, counts, changed = jax.tree.map(lambda part: part[0], so_far)

    def one_block(b, carry):
        found, sums, counts, changed = carry
        known, near = jax.tree.map(
            lambda whole: lax.dynamic_slice_in_dim(whole, b * block, block), (previous, short)
        )

        def take(rows):
            return x[b * block + rows]

        # Rows that are there in short are looked at one by one: a block of them is no copy.
        part = take if short is not None else lax.dynamic_slice_in_dim(x, b * block, block)
        there = b * block + jnp.arange(block) < valid
        nearest, before = search(part, known, near), known.index
        label = jnp.where(there, nearest.index, clusters)
        moved = label != before
        changed += jnp.sum(moved, dtype=jnp.int32)
        found = jax.tree.map(
            lambda whole, here: lax.dynamic_update_slice_in_dim(whole, here, b * block, axis=0),
            found,
            nearest._replace(index=label),
        )
        if update:
            sums = _move_marked(sums, take, before, label, moved, span)
            counts = counts.at[before].add(-1, mode="drop").at[label].add(1, mode="drop")
        return found, sums, counts, changed

    def group(g, carry):
        last = jnp.minimum((g + 1) * in_group, blocks)
        found, sums, counts, changed = lax.fori_loop(g * in_group, last, one_block, carry)
        return found, exact_sums.carry(sums) if update else sums, counts, changed

    none = jax.tree.map(jnp.zeros_like, previous)._replace(
        index=jnp.full((rows,), clusters, jnp.int32)
    )
    groups = (blocks + in_group - 1) // in_group
    found, sums, counts, changed = lax.fori_loop(0, groups, group, (none, sums, counts, changed))
    return jax.tree.map(lambda part: part[None], Pass(sums, counts, changed)), found


def _move_marked(
    sums: Sums, take: Take, old: jax.Array, new: jax.Array, marked: jax.Array, span: jax.Array
) -> Sums:
    """Takes the marked rows from one sum into another, a batch of them at a time."""
    batch, (order, count) = min(_MOVED, len(marked)), marked_first(marked)
    clusters = sums.high.shape[0]

    def step(i, sums):
        first = jnp.minimum(i * batch, len(marked) - batch)
        rows = lax.dynamic_slice_in_dim(order, first, batch)
        number = first + jnp.arange(batch)
        there = (number >= i * batch) & (number < count)
        here, before = (jnp.where(there, labels[rows], clusters) for labels in (new, old))
        return exact_sums.move_rows(sums, take(rows), before, here, span)

    return lax.fori_loop(0, (count + batch - 1) // batch, step, sums)


def _measure_shard(x, labels, centroids, *, block):
    """One device's part, a block at a time: its sums do not depend on the other blocks."""

    def one_block(part):
        rows, label = part
        apart = squared_distance(rows, centroids, jnp.minimum(label, len(centroids) - 1))
        apart = jnp.where(label < len(centroids), apart, 0.0)
        return apart, jnp.sum(apart)

    blocks = x.reshape(-1, block, x.shape[1]), labels.reshape(-1, block)
    distances, sums = lax.map(one_block, blocks)
    return distances.reshape(-1), sums
