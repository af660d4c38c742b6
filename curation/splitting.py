"""The two steps of a lowest level too large for one k-means: clusters, and clusters within each.

As the paper's code does for its 10 million clusters: 100,000 first, then 100 in each of them. What
is nearest across the borders of the first step is not looked for.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from curation.device_rows import DeviceRows, block_for
from curation.kmeans import KMeansConfig, cluster_rows
from curation.lloyd import Assignment

Report = Callable[[str, int, int], None]


def split(
    rows: DeviceRows,
    centroids: np.ndarray,
    assignment: Assignment,
    parts: int,
    seed: tuple[int, ...],
    config: KMeansConfig,
    report: Report | None = None,
) -> tuple[np.ndarray, Assignment]:
    """Divides every cluster into several; those without members are dropped.

    Args:
      rows: that were clustered.
      centroids: of the first step, `[K, D]`.
      assignment: of the first step.
      parts: how many clusters to make of one, at most its size.
      seed: of each k-means, with the cluster's number.
      config: of each k-means.
      report: called with "splits", clusters done and all of them.

    Returns:
      Centroids `[<= K * parts, D]`, those of one cluster of the first step together, and who is
      nearest among them.
    """
    order = np.argsort(assignment.labels, kind="stable")
    edges = np.searchsorted(assignment.labels[order], np.arange(len(centroids) + 1))
    block = block_for(int(np.diff(edges).max()))  # Clusters of any size share a program.
    config = dataclasses.replace(config, init="k-means++")
    labels = np.zeros(rows.data.rows, np.int32)
    distances = np.zeros(rows.data.rows, np.float32)
    found: list[np.ndarray] = []
    count = 0
    for cluster, (start, stop) in enumerate(itertools.pairwise(edges)):
        members = order[start:stop]
        if not len(members):
            continue
        here = DeviceRows(rows.data.subset(members), rows.mesh, memory=rows.memory, block=block)
        one = cluster_rows(here, min(parts, len(members)), (*seed, cluster), config)
        used, inside = np.unique(one.labels, return_inverse=True)
        found.append(one.centroids[used])
        labels[members] = count + inside
        distances[members] = one.distances
        count += len(used)
        if report:
            report("splits", cluster + 1, len(centroids))
    inertia = float(np.sum(distances, dtype=np.float64))
    return np.concatenate(found), Assignment(labels, distances, inertia)
