"""The result of clustering: for every level its centroids and who belongs to them.

`Hierarchy.levels[0]` is level 1 of the paper, whose members are rows of the embeddings; the members
of a level above are centroids of the level below. Each `Level` holds, for K clusters of N members:

    centroids   float32 [K, D], or None where only the assignment is known
    indptr      int64 [K + 1]: cluster k's members stand at indptr[k] : indptr[k + 1]
    indices     int32 or int64 [N]: every member once; in a cluster the nearest comes first
    distances   float32 [N]: squared Euclidean distances of `indices` to their centroids, or None

`Level.from_assignment(centroids, labels, distances)` sorts; a cluster may be empty. All arrays may
be memory maps. `Hierarchy.settings` is JSON-able: how it was made, for the reader of its manifest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.errors import UserError

_CHUNK = 1 << 24  # elements looked at together where an array may be a memory map


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One clustering: see the module for the arrays.

    Raises:
      UserError: the arrays do not fit each other. Only `check` reads what memory maps hold.
    """

    centroids: np.ndarray | None
    indptr: np.ndarray
    indices: np.ndarray
    distances: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.indptr.ndim != 1 or len(self.indptr) == 0 or self.indptr.dtype != np.int64:
            raise UserError(
                f"a level's indptr must be int64 [K + 1], not {_described(self.indptr)}"
            )
        if self.indices.ndim != 1 or self.indices.dtype not in (np.int32, np.int64):
            raise UserError(
                f"a level's indices must be int32 or int64 [N], not {_described(self.indices)}"
            )
        if self.centroids is not None and (
            self.centroids.ndim != 2
            or len(self.centroids) != self.num_clusters
            or self.centroids.dtype != np.float32
        ):
            raise UserError(
                f"a level of {self.num_clusters} clusters needs centroids float32 "
                f"[{self.num_clusters}, D], not {_described(self.centroids)}"
            )
        if self.distances is not None and (
            self.distances.shape != self.indices.shape or self.distances.dtype != np.float32
        ):
            raise UserError(
                f"a level of {self.num_members} members needs distances float32 "
                f"[{self.num_members}], not {_described(self.distances)}"
            )

    @classmethod
    def from_assignment(
        cls, centroids: np.ndarray, labels: np.ndarray, distances: np.ndarray
    ) -> "Level":
        """Sorts members by cluster, then distance; equally near ones by index.

        Args:
          centroids: [K, D], kept in float32.
          labels: integers [N] in [0, K).
          distances: squared Euclidean distance [N] of each member to its centroid.

        Raises:
          UserError: the shapes do not fit, or a label is out of range.
        """
        centroids = np.asarray(centroids, np.float32)
        labels, distances = np.asarray(labels), np.asarray(distances, np.float32)
        if centroids.ndim != 2 or labels.ndim != 1 or distances.shape != labels.shape:
            raise UserError(
                f"a level needs centroids [K, D], labels [N] and distances [N]; got "
                f"{centroids.shape}, {labels.shape} and {distances.shape}"
            )
        k = len(centroids)
        if len(labels) and not (labels.min() >= 0 and labels.max() < k):
            raise UserError(f"labels must lie in [0, {k}), the number of centroids")
        order = np.lexsort((distances, labels))  # Stable: equal distances stay by index.
        indptr = np.zeros(k + 1, np.int64)
        np.cumsum(np.bincount(labels, minlength=k), out=indptr[1:])
        small = len(labels) <= np.iinfo(np.int32).max
        return cls(
            centroids, indptr, order.astype(np.int32 if small else np.int64), distances[order]
        )

    @property
    def num_clusters(self) -> int:
        """K, empty ones included."""
        return len(self.indptr) - 1

    @property
    def num_members(self) -> int:
        """N, what was clustered."""
        return len(self.indices)

    @property
    def sizes(self) -> np.ndarray:
        """Members of each cluster: int64 [K]."""
        return np.diff(self.indptr)

    def members(self, cluster: int) -> np.ndarray:
        """The members of one cluster, nearest first."""
        if not 0 <= cluster < self.num_clusters:
            raise IndexError(f"cluster {cluster} of {self.num_clusters}")
        return self.indices[self.indptr[cluster] : self.indptr[cluster + 1]]

    def labels(self) -> np.ndarray:
        """The cluster of each member: int64 [N]."""
        labels = np.empty(self.num_members, np.int64)
        labels[self.indices] = np.repeat(np.arange(self.num_clusters), self.sizes)
        return labels

    def check(self, name: str = "level") -> None:
        """Reads the arrays through, in parts.

        Raises:
          UserError: they are no partition: a member is missing, out of range or there twice.
        """
        if self.indptr[0] != 0 or self.indptr[-1] != self.num_members or np.any(self.sizes < 0):
            raise UserError(f"{name}: indptr does not divide {self.num_members} members")
        seen = np.zeros(self.num_members, bool)
        for start in range(0, self.num_members, _CHUNK):
            part = np.asarray(self.indices[start : start + _CHUNK])
            if part.min() < 0 or part.max() >= self.num_members:
                raise UserError(f"{name}: indices must lie in [0, {self.num_members})")
            seen[part] = True
        if not seen.all():
            missing = int(np.argmin(seen))
            raise UserError(f"{name}: member {missing} is in no cluster, others in two")


