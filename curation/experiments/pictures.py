"""Long-tailed images: what a classifier learns from samples of equal size.

Classes have sizes that fall by a constant ratio. Samples are chosen without labels, by clusters of
pixels; a linear classifier is then trained on the chosen images with their labels, and tested on
equally many images of every class. The images are scikit-learn's handwritten digits or, without
that package, letters of many typefaces.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from common.data.assets import asset
from common.data.image_assets import small_digits
from common.data.image_sets import Glyphs
from common.errors import UserError
from curation.balance import divergence_from_uniform
from curation.experiments.clustering import cluster
from curation.experiments.config import PicturesConfig
from curation.sampling import balanced_sample, flat_sample

DIGITS, LETTERS = "small-digits", "letters"
RANDOM, FLAT, TWO, RESAMPLED = "random sample", "flat", "two levels", "two levels, resampled"
NAMES = (RANDOM, FLAT, TWO, RESAMPLED)
_SIDE = 8  # pixels
_LETTERS = 26
_PENALTY = 1.0  # of the classifier's weights


def measure_pictures(config: PicturesConfig) -> dict[str, Any]:
    """Accuracy, and divergence of the sampled classes from equal shares, of each way."""
    kind = _kind(config.kind)
    images, labels = _images(kind, config)
    pool = np.zeros(0, int)
    accuracy: dict[str, list[float]] = {name: [] for name in NAMES}
    divergence: dict[str, list[float]] = {name: [] for name in NAMES}
    counts: dict[str, list[int]] = {}
    for seed in config.seeds:
        pool, test = split(labels, config, seed)
        x, y = images[pool], labels[pool]
        for name, choose in _ways(x, config, seed).items():
            picked = choose()
            found = np.bincount(y[picked], minlength=config.classes)
            right = classify(x[picked], y[picked], images[test], config.classes) == labels[test]
            accuracy[name].append(float(np.mean(right)))
            divergence[name].append(divergence_from_uniform(found))
            counts[name] = np.sort(found)[::-1].tolist()
    return {
        "kind": kind,
        "pool": len(pool),
        "accuracy": {name: float(np.mean(values)) for name, values in accuracy.items()},
        "accuracy_deviation": {name: float(np.std(values)) for name, values in accuracy.items()},
        "divergence": {name: float(np.mean(values)) for name, values in divergence.items()},
        "counts": counts,
    }


def split(labels: np.ndarray, config: PicturesConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the images of the long-tailed pool, and of the balanced test.

    Raises:
      UserError: a class has too few images.
    """
    rng = np.random.default_rng(seed)
    pool, test = [], []
    for rank, label in enumerate(rng.permutation(config.classes)):
        size = max(round(config.largest * config.ratio**rank), config.smallest)
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < size + config.held_out:
            raise UserError(
                f"pictures: class {label} has {len(members)} images, and {size} to draw from and "
                f"{config.held_out} to test on are wanted"
            )
        test.append(members[: config.held_out])
        pool.append(members[config.held_out : config.held_out + size])
    return np.concatenate(pool), np.concatenate(test)


def classify(x: np.ndarray, y: np.ndarray, test: np.ndarray, classes: int) -> np.ndarray:
    """Labels of `test` by ridge regression onto the classes of `y`."""
    mean = x.mean(axis=0)
    x, test = x - mean, test - mean
    targets = np.eye(classes)[y] - 1 / classes
    weights = np.linalg.solve(x.T @ x + _PENALTY * np.eye(x.shape[1]), x.T @ targets)
    return np.argmax(test @ weights, axis=1)


def cut_out(mask: np.ndarray) -> np.ndarray:
    """What is set in a mask, bool [H, W], cut out and shrunk to 8 × 8: float32 [64], 0 … 1."""
    rows, columns = np.nonzero(mask)
    mask = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    spare = max(mask.shape) - np.array(mask.shape)
    square = np.pad(mask, [(side // 2, side - side // 2) for side in spare])
    shrunk = Image.fromarray(square.astype(np.float32)).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(shrunk).reshape(-1)


def _images(kind: str, config: PicturesConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of 8 × 8 pixels, float32 [N, 64], and their labels [N], of the first classes."""
    if kind == DIGITS:
        source = small_digits()
        assert source.labels is not None
        images = np.stack([source[n][..., 0] for n in range(len(source))])
        wanted = source.labels < config.classes
        pixels = images.reshape(len(images), -1).astype(np.float32) / 255
        return pixels[wanted], source.labels[wanted]
    # Classes come in turn: enough images for the largest class and the test.
    letters = Glyphs(28, _LETTERS * (config.largest + config.held_out))
    assert letters.labels is not None
    chosen = np.flatnonzero(letters.labels < config.classes)
    return np.stack([cut_out(letters.draw(n)[1]) for n in chosen]), letters.labels[chosen]


def _kind(kind: str) -> str:
    """The set to take: digits, where their package is installed.

    Raises:
      UserError: there is no such set, or its package is not installed.
    """
    if kind not in (DIGITS, LETTERS, "auto"):
        raise UserError(f"pictures.kind is {DIGITS}, {LETTERS} or auto, not {kind!r}")
    if kind == "auto":
        try:
            asset(DIGITS)
        except UserError:
            return LETTERS
        return DIGITS
    return kind


def _ways(x: np.ndarray, config: PicturesConfig, seed: int) -> dict[str, Callable[[], np.ndarray]]:
    rng = np.random.default_rng([seed, 1])
    size = config.size
    return {
        RANDOM: lambda: rng.choice(len(x), size, replace=False),
        FLAT: lambda: flat_sample(cluster(x, config.clusters[1:], seed=seed), size, seed=seed),
        TWO: lambda: balanced_sample(cluster(x, config.clusters, seed=seed), size, seed=seed),
        RESAMPLED: lambda: balanced_sample(
            cluster(x, config.clusters, seed=seed, resamplings=5), size, seed=seed
        ),
    }
