"""Logistic regression on frozen features by L-BFGS, in float64 (specification, section 6.3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize
from tqdm import tqdm

from common.errors import UserError
from dino.evaluation.knn import check_features
from dino.evaluation.metrics import accuracy

STRENGTHS = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45))
HELDOUT = 0.1  # Of the training examples, to choose the strength by.
_ITERATIONS = 1000
_TOLERANCE = 1e-12
# So many strengths in a row that score worse than the best end the search: two and a half powers of
# ten. The weaker a penalty, the more iterations it takes: most of all where it helps nothing.
_PATIENCE = 10


@dataclass(frozen=True)
class Logistic:
    """A classifier: weights [D, C] and biases [C] in float64."""

    kernel: np.ndarray
    bias: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Class of each feature [N, D]."""
        return np.argmax(features.astype(np.float64) @ self.kernel + self.bias, -1)


def fit_logistic(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    strength: float,
    *,
    start: Logistic | None = None,
    iterations: int = _ITERATIONS,
) -> Logistic:
    """Minimises `strength` times the summed cross-entropy plus half the squared weights.

    Args:
        features: float [N, D].
        labels: int [N].
        classes: C.
        strength: The inverse of the penalty, scikit-learn's and cuML's C.
        start: Where to begin; by default at zero.
        iterations: Most iterations.
    """
    width = features.shape[1]
    shape = (width + 1, classes)
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(features, np.float64))
        y = jnp.asarray(np.asarray(labels, np.int32))
        # Divided by strength × N, so that tolerances mean the same for every strength.
        penalty = 1.0 / (strength * len(labels))

        def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
            loss, gradient = _objective(jnp.asarray(flat.reshape(shape)), x, y, penalty)
            return float(loss), np.asarray(gradient).ravel()

        first = np.zeros(shape) if start is None else np.vstack([start.kernel, start.bias])
        result = optimize.minimize(
            value,
            first.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": iterations, "ftol": _TOLERANCE, "gtol": _TOLERANCE, "maxls": 50},
        )
    weights = result.x.reshape(shape)
    return Logistic(weights[:-1], weights[-1])


@jax.jit
@jax.value_and_grad
def _objective(weights: jax.Array, x: jax.Array, y: jax.Array, penalty: jax.Array) -> jax.Array:
    """Mean cross-entropy plus the penalty of all weights but the biases; and its gradient."""
    logits = jnp.matmul(x, weights[:-1], precision=jax.lax.Precision.HIGHEST) + weights[-1]
    right = jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
    loss = jnp.mean(jax.nn.logsumexp(logits, -1) - right)
    return loss + 0.5 * penalty * jnp.sum(jnp.square(weights[:-1]))


@dataclass(frozen=True)
class LogisticResult:
    """What a choice of strength came to.

    Attributes:
        predicted: Class of each test example, by the classifier fitted to all training examples.
        strength: The chosen one.
        heldout: Score on the held-out part for each strength that was tried.
    """

    predicted: np.ndarray
    strength: float
    heldout: dict[float, float]


def logistic_predict(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    classes: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    metric: Callable[[np.ndarray, np.ndarray], float] = accuracy,
    iterations: int = _ITERATIONS,
    seed: int = 0,
) -> LogisticResult:
    """Chooses the strength on a tenth of the training examples, then fits to all of them.

    Strengths are gone through from weak to strong, each from where the one before ended, until ten
    in a row have scored worse than the best.

    Raises:
        UserError: Shapes do not fit, or there are too few examples.
    """
    train, test, labels = check_features(train, labels, test)
    if len(train) < 10:
        raise UserError(f"logistic regression needs 10 training images or more, not {len(train)}")
    classes = int(labels.max()) + 1 if classes is None else classes
    order = np.random.default_rng(seed).permutation(len(train))
    heldout, kept = np.split(order, [int(len(train) * HELDOUT)])
    scores: dict[float, float] = {}
    fitted: Logistic | None = None
    best, start, worse = 0.0, None, 0  # The strength with the best score, and its classifier.
    for strength in tqdm(sorted(strengths), desc="logistic", unit="fit", disable=None):
        fitted = fit_logistic(
            train[kept], labels[kept], classes, strength, start=fitted, iterations=iterations
        )
        scores[strength] = metric(fitted.predict(train[heldout]), labels[heldout])
        if start is None or scores[strength] > scores[best]:
            best, start = strength, fitted
        worse = worse + 1 if scores[strength] < scores[best] else 0
        if worse == _PATIENCE:
            break
    final = fit_logistic(train, labels, classes, best, start=start, iterations=iterations)
    return LogisticResult(final.predict(test), best, scores)
