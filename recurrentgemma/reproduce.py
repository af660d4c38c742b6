"""`python -m recurrentgemma.reproduce`: the papers' claim beside full attention of equal size."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.launch import Results, Run, RunFolder, launch
from common.launch.experiments import conduct, measured
from common.sharding import make_mesh
from common.train import check_config
from recurrentgemma.data import check_data
from recurrentgemma.experiments import claims, report
from recurrentgemma.experiments.config import PRESETS, ReproduceConfig
from recurrentgemma.experiments.contenders import ATTENTION, GRIFFIN
from recurrentgemma.experiments.induction import measure_induction
from recurrentgemma.experiments.language import measure_language
from recurrentgemma.experiments.memory import measure_memory
from recurrentgemma.experiments.speed import measure_speed

EXAMPLES = [
    "python -m recurrentgemma.reproduce --config=smoke --workdir=runs/reproduce-smoke",
    "python -m recurrentgemma.reproduce --config=cpu --workdir=runs/reproduce-cpu",
    "python -m recurrentgemma.reproduce --config=gpu --workdir=runs/reproduce-gpu "
    "--set language.train.steps=5000 --set seed=1",
]


def reproduce(
    config: ReproduceConfig, workdir: Path, resume_command: str | None = None
) -> Results | None:
    """Measures what `workdir` does not hold yet and writes the report.

    Returns:
      The results; None if a signal stopped a training, which the same command resumes.

    Raises:
      UserError: config, corpus, devices or folder do not fit. What was there stays.
    """
    for training in (config.language.train, config.induction.train):
        check_config(training, make_mesh(training.mesh))
    check_data(config.language.data, config.language.model.vocab_size)

    def measure(folder: RunFolder) -> dict[str, Any]:
        return _measure(config, folder.path, resume_command)

    conclude = functools.partial(claims.results, config)
    return conduct(config, workdir, measure, conclude, report.write, _headline)


def _measure(config: ReproduceConfig, workdir: Path, resume_command: str | None) -> dict[str, Any]:
    """Every experiment in turn, each taken from `workdir` if it was done before."""
    options = (config.seed, workdir, resume_command)
    experiments = {
        "memory": lambda: measure_memory(config.speed),
        "speed": lambda: measure_speed(config.speed, config.seed),
        "language": lambda: measure_language(config.language, *options),
        "induction": lambda: measure_induction(config.induction, *options),
    }
    return {name: measured(workdir, name, run) for name, run in experiments.items()}


def _headline(results: Results) -> str:
    memory, speed = results.measured["memory"], results.measured["speed"]
    kept, seconds = memory["bytes"], speed["decode_seconds"]
    return (
        f"at a context of {speed['contexts'][-1]:,} Griffin keeps "
        f"{kept[GRIFFIN][-1] / kept[ATTENTION][-1]:.1%} of full attention's bytes and decodes "
        f"{seconds[ATTENTION][-1] / seconds[GRIFFIN][-1]:.1f} times as fast"
    )


def _main(run: Run) -> None:
    assert run.workdir is not None
    reproduce(run.config, run.workdir, run.command)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="recurrentgemma",
        verb="reproduce",
        description="Griffin and Hawk beside a full-attention decoder of equal size.",
        examples=EXAMPLES,
        presets=PRESETS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
