"""Where the tokens of a call stand: positions, documents, padding, and what was cached before.

Every temporal mixer (attention, recurrence, convolution) receives one `TokenLayout`, so packing,
padding and chunked prefill are decided once for a call and mean the same in every layer.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Layout of a chunk of `T` tokens for each of `B` rows.

    Attributes:
      positions: `[B, T]` (or `[1, T]`) int32 position inside the document; 0 starts a document.
      segments: `[B, T]` int32, equal exactly for tokens of one document; 0 continues the document
        that the state ended in. None: each row is one document that starts at index 0.
      lengths: `[B]` int32 number of real tokens at the head of each row; the rest is padding that
        must leave the state as it is. None: all are real.
      cached: `[B]` int32 position of the next token of the cached document (0: nothing cached).
      first: `[B]` int32 first position of the cached document that was ever seen.
      fresh: static; True where no row has anything cached, so that state may be ignored.
    """

    positions: jax.Array
    segments: jax.Array | None
    lengths: jax.Array | None
    cached: jax.Array | None
    first: jax.Array | None
    fresh: bool = dataclasses.field(metadata={"static": True}, default=True)

    @property
    def resets(self) -> jax.Array:
        """`[B or 1, T]` bool: True where a document starts and memory is cleared."""
        if self.segments is None:
            return jnp.arange(self.positions.shape[1])[None, :] == 0
        before = jnp.pad(self.segments[:, :-1], ((0, 0), (1, 0)))
        return self.segments != before

    @property
    def valid(self) -> jax.Array | None:
        """`[B, T]` bool: True for real tokens; None where all are."""
        if self.lengths is None:
            return None
        return jnp.arange(self.positions.shape[1])[None, :] < self.lengths[:, None]


def sequence_layout(
    tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> TokenLayout:
    """Layout of whole sequences `[B, L]`, nothing cached.

    Documents start where a position is 0 or where the segment id changes. Without positions they
    count from 0 within each segment. Padding needs no more than an own segment id, or negative
    positions before a document starts.
    """
    batch, length = tokens.shape
    if positions is None and segment_ids is None:
        return TokenLayout(jnp.arange(length, dtype=jnp.int32)[None], None, None, None, None)
    starts = jnp.zeros((batch, length), bool)
    if segment_ids is not None:
        segment_ids = jnp.broadcast_to(segment_ids, (batch, length))
        change = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
    if positions is None:
        index = jnp.arange(length, dtype=jnp.int32)[None]
        positions = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    else:
        positions = jnp.broadcast_to(positions, (batch, length)).astype(jnp.int32)
        starts = starts | (positions == 0)
    segments = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    return TokenLayout(positions, segments, None, None, None)


def chunk_layout(
    tokens: jax.Array,
    cached: jax.Array,
    first: jax.Array,
    positions: jax.Array | None,
    lengths: jax.Array | None,
    *,
    fresh: bool,
) -> TokenLayout:
    """Layout of a chunk `[B, T]` that continues rows whose next position is `cached [B]`.

    Positions default to counting on from `cached`; a 0 among given positions starts a new document.
    """
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    if positions is None:
        positions = cached[:, None] + index
    positions = jnp.broadcast_to(positions, tokens.shape).astype(jnp.int32)
    segments = jnp.cumsum(positions == 0, axis=1, dtype=jnp.int32)
    if lengths is not None:
        # Padding repeats the last real token's document, so that it opens none of its own.
        last = jnp.clip(lengths - 1, 0)[:, None]
        segments = jnp.where(
            index < lengths[:, None], segments, jnp.take_along_axis(segments, last, axis=1)
        )
        segments = jnp.where(lengths[:, None] == 0, 0, segments)
    # A stream that opens at a position beyond 0 has seen nothing before that position.
    first = jnp.where(cached == 0, jnp.where(positions[:, 0] < 0, 0, positions[:, 0]), first)
    return TokenLayout(positions, segments, lengths, cached, first, fresh)


def end_of_chunk(layout: TokenLayout) -> tuple[jax.Array, jax.Array]:
    """Returns `(cached, first)`, each `[B]`, as they stand after the chunk."""
    assert layout.cached is not None
    assert layout.first is not None
    assert layout.segments is not None
    length = layout.positions.shape[1]
    lengths = layout.lengths if layout.lengths is not None else jnp.full_like(layout.cached, length)
    last = jnp.clip(lengths - 1, 0)[:, None]
    position = jnp.take_along_axis(layout.positions, last, axis=1)[:, 0]
    opened = jnp.take_along_axis(layout.segments, last, axis=1)[:, 0] > 0
    cached = jnp.where(lengths == 0, layout.cached, position + 1)
    first = jnp.where(opened, 0, layout.first)
    return cached, jnp.where(lengths == 0, layout.first, first)
