"""How evenly points are spread over clusters or concepts."""

from typing import NamedTuple

import numpy as np

from curation.clusters import Hierarchy


class Balance(NamedTuple):
    """Counts of groups before and after a selection, each int64 [K]."""

    before: np.ndarray
    after: np.ndarray


def divergence_from_uniform(counts: np.ndarray) -> float:
    """Kullback-Leibler divergence of shares from equal ones, in nats: 0 … log K.

    Nothing counted at all diverges by 0.
    """
    total = counts.sum()
    shares = counts[counts > 0] / max(total, 1)
    return float(np.sum(shares * np.log(shares * len(counts))))


def largest_share(counts: np.ndarray) -> float:
    """The share of the largest group."""
    return float(counts.max(initial=0) / max(counts.sum(), 1))


def balance_of_levels(hierarchy: Hierarchy, selected: np.ndarray) -> list[Balance]:
    """Points in the clusters of each level, of all and of those selected."""
    labels = hierarchy.levels[0].labels()
    found = []
    for number, before in enumerate(hierarchy.point_counts()):
        if number:
            labels = hierarchy.levels[number].labels()[labels]
        found.append(Balance(before, np.bincount(labels[selected], minlength=len(before))))
    return found


def balance_of_labels(labels: np.ndarray, selected: np.ndarray) -> Balance:
    """Points of each label, of all and of those selected."""
    names, numbers = np.unique(labels, return_inverse=True)
    counts = [np.bincount(of, minlength=len(names)) for of in (numbers, numbers[selected])]
    return Balance(*counts)
