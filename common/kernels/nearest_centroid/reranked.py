"""Nearest centroid at the speed of bfloat16 with the winners of float32.

All scores are computed from rounded operands. Where a row's two best are further apart than
rounding can have moved them, the winner is certain. Of the other rows, some per cent of usual data,
most have two contenders that close, whose distances are computed in float32; the rest is compared
with all centroids anew in float32.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from common.kernels.dispatch import dispatch, unfit
from common.kernels.nearest_centroid import nearest_centroid, xla

# Rounding to bfloat16 moves a number by at most 2^-8 of it. For two scores of a row these errors
# add up, like random signs, to about 0.6 of 2^-8 times the root of sum(x^2 c^2), which is at most
# |x|_4 |c|_4: a margin of six to seven standard deviations.
_MARGIN = 4 * 2.0**-8
# Uncertain rows compared at a time: with their two contenders, with all centroids.
_BATCH, _REST = 128, 64


Take = Callable[[jax.Array], jax.Array]


class Nearest(NamedTuple):
    """What is known of some rows' centroids; scores are `|c|^2 / 2 - x.c` of rounded operands.

    Attributes:
        index: The nearest centroid `[N]`, int32.
        score: Its score `[N]`.
        following: What no other centroid's score is below `[N]`.
    """

    index: jax.Array
    score: jax.Array | None
    following: jax.Array | None


class Rounded(NamedTuple):
    """Rows as the rounded products take them, for a search that comes back to them.

    Attributes:
        bits: Of the rows in bfloat16 `[N, D]`, uint16: a CPU copies bfloat16 four times slower.
        norm: The fourth root of the sum of fourth powers of each row `[N]`, float32.
    """

    bits: jax.Array
    norm: jax.Array


def rounded(x: jax.Array) -> Rounded:
    """Rounds rows `[N, D]` of float32."""
    return Rounded(lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16), _fourth_norm(x))


def nearest_reranked(x: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the centroid nearest to each row: as `nearest_centroid`, of float32 rows.

    Near ties are decided by float32 products, among equal ones the lowest index wins. The distance
    is `sum((x - c[index])**2)`, without cancellation. Rows and centroids must be finite.

    Args:
        x: Rows `[N, D]` in float32.
        c: Centroids `[K, D]` in float32.

    Returns:
        The index `[N]` in int32 and the squared distance `[N]` in float32.
    """
    x, c = jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32)
    index = nearest_of_all(x, c).index
    return index, squared_distance(x, c, index)


def nearest_of_all(x: jax.Array | Take, c: jax.Array, short: Rounded | None = None) -> Nearest:
    """As `nearest_reranked`, and says how certain it is: what `nearest_of_moved` goes on from.

    Args:
        x: Rows `[N, D]` in float32, or what takes some of them by number.
        c: Centroids `[K, D]` in float32.
        short: The same rows, `rounded` before; needed if `x` is a function.
    """
    search = _Search(x, c, short)
    index, score, following = search.two_least(search.short_c, search.half)
    found = Nearest(index, score, following)
    return search.decide(found, following - score)


def nearest_of_moved(
    x: jax.Array | Take,
    c: jax.Array,
    moved: jax.Array,
    known: Nearest,
    short: Rounded | None = None,
    *,
    most: int,
) -> Nearest:
    """As `nearest_of_all`, where only some centroids are others than when `known` was found.

    A row whose own centroid stayed is compared with those that moved. So is one whose own came
    nearer than any that stayed can be; only the remaining rows look at all centroids.

    Args:
        x: Rows `[N, D]` in float32, or what takes some of them by number.
        c: Centroids `[K, D]` in float32.
        moved: Which of them are others than before `[K]`, bool; at most `most`.
        known: Of the same rows, before.
        short: The same rows, `rounded` before; needed if `x` is a function.
        most: How many products are computed for each row.
    """
    search = _Search(x, c, short)
    (places,) = jnp.nonzero(moved, size=most, fill_value=len(c))
    half = jnp.where(places < len(c), search.half[places], jnp.inf)
    at, low, second = search.two_least(search.short_c[places], half)
    at = jnp.minimum(places[at], len(c) - 1).astype(jnp.int32)
    stayed = ~moved[known.index]
    kept = stayed & (known.score <= low)
    found = Nearest(
        jnp.where(kept, known.index, at),
        jnp.where(kept, known.score, low),
        jnp.minimum(known.following, jnp.where(kept, low, jnp.where(stayed, known.score, second))),
    )
    # Among those that stayed it was decided before.
    gap = jnp.where(kept, low, found.following) - found.score
    return search.decide(found, gap)


