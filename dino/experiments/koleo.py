"""KoLeo spreads features over the sphere (specification, E3)."""

from typing import Any

from dino.experiments.bench import MAIN, Bench

FIGURES = ("nearest", "mean_cosine", "effective_rank", "precision@1", "mAP", "knn", "linear")


def measure_koleo(bench: Bench) -> dict[str, Any]:
    """Trains without KoLeo, with the paper's weight, and with much of it.

    Returns:
      `weights`, ascending, and a list of as many numbers for each of `FIGURES`.
    """
    none, much = bench.config.koleo
    scores = [
        bench.scores("koleo-none", bench.changed(koleo_weight=none)),
        bench.scores(MAIN),
        bench.scores("koleo-much", bench.changed(koleo_weight=much)),
    ]
    weights = [none, bench.config.run.objective.koleo_weight, much]
    return {"weights": weights, **{name: [s[name] for s in scores] for name in FIGURES}}
