"""A short training at twice the resolution (specification, E6)."""

import dataclasses
from typing import Any

from common.launch.experiments import measured
from dino.checkpoint import load
from dino.experiments.bench import MAIN, Bench
from dino.train import train

BEFORE, AFTER = "before", "after"
FINISHED = "finished"


def measure_resolution(bench: Bench) -> dict[str, Any]:
    """Goes on from the main run at a higher resolution.

    Returns:
      `knn` and `patches` at the `size` of the finish, before it and after it.
    """
    start = bench.trained(MAIN)
    finish = dataclasses.replace(bench.config.finish, checkpoint=str(start))
    path = bench.done(
        FINISHED,
        lambda: train(
            finish, bench.path(FINISHED), bench.resume_command, images=bench.large_images
        ),
    )
    scorer = bench.large_scorer

    def scores(name: str, folder: Any) -> dict[str, Any]:
        def score() -> dict[str, Any]:
            model = load(folder)
            return {"knn": scorer.knn(model), "patches": scorer.patches(model)}

        return measured(bench.folder, f"large-{name}", score)

    found = {BEFORE: scores(BEFORE, start), AFTER: scores(AFTER, path)}
    return {
        "size": bench.config.resolution.size,
        "steps": bench.config.resolution.steps,
        "trained_size": bench.config.run.data.crops.global_size,
        **{key: {name: of[key] for name, of in found.items()} for key in ("knn", "patches")},
    }
