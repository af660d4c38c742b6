"""One pass of k-means over rows on devices: the nearest centroid of each, and sums by cluster.

Compiled once for a chunk's shape; what a pass gathers grows from chunk to chunk, apart on each
device, and meets in `totals`. Sums are exact, so that a pass need only take rows that go to another
cluster out of the sum of the one before. Distances are `measure`d where they are wanted, which is
seldom.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.kernels.nearest_centroid.reranked import (
    marked_first,
    nearest_float32,
    nearest_reranked,
    squared_distance,
)
from common.sharding import MESH_AXES
from curation import exact_sums
from curation.exact_sums import Sums

Precision = Literal["bfloat16", "float32"]
_SEARCHES = {"bfloat16": nearest_reranked, "float32": nearest_float32}
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


def again(so_far: Pass) -> Pass:
    """Returns where the next pass over the same rows starts."""
    return so_far._replace(changed=jnp.zeros_like(so_far.changed))


@functools.partial(
    jax.jit,
    static_argnames=("mesh", "block", "precision", "update"),
    donate_argnames=("so_far", "previous"),
)
def assign(
    so_far: Pass,
    x: jax.Array,
    previous: jax.Array,
    valid: jax.Array,
    centroids: jax.Array,
    span: jax.Array,
    *,
    mesh: Mesh,
    block: int,
    precision: Precision,
    update: bool = True,
) -> tuple[Pass, jax.Array]:
    """Assigns a chunk's rows: returns the nearest centroid of each too, int32 `[R]`.

    Args:
      so_far: of the chunks before, and of the pass before.
      x: rows `[R, D]`, divided over all axes of the mesh.
      previous: labels that they had in the pass before `[R]`, K in the first one.
      valid: how many of the rows there are; behind them, labels are K.
      centroids: `[K, D]`, of float32.
      span: of the data.
      mesh, block: where, and rows at a time.
      precision: whether the search goes by bfloat16 first; winners are float32's in any case.
      update: whether sums and counts are wanted.
    """
    here = functools.partial(_assign_shard, block=block, search=_SEARCHES[precision], update=update)
    return jax.shard_map(
        here,
        mesh=mesh,
        in_specs=(_ROWS, _ROWS, _ROWS, _ALL, _ALL, _ALL),
        out_specs=(_ROWS, _ROWS),
        check_vma=False,
    )(so_far, x, previous, valid, centroids, span)


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
    sums = exact_sums.add_rows(whole.sums, -x, old, span)
    sums = exact_sums.carry(exact_sums.add_rows(sums, x, new, span))
    counts = whole.counts.at[old].add(-1, mode="drop").at[new].add(1, mode="drop")
    return Pass(sums, counts, whole.changed)


@jax.jit
def move_centroids(
    whole: Pass, centroids: jax.Array, span: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean of each cluster (the old centroid of empty ones), and the squared shift."""
    means = exact_sums.means(whole.sums, whole.counts, span)
    moved = jnp.where(whole.counts[:, None] > 0, means, centroids)
    return moved, jnp.sum(jnp.square(moved - centroids))


def _assign_shard(so_far, x, previous, valid, centroids, span, *, block, search, update):
    """One device's part: `x [R, D]`, sums with a leading dimension of one."""
    rows, clusters = x.shape[0], centroids.shape[0]
    shard = lax.axis_index(MESH_AXES).astype(jnp.int32)
    valid = jnp.clip(valid - shard * rows, 0, rows)
    blocks = (valid + block - 1) // block
    in_group = max(1, exact_sums.MOST_ROWS // (2 * block))  # a row may go and come
    sums, counts, changed = jax.tree.map(lambda part: part[0], so_far)

    def one_block(b, carry):
        labels, sums, counts, changed = carry
        part = lax.dynamic_slice_in_dim(x, b * block, block)
        there = b * block + jnp.arange(block) < valid
        label = jnp.where(there, search(part, centroids)[0], clusters)
        before = lax.dynamic_slice_in_dim(previous, b * block, block)
        moved = label != before
        changed += jnp.sum(moved, dtype=jnp.int32)
        labels = lax.dynamic_update_slice_in_dim(labels, label, b * block, axis=0)
        if update:
            sums = _add_marked(sums, -part, before, moved & (before < clusters), span)
            sums = _add_marked(sums, part, label, moved, span)
            counts = counts.at[before].add(-1, mode="drop").at[label].add(1, mode="drop")
        return labels, sums, counts, changed

    def group(g, carry):
        last = jnp.minimum((g + 1) * in_group, blocks)
        labels, sums, counts, changed = lax.fori_loop(g * in_group, last, one_block, carry)
        return labels, exact_sums.carry(sums) if update else sums, counts, changed

    none = jnp.full((rows,), clusters, jnp.int32)
    groups = (blocks + in_group - 1) // in_group
    labels, sums, counts, changed = lax.fori_loop(0, groups, group, (none, sums, counts, changed))
    return jax.tree.map(lambda part: part[None], Pass(sums, counts, changed)), labels


def _add_marked(
    sums: Sums, x: jax.Array, labels: jax.Array, marked: jax.Array, span: jax.Array
) -> Sums:
    """Adds the marked rows, a batch of them at a time."""
    batch, (order, count) = min(_MOVED, len(x)), marked_first(marked)

    def step(i, sums):
        first = jnp.minimum(i * batch, len(x) - batch)
        rows = lax.dynamic_slice_in_dim(order, first, batch)
        number = first + jnp.arange(batch)
        there = (number >= i * batch) & (number < count)
        label = jnp.where(there, labels[rows], sums.high.shape[0])
        return exact_sums.add_rows(sums, x[rows], label, span)

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
