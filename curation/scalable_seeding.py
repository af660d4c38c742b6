"""k-means|| (Bahmani et al., 2012): seeds from all rows in a few passes.

Each pass draws about K / 2 rows at once, with probabilities proportional to their squared distances
from the candidates so far. Greedy k-means++ then chooses among the candidates, each of which counts
as many times as there are rows nearest to it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from curation.assignment import Precision
from curation.device_rows import DeviceRows
from curation.greedy_seeding import greedy_plus_plus
from curation.lloyd import assign_rows

ROUNDS = 5
_CHUNK = 1 << 24  # rows drawn from together

Report = Callable[[str, int, int], None]


def scalable_seeds(
    rows: DeviceRows,
    k: int,
    seed: Sequence[int],
    precision: Precision,
    *,
    report: Report | None = None,
) -> np.ndarray:
    """Returns K seeds `[K, D]`.

    Args:
      rows: all of them.
      k: how many seeds.
      seed: of the draws.
      precision: of the search for the nearest candidates.
      report: called with "candidates", passes done and all passes, then with "seeding".
    """
    rng = np.random.default_rng([*seed, 2])
    each = -(-k // 2)
    chosen = rng.integers(rows.data.rows, size=1)
    found = assign_rows(rows, _padded(rows, chosen, 1), precision)
    nearest, distances = found.labels, found.distances
    for number in range(ROUNDS):
        drawn = _draw(distances, each, rng)
        if not len(drawn):
            break  # Every row is a candidate or equal to one.
        found = assign_rows(rows, _padded(rows, drawn, _most(each)), precision)
        nearer = found.distances < distances
        nearest = np.where(nearer, found.labels + len(chosen), nearest)
        distances = np.where(nearer, found.distances, distances)
        chosen = np.concatenate([chosen, drawn])
        if report:
            report("candidates", number + 1, ROUNDS)
    if len(chosen) < k:
        others = np.setdiff1d(rng.permutation(rows.data.rows)[: 2 * k], chosen)
        chosen = np.concatenate([chosen, others[: k - len(chosen)]])
    weights = np.bincount(nearest, minlength=len(chosen)).astype(np.float32)
    candidates = rows.data.take(chosen)
    # A candidate that another one has taken all rows from may still be needed as the last of K.
    weights = np.maximum(weights, 1e-3)
    return candidates[greedy_plus_plus(candidates, k, seed, weights, report=report)]


def _draw(distances: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws about so many different rows, or a little more, by their distances; ascending."""
    whole = float(np.sum(distances, dtype=np.float64))
    if whole <= 0:
        return np.zeros(0, np.int64)
    drawn = []
    for start in range(0, len(distances), _CHUNK):
        part = distances[start : start + _CHUNK]
        here = rng.random(len(part), np.float32) < part * (count / whole)
        drawn.append(start + np.flatnonzero(here))
    rows = np.concatenate(drawn)
    if len(rows) > _most(count):
        rows = np.sort(rng.choice(rows, _most(count), replace=False))
    return rows


def _most(count: int) -> int:
    return count + count // 8 + 8


def _padded(rows: DeviceRows, chosen: np.ndarray, size: int) -> np.ndarray:
    """Returns rows as centroids, the first repeated up to a size: passes share one program."""
    x = rows.data.take(chosen)
    return np.concatenate([x, np.broadcast_to(x[0], (size - len(x), x.shape[1]))])
