"""The simulated distribution in two dimensions: how near to uniform the centroids of levels come.

Section 4.1 of the paper: three Gaussians and some uniform points in a square, of which one holds
most of the mass; the divergence of the centroids' density from uniform over the square falls with
every level, and with resampling reaches that of points drawn uniformly.
"""

import time
from typing import Any

import numpy as np

from curation.experiments.clustering import cluster
from curation.experiments.config import PlaneConfig

HALF = 3.0  # The square is [-3, 3]².
BANDWIDTH, STEP = 0.5, 0.02
# Settings of the published figure: clusters of each level, the lowest first.
LEVELS = {"one level": (300,), "two levels": (1500, 300), "three levels": (3000, 1000, 300)}
RESAMPLED = "three levels, resampled"
DATA, UNIFORM = "the data", "uniform points"


def simulated(rng: np.random.RandomState) -> np.ndarray:
    """The 9,000 points of the figure: [9000, 2]."""
    parts = [
        np.array(centre) + 0.5 * rng.randn(count, 2)
        for centre, count in (((-1, -1), 7000), ((1, -1), 1000), ((0, 1), 500))
    ]
    return np.concatenate([*parts, rng.uniform(-HALF, HALF, (500, 2))])


def divergence(points: np.ndarray) -> float:
    """Kullback-Leibler divergence of the points' density from uniform over the square, in nats.

    The density is a Gaussian kernel estimate on a grid, normalised over the square.
    """
    grid = np.arange(-HALF, HALF, STEP)
    # The kernel is a product over axes, and so is its sum over points one product of matrices.
    x, y = (np.exp(-((grid[:, None] - axis) ** 2) / (2 * BANDWIDTH**2)) for axis in points.T)
    density = x @ y.T
    density /= density.sum() * STEP**2
    share = density[density > 0]
    return float(np.sum(share * np.log(share * (2 * HALF) ** 2)) * STEP**2)


def measure_plane(config: PlaneConfig) -> dict[str, Any]:
    """The divergence of every setting for every seed, the last seed's points, and the time."""
    found: dict[str, list[float]] = {}
    seconds = dict.fromkeys((*LEVELS, RESAMPLED), 0.0)
    points: dict[str, Any] = {}
    for seed in config.seeds:
        rng = np.random.RandomState(seed)
        data = simulated(rng)
        uniform = [rng.uniform(-HALF, HALF, (300, 2)) for _ in range(config.uniform_draws)]
        found.setdefault(DATA, []).append(divergence(data))
        found.setdefault(UNIFORM, []).extend(divergence(draw) for draw in uniform)
        points = {DATA: data[:: len(data) // 3000].round(3).tolist()}
        for name in seconds:
            start = time.perf_counter()
            resampled = name == RESAMPLED
            levels = LEVELS["three levels" if resampled else name]
            hierarchy = cluster(
                data,
                levels,
                seed=seed,
                iterations=config.iterations,
                resamplings=config.resamplings if resampled else 0,
                sample_size=config.sample_size,
            )
            centroids = np.asarray(hierarchy.levels[-1].centroids)
            seconds[name] += (time.perf_counter() - start) / len(config.seeds)
            found.setdefault(name, []).append(divergence(centroids))
            points[name] = centroids.round(3).tolist()
    return {
        "divergence": {name: float(np.mean(values)) for name, values in found.items()},
        "each": {name: values for name, values in found.items() if name != UNIFORM},
        "uniform_deviation": float(np.std(found[UNIFORM])),
        "seconds": seconds,
        "points": points,
    }
