"""A table of embeddings that lies in parts on the batch's devices: look-up, and loss of its head.

Left to the compiler, the table is gathered anew for every chunk of positions of the loss, the
gradient is scattered after every chunk, and the look-up's gradient is made whole on every device.
Here the look-up moves tokens and features instead of the table; for the loss each device gathers
the table once, works through its own rows, and adds up its own gradient until the end.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from common.nn.linear import product, product_gradients, tied_product
from common.nn.losses import by_chunks, joined_rows, split_rows, token_nll
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """What turns features into logits: `cap(x @ table.T)`.

    Attributes:
      table: `[V, D]`, with the logical axes ("vocab", "embed").
      cap: applied to the logits; the same function at every call.
      dtype: of the product's operands.
    """

    table: jax.Array
    cap: Cap = dataclasses.field(metadata={"static": True})
    dtype: jax.typing.DTypeLike = dataclasses.field(metadata={"static": True})


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
      table, cap, dtype: see `Head`.
      targets: `[B, L]` int32.
      chunk: as for `by_chunks`; of the positions that a device holds.

    Returns:
      `[B, L]` fp32 nats.
    """
    return through_head(_nll, hidden, Head(table, cap, dtype), (targets,), chunk=chunk)


def through_head(
    function: Callable[..., Any],
    hidden: jax.Array,
    head: Head,
    rows: Sequence[jax.Array] = (),
    frozen: Sequence[Head] = (),
    *,
    chunk: int | None,
) -> Any:
    """`function(logits, heads, *rows)` of `chunk` positions of each row at a time.

    Gradients flow to `hidden` and to the head's table, to nothing else.

    Args:
      function: maps logits `[B, C, V]`, a tuple of functions from features to logits (those of
        `frozen`) and arrays `[B, C, ...]` to a pytree of arrays `[B, C, ...]`; the same function
        at every call.
      hidden: `[B, L, D]`.
      head: makes the logits.
      rows: `[B, L, ...]` each.
      frozen: further heads.
      chunk: as for `by_chunks`; of the positions that a device holds.

    Returns:
      The pytree, of `[B, L, ...]`.
    """
    layout = _layout(head.table.shape, hidden.shape[:2])
    if not layout.manual:
        others = tuple(functools.partial(_whole_logits, other) for other in frozen)

        def of_chunk(x: jax.Array, *rows: jax.Array) -> Any:
            return function(_whole_logits(head, x), others, *rows)

        return by_chunks(of_chunk, (hidden, *rows), chunk)
    layouts = [_layout(other.table.shape, hidden.shape[:2]) for other in frozen]
    gathered = (layout.shared, tuple(other.shared for other in layouts))
    local = functools.partial(_local, function, chunk, gathered)
    tables = [dataclasses.replace(h, table=o.table) for h, o in zip(frozen, layouts)]
    inward = (
        layout.rows,
        dataclasses.replace(head, table=layout.table),
        (layout.rows,) * len(rows),
        tuple(tables),
    )
    return layout.mapped(local, inward, layout.rows)(hidden, head, tuple(rows), tuple(frozen))


def _whole_logits(head: Head, x: jax.Array) -> jax.Array:
    """Logits by a head whose table the compiler divides."""
    return head.cap(shard(tied_product(x, head.table, head.dtype), "batch", "seq", "vocab"))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _local(function, chunk, gathered, hidden, head, rows, frozen):
    """The rows of one device: `hidden [b, l, D]`, its part of each table, `rows [b, l, ...]`."""
    own, others = _gathered(head, frozen, gathered)

    def of_chunk(x, *rows):
        return function(head.cap(_logits(own, head.dtype, x)), others, *rows)

    return by_chunks(of_chunk, (hidden, *rows), chunk)


def _forward(function, chunk, gathered, hidden, head, rows, frozen):
    result = _local(function, chunk, gathered, hidden, head, rows, frozen)
    return result, (hidden, head, rows, frozen)


def _backward(function, chunk, gathered, residuals, g):
    hidden, head, rows, frozen = residuals
    kernel, others = _gathered(head, frozen, gathered)
    batch, length = hidden.shape[:2]
    parts = 1 if chunk is None or length % chunk else max(1, length // chunk)

    def of_chunk(d_kernel, piece):
        x, rows, g = piece
        logits = _logits(kernel, head.dtype, x)
        _, pull = jax.vjp(lambda logits: function(head.cap(logits), others, *rows), logits)
        (d_logits,) = pull(g)
        dx, more = product_gradients(x, kernel, d_logits, head.dtype)
        return d_kernel + more, dx.astype(x.dtype)

    zero = jnp.zeros(kernel.shape, jnp.float32)
    split = jax.tree.map(lambda x: split_rows(x, parts), (hidden, rows, g))
    d_kernel, dx = jax.lax.scan(of_chunk, zero, split)
    if gathered[0]:
        d_kernel = jax.lax.psum_scatter(d_kernel, gathered[0], scatter_dimension=0, tiled=True)
        # In the order that the look-up's gradient has, a TPU would sum it whole everywhere.
        d_kernel = with_layout_constraint(d_kernel, Layout((0, 1)))
    # Over the other axes `shard_map` sums, as over all that its specification leaves out.
    d_table = d_kernel.T.astype(head.table.dtype)
    return joined_rows(dx, batch, length), dataclasses.replace(head, table=d_table), None, None


_local.defvjp(_forward, _backward)


@jax.custom_vjp
def _token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return token_nll(logits, targets)


def _token_nll_forward(logits, targets):
    return token_nll(logits, targets), (logits, targets)


def _token_nll_backward(residuals, g):
    logits, targets = residuals
    # Written out: the gradient of picking the target would be scattered into zeros.
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    return (jax.nn.softmax(logits) - hit) * g[..., None], None


_token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def _nll(logits: jax.Array, heads: tuple[()], targets: jax.Array) -> jax.Array:
    return _token_nll(logits, targets)


def _gathered(head: Head, frozen: Sequence[Head], gathered) -> tuple[jax.Array, tuple[Any, ...]]:
    """The head's whole kernel, and functions that make logits by the others'."""
    own, shared = gathered
    others = [
        functools.partial(_capped, other.cap, _kernel(other.table, other.dtype, axes), other.dtype)
        for other, axes in zip(frozen, shared)
    ]
    return _kernel(head.table, head.dtype, own), tuple(others)


def _logits(kernel: jax.Array, dtype, x: jax.Array) -> jax.Array:
    return shard(product(x, kernel, dtype), "batch", "seq", "vocab")


def _capped(cap: Cap, kernel: jax.Array, dtype, x: jax.Array) -> jax.Array:
    return cap(_logits(kernel, dtype, x))


def _kernel(table: jax.Array, dtype, gathered: tuple[str, ...]) -> jax.Array:
    """The whole table turned, `[D, V]`: its parts then are rows, which are moved as they lie."""
    kernel = table.astype(dtype).T
    return jax.lax.all_gather(kernel, gathered, axis=0, tiled=True) if gathered else kernel
