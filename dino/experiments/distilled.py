"""A small student of a frozen teacher against the same training from scratch (E7)."""

import dataclasses
from typing import Any

from common.launch.experiments import measured
from dino.checkpoint import load
from dino.distill import distil
from dino.distillation import DistillationConfig, TeacherConfig
from dino.experiments.bench import MAIN, Bench, curves

TEACHER, DISTILLED, SCRATCH = "teacher", "distilled", "from scratch"
FIGURES = ("knn", "linear", "patches")


def measure_distillation(bench: Bench) -> dict[str, Any]:
    """Trains the small model by the main run's teacher, and without it, for equal steps.

    Returns:
      For each of `FIGURES` that of the student, of the model from scratch and of the teacher;
      `parameters` of each.
    """
    teacher = bench.trained(MAIN)
    run, small = bench.config.seeded, bench.config.small_backbone
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, backbone=small))
    fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    config = DistillationConfig(
        **fields, teacher=TeacherConfig(checkpoint=str(teacher), dtype="float32")
    )

    def score() -> dict[str, Any]:
        path = bench.done(
            "distilled",
            lambda: distil(
                config, bench.path("distilled"), bench.resume_command, images=bench.images
            ),
        )
        return {**bench.scorer.score(load(path)), **curves(path)}

    scores = {
        TEACHER: bench.scores(MAIN),
        DISTILLED: measured(bench.folder, "model-distilled", score),
        SCRATCH: bench.scores("small-scratch", run),
    }
    large = bench.config.run.model.backbone.num_parameters()
    return {
        **{key: {name: found[key] for name, found in scores.items()} for key in FIGURES},
        "parameters": {
            TEACHER: large,
            **dict.fromkeys((DISTILLED, SCRATCH), small.num_parameters()),
        },
        "steps": run.train.steps,
    }
