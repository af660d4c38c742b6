"""Retrieval of what resembles a small data set from a large pool, in DINOv2's two manners.

By sample: the nearest neighbours of every query, for query sets large enough. By cluster: random
members of every cluster of the pool that holds more than a few queries, for small ones
(arXiv:2304.07193, section 3 and appendix A).
"""

import numpy as np

from common.errors import UserError
from common.kernels import nearest_centroid
from curation.clusters import Hierarchy, Level
from curation.sampling import sample_clusters
from curation.similarity import Progress, check_rows, nearest_neighbours

_CHUNK = 1 << 16  # queries assigned together


def retrieve(
    queries: np.ndarray, pool: np.ndarray, k: int, *, progress: Progress | None = None
) -> np.ndarray:
    """Retrieves by sample: the k rows of the pool most similar to each query.

    `curation.similarity.nearest_neighbours` gives the similarities too; `np.unique` of the result
    is the retrieved set.

    Args:
      queries: [Q, D], an array or a memory map.
      pool: [N, D].
      k: neighbours of each query; DINOv2 takes 4 for large query sets, 32 for ImageNet-1k.
      progress: called with (blocks done, blocks in all).

    Returns:
      Row numbers of the pool: int64 [Q, k], by falling cosine similarity.

    Raises:
      UserError: shapes, dtype or k do not fit, or a row is zero or not finite.
    """
    return nearest_neighbours(queries, pool, k, progress=progress).indices


def retrieve_clusters(
    queries: np.ndarray,
    hierarchy: Hierarchy,
    *,
    level: int = 1,
    per_cluster: int = 10_000,
    more_than: int = 3,
    at_most: int | None = 1_000_000,
    seed: int = 0,
) -> np.ndarray:
    """Retrieves by cluster: random members of each cluster that holds more than a few queries.

    A query belongs to the cluster of the nearest centroid. Where all that would be retrieved is
    more than `at_most`, the clusters give equally many, as far as each has them.

    Args:
      queries: [Q, D], prepared as the embeddings that were clustered.
      hierarchy: the pool's clusters, with centroids.
      level: which of its levels, from 1.
      per_cluster: most members taken of one cluster.
      more_than: clusters with so many queries or fewer are left out.
      at_most: most members in all; None for any number.
      seed: of the random choice.

    Returns:
      Row numbers of the pool: int64, ascending, each once.

    Raises:
      UserError: the hierarchy has no centroids there, or arguments do not fit.
    """
    flat = hierarchy.flattened(level)
    if flat.centroids is None:
        raise UserError(f"level {level} of the clusters has no centroids to compare queries with")
    if min(per_cluster, more_than, 0 if at_most is None else at_most) < 0:
        raise UserError("per_cluster, more_than and at_most cannot be negative")
    check_rows(queries, flat.centroids)
    held = np.bincount(assign(queries, flat.centroids), minlength=flat.num_clusters)
    most = np.where(held > more_than, np.minimum(flat.sizes, per_cluster), 0)
    total = int(most.sum()) if at_most is None else at_most
    return sample_clusters(Level(None, flat.indptr, flat.indices), most, total, seed)


def assign(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid of each row, int64 [N], a part of the rows at a time.

    Raises:
      UserError: a row is not finite.
    """
    labels = np.empty(len(x), np.int64)
    # Distances do not change when all move, and are exact where numbers are small.
    origin = np.mean(centroids, axis=0, dtype=np.float64).astype(np.float32)
    for start in range(0, len(x), _CHUNK):
        rows = np.asarray(x[start : start + _CHUNK], np.float32) - origin
        index, distance = nearest_centroid(rows, centroids - origin)
        bad = np.flatnonzero(~np.isfinite(np.asarray(distance)))
        if len(bad):
            raise UserError(f"row {start + int(bad[0])} of the queries is not finite: leave it out")
        labels[start : start + _CHUNK] = index
    return labels
