"""Greedy k-means++: each seed the best of a few rows drawn by their distance from the seeds so far.

Drawing candidates for one seed after the other would read all rows for every seed. They are drawn
for several seeds at once instead, from the distribution as it is then, with one product for all
their distances; later each is accepted with the ratio of its squared distance by then to that when
it was drawn. What is accepted is distributed as if it had been drawn anew (rejection sampling), so
that the seeds are those of the sequential method in distribution, at a fraction of its reads.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curation.checkpointing import Checkpoints
from curation.device_rows import rounded_blocks

_BLOCK = 1024
_STEPS = 256  # between two looks at the time
# Up to so many clusters are few, and each of their seeds is the best of so many.
_FEW, _OF_FEW = 256, 16
_SEEDS_A_DRAW = 8
_MOST_DISTANCES = 2**23  # held at a time, where one seed's candidates need no more
# A row nearer than this part of its squared norm is taken for the seed itself: the error of a
# product in float32. Narrow rows are subtracted instead, without any.
_NOTHING = 1e-6
_NARROW = 16

Report = Callable[[str, int, int], None]


def greedy_plus_plus(
    x: np.ndarray,
    k: int,
    seed: Sequence[int],
    weights: np.ndarray | None = None,
    *,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
) -> np.ndarray:
    """Chooses seeds by greedy k-means++, each the best of `candidates_of(k)`.

    Args:
      x: rows `[M, D]`, float32.
      k: how many seeds.
      seed: of the draws.
      weights: how often each row counts `[M]`; None for once.
      checkpoints: where steps so far are kept.
      report: called with "seeding", steps done and all steps.

    Returns:
      Row numbers `[K]`, in the order of choice. If there are fewer than K different rows, those
      behind the last of them are random repetitions.
    """
    rows = len(x)
    blocks = rounded_blocks(-(-rows // _BLOCK))
    device = jax.local_devices()[0]
    padded = np.zeros((blocks * _BLOCK, x.shape[1]), np.float32)
    padded[:rows] = x
    weight = np.zeros(len(padded), np.float32)
    weight[:rows] = 1 if weights is None else weights
    key = jax.random.key(np.random.SeedSequence(seed).generate_state(1)[0])
    data, weigh, key = jax.device_put((padded, weight, key), device)
    kept = checkpoints.load("seeding") if checkpoints else None
    if kept is not None:
        done, chosen, nearest = int(kept["done"]), kept["chosen"], kept["nearest"]
    else:
        done, chosen = 1, np.zeros(k, np.int32)
        chosen[0], nearest = _first(padded, weight, seed)
    state = jax.device_put((chosen, nearest), device)
    candidates = candidates_of(k)
    seeds_a_draw = max(1, min(_SEEDS_A_DRAW, _MOST_DISTANCES // (candidates * len(padded))))
    while done < k:
        stop = min(done - done % _STEPS + _STEPS, k)
        state = _steps(
            data, weigh, *state, key, done, stop, candidates=candidates, drawn=seeds_a_draw
        )
        done = stop
        if report:
            jax.block_until_ready(state)
            report("seeding", done, k)
        if checkpoints and checkpoints.due():
            found = dict(zip(("chosen", "nearest"), map(np.asarray, state)))
            checkpoints.save("seeding", done=np.asarray(done), **found)
    return np.asarray(state[0])


def candidates_of(k: int) -> int:
    """Returns how many rows each of K seeds is the best of.

    The paper's code takes `2 + floor(ln k)`. Few seeds cost little, and with 20 candidates in place
    of 5 the same iterations left 1 % less inertia (40 clusters of rings in the plane).
    """
    return max(2 + int(math.log(k)), _OF_FEW if k <= _FEW else 0)


def _first(x: np.ndarray, weights: np.ndarray, seed: Sequence[int]) -> tuple[int, np.ndarray]:
    """Draws the first seed by weight alone; returns its row and the distances to it `[M]`."""
    share = weights.astype(np.float64)
    row = int(np.random.default_rng([*seed, 4]).choice(len(x), p=share / share.sum()))
    nearest = np.empty(len(x), np.float32)
    for start in range(0, len(x), _BLOCK):
        block = slice(start, start + _BLOCK)
        nearest[block] = np.square(x[block] - x[row]).sum(axis=1)
    return row, nearest


@functools.partial(jax.jit, static_argnames=("candidates", "drawn"), donate_argnums=(2, 3))
def _steps(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    nearest: jax.Array,
    key: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    *,
    candidates: int,
    drawn: int,
) -> tuple[jax.Array, jax.Array]:
    """Chooses seeds start:stop.

    Args:
      x, weights: rows `[M, D]` and how often each counts; zero behind the last.
      chosen: row numbers of the seeds `[K]`.
      nearest: squared distance of each row to its nearest seed `[M]`.
      candidates: how many the best is taken of.
      drawn: for how many seeds they are drawn at once.
    """
    norms = jnp.sum(jnp.square(x), axis=1)

    def draw(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        seed, chosen, nearest = state
        for_rows, for_luck = jax.random.split(jax.random.fold_in(key, seed))
        part = weights * nearest
        anything = jnp.sum(part) > 0
        # Where nothing is left all rows are as good.
        rows = _draw(for_rows, jnp.where(anything, part, weights), candidates * drawn)
        luck = jax.random.uniform(for_luck, (len(rows),))
        apart = _distances(x, norms, rows)
        before = jnp.where(anything, nearest[rows], 1)

        def accepted(nearest: jax.Array, behind: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Returns the next candidates that are accepted, and whether there are enough."""
            by_now = jnp.where(anything, nearest[rows], 1)
            fit = (luck * before < by_now) & (jnp.arange(len(rows)) >= behind)
            count = jnp.cumsum(fit.astype(jnp.int32))
            places = jnp.searchsorted(count, jnp.arange(1, candidates + 1))
            return places.astype(jnp.int32), count[-1] >= candidates

        def going(state: tuple[jax.Array, ...]) -> jax.Array:
            seed, *_, enough = state
            return (seed < stop) & enough

        def choose(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            seed, chosen, nearest, places, _ = state
            nearer = jnp.minimum(apart[places], nearest)
            left = _total(nearer, weights)
            best = places[jnp.argmin(left)]
            nearest = jnp.minimum(apart[best], nearest)
            return (
                seed + 1,
                chosen.at[seed].set(rows[best]),
                nearest,
                *accepted(nearest, places[-1] + 1),
            )

        # As they are drawn all are accepted.
        state = (seed, chosen, nearest, jnp.arange(candidates, dtype=jnp.int32), jnp.asarray(True))
        return lax.while_loop(going, choose, state)[:3]

    state = (jnp.asarray(start, jnp.int32), chosen, nearest)
    return lax.while_loop(lambda state: state[0] < stop, draw, state)[1:]


def _total(values: jax.Array, weights: jax.Array) -> jax.Array:
    """`values [count, M]`, `weights [M]` -> their sums `[count]`, block by block."""
    by_block = jnp.einsum(
        "cbm,bm->cb",
        values.reshape(len(values), -1, _BLOCK),
        weights.reshape(-1, _BLOCK),
        precision=lax.Precision.HIGHEST,
    )
    return jnp.sum(by_block, axis=1)


def _draw(key: jax.Array, part: jax.Array, count: int) -> jax.Array:
    """Draws rows with probabilities proportional to `part [M]`: int32 `[count]`."""
    blocks = part.reshape(-1, _BLOCK)
    ends = jnp.cumsum(jnp.sum(blocks, axis=1))
    at = jax.random.uniform(key, (count,)) * ends[-1]
    block = jnp.minimum(jnp.searchsorted(ends, at, side="right"), len(ends) - 1)
    inside = at - jnp.where(block > 0, ends[block - 1], 0.0)
    within = blocks[block]
    beyond = (jnp.cumsum(within, axis=1) > inside[:, None]) & (within > 0)
    # Rounding may lead past the last row of a block.
    last = jnp.max(jnp.where(within > 0, jnp.arange(_BLOCK), 0), axis=1)
    row = jnp.where(jnp.any(beyond, axis=1), jnp.argmax(beyond, axis=1), last)
    return (block * _BLOCK + row).astype(jnp.int32)


def _distances(x: jax.Array, norms: jax.Array, drawn: jax.Array) -> jax.Array:
    """Returns the squared distances of all rows to some of them: `[count, M]`."""
    c = x[drawn]
    if x.shape[1] <= _NARROW:
        apart = jnp.zeros((len(drawn), len(x)), jnp.float32)
        for d in range(x.shape[1]):
            apart += jnp.square(c[:, d, None] - x[None, :, d])
        return apart
    both = norms[drawn][:, None] + norms
    products = lax.dot_general(
        c, x, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    apart = both - 2 * products
    return jnp.where(apart > _NOTHING * both, apart, 0.0)
