"""Where k-means starts: greedy k-means++, its scalable form, or random rows.

Greedy k-means++ draws a few candidates a step, each row with a probability proportional to its
squared distance from the seeds so far, and keeps the one that leaves the least of it. Its steps
follow each other and are cheap each, so they run on one device, over all rows or, of larger data,
over a uniform sample; where that device is and how many others there are changes nothing.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curation.checkpointing import Checkpoints
from curation.device_rows import rounded_blocks
from curation.embeddings import Centred

log = logging.getLogger(__name__)

Init = Literal["auto", "k-means++", "k-means||", "random"]
# Rows that seeds are drawn from: all, or at least so many, and so many for each seed.
SAMPLE_ROWS = 65_536
SAMPLE_ROWS_PER_SEED = 20
# More seeds than these are chosen in a few passes rather than one after the other.
MOST_STEPS = 2048
_BLOCK = 1024
_STEPS = 256  # between two looks at the time
# A row nearer than this part of its squared norm is taken for the seed itself: the error of a
# product in float32. Narrow rows are subtracted instead, without any.
_NOTHING = 1e-6
_NARROW = 16

Report = Callable[[str, int, int], None]


def sample_rows(rows: int, k: int, seed: Sequence[int]) -> np.ndarray:
    """Returns the rows that seeds are drawn from: all, or a uniform sample; ascending."""
    wanted = max(SAMPLE_ROWS, SAMPLE_ROWS_PER_SEED * k)
    if rows <= wanted:
        return np.arange(rows)
    return np.sort(np.random.default_rng([*seed, 0]).choice(rows, wanted, replace=False))


def random_seeds(data: Centred, k: int, seed: Sequence[int]) -> np.ndarray:
    """Returns K different rows, `[K, D]`."""
    chosen = np.random.default_rng([*seed, 1]).choice(data.rows, k, replace=False)
    return data.take(chosen)


def plus_plus_seeds(
    data: Centred,
    k: int,
    seed: Sequence[int],
    *,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
) -> np.ndarray:
    """Returns K seeds `[K, D]` by greedy k-means++, over a sample of rows if there are many."""
    x = data.take(sample_rows(data.rows, k, seed))
    chosen = greedy_plus_plus(x, k, seed, checkpoints=checkpoints, report=report)
    return x[chosen]


def greedy_plus_plus(
    x: np.ndarray,
    k: int,
    seed: Sequence[int],
    weights: np.ndarray | None = None,
    *,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
) -> np.ndarray:
    """Chooses seeds by greedy k-means++ with `2 + floor(ln k)` candidates a step.

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
    arrays = jax.device_put((padded, weight), device)
    kept = checkpoints.load("seeding") if checkpoints else None
    done = 0
    chosen, nearest = np.zeros(k, np.int32), np.ones(len(padded), np.float32)
    if kept is not None:
        done, chosen, nearest = int(kept["done"]), kept["chosen"], kept["nearest"]
    state = jax.device_put((chosen, nearest), device)
    key = jax.device_put(jax.random.key(np.random.SeedSequence(seed).generate_state(1)[0]), device)
    candidates = 2 + int(math.log(k))
    while done < k:
        stop = min(done + _STEPS, k)
        state = _steps(*arrays, *state, key, done, stop, candidates=candidates)
        done = stop
        if report:
            jax.block_until_ready(state)
            report("seeding", done, k)
        if checkpoints and checkpoints.due():
            found = dict(zip(("chosen", "nearest"), map(np.asarray, state)))
            checkpoints.save("seeding", done=np.asarray(done), **found)
    chosen, nearest = map(np.asarray, state)
    return chosen


@functools.partial(jax.jit, static_argnames="candidates", donate_argnums=(2, 3))
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
) -> tuple[jax.Array, jax.Array]:
    """Chooses seeds start:stop.

    Args:
      x, weights: rows `[M, D]` and how often each counts; zero behind the last.
      chosen: row numbers of the seeds `[K]`.
      nearest: squared distance of each row to its nearest seed `[M]`; ones before the first.
    """
    norms = jnp.sum(jnp.square(x), axis=1)

    def step(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chosen, nearest = state
        part = weights * nearest
        # Where nothing is left all rows are as good.
        part = jnp.where(jnp.sum(part) > 0, part, weights)
        drawn = _draw(jax.random.fold_in(key, i), part, candidates)
        nearer = jnp.minimum(_distances(x, norms, drawn), jnp.where(i == 0, jnp.inf, nearest))
        left = jnp.sum((weights * nearer).reshape(candidates, -1, _BLOCK), axis=2).sum(axis=1)
        # The first seed is drawn, not chosen among several.
        best = jnp.where(i == 0, 0, jnp.argmin(left))
        return chosen.at[i].set(drawn[best]), nearer[best]

    return lax.fori_loop(start, stop, step, (chosen, nearest))


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
