"""The density of centroids by that of the data: the exponent d / (d + 2) of quantisation.

Two separate boxes, one with fifty times as many points. k-means gives the dense one more centroids,
but less than in proportion: by the density to the power d / (d + 2); the next level, whose data are
the centroids, by that power of it again. Random seeds stay in proportion, for Lloyd's iterations
move no centroid from box to box.
"""

from typing import Any

import numpy as np

from curation.experiments.config import DensityConfig
from curation.kmeans import kmeans


def boxes(dimensions: int, large: int, small: int, seed: int) -> np.ndarray:
    """Uniform points of two unit boxes whose centres are 3 apart on the first axis."""
    rng = np.random.default_rng([seed, dimensions])
    points = rng.random((large + small, dimensions), np.float32)
    points[large:, 0] += 3
    return points


def ratio(centroids: np.ndarray) -> float:
    """Centroids in the dense box to those in the other."""
    dense = int(np.sum(centroids[:, 0] < 2))
    return dense / max(len(centroids) - dense, 1)


def measure_density(config: DensityConfig, seed: int) -> dict[str, Any]:
    """Ratios of both levels and of random seeds, beside what theory says, by dimension."""
    found: dict[str, list[float]] = {
        name: [] for name in ("first", "second", "random", "theory", "second_theory", "exponent")
    }
    contrast = config.large / config.small
    for d in config.dimensions:
        x = boxes(d, config.large, config.small, seed)
        k, iterations = config.clusters, config.iterations
        first = kmeans(x, k[0], seed, iterations=iterations[0], tolerance=0.0)
        second = kmeans(first.centroids, k[1], seed, iterations=iterations[1], tolerance=0.0)
        scattered = kmeans(
            x, k[0], seed, init="random", iterations=iterations[0], tolerance=0.0, empty="keep"
        )
        exponent = d / (d + 2)
        found["first"].append(ratio(first.centroids))
        found["second"].append(ratio(second.centroids))
        found["random"].append(ratio(scattered.centroids))
        found["theory"].append(contrast**exponent)
        found["second_theory"].append(contrast ** (exponent**2))
        found["exponent"].append(float(np.log(ratio(first.centroids)) / np.log(contrast)))
    return {"dimensions": list(config.dimensions), "contrast": contrast, **found}
