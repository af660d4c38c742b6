"""Lloyd's iterations: every row to its nearest centroid, every centroid to the mean of its rows.

The same loop for rows that stay on the devices and for rows that stream past them. Means come from
sums that do not depend on order, so that the iterations are the same on any mesh.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from common.kernels.nearest_centroid.reranked import Nearest, Rounded
from curation import assignment
from curation.assignment import Pass, Precision, Step
from curation.checkpointing import Checkpoints
from curation.device_rows import Chunk, DeviceRows

Empty = Literal["repair", "keep"]
MOST_REPAIRS = 1024  # of empty clusters in one iteration
# Products of a pass from which on looking at moved centroids alone pays for compiling that.
_WORTH_IT = 1 << 32
_PARTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of all centroids; there is a program for each

Report = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class LloydConfig:
    """How to iterate.

    Attributes:
      iterations: at the most.
      tolerance: stop when the squared shifts of all centroids add up to no more than this.
      empty: "repair" puts a centroid that no row is nearest to onto one of the rows farthest from
        their own; "keep" leaves it where it is.
      precision: of the search for winners, which are float32's in any case.
    """

    iterations: int
    tolerance: float
    empty: Empty
    precision: Precision


@dataclasses.dataclass(frozen=True, eq=False)
class Assignment:
    """All rows and their nearest centroids.

    Attributes:
      labels: int32 [N].
      distances: squared, float32 [N].
      inertia: their sum.
    """

    labels: np.ndarray
    distances: np.ndarray
    inertia: float


@dataclasses.dataclass(frozen=True, eq=False)
class Clustering:
    """Where the iterations ended: centroids `[K, D]` of centred rows, and who is nearest."""

    centroids: np.ndarray
    assignment: Assignment
    iterations: int
    converged: bool


def lloyd(
    rows: DeviceRows,
    centroids: np.ndarray,
    config: LloydConfig,
    *,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
) -> Clustering:
    """Iterates from given centroids until no row changes its cluster.

    Interrupted and called again with the same checkpoints, it goes on with the last iteration kept
    and ends where it would have ended.

    Args:
      rows: of which the centroids are to be means.
      centroids: where to start, `[K, D]`.
      config: how to iterate.
      checkpoints: where centroids are kept between iterations.
      report: called with "iteration", iterations done and all of them; where rows are streamed,
        also with "rows of an iteration".
    """
    span = np.float32(rows.data.span)
    done, shift = 0, math.inf
    if checkpoints and (kept := checkpoints.load("lloyd")) is not None:
        centroids, done, shift = kept["centroids"], int(kept["done"]), float(kept["shift"])
    here = _everywhere(rows, np.asarray(centroids, np.float32))
    state = _State(rows, len(centroids), config.precision)
    step: Step | None = None
    converged = shift <= config.tolerance
    while True:
        last = done >= config.iterations or converged
        # After the last iteration sums are no longer needed, but few rows change them, and the
        # program without them would have to be compiled.
        whole = state.assign(here, step, update=done > 0 or not last, report=report)
        if last or whole.changed == 0:
            found = state.measured(here)
            return Clustering(np.asarray(here), found, done, converged or not last)
        if config.empty == "repair":
            whole = _repair(rows, state.measured, here, whole, span)
        step = assignment.move_centroids(whole, here, span)
        here, done, shift = step.centroids, done + 1, float(step.shift)
        converged = shift <= config.tolerance
        if report:
            report("iteration", done, config.iterations)
        if checkpoints and checkpoints.due():
            kept = {"done": np.asarray(done), "shift": np.asarray(shift)}
            checkpoints.save("lloyd", centroids=np.asarray(here), **kept)


def assign_rows(rows: DeviceRows, centroids: np.ndarray, precision: Precision) -> Assignment:
    """Assigns all rows to given centroids `[K, D]` of centred rows."""
    state = _State(rows, len(centroids), precision)
    here = _everywhere(rows, np.asarray(centroids, np.float32))
    state.assign(here, None, update=False)
    return state.measured(here)


class _State:
    """Labels of all rows, in every process, from pass to pass; distances where they are asked for.

    Of streamed rows they cost another reading, so that most passes do without.
    """

    def __init__(self, rows: DeviceRows, clusters: int, precision: Precision):
        self._rows, self._clusters, self._precision = rows, clusters, precision
        self._kept: Nearest | None = None  # what was found of resident rows
        self._short: Rounded | None = None
        self._labels = np.full(rows.data.rows, clusters, np.int32)
        self._gathered = assignment.start(rows.mesh, clusters, rows.data.width)
        self._all_moved = _everywhere(rows, np.ones((clusters,), bool))

    def assign(
        self,
        centroids: jax.Array,
        step: Step | None,
        *,
        update: bool,
        report: Report | None = None,
    ) -> Pass:
        """Passes over all rows; returns what the devices have gathered.

        A pass without `update` is the last one. `step` is how centroids came where they are, from
        where they were in the pass before.
        """
        rows = self._rows
        waiting: tuple[Chunk, jax.Array] | None = None
        so_far = assignment.again(self._gathered)
        for chunk in rows.chunks():
            so_far, found = assignment.assign(
                so_far,
                chunk.x,
                self._before(chunk),
                np.int32(chunk.valid),
                centroids,
                self._all_moved if step is None else step.moved,
                np.float32(rows.data.span),
                self._short,
                mesh=rows.mesh,
                block=rows.block,
                precision=self._precision,
                update=update,
                most_moved=self._most_moved(step),
            )
            if rows.resident:
                self._kept = found
            if report and not rows.resident:
                report("rows of an iteration", chunk.first, rows.data.rows)
            if waiting:  # Devices are busy with this chunk while the one before is fetched.
                _take(*waiting, self._labels)
            waiting = chunk, found.index
        if waiting:
            _take(*waiting, self._labels)
        self._gathered = so_far
        return assignment.totals(rows.mesh, so_far)

    def measured(self, centroids: jax.Array) -> Assignment:
        """Passes over all rows for their distances to the centroids they were assigned to."""
        rows, blocks = self._rows, []
        distances = np.zeros(rows.data.rows, np.float32)
        for chunk in rows.chunks():
            labels = self._before(chunk).index
            apart, sums = assignment.measure(
                chunk.x, labels, centroids, mesh=rows.mesh, block=rows.block
            )
            _take(chunk, apart, distances)
            blocks.append(fetch(sums))
        inertia = math.fsum(np.concatenate(blocks).tolist())
        return Assignment(self._labels, distances, inertia)

    def _before(self, chunk: Chunk) -> Nearest:
        if self._kept is not None:
            return self._kept
        labels = np.full(self._rows.chunk_rows, self._clusters, np.int32)
        labels[: chunk.valid] = self._labels[chunk.first : chunk.first + chunk.valid]
        found = Nearest(self._rows.place(labels), None, None)
        if not self._keeps_scores:
            return found
        self._short = assignment.round_rows(chunk.x, mesh=self._rows.mesh, block=self._rows.block)
        nothing = np.zeros(self._rows.chunk_rows, np.float32)
        score, following = self._rows.place(nothing), self._rows.place(nothing)
        return found._replace(score=score, following=following)

    @property
    def _keeps_scores(self) -> bool:
        """Where they pay: the rows are at hand, and searching takes longer than compiling."""
        rows = self._rows
        products = rows.data.rows * rows.data.width * self._clusters
        return rows.resident and self._precision == "bfloat16" and products >= _WORTH_IT

    def _most_moved(self, step: Step | None) -> int | None:
        """A number for which there may be a program already; None: look at all centroids."""
        if step is None or self._kept is None or not self._keeps_scores:
            return None
        count = int(step.count)
        for part in _PARTS:
            if count <= (most := math.ceil(self._clusters * part)):
                return most
        return None


def _take(chunk: Chunk, of_rows: jax.Array, whole: np.ndarray) -> None:
    whole[chunk.first : chunk.first + chunk.valid] = fetch(of_rows)[: chunk.valid]


def fetch(array: jax.Array) -> np.ndarray:
    """Returns a whole array in every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _everywhere(rows: DeviceRows, array: np.ndarray) -> jax.Array:
    sharding = NamedSharding(rows.mesh, PartitionSpec())
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _repair(
    rows: DeviceRows,
    measured: Callable[[jax.Array], Assignment],
    centroids: jax.Array,
    whole: Pass,
    span: np.float32,
) -> Pass:
    """Gives each empty cluster one of the rows farthest from their centroids, the farthest first.

    A row that is its cluster's last, or lies on its centroid, stays.
    """
    counts = np.array(whole.counts)
    empty = np.flatnonzero(counts == 0)[:MOST_REPAIRS]
    if not len(empty):
        return whole
    clusters, found = len(counts), measured(centroids)
    old = np.full(MOST_REPAIRS, clusters, np.int32)
    new = np.full(MOST_REPAIRS, clusters, np.int32)
    moved: list[int] = []
    for row in _farthest(found.distances, 2 * len(empty)):
        label = found.labels[row]
        if len(moved) == len(empty) or found.distances[row] == 0:
            break
        if counts[label] > 1:
            counts[label] -= 1
            old[len(moved)], new[len(moved)] = label, empty[len(moved)]
            moved.append(row)
    x = np.zeros((MOST_REPAIRS, rows.data.width), np.float32)
    if moved:
        x[: len(moved)] = rows.data.take(np.asarray(moved))
    return assignment.move_rows(whole, x, old, new, span)


def _farthest(distances: np.ndarray, count: int) -> np.ndarray:
    """Returns the rows of the largest distances, in that order; of equal ones the first."""
    if count < len(distances):
        least = np.partition(distances, -count)[-count]
        rows = np.flatnonzero(distances >= least)
    else:
        rows = np.arange(len(distances))
    return rows[np.argsort(-distances[rows], kind="stable")][:count]
