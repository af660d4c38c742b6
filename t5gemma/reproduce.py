"""`python -m t5gemma.reproduce`: the paper's claims, each beside what it is claimed against."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from common.data.assets import asset
from common.launch import Results, Run, RunFolder, launch
from common.launch.experiments import conduct, measured
from common.sharding import make_mesh
from common.train import check_config
from t5gemma.experiments import claims, equal_flops, report
from t5gemma.experiments.bench import Bench
from t5gemma.experiments.config import PRESETS, BenchConfig, ReproduceConfig
from t5gemma.experiments.equal_flops import measure_equal_flops
from t5gemma.experiments.from_scratch import NAMES, SCRATCH, donor_name, measure_from_scratch
from t5gemma.experiments.objectives import measure_objectives
from t5gemma.experiments.unbalanced import measure_unbalanced

EXAMPLES = [
    "python -m t5gemma.reproduce --config=smoke --workdir=runs/t5-reproduce-smoke",
    "python -m t5gemma.reproduce --config=cpu --workdir=runs/t5-reproduce-cpu",
    "python -m t5gemma.reproduce --config=gpu --workdir=runs/t5-reproduce-gpu --set seed=1",
]


def reproduce(
    config: ReproduceConfig, workdir: Path, resume_command: str | None = None
) -> Results | None:
    """Measures what `workdir` does not hold yet and writes the report.

    Returns:
      The results; None if a signal stopped a training, which the same command resumes.

    Raises:
      UserError: config, corpus, devices or folder do not fit, or a real donor is not installed.
        What was there stays.
    """
    for bench in _benches(config):
        check_config(bench.train, make_mesh(bench.train.mesh))
        if bench.donor.asset is not None:
            asset(bench.donor.asset)

    def measure(folder: RunFolder) -> dict[str, Any]:
        return _measure(config, folder.path, resume_command)

    return conduct(
        config,
        workdir,
        measure,
        functools.partial(claims.results, config),
        report.write,
        functools.partial(_headline, config),
    )


def _benches(config: ReproduceConfig) -> list[BenchConfig]:
    return [config.main] if config.other is None else [config.main, config.other]


def _measure(config: ReproduceConfig, workdir: Path, resume_command: str | None) -> dict[str, Any]:
    """Every experiment in turn, each taken from `workdir` if it was done before."""
    main = Bench(config.main, workdir / "main", config.seed, resume_command)
    other = main
    if config.other is not None:
        other = Bench(config.other, workdir / "other", config.seed, resume_command)
    timing = config.timing
    experiments = {
        "from_scratch": lambda: measure_from_scratch(config.from_scratch, main),
        "equal_flops": lambda: measure_equal_flops(timing, main),
        "unbalanced": lambda: measure_unbalanced(config.unbalanced, timing, other),
        "objectives": lambda: measure_objectives(config.objectives, other),
        "other": lambda: {"donor": donor_name(other), "positions": other.positions},
    }
    found = {name: measured(workdir, name, run) for name, run in experiments.items()}
    for bench in (main, other):
        bench.release(NAMES[bench.config.cross])
    return {"device": jax.devices()[0].device_kind, **found}


def _headline(config: ReproduceConfig, results: Results) -> str:
    loss = results.measured["from_scratch"]["loss"]
    adapted = loss[NAMES[config.main.cross]]
    flops = results.measured["equal_flops"]["flops"]
    ratio = flops[equal_flops.ADAPTED] / flops[equal_flops.CONTINUED]
    return (
        f"after equal tokens the adapted pair continues text at {adapted:.3f} nats per token and "
        f"the one from scratch at {loss[SCRATCH]:.3f}; an answer takes {ratio:.2f} times the FLOPs "
        "of the donor's"
    )


def _main(run: Run) -> None:
    assert run.workdir is not None
    reproduce(run.config, run.workdir, run.command)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="t5gemma",
        verb="reproduce",
        description="Adapted encoder-decoders beside models from scratch, their donors, other "
        "objectives and other sizes.",
        examples=EXAMPLES,
        presets=PRESETS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
