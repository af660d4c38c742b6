"""`python -m dino.reproduce`: what the recipe and each of its parts is worth, scaled down."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from common.launch import Results, Run, RunFolder, launch
from common.launch.experiments import conduct, measured
from common.sharding import make_mesh
from common.train import check_config
from dino.checkpoint import load
from dino.experiments import claims, report
from dino.experiments.bench import MAIN, PIXELS, RANDOM, Bench
from dino.experiments.collapse import measure_collapse
from dino.experiments.config import PRESETS, ReproduceConfig
from dino.experiments.distilled import measure_distillation
from dino.experiments.koleo import measure_koleo
from dino.experiments.patches import measure_patches
from dino.experiments.pretraining import measure_pretraining
from dino.experiments.resolution import FINISHED, measure_resolution
from dino.presets import training

EXAMPLES = [
    "python -m dino.reproduce --config=smoke --workdir=runs/dino-reproduce-smoke",
    "python -m dino.reproduce --config=cpu --workdir=runs/dino-reproduce-cpu",
    "python -m dino.reproduce --config=cpu --workdir=runs/dino-reproduce-1 --set seed=1",
]
EXPERIMENTS = {
    "pretraining": measure_pretraining,
    "collapse": measure_collapse,
    "koleo": measure_koleo,
    "patches": measure_patches,
    "resolution": measure_resolution,
    "distillation": measure_distillation,
}


def reproduce(
    config: ReproduceConfig, workdir: Path, resume_command: str | None = None
) -> Results | None:
    """Measures what `workdir` does not hold yet and writes the report.

    Returns:
      The results; None if a signal stopped a training, which the same command resumes.

    Raises:
      UserError: config, images, devices or folder do not fit. What was there stays.
    """
    for run in (config.run, config.finish):
        check_config(training(run), make_mesh(run.train.mesh))

    def measure(folder: RunFolder) -> dict[str, Any]:
        bench = Bench(config, folder.path, resume_command)
        found: dict[str, Any] = {"device": jax.devices()[0].device_kind}
        for name, run in EXPERIMENTS.items():
            found[name] = measured(folder.path, name, lambda run=run: run(bench))
        _draw(bench, folder.report)
        return found

    conclude = functools.partial(claims.results, config)
    return conduct(config, workdir, measure, conclude, report.write, _headline)


def _draw(bench: Bench, folder: Path) -> None:
    path = folder / report.PICTURE
    if not path.exists():
        shown = bench.large_scorer.test.pixels[: bench.config.scores.shown]
        report.draw_patches(load(bench.path(FINISHED)), shown, path)


def _headline(results: Results) -> str:
    scores = results.measured["pretraining"]["scores"]
    main, pixels, random = (scores[name]["knn"] for name in (MAIN, PIXELS, RANDOM))
    return (
        f"k-NN classifies {main:.1%} of held-out images by pretrained features, {pixels:.1%} by "
        f"raw pixels and {random:.1%} by the same model with random weights"
    )


def _main(run: Run) -> None:
    assert run.workdir is not None
    reproduce(run.config, run.workdir, run.command)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="dino",
        verb="reproduce",
        description="Pretrained features beside untrained ones, and the recipe's parts, each with "
        "and without: centring, KoLeo, the loss on patches, a high-resolution finish, "
        "distillation.",
        examples=EXAMPLES,
        presets=PRESETS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
