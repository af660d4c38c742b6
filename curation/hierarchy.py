"""Hierarchical k-means with resampling (arXiv:2405.15613, algorithm 1).

Each level clusters the centroids of the level below. One k-means leaves its centroids nearly as
dense where the data is dense; so a level is clustered anew, several times, on a sample that holds
equally many members of every cluster, which flattens the density without giving up clusters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from common.errors import UserError
from common.sharding import make_mesh
from curation.checkpointing import Checkpoints
from curation.clusters import Hierarchy, Level
from curation.device_rows import DeviceRows
from curation.embeddings import Embeddings, open_embeddings, scan
from curation.kmeans import KMeansConfig, check_clusters, cluster_rows, resolve_precision
from curation.lloyd import Assignment, Empty, assign_rows
from curation.seeding import Init
from curation.splitting import split

Strategy = Literal["c", "r"]
Report = Callable[[str, int, int], None]


# How the reference iterates.
REFERENCE = KMeansConfig(tolerance=0.0, empty="keep")


@dataclasses.dataclass(frozen=True)
class HierarchyConfig:
    """How to cluster level upon level.

    Attributes:
      clusters: of each level, the lowest first; each fewer than before.
      resampling_steps: how many times each level is clustered again on a sample; one number for
        all levels, or one each. None for the published setting: none on the lowest, 9 above.
        (`n_resampling_steps` of the reference's configuration counts the first clustering too.)
      sample_sizes: members of each cluster in the sample, likewise; None for half the mean size of
        a cluster. A level with 1 or less is not resampled.
      strategy: "c" samples the members closest to their centroid, "r" random ones.
      kmeans: of every single clustering. The reference iterates 50 times, keeps centroids without
        members, and starts once.
      splits: into how many clusters each cluster of a level is then divided on its own, for levels
        too large for one k-means; likewise. Such a level is not resampled.
    """

    clusters: tuple[int, ...] = (1000, 100, 10)
    resampling_steps: int | tuple[int, ...] | None = None
    sample_sizes: int | tuple[int, ...] | None = None
    strategy: Strategy = "c"
    kmeans: KMeansConfig = REFERENCE
    splits: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if not self.clusters:
            raise UserError("a hierarchy needs the number of clusters of at least one level")
        if min(self.clusters) < 1:
            raise UserError(
                f"the number of clusters must be a whole number from 1, not {min(self.clusters)}"
            )
        for name in ("resampling_steps", "sample_sizes", "splits"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(self.clusters):
                raise UserError(
                    f"{name} has {len(value)} numbers for {len(self.clusters)} levels: give one "
                    "each, or a single one"
                )
            numbers = value if isinstance(value, tuple) else (value,)
            if any(number is not None and number < 0 for number in numbers):
                raise UserError(f"{name} must be 0 or more, not {value}")
        for level in range(len(self.clusters)):
            if self.splits_of(level) > 1 and self.steps_of(level):
                raise UserError(f"level {level + 1} cannot be both split and resampled")
        for level, above in enumerate(self.clusters[1:]):
            below = self.clusters[level] * max(1, self.splits_of(level))
            if above >= below:
                raise UserError(
                    f"each level needs fewer clusters than the one below, not {above} above {below}"
                )
        if self.strategy not in ("c", "r"):
            raise UserError(f"strategy is 'c' (closest) or 'r' (random), not '{self.strategy}'")

    def steps_of(self, level: int) -> int:
        """Returns how many times a level, counted from 0, is clustered again."""
        if self.resampling_steps is None:
            return 9 if level and self.splits_of(level) <= 1 else 0
        return _of(self.resampling_steps, level)

    def splits_of(self, level: int) -> int:
        """Returns into how many clusters those of a level, counted from 0, are divided."""
        return _of(self.splits, level)

    def sample_of(self, level: int, members: int) -> int:
        """Returns how many members of a cluster are sampled in a level of so many."""
        if self.sample_sizes is None:
            return max(1, round(members / self.clusters[level] / 2))
        return _of(self.sample_sizes, level)


def hierarchical_kmeans(
    x: Any,
    clusters: Sequence[int] = (1000, 100, 10),
    resampling_steps: int | Sequence[int] | None = None,
    seed: int = 0,
    *,
    sample_sizes: int | Sequence[int] | None = None,
    strategy: Strategy = "c",
    init: Init = "auto",
    iterations: int = 50,
    tolerance: float = 0.0,
    restarts: int = 1,
    empty: Empty = "keep",
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
    splits: int | Sequence[int] = 1,
    normalize: bool = False,
    mesh: Mesh | None = None,
    memory: int | None = None,
    checkpoints: str | Path | None = None,
    report: Report | None = None,
) -> Hierarchy:
    """Clusters embeddings, then their centroids, then the centroids of these, and so on.

    Like `kmeans`, the result follows from rows, arguments and seed alone.

    Args:
      x: embeddings `[N, D]`: see `kmeans`.
      clusters, resampling_steps, sample_sizes, strategy, splits: see `HierarchyConfig`.
      seed: of all random choices.
      init, iterations, tolerance, restarts, empty, precision: of every k-means, see `KMeansConfig`.
      normalize: scale rows to unit length first; centroids are what they are.
      mesh, memory, checkpoints, report: see `kmeans`.

    Returns:
      The levels, lowest first. A centroid is the one that k-means found on the last sample, its
      members are those of the whole level nearest to it, which may be none.

    Raises:
      UserError: rows that cannot be clustered, or arguments that make no sense.
    """
    config = HierarchyConfig(
        _numbers("clusters", clusters),
        None if resampling_steps is None else _numbers("resampling_steps", resampling_steps),
        None if sample_sizes is None else _numbers("sample_sizes", sample_sizes),
        strategy,
        KMeansConfig(init, iterations, tolerance, restarts, empty, precision),
        _numbers("splits", splits),
    )
    embeddings = open_embeddings(x, normalize=normalize)
    return cluster_levels(
        embeddings, config, seed, mesh=mesh, memory=memory, checkpoints=checkpoints, report=report
    )


def cluster_levels(
    embeddings: Embeddings,
    config: HierarchyConfig,
    seed: int,
    *,
    mesh: Mesh | None = None,
    memory: int | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_seconds: float | None = None,
    report: Report | None = None,
) -> Hierarchy:
    """As `hierarchical_kmeans`, for a configuration; states are kept every so many seconds."""
    check_clusters(config.clusters[0], embeddings, seed)
    mesh = mesh or make_mesh()
    data = scan(embeddings)
    settings = {"data": data.settings, "seed": seed} | dataclasses.asdict(config)
    kept = (
        None
        if checkpoints is None
        else Checkpoints(Path(checkpoints), settings, seconds=checkpoint_seconds)
    )
    levels: list[Level] = []
    for number in range(len(config.clusters)):
        rows = DeviceRows(data, mesh, memory=memory)
        centroids, assignment = _cluster_level(rows, config, number, seed, kept, report)
        levels.append(Level.from_assignment(centroids, assignment.labels, assignment.distances))
        data = scan(Embeddings(centroids, name=f"the centroids of level {number + 1}"))
    return Hierarchy(levels, {"seed": seed, **dataclasses.asdict(config)})


def _cluster_level(
    rows: DeviceRows,
    config: HierarchyConfig,
    number: int,
    seed: int,
    checkpoints: Checkpoints | None,
    report: Report | None,
) -> tuple[np.ndarray, Assignment]:
    """Clusters the input of a level, counted from 0, and does so again on samples of it."""
    k, steps = config.clusters[number], config.steps_of(number)
    if k > rows.data.rows:  # Splitting leaves fewer clusters than were asked for.
        raise UserError(f"level {number + 1} has {rows.data.rows} rows for {k} clusters")
    size = config.sample_of(number, rows.data.rows)
    if size <= 1:
        steps = 0
    name, done, centroids = f"level{number + 1}", -1, np.zeros((0, 0), np.float32)
    if checkpoints and (kept := checkpoints.load(name)) is not None:
        done, centroids = int(kept["step"]), kept["centroids"]
    precision = resolve_precision(config.kmeans.precision, rows.data)
    assignment: Assignment | None = None
    if done >= 0:
        assignment = assign_rows(rows, centroids - rows.data.centre, precision)
    for step in range(done + 1, steps + 1):
        given = rows
        if assignment is not None:
            sample = resample(assignment, k, size, config.strategy, (seed, number, step))
            if len(sample) < k:
                break  # So few different rows that there are not as many as clusters.
            given = DeviceRows(rows.data.subset(sample), rows.mesh, memory=rows.memory)
        part = checkpoints and checkpoints.below(f"{name}_step{step}", {"level": number, "n": step})
        tell = report and _prefixed(report, f"level {number + 1}, step {step + 1}/{steps + 1}: ")
        found = cluster_rows(
            given, k, (seed, number, step), config.kmeans, checkpoints=part, report=tell
        )
        centroids = found.centroids
        if given is rows:
            assignment = Assignment(found.labels, found.distances, found.inertia)
        else:
            assignment = assign_rows(rows, centroids - rows.data.centre, precision)
        if checkpoints and part:
            checkpoints.save(name, step=np.asarray(step), centroids=centroids)
            part.clear()
    assert assignment is not None
    if (parts := config.splits_of(number)) <= 1:
        return centroids, assignment
    if checkpoints and (kept := checkpoints.load(f"{name}_split")) is not None:
        whole = float(np.sum(kept["distances"], dtype=np.float64))
        return kept["centroids"], Assignment(kept["labels"], kept["distances"], whole)
    tell = report and _prefixed(report, f"level {number + 1}: ")
    centroids, assignment = split(
        rows, centroids, assignment, parts, (seed, number), config.kmeans, tell
    )
    if checkpoints:
        checkpoints.save(
            f"{name}_split",
            centroids=centroids,
            labels=assignment.labels,
            distances=assignment.distances,
        )
    return centroids, assignment


def resample(
    assignment: Assignment, k: int, size: int, strategy: Strategy, seed: Sequence[int]
) -> np.ndarray:
    """Returns so many members of each cluster, or all it has; row numbers, ascending.

    Args:
      assignment: of the rows.
      k: how many clusters there are.
      size: members of each.
      strategy: "c" for the closest to the centroid, of equally close ones the first; "r" for
        random ones.
      seed: of the random choice.
    """
    labels = assignment.labels
    order = assignment.distances
    if strategy == "r":
        order = np.random.default_rng([*seed, 3]).random(len(labels))
    sorted_rows = np.lexsort((order, labels))
    sizes = np.bincount(labels, minlength=k)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(sorted_rows[np.arange(len(labels)) - starts < size])


def _numbers(name: str, value: Any) -> Any:
    """Returns a whole number, or a tuple of them."""
    several = np.ndim(value) > 0
    numbers = tuple(np.ravel(np.asarray(value)).tolist())
    if np.ndim(value) > 1 or not all(type(number) is int for number in numbers):
        raise UserError(f"{name} must be whole numbers, one for each level, not {value}")
    if name == "clusters" and not several:
        return numbers
    return numbers if several else numbers[0]


def _of(value: int | tuple[int, ...], level: int) -> int:
    return value[level] if isinstance(value, tuple) else value


def _prefixed(report: Report, prefix: str) -> Report:
    return lambda what, done, whole: report(prefix + what, done, whole)
