"""`python -m curation.reproduce`: the paper's claims, each at a size for this machine."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from common.launch import Results, Run, RunFolder, launch
from common.launch.experiments import conduct, measured
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


def reproduce(config: ReproduceConfig, workdir: Path) -> Results | None:
    """Measures what `workdir` does not hold yet and writes the report; see `conduct`."""

    def measure(folder: RunFolder) -> dict[str, Any]:
        experiments = _experiments(config, folder.path)
        found = {name: measured(folder.path, name, run) for name, run in experiments.items()}
        return {"device": jax.devices()[0].device_kind, **found}

    conclude = functools.partial(claims.results, config)
    return conduct(config, workdir, measure, conclude, report.write, _headline)


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
    found = results.measured["plane"]["divergence"]
    return (
        f"in the plane the divergence from uniform falls from {found[plane.DATA]:.3f} to "
        f"{found[plane.RESAMPLED]:.3f} nats, where uniform points have {found[plane.UNIFORM]:.3f}"
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