def nearest_float32(x: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `nearest_reranked`, by products of float32 alone."""
    x, c = jnp.asarray(x, jnp.float32), jnp.asarray(c, jnp.float32)
    index, _ = nearest_centroid(x, c)
    return index, squared_distance(x, c, index)


def squared_distance(x: jax.Array, c: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `sum((x - c[index])**2)` `[N]`."""
    return jnp.sum(jnp.square(x - c[index]), axis=1)


def marked_first(marked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns places in `marked [N]`, those that are true first, int32; and how many are true."""
    place = jnp.cumsum(marked, dtype=jnp.int32)
    total = len(marked)
    order = jnp.zeros((total,), jnp.int32)
    order = order.at[jnp.where(marked, place - 1, total)].set(jnp.arange(total), mode="drop")
    return order, place[-1]


class _Search:
    """Rows and centroids in float32, and rounded."""

    def __init__(self, x: jax.Array | Take, c: jax.Array, short: Rounded | None):
        self.c = jnp.asarray(c, jnp.float32)
        self.half = 0.5 * jnp.sum(jnp.square(self.c), axis=1)
        if short is None:
            x = jnp.asarray(x, jnp.float32)
            short = rounded(x)
        bits, norm = short
        self.take = x if callable(x) else x.__getitem__
        self.short_x = lax.bitcast_convert_type(bits, jnp.bfloat16)
        self.short_c = self.c.astype(jnp.bfloat16)
        self.margin = _MARGIN * norm * jnp.max(_fourth_norm(self.c))

    def two_least(
        self, short_c: jax.Array, half: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The place of each row's least score among some centroids, that score, and the next."""
        index, score, following = dispatch(
            "nearest_centroid",
            None,
            self.short_x,
            short_c,
            half,
            xla=xla.search_two,
            tpu=unfit("tpu", self.short_x, short_c) or _tpu,
            gpu=unfit("gpu", self.short_x, short_c) or _gpu,
        )
        return index, score, following

    def decide(self, found: Nearest, gap: jax.Array) -> Nearest:
        """Returns what was found, decided in float32 where other scores may be as near as `gap`."""
        uncertain = ~(gap > self.margin)
        between = functools.partial(self._between_two, found.score + self.margin)
        (*decided, uncertain) = _in_batches(between, (*found, uncertain), uncertain, _BATCH)
        (index, score) = _in_batches(self._among_all, tuple(decided[:2]), uncertain, _REST)
        # The least of all scores is the best that is known of the others, if it is not the own.
        return Nearest(index, score, jnp.where(uncertain, jnp.minimum(*decided[1:]), decided[2]))

    def _between_two(self, limit: jax.Array, rows: jax.Array) -> tuple[jax.Array, ...]:
        """Returns `Nearest` of some rows, as of their nearer contender, and if there are others."""
        wide = self.take(rows)
        found = xla.contenders(wide.astype(jnp.bfloat16), self.short_c, self.half, limit[rows])
        first = squared_distance(wide, self.c, found.first)
        nearer = squared_distance(wide, self.c, found.last) < first
        index = jnp.where(nearer, found.last, found.first)
        own = index == found.index
        score = jnp.where(own, found.score, found.following)
        following = jnp.where(own, found.following, found.score)
        return index, score, following, (found.count < 1) | (found.count > 2)

    def _among_all(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = self.take(rows)
        index, _ = nearest_centroid(wide, self.c)
        products = _short(wide) * _short(self.c[index])
        return index, self.half[index] - jnp.sum(products, axis=1)


def _in_batches(
    decided: Callable[[jax.Array], tuple[jax.Array, ...]],
    found: tuple[jax.Array, ...],
    uncertain: jax.Array,
    batch: int,
) -> tuple[jax.Array, ...]:
    """Returns what was found with what is decided of uncertain rows, a batch at a time."""
    batch = min(batch, len(uncertain))
    order, count = marked_first(uncertain)

    def step(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The last batch begins early enough to be whole: it decides some rows again, or, where
        # there is but one batch, the first row.
        rows = lax.dynamic_slice_in_dim(order, jnp.minimum(i * batch, len(order) - batch), batch)
        return tuple(
            whole.at[rows].set(part) for whole, part in zip(found, decided(rows), strict=True)
        )

    return lax.fori_loop(0, (count + batch - 1) // batch, step, found)


def _short(x: jax.Array) -> jax.Array:
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _fourth_norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sqrt(jnp.sum(jnp.square(jnp.square(x)), axis=1)))


# Pallas takes a while to import, and programs for a CPU alone never need it.


def _tpu(
    x: jax.Array, c: jax.Array, half: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from common.kernels.nearest_centroid import tpu

    return tpu.search_two(x, c, half, interpret=interpret)


def _gpu(
    x: jax.Array, c: jax.Array, half: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from common.kernels.nearest_centroid import gpu

    return gpu.search_two(x, c, half, interpret=interpret)
