"""Lloyd's iterations as the paper's own code does them, in torch.

Written from the algorithm's description: distances by expansion in chunks of about 1e8 numbers,
labels to the host, clusters by sorting them, and one mean after the other in float32.
"""

import numpy as np
import torch

_CHUNK_NUMBERS = 100_000_000


@torch.no_grad()
def lloyd(x: np.ndarray, start: np.ndarray, iterations: int) -> float:
    """Returns the inertia after so many iterations from given centroids."""
    rows, centroids = torch.from_numpy(x), torch.from_numpy(start.copy())
    norms = rows.square().sum(dim=1)
    labels, distances = _assign(rows, norms, centroids)
    for _ in range(iterations):
        order = np.argsort(labels, kind="stable")
        edges = np.searchsorted(labels[order], np.arange(1, len(centroids)))
        for cluster, members in enumerate(np.split(order, edges)):
            if len(members):
                centroids[cluster] = rows[torch.from_numpy(members)].mean(dim=0)
        labels, distances = _assign(rows, norms, centroids)
    return float(distances.sum(dtype=np.float64))


def _assign(
    rows: torch.Tensor, norms: torch.Tensor, centroids: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    chunk = max(1, _CHUNK_NUMBERS // len(centroids))
    square = centroids.square().sum(dim=1)
    labels, distances = [], []
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        apart = norms[part, None] - 2 * rows[part] @ centroids.T + square
        least, index = apart.min(dim=1)
        labels.append(index.numpy())
        distances.append(least.clamp(min=0).numpy())
    return np.concatenate(labels), np.concatenate(distances)
