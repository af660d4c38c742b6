"""`python -m t5gemma.train`: trains an encoder-decoder by any objective, resumes, reports."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from common.checkpoint.store import CheckpointStore
from common.data.pipeline import batches, evaluation_batches
from common.data.unigram import count_targets, unigram_cross_entropy
from common.errors import UserError
from common.launch import Figure, Run, RunFolder, Table, launch, line_from_metrics, write_report
from common.launch import config as configs
from common.launch.workdir import write_atomically
from common.models import Decoder, load_decoder
from common.sharding import check_same, first_process_first, local_rows, make_mesh
from common.train import Trainer, TrainResult, check_config, read_metrics
from common.train.task import PureDict
from t5gemma.checkpoint import load
from t5gemma.data import TrainingData, check_data, discard_data, prepare_data
from t5gemma.model import T5Gemma
from t5gemma.presets import PRESETS, Config, make_task

EXAMPLES = [
    "python -m t5gemma.train --config=smoke --workdir=runs/t5-smoke",
    "python -m t5gemma.train --config=cpu --workdir=runs/t5-ul2 --set objective.kind=ul2",
    "python -m t5gemma.train --config=cpu --workdir=runs/t5-tuned --set checkpoint=runs/t5-cpu "
    "--set objective.kind=instruction --set objective.pairs.path=pairs.jsonl",
]
# A resumed run may last longer, log or save at other times, and run on other devices.
MAY_CHANGE = (
    "loss_chunk",
    "model.encoder.remat",
    "model.decoder.remat",
    "train.accumulation",
    "train.mesh",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)
_COUNTED_ROWS = 4096


def train(config: Config, workdir: Path, resume_command: str | None = None) -> TrainResult:
    """Trains in `workdir` from where it stands, and writes the report.

    Raises:
      UserError: config, corpus, checkpoint, mesh or folder do not fit. What was there stays.
    """
    mesh = make_mesh(config.train.mesh)
    check_config(config.train, mesh)
    config, start = resolve(config, workdir, mesh)
    check_data(config.data, config.objective, config.model.decoder.vocab_size)
    teacher = load_teacher(config, mesh)
    task = make_task(config, teacher)
    folder = RunFolder(workdir)
    resumed = folder.open(config, MAY_CHANGE)
    primary = jax.process_index() == 0
    try:
        tokenizer = None if start is None else start.tokenizer
        with first_process_first("data"):
            data = prepare_data(
                config.data,
                config.objective,
                config.model,
                folder.path,
                seed=config.seed,
                say=print if primary else _quiet,
                tokenizer=tokenizer,
            )
        _check_teacher(teacher, data)
        check_same("corpus", data.describe())
        part: Any = {
            "global_batch": config.train.batch_size,
            "local_rows": local_rows(mesh, config.train.batch_size),
        }
        trainer = Trainer(
            task,
            config.train,
            folder.path,
            batches(data.train, seed=config.seed, **part),
            {"heldout": lambda: evaluation_batches(data.heldout, **part)},
            seed=config.seed,
            initial_params=None if start is None else parameters_of(start),
            resume_command=resume_command,
        )
    except UserError:
        if primary and not resumed:
            discard_data(folder.path)
            folder.abandon()
        raise
    result = trainer.run()
    if primary and not result.preempted:
        _report(config, data, folder, result)
    folder.close()
    return result


def resolve(
    config: Config, workdir: Path, mesh: jax.sharding.Mesh
) -> tuple[Config, T5Gemma | None]:
    """The run's configuration with its checkpoint's shape, and the model that a new run starts as.

    A run that is resumed has its shape from its own folder, and needs the checkpoint no more.
    """
    if config.checkpoint is None:
        return config, None
    remat = config.model.decoder.remat
    if CheckpointStore(Path(workdir) / "checkpoints").latest() is not None:
        text = RunFolder(workdir).config.read_text()
        past = configs.from_json(Config, text, f"{workdir}/config.json")
        return dataclasses.replace(config, model=past.model.with_stacks(remat=remat)), None
    model = load(
        config.checkpoint, dtype=config.model.decoder.dtype, param_dtype="float32", mesh=mesh
    )
    shape = model.config.with_stacks(remat=remat)
    return dataclasses.replace(config, model=shape), model


def load_teacher(config: Config, mesh: jax.sharding.Mesh) -> Decoder | None:
    """The donor that a run distils, on the mesh; None for another objective."""
    if config.objective.kind != "distillation":
        return None
    settings = config.objective.teacher
    if settings.checkpoint is None:
        raise UserError("distillation needs a teacher: set objective.teacher.checkpoint")
    return load_decoder(settings.checkpoint, dtype=settings.dtype, mesh=mesh)


def parameters_of(model: T5Gemma) -> Any:
    """What gives the Trainer a model's parameters, placed as it wants them."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def placed(abstract: PureDict) -> PureDict:
        return jax.tree.map(
            lambda value, leaf: jax.device_put(value.astype(leaf.dtype), leaf.sharding),
            params,
            abstract,
        )

    return placed


