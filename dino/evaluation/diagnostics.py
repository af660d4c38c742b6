"""How features lie in their space, and what patches know of their own pixels.

What training's parts are there for: KoLeo spreads features (distance to the nearest neighbour,
effective rank), the loss on patches makes them local (a linear probe of each patch).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from dino.evaluation.dense_data import DenseSource
from dino.evaluation.dense_features import patch_map
from dino.evaluation.features import FeatureModel, filled
from dino.evaluation.knn import unit
from dino.evaluation.logistic import fit_logistic
from dino.evaluation.metrics import confusion, mean_iou


@dataclass(frozen=True)
class Spread:
    """How features, scaled to length 1, lie on the sphere.

    Attributes:
        nearest: Median distance to the nearest other one.
        mean_cosine: Mean cosine between two of them; 1 where all are one.
        effective_rank: Of how many directions of equal variance they could be made: the
            exponential of the entropy of the covariance's eigenvalues as shares of their sum.
    """

    nearest: float
    mean_cosine: float
    effective_rank: float


def spread_of(features: np.ndarray) -> Spread:
    """Measures features [N, D], N at least 2."""
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"a spread is that of 2 features or more, not {list(features.shape)}")
    x = unit(jnp.asarray(features, jnp.float32))
    cosine = np.asarray(jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST), np.float64)
    count = len(cosine)
    total = cosine.sum() - np.trace(cosine)
    np.fill_diagonal(cosine, -1.0)
    nearest = np.sqrt(np.maximum(2 - 2 * cosine.max(1), 0))
    centred = np.asarray(x, np.float64)
    values = np.linalg.svd(centred - centred.mean(0), compute_uv=False) ** 2
    shares = values / max(values.sum(), np.finfo(np.float64).tiny)
    shares = shares[shares > 0]
    rank = float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 1.0
    return Spread(float(np.median(nearest)), float(total / (count * (count - 1))), rank)


def patch_probe(
    model: FeatureModel,
    train: DenseSource,
    test: DenseSource,
    patch: int,
    classes: int,
    *,
    strength: float = 1.0,
    iterations: int = 200,
    batch: int = 64,
) -> float:
    """Mean intersection over union of a linear classifier of single patches.

    A patch's class is that of most of its pixels.

    Args:
        model: The frozen model.
        train, test: Images of one size, whole patches a side, with the class of each pixel.
        patch: Side of a patch.
        classes: How many there are.
        strength: C of the logistic regression.
        iterations: Most iterations of it.
        batch: Images at a time.
    """
    features, labels = _patches(model, train, patch, classes, batch)
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    head = fit_logistic(
        (features - mean) / deviation, labels, classes, strength, iterations=iterations
    )
    features, truth = _patches(model, test, patch, classes, batch)
    predicted = head.predict((features - mean) / deviation)
    return mean_iou(confusion(predicted, truth, classes))[0]


def _patches(
    model: FeatureModel, source: DenseSource, patch: int, classes: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] and classes [N] of all patches of all images."""
    features, labels = [], []
    for start in range(0, len(source), batch):
        pairs = [source[i] for i in range(start, min(start + batch, len(source)))]
        images = np.stack([image for image, _ in pairs])
        found = patch_map(model, filled(images, batch), patch, 1)[: len(images)]
        features.append(np.asarray(found).reshape(-1, found.shape[-1]))
        labels += [_majority(values, patch, classes) for _, values in pairs]
    return np.concatenate(features), np.concatenate(labels)


def _majority(values: np.ndarray, patch: int, classes: int) -> np.ndarray:
    """The most frequent class of each patch of a label map [H, W]; the lowest of several."""
    h, w = values.shape[0] // patch, values.shape[1] // patch
    blocks = values.reshape(h, patch, w, patch).swapaxes(1, 2).reshape(h * w, -1)
    return np.stack([(blocks == c).sum(1) for c in range(classes)], 1).argmax(1)
