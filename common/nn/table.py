"""A table of embeddings that lies in parts on the batch's devices: look-up, and loss of its head.

Left to the compiler, the table is gathered anew for every chunk of positions of the loss, the
gradient is scattered after every chunk, and the look-up's gradient is made whole on every device.
Here the look-up moves tokens and features instead of the table; for the loss each device gathers
the table once, works through its own rows, and adds up its own gradient until the end.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from common.nn.linear import product, product_gradients, tied_product
from common.nn.losses import chunked_nll
from common.sharding.rules import current_rules, partition_spec, shard

Cap = Callable[[jax.Array], jax.Array]


def look_up(table: jax.Array, tokens: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of `table [V, D]`, whose axes are ("vocab", "embed"): `[B, L] int -> [B, L, D]`."""
    layout = _layout(table.shape, tokens.shape)
    if not layout.manual:
        return jnp.take(table, tokens, axis=0).astype(dtype)

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        # Every device looks up its columns for the rows of all that share the table, then they
        # exchange columns for rows.
        for axis in layout.shared:
            tokens = jax.lax.all_gather(tokens, axis, axis=0, tiled=True)
        x = jnp.take(table, tokens, axis=0).astype(dtype)
        for axis in reversed(layout.shared):
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=2, tiled=True)
        return x

    rows = layout.rows
    return layout.mapped(local, (layout.table, rows), PartitionSpec(*rows, None))(table, tokens)


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
    layout = _layout(table.shape, targets.shape)
    if not layout.manual:
        return chunked_nll(
            lambda x: cap(shard(tied_product(x, table, dtype), "batch", "seq", "vocab")),
            hidden,
            targets,
            chunk=chunk,
        )
    rows = layout.rows
    local = functools.partial(_local_nll, cap, jnp.dtype(dtype), chunk, layout.shared)
    return layout.mapped(local, (rows, layout.table, rows), rows)(hidden, table, targets)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How table and tokens lie on the mesh.

    Attributes:
      rows: of `[B, L]`.
      shared: mesh axes that divide both the batch and the table's columns.
    """

    rows: PartitionSpec
    shared: tuple[str, ...]

    @property
    def manual(self) -> frozenset[str]:
        """The axes over which devices work on rows of their own; the others are the compiler's."""
        return frozenset(axis for part in self.rows for axis in _axes(part))

    @property
    def table(self) -> PartitionSpec:
        return PartitionSpec(None, self.shared or None)

    def mapped(self, function: Callable[..., jax.Array], inward: Any, outward: Any) -> Any:
        return jax.shard_map(
            function,
            in_specs=inward,
            out_specs=outward,
            axis_names=self.manual,
            check_vma=False,
        )


def _layout(table: tuple[int, ...], tokens: tuple[int, ...]) -> _Layout:
    mesh, rules = jax.sharding.get_abstract_mesh(), current_rules()
    if mesh.empty:
        return _Layout(PartitionSpec(), ())
    rows = partition_spec(("batch", "seq"), tokens, mesh, rules)
    columns = _axes((*partition_spec(("vocab", "embed"), table, mesh, rules), None, None)[1])
    batch = _axes((*rows, None)[0])
    return _Layout(rows, tuple(axis for axis in columns if axis in batch))


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
        logits, of_capped = jax.vjp(cap, _logits(kernel, None, dtype, x))
        # Written out: the gradient of picking the target would be scattered into zeros.
        hit = jax.lax.broadcasted_iota(y.dtype, logits.shape, 2) == y[..., None]
        (d_logits,) = of_capped((jax.nn.softmax(logits) - hit) * g[..., None])
        dx, more = product_gradients(x, kernel, d_logits, dtype)
        return d_kernel + more, dx.astype(x.dtype)

    def split(x):
        return jnp.moveaxis(x.reshape(batch, parts, length // parts, *x.shape[2:]), 1, 0)

    zero = jnp.zeros(kernel.shape, jnp.float32)
    d_kernel, dx = jax.lax.scan(of_chunk, zero, (split(hidden), split(targets), split(g)))
    if gathered:
        d_kernel = jax.lax.psum_scatter(d_kernel, gathered, scatter_dimension=0, tiled=True)
        # In the order that the look-up's gradient has, a TPU would sum it whole everywhere.
        d_kernel = with_layout_constraint(d_kernel, Layout((0, 1)))
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
