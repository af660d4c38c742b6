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
# Enough to choose a strength by what it gets right: on digits, tumours and drawn classes the same
# as by `_TOLERANCE`, in a third to a half of the time. The weakest penalties end somewhat earlier.
_SEARCH_TOLERANCE = 1e-8
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
    rows = _Rows(features, labels, classes)
    return rows.fit(strength, start=start, iterations=iterations)


class _Rows:
    """Training examples along their principal axes, for fits of several strengths.

    The minimum is the same in any coordinates in which the penalty is. Along the principal axes the
    curvature of the objective is known well enough to divide by its root, after which all
    directions are about alike and L-BFGS needs few steps; axes along which nothing varies carry
    weights of zero, and are left out.

    Args:
        features: float [N, D].
        labels: int [N].
        classes: C.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, classes: int):
        x = np.asarray(features, np.float64)
        self._mean = x.mean(0)
        x = x - self._mean  # The biases, which are not penalised, take it over.
        self._count, self._classes = len(x), classes
        with jax.enable_x64(True):
            variances, axes = np.linalg.eigh(np.asarray(jnp.asarray(x.T) @ jnp.asarray(x)) / len(x))
            least = len(variances) * np.finfo(np.float64).eps * np.max(variances, initial=0.0)
            varies = variances > least
            self._variances, self._axes = variances[varies], axes[:, varies]
            self._x = jnp.asarray(x) @ jnp.asarray(self._axes)
            self._y = jnp.asarray(np.asarray(labels, np.int32))

    def fit(
        self,
        strength: float,
        *,
        start: Logistic | None,
        iterations: int,
        tolerance: float = _TOLERANCE,
    ) -> Logistic:
        """As `fit_logistic`, until a step changes the objective by less than that part of it."""
        # Divided by strength × N, so that tolerances mean the same for every strength.
        penalty = 1.0 / (strength * self._count)
        # Of the cross-entropy at equal odds the curvature along an axis, and the penalty's.
        odds = (1 - 1 / self._classes) / self._classes
        scale = 1.0 / np.sqrt(odds * self._variances + penalty)[:, None]
        shape = (len(scale) + 1, self._classes)
        with jax.enable_x64(True):
            x = self._x * scale.T
            weigh = jnp.asarray(penalty * scale**2)

            def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
                loss, gradient = _objective(jnp.asarray(flat.reshape(shape)), x, self._y, weigh)
                return float(loss), np.asarray(gradient).ravel()

            result = optimize.minimize(
                value,
                self._inward(start, scale).ravel(),
                jac=True,
                method="L-BFGS-B",
                options={
                    "maxiter": iterations,
                    "ftol": tolerance,
                    "gtol": tolerance,
                    "maxls": 50,
                },
            )
        weights = result.x.reshape(shape)
        kernel = self._axes @ (scale * weights[:-1])
        return Logistic(kernel, weights[-1] - self._mean @ kernel)

    def _inward(self, start: Logistic | None, scale: np.ndarray) -> np.ndarray:
        if start is None:
            return np.zeros((len(scale) + 1, self._classes))
        weights = (self._axes.T @ start.kernel) / scale
        return np.vstack([weights, start.bias + self._mean @ start.kernel])


@jax.jit
@jax.value_and_grad
def _objective(weights: jax.Array, x: jax.Array, y: jax.Array, weigh: jax.Array) -> jax.Array:
    """Mean cross-entropy plus the penalty of all weights but the biases; and its gradient."""
    logits = jnp.matmul(x, weights[:-1], precision=jax.lax.Precision.HIGHEST) + weights[-1]
    right = jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
    loss = jnp.mean(jax.nn.logsumexp(logits, -1) - right)
    return loss + 0.5 * jnp.sum(weigh * jnp.square(weights[:-1]))


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
    rows = _Rows(train[kept], labels[kept], classes)
    scores: dict[float, float] = {}
    fitted: Logistic | None = None
    best, start, worse = 0.0, None, 0  # The strength with the best score, and its classifier.
    for strength in tqdm(sorted(strengths), desc="logistic", unit="fit", disable=None):
        fitted = rows.fit(
            strength, start=fitted, iterations=iterations, tolerance=_SEARCH_TOLERANCE
        )
        scores[strength] = metric(fitted.predict(train[heldout]), labels[heldout])
        if start is None or scores[strength] > scores[best]:
            best, start = strength, fitted
        worse = worse + 1 if scores[strength] < scores[best] else 0
        if worse == _PATIENCE:
            break
    final = fit_logistic(train, labels, classes, best, start=start, iterations=iterations)
    return LogisticResult(final.predict(test), best, scores)
