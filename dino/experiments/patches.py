"""What the loss on masked patches teaches single patches (specification, E4)."""

from typing import Any

from dino.experiments.bench import MAIN, PIXELS, RANDOM, Bench

WITH, WITHOUT = "with the loss on patches", "without"
FIGURES = ("patches", "knn", "linear")


def measure_patches(bench: Bench) -> dict[str, Any]:
    """Trains with the loss on patches and without.

    Returns:
      For each of `FIGURES` that of either, of pixels and of random weights.
    """
    scores = {
        WITH: bench.scores(MAIN),
        WITHOUT: bench.scores("no-patches", bench.changed(ibot_weight=0.0)),
        PIXELS: bench.baseline(PIXELS),
        RANDOM: bench.baseline(RANDOM),
    }
    return {key: {name: found[key] for name, found in scores.items()} for key in FIGURES}
