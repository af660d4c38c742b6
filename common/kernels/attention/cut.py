"""How a call is cut into tiles, and which tiles its window leaves.

A tile is a block of queries by a block of keys. Tiles that the causal bound or the window excludes
as a whole are never visited; those inside the window as a whole need no mask.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from common.kernels.attention.options import Options

# An index of a block: a number, an array of them, or a traced value inside a kernel.
Index = Any


class Cut(NamedTuple):
    """Sizes of the tiles and of what they cover.

    Attributes:
      options: the call's window.
      block_q, block_k: queries and keys of one tile.
      queries, keys: T and S, without padding.
      offset: key position of query 0; a traced scalar where only the running program knows it.
    """

    options: Options
    block_q: int
    block_k: int
    queries: int
    keys: int
    offset: int | jax.Array

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of blocks of queries and of keys."""
        return -(-self.queries // self.block_q), -(-self.keys // self.block_k)

    def keys_of(self, i: Index) -> tuple[Index, Index]:
        """Returns the first and the end of the key blocks that query block `i` may see."""
        first, end = 0, self.blocks[1]
        position = i * self.block_q + self.offset
        if self.options.before is not None:
            first = _quotient(_clip(position - self.options.before, 0, self.keys), self.block_k)
        if self.options.after is not None:
            last = _clip(position + self.block_q - 1 + self.options.after, -1, self.keys - 1)
            end = _quotient(last + self.block_k, self.block_k)
        return first, end

    def queries_of(self, j: Index) -> tuple[Index, Index]:
        """Returns the first and the end of the query blocks that may see key block `j`."""
        first, end = 0, self.blocks[0]
        index = j * self.block_k - self.offset  # of the query at the block's first key
        if self.options.after is not None:
            first = _quotient(_clip(index - self.options.after, 0, self.queries), self.block_q)
        if self.options.before is not None:
            last = index + self.block_k - 1 + self.options.before
            end = _quotient(_clip(last, -1, self.queries - 1) + self.block_q, self.block_q)
        return first, end

    def whole(self, i: Index, j: Index) -> Index:
        """Returns whether the window leaves all of tile `(i, j)`, and no key is padding."""
        query, key = i * self.block_q + self.offset, j * self.block_k
        inside = key + self.block_k <= self.keys
        if self.options.before is not None:
            inside = inside & (query + self.block_q - 1 - key <= self.options.before)
        if self.options.after is not None:
            inside = inside & (key + self.block_k - 1 - query <= self.options.after)
        return inside

    def whole_keys_of(self, i: Index) -> tuple[Index, Index]:
        """Returns the first and the end of the whole tiles among `keys_of(i)`."""
        first, end = self.keys_of(i)
        position = i * self.block_q + self.offset
        low, high = first, self.keys // self.block_k
        if self.options.before is not None:
            last = position + self.block_q - 1 - self.options.before  # a key that all may see
            low = _quotient(_clip(last, 0, self.keys) + self.block_k - 1, self.block_k)
        if self.options.after is not None:
            reach = _clip(position + self.options.after + 1, 0, self.keys)
            high = _quotient(reach, self.block_k)
        low = _clip(low, first, end)
        return low, _clip(high, low, end)

    def whole_queries_of(self, j: Index) -> tuple[Index, Index]:
        """Returns the first and the end of the whole tiles among `queries_of(j)`."""
        first, end = self.queries_of(j)
        index = j * self.block_k - self.offset
        low, high = first, end
        if self.options.after is not None:
            last = index + self.block_k - 1 - self.options.after
            low = _quotient(_clip(last, 0, self.queries) + self.block_q - 1, self.block_q)
        if self.options.before is not None:
            reach = _clip(index + self.options.before + 1, 0, self.queries)
            high = _quotient(reach, self.block_q)
        if self.keys % self.block_k:
            high = high * (j < self.blocks[1] - 1)  # the last block holds padding
        low = _clip(low, first, end)
        return low, _clip(high, low, end)

    @property
    def bounded(self) -> bool:
        """Whether any tile needs a mask for the window or for padding."""
        window = self.options.before is not None or self.options.after is not None
        return window or self.keys % self.block_k > 0

    def work(self) -> float:
        """Returns the pairs in visited tiles, relative to all `queries * keys`; offset known."""
        first, end = self.keys_of(np.arange(self.blocks[0]))
        visited = np.broadcast_to(np.maximum(end - first, 0), self.blocks[0]).sum()
        return int(visited) * self.block_q * self.block_k / (self.queries * self.keys)


def start(queries: int, keys: int, offset: jax.Array | None) -> int | jax.Array:
    """Returns the `offset` of a cut: where the call says, or the last query at the last key."""
    return keys - queries if offset is None else offset.astype(jnp.int32)


def _quotient(dividend: Index, divisor: int) -> Index:
    """Divides what is not negative; inside a kernel without the rounding of negative numbers."""
    if isinstance(dividend, jax.Array):
        return lax.div(dividend, jnp.asarray(divisor, dividend.dtype))
    return dividend // divisor


def _clip(value: Index, low: Index, high: Index) -> Index:
    if all(isinstance(x, int) for x in (value, low, high)):
        return min(max(value, low), high)
    xp: Any = jnp if any(isinstance(x, jax.Array) for x in (value, low, high)) else np
    return xp.minimum(xp.maximum(value, low), high)


# What a visit tells its kernel.
FIRST, LAST, ACTIVE, WHOLE = 1, 2, 4, 8


class Visits(NamedTuple):
    """The tiles in the order of a sequential grid, `[N]` int32 each.

    Attributes:
      outer: the block whose result is accumulated over consecutive visits.
      inner: the block that is read.
      flags: FIRST and LAST of the outer block; ACTIVE: there is something to compute; WHOLE: no
        mask needed. An outer block with nothing to see has one visit, which is not active.
    """

    outer: Any
    inner: Any
    flags: Any


def visits(cut: Cut, *, by_keys: bool) -> Visits:
    """Lists the visits block of queries by block of queries, or by blocks of keys.

    With a known offset the list holds exactly the tiles that are needed. With a traced one it has
    the length that any offset may need, its rest not active and without reads of its own.
    """
    outer_blocks, inner_blocks = reversed(cut.blocks) if by_keys else cut.blocks
    static = isinstance(cut.offset, int)
    steps = inner_blocks if static else _most(cut, by_keys)
    xp: Any = np if static else jnp
    outer = xp.repeat(xp.arange(outer_blocks, dtype=np.int32), steps)
    step = xp.tile(xp.arange(steps, dtype=np.int32), outer_blocks)
    first, end = cut.queries_of(outer) if by_keys else cut.keys_of(outer)
    count = xp.maximum(end - first, 1)
    inner = xp.clip(first + xp.minimum(step, count - 1), 0, inner_blocks - 1)
    whole = cut.whole(inner, outer) if by_keys else cut.whole(outer, inner)
    flags = FIRST * (step == 0) + LAST * (step == count - 1)
    flags = flags + ACTIVE * (step < end - first) + WHOLE * whole
    listed = Visits(*(part.astype(np.int32) for part in (outer, inner, flags)))
    return Visits(*(part[step < count] for part in listed)) if static else listed


def _most(cut: Cut, by_keys: bool) -> int:
    """Returns the most inner blocks that any outer block may touch, wherever the queries stand."""
    outer, inner = (cut.block_k, cut.block_q) if by_keys else (cut.block_q, cut.block_k)
    blocks = cut.blocks[0 if by_keys else 1]
    if cut.options.before is None or cut.options.after is None:
        return blocks
    span = outer + cut.options.before + cut.options.after
    return min(blocks, -(-(span - 1) // inner) + 1)
