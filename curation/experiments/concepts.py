"""Long-tailed concepts: how evenly samples of equal size represent them.

Gaussians in 16 dimensions with sizes after Zipf's law stand for the concepts of a web crawl.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from curation.balance import divergence_from_uniform, largest_share
from curation.clusters import Hierarchy
from curation.experiments.clustering import cluster
from curation.experiments.config import ConceptsConfig
from curation.sampling import balanced_sample, flat_sample

RAW, RANDOM = "the pool", "random sample"
FINE, COARSE = "flat, 200 clusters", "flat, 50 clusters"
TWO, THREE, RESAMPLED = "two levels", "three levels", "two levels, resampled"
NAMES = (RAW, RANDOM, FINE, COARSE, TWO, RESAMPLED, THREE)


def long_tailed(config: ConceptsConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, D] and the concept of each [N]."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, config.concepts + 1)
    sizes = np.maximum(np.round(config.points * shares / shares.sum()), 1).astype(int)
    labels = np.repeat(np.arange(config.concepts), sizes)
    centres = np.sqrt(8) * rng.normal(size=(config.concepts, config.width))
    points = centres[labels] + rng.normal(size=(len(labels), config.width))
    return points.astype(np.float32), labels


def measure_concepts(config: ConceptsConfig) -> dict[str, Any]:
    """Divergence of the sampled concepts from equal shares, and the largest share, of each way."""
    divergences: dict[str, list[float]] = {name: [] for name in NAMES}
    shares: dict[str, list[float]] = {name: [] for name in NAMES}
    counts: dict[str, list[int]] = {}
    for seed in config.seeds:
        x, labels = long_tailed(config, seed)
        for name, choose in _ways(x, config.size, seed).items():
            found = np.bincount(labels[choose()], minlength=config.concepts)
            divergences[name].append(divergence_from_uniform(found))
            shares[name].append(largest_share(found))
            counts[name] = found.tolist()
    return {
        "divergence": {name: float(np.mean(values)) for name, values in divergences.items()},
        "each": divergences,
        "largest_share": {name: float(np.mean(values)) for name, values in shares.items()},
        "counts": counts,
    }


def _ways(x: np.ndarray, size: int, seed: int) -> dict[str, Callable[[], np.ndarray]]:
    """The samples by name; clusters of proportions that suit 50 concepts in 10,000 points."""

    def hierarchy(*levels: int, **options: Any) -> Hierarchy:
        return cluster(x, levels, seed=seed, **options)

    rng = np.random.default_rng([seed, 1])
    return {
        RAW: lambda: np.arange(len(x)),
        RANDOM: lambda: rng.choice(len(x), size, replace=False),
        FINE: lambda: flat_sample(hierarchy(200), size, seed=seed),
        COARSE: lambda: flat_sample(hierarchy(50), size, seed=seed),
        TWO: lambda: balanced_sample(hierarchy(800, 50), size, seed=seed),
        RESAMPLED: lambda: balanced_sample(
            hierarchy(800, 50, resamplings=10, sample_size=(6, 8)), size, seed=seed
        ),
        THREE: lambda: balanced_sample(hierarchy(1500, 400, 50), size, seed=seed),
    }
