"""What every model of the experiments is measured by."""

import dataclasses
from typing import Any

import numpy as np

from dino.evaluation.diagnostics import patch_probe, spread_of
from dino.evaluation.features import FeatureModel, View, extract
from dino.evaluation.knn import knn_predict
from dino.evaluation.logistic import fit_logistic
from dino.evaluation.retrieval import by_class, rankings, retrieval_scores
from dino.experiments.config import ScoresConfig
from dino.experiments.sets import DrawnSet, PixelClasses

_BATCH = 128
_LINEAR = 200  # Iterations of linear classifiers.


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Labelled and held-out images of one size, and how models are measured on them.

    Attributes:
      train, test: the images.
      config: how many are used for what.
      patch: side of a patch.
    """

    train: DrawnSet
    test: DrawnSet
    config: ScoresConfig
    patch: int

    def score(self, model: FeatureModel) -> dict[str, Any]:
        """All figures of a frozen model.

        Returns:
          `knn` and `linear`, accuracies of k-NN and of logistic regression on class tokens; `mAP`
          and `precision@1` of retrieval by class; `nearest` (median distance), `mean_cosine` and
          `effective_rank` of the test images' class tokens; `patches`, mean intersection over union
          of a linear classifier of single patches.
        """
        train, test = self._class_tokens(model)
        classes = len(self.test.classes)
        spread = spread_of(test)
        relevance = by_class(self.test.labels, self.train.labels)
        found = retrieval_scores(rankings(test, train), relevance, ks=(1,))
        mean, deviation = train.mean(0), train.std(0) + 1e-6
        head = fit_logistic(
            (train - mean) / deviation, self.train.labels, classes, 1.0, iterations=_LINEAR
        )
        right = head.predict((test - mean) / deviation) == self.test.labels
        return {
            "knn": self._knn(train, test),
            "linear": float(right.mean()),
            **found,
            **dataclasses.asdict(spread),
            "patches": self.patches(model),
        }

    def knn(self, model: FeatureModel) -> float:
        """Accuracy of k-NN on class tokens."""
        return self._knn(*self._class_tokens(model))

    def patches(self, model: FeatureModel) -> float:
        """Mean intersection over union of a linear classifier of single patches."""
        train, test = self.config.dense_images
        return patch_probe(
            model,
            PixelClasses(self.train.first(train)),
            PixelClasses(self.test.first(test)),
            self.patch,
            1 + len(self.test.classes),
            batch=_BATCH,
        )

    def _class_tokens(self, model: FeatureModel) -> tuple[np.ndarray, np.ndarray]:
        side = self.test.pixels.shape[1]
        view = View(side, side)
        train, test = (
            extract(model, part.images, view, batch=_BATCH).cls[0]
            for part in (self.train, self.test)
        )
        return train, test

    def _knn(self, train: np.ndarray, test: np.ndarray) -> float:
        k = min(self.config.neighbours, len(train))
        classes = len(self.test.classes)
        predicted = knn_predict(train, self.train.labels, test, (k,), classes=classes)[k]
        return float((predicted == self.test.labels).mean())
