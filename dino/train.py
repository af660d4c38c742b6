"""`python -m dino.train`: pretrains, goes on from another run or from a backbone, and resumes."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from common.data.image_sources import HealthyImages
from common.errors import UserError
from common.launch import Figure, Run, RunFolder, Table, launch, line_from_metrics, write_report
from common.launch.workdir import write_atomically
from common.sharding import check_same, local_rows, make_mesh
from common.train import Task, Trainer, TrainResult, check_config, read_metrics
from dino.data import training_batches, training_images
from dino.presets import PRESETS, Config, mask_group, training
from dino.starting import resolve
from dino.task import Pretraining

EXAMPLES = [
    "python -m dino.train --config=smoke --workdir=runs/dino-smoke",
    "python -m dino.train --config=vitl14 --workdir=runs/vitl14 --set data.images.path=images/",
    "python -m dino.train --config=continued --workdir=runs/mine --set checkpoint=dinov2-base "
    "--set data.images.path=images/",
]
# A resumed run may last longer, log or save at other times, and run on other devices.
MAY_CHANGE = (
    "objective.loss_chunk",
    "model.backbone.remat",
    "data.threads",
    "data.prefetch",
    "data.cache_megabytes",
    "data.images.error_budget",
    "train.mesh",
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)
LOSSES = ("dino_global", "dino_local", "ibot", "koleo")

C = TypeVar("C", bound=Config)


def make_task(config: Config) -> Pretraining:
    """The Task of a run."""
    return Pretraining(config.model, config.objective, config.train.steps, mask_group(config))


def train(
    config: C,
    workdir: Path,
    resume_command: str | None = None,
    *,
    task_of: Callable[[C, jax.sharding.Mesh], Task] | None = None,
    images: HealthyImages | None = None,
) -> TrainResult:
    """Trains in `workdir` from where it stands, and writes the report.

    Args:
      config: of the run.
      workdir: its folder.
      resume_command: printed when a signal stops it.
      task_of: makes the task, once the folder is the run's, of the configuration with its
        checkpoint's shape; None: pretraining.
      images: those of `config.data`, where a caller has opened them for several runs.

    Raises:
      UserError: config, images, checkpoint, mesh or folder do not fit. What was there stays.
    """
    mesh = make_mesh(config.train.mesh)
    settings = training(config)
    check_config(settings, mesh)
    model, start = resolve(
        config.model, config.checkpoint, Path(workdir), mesh, resample=config.resample_positions
    )
    config = dataclasses.replace(config, model=model)
    if images is None:
        images = training_images(config.data)
    folder = RunFolder(workdir)
    resumed = folder.open(config, MAY_CHANGE)
    try:
        task = make_task(config) if task_of is None else task_of(config, mesh)
        check_same("images", images.source.fingerprint())
        batches = training_batches(
            config.data,
            patch_size=model.backbone.patch_size,
            batch=settings.batch_size,
            seed=config.seed,
            local_rows=local_rows(mesh, settings.batch_size),
            source=images,
        )
        trainer = Trainer(
            task,
            settings,
            folder.path,
            batches,
            seed=config.seed,
            initial_params=start,
            resume_command=resume_command,
        )
    except UserError:
        if jax.process_index() == 0 and not resumed:
            folder.abandon()
        raise
    result = trainer.run()
    batches.close()
    if jax.process_index() == 0 and not result.preempted:
        _report(config, images, folder, result)
    folder.close()
    return result


def _report(config: Config, images: HealthyImages, folder: RunFolder, result: TrainResult) -> None:
    """Writes curves and the table of results, and prints the headline."""
    lines = read_metrics(folder.path)
    losses = Figure(
        "loss",
        "Losses",
        "step",
        "nats",
        [line_from_metrics(lines, name, name) for name in ("loss", *LOSSES)],
        caption="All but the sum without their weights; KoLeo is minus a logarithm of distances.",
    )
    entropies = Figure(
        "entropy",
        "Entropy of the teacher's targets",
        "step",
        "nats",
        [
            line_from_metrics(lines, "target_entropy", "of each"),
            line_from_metrics(lines, "usage_entropy", "of their mean"),
        ],
        caption="The mean's is that of all prototypes together: near 0, the run has collapsed.",
    )
    last = result.metrics
    text = (
        "Settings in ../config.json. `dino.load` of this folder gives the teacher's backbone; "
        "`python -m dino.evaluate` measures its features."
    )
    if images.damaged:
        named = "\n".join(f"- {message}" for message in images.damaged.values())
        text += f"\n\n{len(images.damaged)} damaged images were replaced by others:\n\n{named}"
    rows = [
        ("images", f"{len(images.source):,}"),
        ("steps", f"{result.step:,}"),
        ("images seen", f"{result.step * config.train.batch_size:,}"),
        *((name, _figure(last, name)) for name in ("loss", *LOSSES, "target_entropy")),
        ("usage_entropy", _figure(last, "usage_entropy")),
    ]
    write_report(
        folder.report,
        "DINOv2 training run",
        text=text,
        tables=[Table("Result", ("measure", "value"), rows)],
        figures=[losses, entropies],
    )
    summary = {"step": result.step, "loss": last.get("loss")}
    write_atomically(folder.report / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"report: {folder.report / 'README.md'}")
    print(
        f"loss {_figure(last, 'loss')} after {result.step:,} steps of {config.train.batch_size} "
        f"images; entropy of the prototypes in use {_figure(last, 'usage_entropy')} nats"
    )


def _figure(metrics: Mapping[str, Any], name: str) -> str:
    value = metrics.get(name)
    return "–" if value is None else f"{value:.4f}"


def _main(run: Run) -> None:
    assert run.workdir is not None
    train(run.config, run.workdir, run.command)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="dino",
        verb="train",
        description="Pretrains a vision transformer by DINOv2 on folders of images, from scratch, "
        "from another run or from a published backbone; the same command again resumes.",
        examples=EXAMPLES,
        presets=PRESETS,
        several_processes=True,
        argv=argv,
    )


if __name__ == "__main__":
    main()
