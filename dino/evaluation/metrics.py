"""Scores of predictions, on the host."""

import numpy as np


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions [N] that are right."""
    return float(np.mean(predicted == labels))


def mean_per_class(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their examples that is right."""
    right = (predicted == labels).astype(np.float64)
    return float(np.mean([right[labels == c].mean() for c in np.unique(labels)]))


METRICS = {"accuracy": accuracy, "mean_per_class": mean_per_class}


def average_precision(relevant: np.ndarray, total: int, trapezoid: bool = False) -> float:
    """Average precision of one ranking.

    Args:
        relevant: bool [N], whether the item at each rank is relevant, best first.
        total: How many relevant items there are, ranked or not.
        trapezoid: Take the mean of precision just before and at each relevant item, as the
            revisited Oxford and Paris benchmarks do, instead of precision at it.
    """
    if not total:
        return 0.0
    ranks = np.flatnonzero(relevant)
    found = np.arange(1, len(ranks) + 1)
    at = found / (ranks + 1)
    if not trapezoid:
        return float(at.sum() / total)
    before = np.where(ranks == 0, 1.0, (found - 1) / np.maximum(ranks, 1))
    return float(((before + at) / 2).sum() / total)


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 [classes, classes] by label and prediction; labels outside are left out."""
    counted = (labels >= 0) & (labels < classes)
    pairs = labels[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def mean_iou(counts: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean intersection over union, and that of each class (NaN where it does not occur)."""
    both = np.diag(counts).astype(np.float64)
    union = counts.sum(0) + counts.sum(1) - both
    ratios = np.divide(both, union, out=np.full(len(both), np.nan), where=union > 0)
    return float(np.nanmean(ratios)) if (union > 0).any() else float("nan"), ratios
