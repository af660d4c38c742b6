"""Where k-means starts: greedy k-means++, its scalable form, or random rows.

Greedy k-means++ draws a few candidates a step, each row with a probability proportional to its
squared distance from the seeds so far, and keeps the one that leaves the least of it. Its steps
follow each other and are cheap each, so they run on one device (`greedy_seeding`), over all rows
or, of larger data, over a uniform sample; where that device is and how many others there are
changes nothing.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from curation.checkpointing import Checkpoints
from curation.embeddings import Centred
from curation.greedy_seeding import Report, greedy_plus_plus

Init = Literal["auto", "k-means++", "k-means||", "random"]
# Rows that seeds are drawn from: all, or at least so many, and so many for each seed.
SAMPLE_ROWS = 65_536
SAMPLE_ROWS_PER_SEED = 20
# More seeds than these are chosen in a few passes rather than one after the other.
MOST_STEPS = 2048


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
