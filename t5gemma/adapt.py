"""`python -m t5gemma.adapt`: makes an encoder-decoder of decoder-only models, and trains it on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from common.checkpoint.store import CheckpointStore
from common.launch import Run, RunFolder, launch
from common.launch import config as configs
from common.models import Decoder, load_decoder
from common.sharding import make_mesh
from common.train import TrainResult, check_config
from t5gemma.adapt_presets import PRESETS, AdaptConfig
from t5gemma.adaptation import adapt as adapted
from t5gemma.adaptation import in_cross_attention
from t5gemma.data import TrainingData
from t5gemma.donors import (
    DONOR_MAY_CHANGE,
    ROLES,
    DonorRun,
    Stopped,
    donor_folders,
    load_donors,
    locate,
    train_donor,
)
from t5gemma.model import T5Gemma
from t5gemma.presets import make_task
from t5gemma.train import MAY_CHANGE, Beginning, load_teacher, run

EXAMPLES = [
    "python -m t5gemma.adapt --config=smoke --workdir=runs/adapt-smoke",
    "python -m t5gemma.adapt --config=cpu --workdir=runs/adapted "
    "--set donors.encoder=SmolLM2-135M.gguf --set objective.kind=distillation",
    "python -m t5gemma.adapt --config=9b-2b --workdir=runs/9b-2b "
    "--set donors.encoder=gemma-2-9b --set donors.decoder=gemma-2-2b --set warmup_steps=1000",
]


def adapt(config: AdaptConfig, workdir: Path, resume_command: str | None = None) -> TrainResult:
    """Adapts and trains in `workdir` from where it stands, and writes the report.

    Donors that are named are read when a run begins; a run that is resumed needs them no more,
    but for a teacher. Donors that are not named are trained in `workdir`/donors.

    Raises:
      UserError: donors, config, corpus, mesh or folder do not fit. What was there stays.
    """
    mesh = make_mesh(config.train.mesh)
    check_config(config.train, mesh)
    begun = CheckpointStore(Path(workdir) / "checkpoints").latest() is not None
    named = config.donors.encoder is not None
    tokenizer = None
    if named:
        config, model = _of_named(config, workdir, mesh, begun)
        teacher = _named_teacher(config, mesh)
        make_task(config, teacher)  # Refuses before anything is written.
        tokenizer = None if model is None else model.tokenizer
        # Handed over: the run's memory is not to hold it beside its own parameters.
        beginning = [Beginning(model, teacher, _facts(config))]
        del model, teacher
    else:
        check_config(config.donors.train, make_mesh(config.donors.train.mesh))
        make_task(config, _own_teacher_shape(config) or load_teacher(config, mesh))

    def begin(folder: RunFolder, data: TrainingData) -> Beginning:
        if named:
            return beginning.pop()
        losses = _train_donors(config, folder, data, begun, resume_command)
        return _of_trained(config, folder, mesh, begun, losses)

    warmup = config.warmup()
    try:
        return run(
            config,
            workdir,
            begin,
            may_change=(*MAY_CHANGE, *(f"donors.{field}" for field in DONOR_MAY_CHANGE)),
            tokenizer=tokenizer,
            trains_from=lambda path: 0 if in_cross_attention(path) else warmup,
            title="T5Gemma, adapted",
            resume_command=resume_command,
        )
    except Stopped as stop:
        return stop.result


def _of_named(
    config: AdaptConfig, workdir: Path, mesh: jax.sharding.Mesh, begun: bool
) -> tuple[AdaptConfig, T5Gemma | None]:
    """The configuration with its donors' shapes, and the model that a new run begins as."""
    remat = config.model.decoder.remat
    if begun:
        text = RunFolder(workdir).config.read_text()
        past = configs.from_json(AdaptConfig, text, f"{workdir}/config.json")
        return dataclasses.replace(config, model=past.model.with_stacks(remat=remat)), None
    model = _adapted(config, *load_donors(config.donors, mesh, config.model.decoder.dtype))
    return dataclasses.replace(config, model=model.config.with_stacks(remat=remat)), model


