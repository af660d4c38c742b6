"""Stochastic depth by leaving rows out: a branch is computed for a part of the batch only.

Unlike masking a branch's result, this saves the work of the rows that are left out (DINOv2's
training; specification of DINOv2, 7.6).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from common.sharding import shard, ways


def add_to_subset(
    x: jax.Array,
    branch: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    rate: float,
    groups: int | None = None,
) -> jax.Array:
    """`x + branch(x)`, where only some rows, drawn at random, get the branch, scaled up for it.

    The batch is cut into `groups` of b consecutive rows; each draws its own
    `keep = max(int(b (1 - rate)), 1)` rows and adds `b / keep` times their branch. The expectation
    is that of `x + branch(x)` for every number of groups.

    Args:
      x: `[B, T, D]`.
      branch: `[K, T, D] -> [K, T, D]`, of some rows.
      key: of the draw.
      rate: share of rows left out; a number of Python's, for it decides shapes.
      groups: a divisor of B. None: the shards of the batch on the mesh in force, so that no row
        leaves its device and each device draws for itself; 1 without a mesh. A fixed multiple of
        the shards is as local, and the same on every mesh.
    """
    batch, length, width = x.shape
    groups = _shards(batch) if groups is None else groups
    if groups < 1 or batch % groups:
        raise ValueError(f"a batch of {batch} rows does not divide into {groups} groups")
    rows = batch // groups
    keep = max(int(rows * (1.0 - rate)), 1)
    if keep == rows:
        return x + branch(x)
    grouped = shard(x.reshape(groups, rows, length, width), "batch", None, "seq", None)
    order = jax.random.uniform(key, (groups, rows))
    kept = shard(jnp.argsort(order, axis=1)[:, :keep], "batch", None)
    some = shard(_take(grouped, kept), "batch", None, "seq", None)
    some = shard(some.reshape(groups * keep, length, width), "batch", "seq", None)
    added = branch(some).astype(x.dtype) * jnp.asarray(rows / keep, x.dtype)
    added = shard(added.reshape(groups, keep, length, width), "batch", None, "seq", None)
    return shard(_add(grouped, kept, added).reshape(x.shape), "batch", "seq", None)


def _shards(batch: int) -> int:
    shards = ways("batch")
    return shards if batch % shards == 0 else 1


# Mapped over the groups, so that the compiler sees that no row leaves its own.
@jax.vmap
def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x.at[rows].get(unique_indices=True, mode="promise_in_bounds")


@jax.vmap
def _add(x: jax.Array, rows: jax.Array, added: jax.Array) -> jax.Array:
    return x.at[rows].add(added, unique_indices=True, mode="promise_in_bounds")
