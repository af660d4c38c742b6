"""Pretrained features against pixels and against the same model with random weights."""

from typing import Any

from dino.experiments.bench import MAIN, PIXELS, RANDOM, Bench

LABELS = {
    MAIN: "pretrained",
    PIXELS: "raw pixels",
    RANDOM: "random weights",
}


def measure_pretraining(bench: Bench) -> dict[str, Any]:
    """Trains the run that others are compared with.

    Returns:
      `scores` of each model; `curve`, k-NN by images seen; `chance`, `parameters`, `images`, `seen`
      and `classes`.
    """
    run = bench.config.run
    scores = {MAIN: bench.scores(MAIN), **{n: bench.baseline(n) for n in (PIXELS, RANDOM)}}
    classes = bench.scorer.test.classes
    return {
        "scores": scores,
        "curve": bench.knn_over_steps(),
        "chance": 1 / len(classes),
        "classes": list(classes),
        "kind": run.data.images.kind,
        "parameters": run.model.backbone.num_parameters(),
        "images": len(bench.images.source),
        "seen": run.train.steps * run.train.batch_size,
        "steps": run.train.steps,
        "test_images": len(bench.scorer.test.labels),
    }
