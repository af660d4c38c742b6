"""What keeps the teacher from saying the same of every image (specification, E2)."""

import math
from typing import Any

from dino.experiments.bench import MAIN, RANDOM, Bench

SINKHORN, MOVING, NONE = "Sinkhorn-Knopp", "moving centre", "no centring"


def measure_collapse(bench: Bench) -> dict[str, Any]:
    """Trains with either centring and with none.

    Returns:
      For each `knn`, `loss`, the last entropy of the prototypes in use (`usage`) and of single
      targets (`targets`), and the `curve` of the first over `steps`; `uniform`, the entropy of
      prototypes that are used equally; `random`, k-NN of random weights.
    """
    scores = {
        SINKHORN: bench.scores(MAIN),
        MOVING: bench.scores("moving", bench.changed(centring="moving")),
        NONE: bench.scores("uncentred", bench.changed(centring="none")),
    }

    def of(key: str) -> dict[str, Any]:
        return {name: found[key] for name, found in scores.items()}

    return {
        "knn": of("knn"),
        "loss": of("loss"),
        "usage": of("usage_entropy"),
        "targets": of("target_entropy"),
        "steps": scores[SINKHORN]["steps"],
        "curve": of("usage_curve"),
        "uniform": math.log(bench.config.run.model.dino_head.prototypes),
        "random": bench.baseline(RANDOM)["knn"],
    }
