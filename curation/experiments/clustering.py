"""Hierarchies as the experiments want them."""

from collections.abc import Sequence

import numpy as np

from curation.clusters import Hierarchy
from curation.hierarchy import hierarchical_kmeans


def cluster(
    x: np.ndarray,
    clusters: Sequence[int],
    *,
    seed: int,
    iterations: int = 50,
    resamplings: int = 0,
    sample_size: int | Sequence[int] = 2,
) -> Hierarchy:
    """Clusters of `clusters` on each level, with as many resamplings on each after the first."""
    sizes = [sample_size] * len(clusters) if isinstance(sample_size, int) else list(sample_size)
    return hierarchical_kmeans(
        np.asarray(x, np.float32),
        tuple(clusters),
        resampling_steps=resamplings,
        sample_sizes=tuple(sizes),
        iterations=iterations,
        seed=seed,
    )
