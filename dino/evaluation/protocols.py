"""The protocols as a report shows them: scores, tables and figures of each contestant."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import UserError
from common.launch import Figure, Line, Table
from dino.evaluation.features import ImageFeatures
from dino.evaluation.knn import knn_predict
from dino.evaluation.linear import LinearConfig, best_head, predict
from dino.evaluation.logistic import logistic_predict
from dino.evaluation.metrics import METRICS
from dino.evaluation.retrieval import Relevance, by_class, rankings, retrieval_scores


@dataclass(frozen=True)
class Outcome:
    """What one contestant came to in one task.

    Attributes:
        headline: The figure to compare contestants by.
        scores: What `scores.json` holds.
        curve: For the task's figure.
    """

    headline: float
    scores: Mapping[str, Any]
    curve: Sequence[Line] = field(default_factory=list)


def labelled(train: ImageFeatures, test: ImageFeatures) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels of both in the training set's numbers, and how many classes it has.

    Raises:
        UserError: One has no labels, or the test set a class that was not trained on.
    """
    if train.labels is None:
        raise UserError(
            "--train has no labels: put its images in one folder for each class, or give "
            "--train_labels"
        )
    return train.labels, labels_of(train.classes, test), len(train.classes)


def labels_of(classes: Sequence[str], test: ImageFeatures) -> np.ndarray:
    """Labels of the test set as numbers of the training set's classes; see `labelled`."""
    if test.labels is None:
        raise UserError(
            "--test has no labels: put its images in one folder for each class, or give "
            "--test_labels"
        )
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in test.classes if name not in number]
    if unknown:
        raise UserError(f"--test has a class {unknown[0]!r} that --train has not")
    renumbered = np.array([number[name] for name in test.classes], np.int64)
    return renumbered[test.labels]


def knn(
    name: str,
    train: ImageFeatures,
    test: ImageFeatures,
    *,
    ks: Sequence[int],
    temperature: float,
    metric: str,
) -> Outcome:
    """k-NN on the last block's class tokens."""
    labels, truth, classes = labelled(train, test)
    found = knn_predict(
        train.cls[-1], labels, test.cls[-1], ks, classes=classes, temperature=temperature
    )
    scores = {k: METRICS[metric](predicted, truth) for k, predicted in found.items()}
    best = max(scores, key=lambda k: scores[k])
    return Outcome(
        scores[best],
        {"best_k": best, **{f"k={k}": score for k, score in scores.items()}},
        [Line(name, list(scores), list(scores.values()))],
    )


def linear(
    name: str,
    heads: Any,
    train_classes: Sequence[str],
    tests: Mapping[str, ImageFeatures],
    config: LinearConfig,
    metric: str,
) -> Outcome:
    """The grid's heads on the first test set, and the best of them on the others."""
    first, *others = tests
    truths = {test: labels_of(train_classes, features) for test, features in tests.items()}
    predicted = predict(heads, tests[first], config)
    best, scores = best_head(predicted, truths[first], config.names, METRICS[metric])
    found: dict[str, Any] = {"best": config.names[best], first: scores[config.names[best]]}
    for test in others:
        row = predict(heads, tests[test], config)[best]
        found[test] = METRICS[metric](row, truths[test])
    rates = len(config.learning_rates)
    values = list(scores.values())
    lines = [
        Line(
            f"{name}: {blocks} block{'s' if blocks > 1 else ''}{', mean patch' if pooled else ''}",
            config.learning_rates,
            values[i * rates : (i + 1) * rates],
        )
        for i, (blocks, pooled) in enumerate(config.inputs)
    ]
    return Outcome(scores[config.names[best]], found | {"heads": scores}, lines)


def logistic(
    name: str,
    train: ImageFeatures,
    test: ImageFeatures,
    *,
    strengths: Sequence[float],
    metric: str,
    seed: int,
) -> Outcome:
    """Logistic regression on the last block's class tokens."""
    labels, truth, classes = labelled(train, test)
    result = logistic_predict(
        train.cls[-1],
        labels,
        test.cls[-1],
        classes=classes,
        strengths=strengths,
        metric=METRICS[metric],
        seed=seed,
    )
    score = METRICS[metric](result.predicted, truth)
    held = result.heldout
    return Outcome(
        score,
        {
            metric: score,
            "strength": result.strength,
            "heldout": {str(c): v for c, v in held.items()},
        },
        [Line(name, list(held), list(held.values()))],
    )


def retrieval(
    queries: ImageFeatures,
    gallery: ImageFeatures,
    protocols: Mapping[str, Sequence[Relevance]] | None,
) -> Outcome:
    """Ranks the gallery (`--train`) for each query (`--test`)."""
    ranked = rankings(queries.cls[-1], gallery.cls[-1])
    if protocols is None:
        labels, truth, _ = labelled(gallery, queries)
        scores = retrieval_scores(ranked, by_class(truth, labels))
        return Outcome(scores["mAP"], scores)
    found = {
        f"{name} {measure}": value
        for name, relevance in protocols.items()
        for measure, value in retrieval_scores(ranked, relevance, trapezoid=True).items()
    }
    return Outcome(found["medium mAP"], found)


def task_table(title: str, outcomes: Mapping[str, Outcome], note: str = "") -> Table:
    """Contestants side by side: every score that is one number or text."""
    names: list[str] = []
    for outcome in outcomes.values():
        names += [
            key
            for key, value in outcome.scores.items()
            if isinstance(value, int | float | str) and key not in names
        ]
    rows = [
        [name, *(outcome.scores.get(key, "") for key in names)]
        for name, outcome in outcomes.items()
    ]
    return Table(title, ["features", *names], rows, note)


FIGURES: dict[str, Callable[[Sequence[Line], str], Figure]] = {
    "knn": lambda lines, metric: Figure(
        "knn", "k-NN", "neighbours", metric.replace("_", " "), lines, log_x=True
    ),
    "linear": lambda lines, metric: Figure(
        "linear", "Linear heads", "learning rate for a batch of 256", metric.replace("_", " "),
        lines, log_x=True,
    ),
    "logistic": lambda lines, metric: Figure(
        "logistic", "Logistic regression", "strength C",
        f"{metric.replace('_', ' ')}, held-out tenth", lines, log_x=True,
    ),
}  # fmt: skip
