"""Cross-entropy of a head tied to the embedding, its table divided among the batch's devices.

Left to the compiler, a table that lies in parts is gathered anew for every chunk of positions, and
its gradient is scattered after every chunk. Here both happen once: each device gathers the table,
works through its own rows, and adds up its own gradient until the end.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from common.nn.linear import product, product_gradients, tied_product
from common.nn.losses import chunked_nll, token_nll
from common.sharding.rules import current_rules, partition_spec, shard

Cap = Callable[[jax.Array], jax.Array]


def tied_nll(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    cap: Cap,
    dtype: jax.typing.DTypeLike,
    chunk: int | None,
) -> jax.Array:
    """`token_nll(cap(hidden @ table.T), targets)` for `chunk` positions of each row at a time.

    Args:
      hidden: `[B, L, D]`.
      table: `[V, D]`, with the logical axes ("vocab", "embed").
      targets: `[B, L]` int32.
      cap: applied to the logits; the same function at every call.
      dtype: of the product's operands.
      chunk: as for `chunked_nll`; of the positions that a device holds.

    Returns:
      `[B, L]` fp32 nats.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), current_rules()
    rows, over = PartitionSpec(), PartitionSpec()
    if not mesh.empty:
        rows = partition_spec(("batch", "seq"), targets.shape, mesh, rules)
        over = partition_spec(("vocab", "embed"), table.shape, mesh, rules)
    manual = frozenset(axis for part in rows for axis in _axes(part))
    if not manual:
        return chunked_nll(
            lambda x: cap(shard(tied_product(x, table, dtype), "batch", "seq", "vocab")),
            hidden,
            targets,
            chunk=chunk,
        )
    gathered = tuple(a for a in _axes(over[1] if len(over) > 1 else None) if a in manual)
    local = functools.partial(_local_nll, cap, jnp.dtype(dtype), chunk, gathered)
    mapped = jax.shard_map(
        local,
        in_specs=(rows, PartitionSpec(None, gathered or None), rows),
        out_specs=rows,
        axis_names=manual,
        check_vma=False,
    )
    return mapped(hidden, table, targets)


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _local_nll(cap, dtype, chunk, gathered, hidden, table, targets):
    """The rows of one device: `hidden [b, l, D]`, its part of the table, `targets [b, l]`."""
    head = functools.partial(_logits, _kernel(table, dtype, gathered), cap, dtype)
    return chunked_nll(head, hidden, targets, chunk=chunk)


def _forward(cap, dtype, chunk, gathered, hidden, table, targets):
    nll = _local_nll(cap, dtype, chunk, gathered, hidden, table, targets)
    return nll, (hidden, table, targets)


def _backward(cap, dtype, chunk, gathered, residuals, g):
    hidden, table, targets = residuals
    kernel = _kernel(table, dtype, gathered)
    batch, length = targets.shape
    parts = 1 if chunk is None or length % chunk else max(1, length // chunk)

    def of_chunk(d_kernel, piece):
        x, y, g = piece
        logits = _logits(kernel, None, dtype, x)
        _, pull = jax.vjp(lambda logits: token_nll(cap(logits), y), logits)
        (d_logits,) = pull(g)
        dx, more = product_gradients(x, kernel, d_logits, dtype)
        return d_kernel + more, dx.astype(x.dtype)

    def split(x):
        return jnp.moveaxis(x.reshape(batch, parts, length // parts, *x.shape[2:]), 1, 0)

    zero = jnp.zeros(kernel.shape, jnp.float32)
    d_kernel, dx = jax.lax.scan(of_chunk, zero, (split(hidden), split(targets), split(g)))
    for axis in reversed(gathered):
        d_kernel = jax.lax.psum_scatter(d_kernel, axis, scatter_dimension=0, tiled=True)
    # Over the other axes `shard_map` sums, as over all that its specification leaves out.
    dx = jnp.moveaxis(dx, 0, 1).reshape(hidden.shape)
    return dx, d_kernel.T.astype(table.dtype), None


_local_nll.defvjp(_forward, _backward)


def _logits(kernel: jax.Array, cap: Cap | None, dtype, x: jax.Array) -> jax.Array:
    logits = shard(product(x, kernel, dtype), "batch", "seq", "vocab")
    return logits if cap is None else cap(logits)


def _kernel(table: jax.Array, dtype, gathered: tuple[str, ...]) -> jax.Array:
    """The whole table turned, `[D, V]`: its parts then are rows, which are moved as they lie."""
    kernel = table.astype(dtype).T
    return jax.lax.all_gather(kernel, gathered, axis=0, tiled=True) if gathered else kernel
