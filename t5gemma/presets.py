"""Training runs of T5Gemma: a tiny one, one for a laptop, and every public size."""

import dataclasses
import functools
from collections.abc import Callable

from flax import nnx

from common.data.corpus import CorpusConfig
from common.errors import UserError
from common.models import Decoder
from common.models.flops import decoder_flops
from common.sharding import MeshConfig
from common.train import OptimizerConfig, TrainConfig
from common.train.task import Path
from t5gemma.config import MODELS, T5GemmaConfig, gemma2_stack, smoke_model
from t5gemma.config import public as public_model
from t5gemma.data import DataConfig, ObjectiveConfig
from t5gemma.flops import forward_flops
from t5gemma.model import T5Gemma
from t5gemma.objective import Distillation, TargetTokens

LARGE = ("2b-2b", "9b-2b", "9b-9b")
WIDE = ("9b-2b", "9b-9b")  # A chip of 16 GiB holds a 64th of such a training, and half a batch.


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    Attributes:
      model: shape of the network.
      data: what it reads.
      objective: what it learns.
      train: steps, batch, optimizer, mesh, checkpoints.
      checkpoint: what to start from: anything `t5gemma.load` takes. Its shape takes the place of
        `model`, of which dtype and remat stay. None starts from fresh parameters.
      loss_chunk: positions of a row whose logits exist at a time; None for all.
      seed: of parameters, of the order of the data, and of spans and splits.
    """

    model: T5GemmaConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: str | None = None
    loss_chunk: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        chunk, length = self.loss_chunk, self.data.decoder_length
        if chunk is not None and (chunk < 1 or length % chunk):
            raise UserError(f"loss_chunk ({chunk}) must divide data.decoder_length ({length})")
        for side in ("encoder", "decoder"):
            most = getattr(self.model, side).max_length
            length = getattr(self.data, f"{side}_length")
            if most is not None and length > most:
                raise UserError(
                    f"data.{side}_length is {length}, more than model.{side}.max_length ({most})"
                )


def make_task(
    config: Config,
    teacher: Decoder | None = None,
    *,
    trains: Callable[[Path], bool] | None = None,
    trains_from: Callable[[Path], int] | None = None,
) -> TargetTokens:
    """The Task of a run.

    Args:
      config: the run's.
      teacher: of the objective "distillation"; may be abstract where nothing is run.
      trains: whether the parameter at a path trains, such as `adaptation.in_cross_attention`.
      trains_from: after how many updates the parameter at a path begins to change.

    Raises:
      UserError: the teacher does not fit the model, or the teacher's settings are out of range.
    """

    def build(rngs: nnx.Rngs) -> T5Gemma:
        return T5Gemma(config.model, rngs=rngs)

    flops = functools.partial(forward_flops, config.model)
    if config.objective.kind != "distillation":
        return TargetTokens(
            build,
            loss_chunk=config.loss_chunk,
            forward_flops=flops,
            trains=trains,
            trains_from=trains_from,
        )
    settings, vocabulary = config.objective.teacher, config.model.decoder.vocab_size
    if teacher is None:
        raise UserError("distillation needs a teacher: set objective.teacher.checkpoint")
    if teacher.vocab_size > vocabulary:
        raise UserError(
            f"the teacher has {teacher.vocab_size} tokens but the model {vocabulary}: "
            "use a teacher of the same tokenizer"
        )
    if settings.top_k is not None and not 1 <= settings.top_k <= teacher.vocab_size:
        raise UserError(
            f"objective.teacher.top_k is {settings.top_k}; use 1 to {teacher.vocab_size}, or none"
        )
    if not 0.0 <= settings.ground_truth <= 1.0:
        raise UserError(
            f"objective.teacher.ground_truth is a share from 0 to 1, not {settings.ground_truth}"
        )
    return Distillation(
        build,
        teacher,
        top_k=settings.top_k,
        ground_truth=settings.ground_truth,
        loss_chunk=config.loss_chunk,
        forward_flops=flops,
        teacher_flops=functools.partial(decoder_flops, teacher.config),
        trains=trains,
        trains_from=trains_from,
    )


def smoke() -> Config:
    """Shows that everything runs: 79 k parameters, 30 steps of PrefixLM on the Python corpus.

    `python -m t5gemma.train --config=smoke --workdir=runs/t5-smoke`; 2 CPU cores, half a minute;
    the loss falls from 6.6 to about 5.
    """
    return Config(
        model=smoke_model(),
        data=DataConfig(
            corpus=CorpusConfig(parts=("documentation",), max_documents=120),
            encoder_length=64,
            decoder_length=64,
            tokenizer_characters=300_000,
        ),
        train=TrainConfig(
            steps=30,
            batch_size=8,
            log_every=1,
            eval_every=15,
            eval_batches=4,
            checkpoint_every=10,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        ),
    )


def cpu() -> Config:
    """About 10 M parameters, the size to try things on without an accelerator.

    `python -m t5gemma.train --config=cpu --workdir=runs/t5-cpu`; 2 CPU cores, two to four seconds
    a step. `--set objective.kind=ul2` for the other objective.
    """
    stack = gemma2_stack(
        vocab_size=4096,
        width=256,
        mlp_width=768,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        num_layers=4,
        max_length=2048,
        window=256,
    )
    return Config(
        model=T5GemmaConfig(stack, stack),
        data=DataConfig(encoder_length=256, decoder_length=256, passes=4),
        train=TrainConfig(
            steps=1000,
            batch_size=8,
            log_every=10,
            eval_every=250,
            eval_batches=16,
            checkpoint_every=250,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        ),
    )


def public(name: str) -> Config:
    """A public size as adapted: rows of 4096 and 4096 tokens, 4.2 M tokens a batch, 2 T in all.

    Reads array_record shards; `--set checkpoint=FOLDER` for the adapted model to begin with, or
    `--set objective.kind=distillation --set objective.teacher.checkpoint=FOLDER`. The paper does
    not say its learning rates: those here are proposals (section 3.4).
    """
    length, batch = 4096, 512
    return Config(
        model=public_model(name),
        data=DataConfig(
            corpus=CorpusConfig(kind="array_record", path="data/*.array_record"),
            tokenizer="data/tokenizer.model",
            encoder_length=length,
            decoder_length=length,
        ),
        train=TrainConfig(
            steps=2_000_000_000_000 // (batch * 2 * length),
            batch_size=batch,
            log_every=20,
            eval_every=5000,
            eval_batches=64,
            checkpoint_every=1000,
            optimizer=OptimizerConfig(
                learning_rate=5e-5 if name in LARGE else 2e-4, warmup_steps=100, weight_decay=0.01
            ),
            accumulation=2 if name in WIDE else 1,
            mesh=MeshConfig(data=1, fsdp=-1, most_fsdp=64 if name in WIDE else 16),
        ),
        loss_chunk=512,
    )


def _public_preset(name: str) -> Callable[[], Config]:
    """`public(name)` as a preset that tells its size."""

    def preset() -> Config:
        return public(name)

    parameters = public_model(name).num_parameters() / 1e9
    preset.__doc__ = (
        f"T5Gemma {name} ({parameters:.2f} B parameters) as adapted: 4096 + 4096 tokens a row.\n\n"
        "What it takes of an accelerator is planned by `python -m common.plan --package=t5gemma "
        f"--config={name}`. See `public`."
    )
    return preset


PRESETS: dict[str, Callable[[], Config]] = {
    "smoke": smoke,
    "cpu": cpu,
    **{name: _public_preset(name) for name in MODELS if name != "smoke"},
}