@dataclasses.dataclass(frozen=True, eq=False)
class Hierarchy:
    """Clusters of clusters: see the module.

    Attributes:
      levels: the lowest first.
      settings: JSON-able.

    Raises:
      UserError: a level's members are not the clusters of the level below.
    """

    levels: Sequence[Level]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels:
            raise UserError("a hierarchy needs at least one level")
        for number, (below, level) in enumerate(zip(self.levels, self.levels[1:]), 2):
            if level.num_members != below.num_clusters:
                raise UserError(
                    f"level {number} groups {level.num_members} clusters, but level {number - 1} "
                    f"has {below.num_clusters}"
                )

    @property
    def num_points(self) -> int:
        """How many embeddings were clustered."""
        return self.levels[0].num_members

    @property
    def num_clusters(self) -> tuple[int, ...]:
        """Clusters of each level, the lowest first."""
        return tuple(level.num_clusters for level in self.levels)

    def point_counts(self) -> list[np.ndarray]:
        """For each level int64 [K]: the embeddings under each cluster (the paper's flat size)."""
        counts: list[np.ndarray] = []
        for level in self.levels:
            if not counts:
                counts.append(level.sizes)
                continue
            running = np.zeros(level.num_members + 1, np.int64)
            np.cumsum(counts[-1][level.indices], out=running[1:])
            counts.append(np.diff(running[level.indptr]))
        return counts

    def point_labels(self, level: int) -> np.ndarray:
        """The cluster of each embedding at a level counted from 1: int64 [points]."""
        if not 1 <= level <= len(self.levels):
            raise UserError(f"level {level} of {len(self.levels)}: levels count from 1")
        labels = self.levels[0].labels()
        for above in self.levels[1:level]:
            labels = above.labels()[labels]
        return labels

    def flattened(self, level: int) -> Level:
        """A level counted from 1 as clusters of embeddings, in each by the order of the tree.

        Children come nearest first and so do their points; distances are not known.
        """
        if not 1 <= level <= len(self.levels):
            raise UserError(f"level {level} of {len(self.levels)}: levels count from 1")
        flat = self.levels[0]
        for above in self.levels[1:level]:
            sizes = flat.sizes[above.indices]
            ends = np.cumsum(sizes)
            starts = np.repeat(flat.indptr[:-1][above.indices] - (ends - sizes), sizes)
            indices = flat.indices[starts + np.arange(len(flat.indices))]
            edges = np.concatenate([np.zeros(1, np.int64), ends])
            flat = Level(above.centroids, edges[above.indptr], indices)
        return flat


def _described(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
