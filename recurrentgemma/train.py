"""`python -m recurrentgemma.train`: pretrains on a corpus, resumes, reports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from common.data.pipeline import batches, evaluation_batches
from common.errors import UserError
from common.launch import Run, RunFolder, launch
from common.launch.training_report import report_language_training
from common.sharding import check_same, first_process_first, local_rows, make_mesh
from common.train import Trainer, TrainResult, check_config
from recurrentgemma.config import PRESETS, Config
from recurrentgemma.data import TextData, check_data, prepare_data
from recurrentgemma.objective import GriffinTask

EXAMPLES = [
    "python -m recurrentgemma.train --config=smoke --workdir=runs/smoke",
    "python -m recurrentgemma.train --config=cpu --workdir=runs/cpu --set train.steps=2000",
    "python -m recurrentgemma.train --config=cpu --workdir=runs/mine "
    "--set data.corpus.kind=text --set data.corpus.path='texts/*.txt'",
]
# A resumed run may last longer, log or save at other times, and run on other devices.
MAY_CHANGE = (
    "loss_chunk",
    "model.remat",
    "train.accumulation",
    "train.mesh",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


def train(config: Config, workdir: Path, resume_command: str | None = None) -> TrainResult:
    """Trains in `workdir` from where it stands, and writes the report.

    Raises:
      UserError: config, corpus, tokenizer, mesh or folder do not fit. What was there stays.
    """
    settings = config.train
    mesh = make_mesh(settings.mesh)
    check_config(settings, mesh)
    check_data(config.data, config.model.vocab_size)
    folder = RunFolder(workdir)
    primary = jax.process_index() == 0
    resumed = folder.open(config, MAY_CHANGE)
    try:
        with first_process_first("data"):
            data = prepare_data(
                config.data, config.model.vocab_size, folder.path, print if primary else _quiet
            )
        check_same("corpus", data.describe())
        part: Any = {
            "global_batch": settings.batch_size,
            "local_rows": local_rows(mesh, settings.batch_size),
        }
        trainer = Trainer(
            GriffinTask(config.model, loss_chunk=config.loss_chunk),
            settings,
            folder.path,
            batches(data.train, seed=config.seed, **part),
            {"heldout": lambda: evaluation_batches(data.heldout, **part)},
            seed=config.seed,
            resume_command=resume_command,
        )
    except UserError:
        if primary and not resumed:
            folder.abandon()
        raise
    result = trainer.run()
    if primary and not result.preempted:
        _report(config, data, folder, result)
    folder.close()
    return result


def _report(config: Config, data: TextData, folder: RunFolder, result: TrainResult) -> None:
    tokens = result.step * config.train.batch_size * config.data.sequence_length
    report_language_training(
        folder,
        result,
        title="RecurrentGemma training run",
        text=f"Trained on the {config.data.corpus.kind} corpus; settings in ../config.json.",
        unit="token",
        unigram=data.unigram_loss(),
        rows=[
            ("parameters", f"{config.model.num_parameters():,}"),
            ("steps", f"{result.step:,}"),
            ("tokens trained on", f"{tokens:,}"),
        ],
    )


def _quiet(text: str) -> None:
    """Says nothing: the first process speaks for all."""


def _main(run: Run) -> None:
    assert run.workdir is not None
    train(run.config, run.workdir, run.command)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="recurrentgemma",
        verb="train",
        description="Pretrains a RecurrentGemma; the same command again resumes.",
        examples=EXAMPLES,
        presets=PRESETS,
        several_processes=True,
        argv=argv,
    )


if __name__ == "__main__":
    main()
