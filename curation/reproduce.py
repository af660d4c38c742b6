"""`python -m curation.reproduce`: the paper's claims, each at a size for this machine."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from common.launch import Results, Run, RunFolder, launch
from common.launch.experiments import measured
from curation.experiments import claims, plane, report
from curation.experiments.concepts import measure_concepts
from curation.experiments.config import PRESETS, ReproduceConfig
from curation.experiments.density import measure_density
from curation.experiments.documents import measure_documents
from curation.experiments.features import measure_features
from curation.experiments.pictures import measure_pictures
from curation.experiments.plane import measure_plane

EXAMPLES = [
    "python -m curation.reproduce --config=smoke --workdir=runs/curation-smoke",
    "python -m curation.reproduce --config=cpu --workdir=runs/curation-cpu",
    "python -m curation.reproduce --config=smoke --workdir=runs/curation-seeds "
    "--set plane.seeds=0,1,2",
]


def reproduce(config: ReproduceConfig, workdir: Path) -> Results:
    """Measures what `workdir` does not hold yet and writes the report.

    Raises:
      UserError: the configuration or the folder does not fit. What was there stays.
    """
    folder = RunFolder(workdir)
    folder.open(config)
    start = time.perf_counter()
    try:
        found = {
            name: measured(folder.path, name, measure)
            for name, measure in _experiments(config, folder.path).items()
        }
    finally:
        folder.close()
    found["device"] = jax.devices()[0].device_kind
    results = claims.results(config, found)
    page = report.write(folder.report, results)
    print(f"\n{results.claim}\n\n{results.setting}\n\n{results.summary()}\n")
    print(f"{time.perf_counter() - start:.0f} s; report: {page}")
    print(_headline(results))
    return results


def _experiments(config: ReproduceConfig, folder: Path) -> dict[str, Callable[[], Any]]:
    experiments: dict[str, Callable[[], Any]] = {
        "plane": lambda: measure_plane(config.plane),
        "density": lambda: measure_density(config.density, config.seed),
        "concepts": lambda: measure_concepts(config.concepts),
        "pictures": lambda: measure_pictures(config.pictures),
        "documents": lambda: measure_documents(config.documents),
    }
    if config.features.seeds:
        experiments["features"] = lambda: measure_features(config.features, folder / "features")
    return experiments


def _headline(results: Results) -> str:
    holds, found = results.holds.values(), results.measured["plane"]["divergence"]
    return (
        f"{sum(holds)} of {len(holds)} expected outcomes came out; in the plane the divergence "
        f"from uniform falls from {found[plane.DATA]:.3f} to {found[plane.RESAMPLED]:.3f} nats, "
        f"where uniform points have {found[plane.UNIFORM]:.3f}"
    )


def _main(run: Run) -> None:
    assert run.workdir is not None
    reproduce(run.config, run.workdir)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="curation",
        verb="reproduce",
        description="The paper's claims, each at a size for this machine.",
        examples=EXAMPLES,
        presets=PRESETS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