def _check_teacher(teacher: Decoder | None, data: TrainingData) -> None:
    if teacher is None or teacher.tokenizer is None:
        return
    if teacher.tokenizer.fingerprint() != data.tokenizer.fingerprint():
        raise UserError(
            "the teacher's tokenizer is not the run's, so that their tokens mean different things: "
            "set data.tokenizer to the teacher's"
        )


def _report(config: Config, data: TrainingData, folder: RunFolder, result: TrainResult) -> None:
    """Writes curves and the table of results, and prints the headline."""
    rows = read_metrics(folder.path)
    size = config.model.decoder.vocab_size
    counts = count_targets(data.train, size, _COUNTED_ROWS)
    unigram = unigram_cross_entropy(counts, count_targets(data.heldout, size, _COUNTED_ROWS))
    heldout = result.metrics["eval/heldout/loss"]
    train_line = line_from_metrics(rows, "loss", "training")
    curves = Figure(
        "loss",
        "Loss",
        "step",
        "nats per target",
        [
            train_line,
            line_from_metrics(rows, "eval/heldout/loss", "held-out"),
            dataclasses.replace(
                train_line, label="unigram, held-out", y=[unigram] * len(train_line.x), dashed=True
            ),
        ],
        caption="The dashed line is the held-out loss of token frequencies alone.",
    )
    lengths = config.data.encoder_length + config.data.decoder_length
    tokens = result.step * config.train.batch_size * lengths
    table = Table(
        "Result",
        ("measure", "value"),
        [
            ("objective", config.objective.kind),
            ("parameters", f"{config.model.num_parameters():,}"),
            ("steps", f"{result.step:,}"),
            ("positions trained on, both sides", f"{tokens:,}"),
            ("of them filled, encoder", f"{data.train.efficiency[0]:.1%}"),
            ("of them filled, decoder", f"{data.train.efficiency[1]:.1%}"),
            ("held-out loss, nats per target", f"{heldout:.4f}"),
            ("held-out perplexity", f"{math.exp(min(heldout, 50.0)):.2f}"),
            ("unigram loss, nats per target", f"{unigram:.4f}"),
        ],
    )
    source = (
        f"pairs of {config.objective.pairs.path}"
        if config.objective.kind == "instruction"
        else f"the {config.data.corpus.kind} corpus"
    )
    write_report(
        folder.report,
        "T5Gemma training run",
        text=f"Trained by {config.objective.kind} on {source}; settings in ../config.json.",
        tables=[table],
        figures=[curves],
    )
    results = {"step": result.step, "heldout_loss": heldout, "unigram_loss": unigram}
    write_atomically(folder.report / "summary.json", json.dumps(results, indent=2) + "\n")
    print(f"report: {folder.report / 'README.md'}")
    print(
        f"held-out loss {heldout:.4f} nats per target after {result.step:,} steps; "
        f"token frequencies alone {unigram:.4f}"
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
        package="t5gemma",
        verb="train",
        description="Trains a T5Gemma by PrefixLM, distillation, UL2 or instruction tuning, from a "
        "checkpoint or from scratch; the same command again resumes.",
        examples=EXAMPLES,
        presets=PRESETS,
        several_processes=True,
        argv=argv,
    )


if __name__ == "__main__":
    main()