def _distils_donor(config: AdaptConfig) -> bool:
    """Whether the teacher is the decoder's donor, as it is unless another is named."""
    objective = config.objective
    return objective.kind == "distillation" and objective.teacher.checkpoint is None


def _named_teacher(config: AdaptConfig, mesh: jax.sharding.Mesh) -> Decoder | None:
    if not _distils_donor(config):
        return load_teacher(config, mesh)
    name = config.donors.decoder or config.donors.encoder
    assert name is not None
    return load_decoder(locate(name), dtype=config.objective.teacher.dtype, mesh=mesh)


def _own_teacher_shape(config: AdaptConfig) -> Decoder | None:
    """A teacher without arrays, in place of a donor that is still to be trained."""
    if not _distils_donor(config):
        return None
    return nnx.eval_shape(lambda: Decoder(config.model.decoder, rngs=nnx.Rngs(0)))


def _train_donors(
    config: AdaptConfig,
    folder: RunFolder,
    data: TrainingData,
    begun: bool,
    resume_command: str | None,
) -> dict[Path, float]:
    """Trains the donors as far as they are not; returns the held-out loss of each, by folder."""
    shapes = config.model.encoder, config.model.decoder
    losses = {}
    for place, shape in zip(donor_folders(folder.path, shapes), shapes):
        # A run that has begun needs them no more: they may have been removed.
        if place not in losses and not (begun and not place.exists()):
            donor = DonorRun(shape, config.donors.train, config.data, config.seed)
            cache = folder.path / "data"
            result = train_donor(donor, data.tokenizer, place, cache, resume_command)
            losses[place] = result.metrics["eval/heldout/loss"]
    return losses


def _of_trained(
    config: AdaptConfig,
    folder: RunFolder,
    mesh: jax.sharding.Mesh,
    begun: bool,
    losses: dict[Path, float],
) -> Beginning:
    """Adapts the donors that were trained, if the run has not begun."""
    folders = donor_folders(folder.path, (config.model.encoder, config.model.decoder))
    model = None
    if not begun:
        options: Any = {"dtype": config.model.decoder.dtype, "param_dtype": "float32"}
        read = {place: load_decoder(place, mesh=mesh, **options) for place in losses}
        model = _adapted(config, *(read[place] for place in folders))
    if _distils_donor(config):
        teacher = load_decoder(folders[1], dtype=config.objective.teacher.dtype, mesh=mesh)
    else:
        teacher = load_teacher(config, mesh)
    facts = [
        (f"{role}'s donor, held-out loss, nats per token", f"{losses[place]:.4f}")
        for role, place in zip(ROLES, folders)
        if place in losses
    ]
    return Beginning(model, teacher, [*_facts(config), *facts])


def _adapted(config: AdaptConfig, encoder: Decoder, decoder: Decoder) -> T5Gemma:
    return adapted(
        encoder,
        decoder,
        cross=config.cross,
        encoder_window=config.model.encoder_window,
        causal_encoder=config.model.causal_encoder,
        seed=config.seed,
    )


def _facts(config: AdaptConfig) -> list[tuple[str, str]]:
    """Rows of the report's table."""
    donors, warmup = config.donors, config.warmup()
    names = (donors.encoder, donors.decoder or donors.encoder)
    return [
        *(
            (f"{role}'s donor", f"trained in donors/ for {donors.train.steps:,} steps"
             if name is None else name)
            for role, name in zip(ROLES, names)
        ),
        ("cross attention begins", config.cross_init()),
        ("steps in which it alone trains", f"{warmup:,}"),
    ]  # fmt: skip


def _main(run: Run) -> None:
    assert run.workdir is not None
    adapt(run.config, run.workdir, run.command)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="t5gemma",
        verb="adapt",
        description="Makes a T5Gemma of one or two decoder-only models (Gemma 2 or 3, Llama, Qwen; "
        "Hugging Face folder or .gguf) and trains it on; the same command again resumes.",
        examples=EXAMPLES,
        presets=PRESETS,
        several_processes=True,
        argv=argv,
    )


if __name__ == "__main__":
    main()
