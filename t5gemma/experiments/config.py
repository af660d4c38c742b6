"""Presets of `t5gemma.reproduce`."""

import dataclasses

from common.data.corpus import CorpusConfig
from common.errors import UserError
from common.models.decoder import DecoderConfig
from common.train import OptimizerConfig, TrainConfig
from t5gemma.data import DataConfig
from t5gemma.fine_tuning import FineTuning


@dataclasses.dataclass(frozen=True)
class DonorConfig:
    """A decoder-only model that others are made of: a real one, or one trained in the run.

    Attributes:
      asset: the real one's name in `common.data.assets`.
      model: shape of one that is trained in the run.
      train: its training, on rows as long as both sides of an encoder-decoder's.
    """

    asset: str | None = None
    model: DecoderConfig | None = None
    train: TrainConfig | None = None

    def __post_init__(self) -> None:
        if (self.asset is None) == (self.model is None):
            raise UserError("a donor is either an asset or a model that is trained in the run")
        if self.model is not None and self.train is None:
            raise UserError("a donor that is trained in the run needs settings of its training")


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """A donor, a text, and how all that is made of the donor is trained on it.

    Attributes:
      donor: the model to adapt.
      data: what is read; lengths of both sides.
      train: of every encoder-decoder, and of the donor where it is continued.
      dtype: what a real donor computes in; parameters stay float32.
      loss_chunk: positions of a row whose logits exist at a time; None for all.
      scored_tokens: held-out tokens that are continued for a score.
      generated: held-out pieces that are continued freely, to compare with the true text.
      batch: rows that are scored or generated at a time.
    """

    donor: DonorConfig
    data: DataConfig
    train: TrainConfig
    dtype: str = "float32"
    loss_chunk: int | None = None
    scored_tokens: int = 8192
    generated: int = 32
    batch: int = 16


@dataclasses.dataclass(frozen=True)
class FromScratchConfig:
    """Adapted against from scratch.

    Attributes:
      warmup: updates in which cross attention alone trains, where it begins at random.
      learning_rate: peak rate of the training from scratch; None: that of the bench.
    """

    warmup: int
    learning_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class ObjectivesConfig:
    """PrefixLM with distillation against UL2.

    Attributes:
      classes: how many labels the classification task has.
      texts: most labelled texts to fine-tune on.
      dev_texts: most labelled texts that are scored.
      tuning: settings that are tried of every encoder.
      causal_encoder: also train a pair whose encoder cannot look ahead (the paper's ablation).
    """

    classes: int
    texts: int
    dev_texts: int
    tuning: FineTuning
    causal_encoder: bool = True


@dataclasses.dataclass(frozen=True)
class TimingConfig:
    """Measured seconds of an answer.

    Attributes:
      rows: prompts answered together.
      repeats: timed turns, of which the median counts.
    """

    rows: int = 4
    repeats: int = 7


@dataclasses.dataclass(frozen=True)
class UnbalancedConfig:
    """A large encoder with a small decoder.

    Attributes:
      small: the small decoder's donor; the large encoder's is the bench's.
      warmups: updates in which cross attention alone trains: none, few, many.
    """

    small: DonorConfig
    warmups: tuple[int, ...]

    def __post_init__(self) -> None:
        rising = list(self.warmups) == sorted(set(self.warmups))
        if len(self.warmups) != 3 or self.warmups[0] != 0 or not rising:
            raise UserError("unbalanced.warmups must be 0, a few and many updates")


@dataclasses.dataclass(frozen=True)
class ReproduceConfig:
    """All experiments.

    Attributes:
      main: what `from_scratch` and `equal_flops` are done with.
      other: what `objectives` and `unbalanced` are done with; None: the same.
      from_scratch, objectives, timing, unbalanced: the experiments.
      seed: of parameters, of the order of the data, of spans and splits.
    """

    main: BenchConfig
    from_scratch: FromScratchConfig
    objectives: ObjectivesConfig
    unbalanced: UnbalancedConfig
    other: BenchConfig | None = None
    timing: TimingConfig = dataclasses.field(default_factory=TimingConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, bench in (("main", self.main), ("other", self.other)):
            if bench is not None and bench.data.corpus.kind != "python":
                raise UserError(
                    f"{name}.data.corpus.kind is '{bench.data.corpus.kind}': the classification "
                    "task is made of the python corpus"
                )
        steps = (self.other or self.main).train.steps
        if (
            self.unbalanced.warmups[-1] >= steps
            or self.from_scratch.warmup >= self.main.train.steps
        ):
            raise UserError("warm-ups must be shorter than the trainings that they begin")


def smoke() -> ReproduceConfig:
    """Every part in miniature: at most 2 minutes on 2 CPU cores.

    `python -m t5gemma.reproduce --config=smoke --workdir=runs/t5-reproduce-smoke`.
    """
    # One training for all, so that models of one shape share their compiled step.
    train = _training(steps=160, batch_size=16, learning_rate=5e-3)
    return ReproduceConfig(
        main=BenchConfig(
            donor=DonorConfig(
                model=_shape(vocab_size=512, width=64, layers=4),
                train=train,
            ),
            data=DataConfig(
                corpus=CorpusConfig(
                    parts=("documentation",), heldout_fraction=0.2, max_documents=250
                ),
                encoder_length=48,
                decoder_length=48,
                spare_tokens=16,
                tokenizer_characters=300_000,
            ),
            train=train,
        ),
        from_scratch=FromScratchConfig(warmup=20),
        objectives=ObjectivesConfig(
            classes=5,
            texts=500,
            dev_texts=400,
            tuning=FineTuning(
                learning_rates=(2e-3,),
                batch_sizes=(32,),
                dropouts=(0.0,),
                epochs=5,
                max_length=64,
            ),
            causal_encoder=False,
        ),
        timing=TimingConfig(repeats=5),
        unbalanced=UnbalancedConfig(
            small=DonorConfig(
                model=_shape(vocab_size=512, width=32, layers=2),
                train=train,
            ),
            warmups=(0, 20, 100),
        ),
    )


PRESETS = {"smoke": smoke}


def _shape(*, vocab_size: int, width: int, layers: int) -> DecoderConfig:
    """A small donor of SmolLM2's kind: no softcaps, no norms behind the branches."""
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=3 * width,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
        num_layers=layers,
        max_length=2048,
        scale_embedding=False,
        zero_centred_norm=False,
        activation="silu",
    )


def _training(*, steps: int, batch_size: int, learning_rate: float) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        log_every=max(1, steps // 40),
        eval_every=max(1, steps // 8),
        eval_batches=8,
        checkpoint_every=max(200, steps // 4),
        keep_checkpoints=1,
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, warmup_steps=max(1, steps // 20), weight_decay=0.01
        ),
    )
