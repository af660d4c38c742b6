"""`python -m t5gemma.train`: trains an encoder-decoder by any objective, resumes, reports."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from common.checkpoint.store import CheckpointStore
from common.data.pipeline import batches, evaluation_batches
from common.data.tokenizers import Tokenizer
from common.data.unigram import count_targets, unigram_cross_entropy
from common.errors import UserError
from common.launch import Run, RunFolder, launch
from common.launch import config as configs
from common.launch.training_report import report_language_training
from common.models import Decoder, load_decoder
from common.sharding import check_same, first_process_first, local_rows, make_mesh
from common.train import Trainer, TrainResult, check_config
from common.train.task import Path as ParameterPath
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


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a run needs that no configuration holds.

    Attributes:
      model: whose parameters a new run begins with; None for fresh ones, or a run that is resumed.
      teacher: of distillation.
      facts: what the report's table says of them.
    """

    model: T5Gemma | None = None
    teacher: Decoder | None = None
    facts: Sequence[tuple[str, Any]] = ()


Begin = Callable[[RunFolder, TrainingData], Beginning]


def train(config: Config, workdir: Path, resume_command: str | None = None) -> TrainResult:
    """Trains in `workdir` from where it stands, and writes the report.

    Raises:
      UserError: config, corpus, checkpoint, mesh or folder do not fit. What was there stays.
    """
    mesh = make_mesh(config.train.mesh)
    check_config(config.train, mesh)
    config, start = resolve(config, workdir, mesh)
    beginning = [Beginning(start, load_teacher(config, mesh))]
    make_task(config, beginning[0].teacher)  # Refuses before anything is written.
    return run(
        config,
        workdir,
        # Handed over: the run's memory is not to hold it beside its own parameters.
        lambda folder, data: beginning.pop(),
        tokenizer=None if start is None else start.tokenizer,
        resume_command=resume_command,
    )


def run(
    config: Config,
    workdir: Path,
    begin: Begin,
    *,
    may_change: Sequence[str] = MAY_CHANGE,
    tokenizer: Tokenizer | None = None,
    trains_from: Callable[[ParameterPath], int] | None = None,
    title: str = "T5Gemma training run",
    resume_command: str | None = None,
) -> TrainResult:
    """Trains in `workdir` what `begin` gives, and writes the report.

    Args:
      config: the run's; its model's shape is settled.
      workdir: the run folder.
      begin: called once the folder is the run's and its data are prepared.
      may_change: fields in which a resumed run may differ.
      tokenizer: of what the run begins with, if there is one.
      trains_from: see `make_task`.
      title: of the report.
      resume_command: the command line that resumes the run.

    Raises:
      UserError: something does not fit. What was in the folder stays.
    """
    mesh = make_mesh(config.train.mesh)
    check_data(config.data, config.objective, config.model.decoder.vocab_size)
    folder = RunFolder(workdir)
    resumed = folder.open(config, may_change)
    primary = jax.process_index() == 0
    try:
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
        check_same("corpus", data.describe())
        beginning = begin(folder, data)
        facts = beginning.facts
        _check_teacher(beginning.teacher, data)
        part: Any = {
            "global_batch": config.train.batch_size,
            "local_rows": local_rows(mesh, config.train.batch_size),
        }
        trainer = Trainer(
            make_task(config, beginning.teacher, trains_from=trains_from),
            config.train,
            folder.path,
            batches(data.train, seed=config.seed, **part),
            {"heldout": lambda: evaluation_batches(data.heldout, **part)},
            seed=config.seed,
            initial_params=None if beginning.model is None else parameters_of(beginning.model),
            resume_command=resume_command,
        )
        del beginning
    except UserError:
        if primary and not resumed and not folder.has_trained():
            discard_data(folder.path)
            folder.abandon()
        raise
    result = trainer.run()
    if primary and not result.preempted:
        _report(config, data, folder, result, title, facts)
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


def _report(
    config: Config,
    data: TrainingData,
    folder: RunFolder,
    result: TrainResult,
    title: str,
    facts: Sequence[tuple[str, Any]],
) -> None:
    size = config.model.decoder.vocab_size
    counts = count_targets(data.train, size, _COUNTED_ROWS)
    unigram = unigram_cross_entropy(counts, count_targets(data.heldout, size, _COUNTED_ROWS))
    lengths = config.data.encoder_length + config.data.decoder_length
    positions = result.step * config.train.batch_size * lengths
    source = (
        f"pairs of {config.objective.pairs.path}"
        if config.objective.kind == "instruction"
        else f"the {config.data.corpus.kind} corpus"
    )
    report_language_training(
        folder,
        result,
        title=title,
        text=f"Trained by {config.objective.kind} on {source}; settings in ../config.json.",
        unit="target",
        unigram=unigram,
        rows=[
            ("objective", config.objective.kind),
            ("parameters", f"{config.model.num_parameters():,}"),
            *facts,
            ("steps", f"{result.step:,}"),
            ("positions trained on, both sides", f"{positions:,}"),
            ("of them filled, encoder", f"{data.train.efficiency[0]:.1%}"),
            ("of them filled, decoder", f"{data.train.efficiency[1]:.1%}"),
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
