"""Presets of `recurrentgemma.reproduce`."""

import dataclasses

from common.data.corpus import CorpusConfig
from common.errors import UserError
from common.train import OptimizerConfig, TrainConfig
from recurrentgemma.data import DataConfig
from recurrentgemma.model import GriffinConfig


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """State size and speed by context.

    Attributes:
      model: shape of Griffin; the others follow from it.
      contexts: document lengths whose last tokens are decoded; from the window on, where
        Griffin's state is full.
      prompts: lengths of prompts that are read.
      batch_size: documents decoded together; prompts are read one at a time.
      decode_steps: tokens of one timed loop.
      repeats: timed turns, of which the median counts.
    """

    model: GriffinConfig
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    batch_size: int = 1
    decode_steps: int = 32
    repeats: int = 9

    def __post_init__(self) -> None:
        least = max(self.model.attention_window, self.decode_steps)
        if len(self.contexts) < 2 or list(self.contexts) != sorted(set(self.contexts)):
            raise UserError("speed.contexts must be two or more lengths that rise")
        if self.contexts[0] < least:
            raise UserError(
                f"speed.contexts must start at {least} or later: at the window, and with room for "
                "the decoded tokens"
            )
        if len(self.prompts) < 2 or list(self.prompts) != sorted(set(self.prompts)):
            raise UserError("speed.prompts must be two or more lengths that rise")
        if self.repeats < 1 or self.decode_steps < 1 or self.batch_size < 1:
            raise UserError("speed.repeats, decode_steps and batch_size must be at least 1")


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Held-out loss after equal training.

    Attributes:
      model: shape of Griffin; the others follow from it.
      data: what is read; `sequence_length` is the training length.
      train: steps, batch and optimizer of each model.
      multiples: of the training length, at which held-out text is scored; the first is 1.
      rows: held-out stretches of the longest length; the same text is scored at every length.
      loss_chunk: positions of a row whose logits exist at a time; None for all.
    """

    model: GriffinConfig
    data: DataConfig
    train: TrainConfig
    multiples: tuple[int, ...] = (1, 2, 4, 8)
    rows: int = 32
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        if len(self.multiples) < 2 or self.multiples[0] != 1:
            raise UserError("language.multiples must be 1 and one or more larger numbers")
        if any(self.multiples[-1] % m for m in self.multiples) or list(self.multiples) != sorted(
            set(self.multiples)
        ):
            raise UserError("language.multiples must rise, and each must divide the last")
        if self.rows < 1:
            raise UserError("language.rows must be at least 1")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Row lengths that are scored."""
        return tuple(m * self.data.sequence_length for m in self.multiples)


@dataclasses.dataclass(frozen=True)
class InductionConfig:
    """Recall of the token that followed a mark.

    Attributes:
      model: shape of Griffin; the others follow from it; its vocabulary is set from below.
      vocabulary: ordinary tokens; the mark is one more.
      train_length: length of training rows.
      multiples: of the training length, at which accuracy is measured; 1, 2 and 4 are among them.
      rows: fresh rows scored at each length.
      train: steps, batch and optimizer of each model.
    """

    model: GriffinConfig
    train: TrainConfig
    vocabulary: int = 16
    train_length: int = 32
    multiples: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16)
    rows: int = 512

    def __post_init__(self) -> None:
        if not {1, 2, 4} <= set(self.multiples):
            raise UserError("induction.multiples must have 1, 2 and 4")
        if self.rows < 1 or min(self.lengths) < 3:
            raise UserError("induction needs rows, each of 3 or more tokens")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Row lengths that are scored."""
        return tuple(int(m * self.train_length) for m in self.multiples)


@dataclasses.dataclass(frozen=True)
class ReproduceConfig:
    """All experiments.

    Attributes:
      speed: bytes and time of decoding, and prefill time, by context; nothing is trained.
      language: held-out loss on text.
      induction: the synthetic task.
      seed: of parameters, of the order of the data and of the synthetic rows.
    """

    speed: SpeedConfig
    language: LanguageConfig
    induction: InductionConfig
    seed: int = 0


def smoke() -> ReproduceConfig:
    """Every part in miniature: at most 2 minutes on 2 CPU cores.

    `python -m recurrentgemma.reproduce --config=smoke --workdir=runs/reproduce-smoke`; the state
    stays fixed while the cache grows, decoding stays flat while full attention slows down, and
    recall beyond the training length is lost by full attention alone. Its loss on text hardly
    rises beyond that length: 100,000 tokens do not teach it to use more than the last few.
    """
    return ReproduceConfig(
        speed=SpeedConfig(
            model=_shape(vocab_size=512, width=64, num_layers=3, window=128),
            contexts=(512, 2048, 8192),
            prompts=(512, 2048),
            repeats=5,
        ),
        language=LanguageConfig(
            model=_shape(vocab_size=512, width=64, num_layers=3, window=32),
            data=DataConfig(
                corpus=CorpusConfig(max_documents=200),
                sequence_length=64,
                tokenizer_characters=300_000,
            ),
            train=_training(steps=200, batch_size=8, learning_rate=1e-2),
            multiples=(1, 8),
            rows=32,
        ),
        induction=InductionConfig(
            model=dataclasses.replace(_synthetic_shape(window=16), num_layers=3),
            train=_training(steps=320, batch_size=32, learning_rate=5e-3),
            multiples=(1, 2, 4),
            rows=256,
        ),
    )


def cpu() -> ReproduceConfig:
    """Models of 1.5 M parameters (5 M for times), the specification's task: 30 minutes, 2 cores.

    `python -m recurrentgemma.reproduce --config=cpu --workdir=runs/reproduce-cpu`.
    """
    return ReproduceConfig(
        speed=SpeedConfig(
            model=_shape(vocab_size=2048, width=256, num_layers=6, window=256),
            contexts=(256, 512, 1024, 2048, 4096, 8192),
            prompts=(256, 512, 1024, 2048, 4096),
        ),
        language=LanguageConfig(
            model=_shape(vocab_size=2048, width=128, num_layers=6, window=128),
            data=DataConfig(sequence_length=256, tokenizer_characters=3_000_000),
            train=_training(steps=600, batch_size=8, learning_rate=6e-3),
            rows=48,
        ),
        induction=InductionConfig(
            model=_synthetic_shape(window=16),
            train=_training(steps=1500, batch_size=32, learning_rate=3e-3),
            rows=512,
        ),
    )


def gpu() -> ReproduceConfig:
    """About 100 M parameters in bfloat16, contexts to 32k: for one GPU of 80 GB.

    Sized by hand and not timed on a GPU yet.
    `python -m recurrentgemma.reproduce --config=gpu --workdir=runs/reproduce-gpu`. The synthetic
    task has the papers' length (256) and window (128).
    """
    model = GriffinConfig(
        vocab_size=8192,
        width=768,
        mlp_width=2304,
        num_heads=8,
        lru_width=1024,
        num_layers=12,
        attention_window=1024,
        dtype="bfloat16",
    )
    return ReproduceConfig(
        speed=SpeedConfig(
            model=model,
            contexts=(1024, 2048, 4096, 8192, 16_384, 32_768),
            prompts=(1024, 2048, 4096, 8192, 16_384, 32_768),
            batch_size=16,
            decode_steps=64,
        ),
        language=LanguageConfig(
            model=dataclasses.replace(model, attention_window=512),
            data=DataConfig(
                corpus=CorpusConfig(parts=("documentation", "source", "tests")),
                sequence_length=1024,
            ),
            train=_training(steps=1500, batch_size=32, learning_rate=1e-3),
            rows=32,
            loss_chunk=256,
        ),
        induction=InductionConfig(
            model=_synthetic_shape(window=128),
            train=_training(steps=20_000, batch_size=32, learning_rate=3e-3),
            train_length=256,
            multiples=(0.5, 1, 2, 4, 8, 16, 32),
            rows=512,
        ),
    )


PRESETS = {"smoke": smoke, "cpu": cpu, "gpu": gpu}


def _shape(*, vocab_size: int, width: int, num_layers: int, window: int) -> GriffinConfig:
    """A small Griffin of the papers' proportions (MLP three times the width)."""
    return GriffinConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=3 * width,
        num_heads=4,
        lru_width=width,
        num_layers=num_layers,
        attention_window=window,
    )


def _synthetic_shape(*, window: int) -> GriffinConfig:
    """The synthetic tasks' model (Griffin, section 6.2): 5 blocks, the third one attention."""
    return _shape(vocab_size=17, width=64, num_layers=5, window=window)


def _training(*, steps: int, batch_size: int, learning_rate: float) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        log_every=max(1, min(20, steps // 20)),
        checkpoint_every=max(500, steps // 10),
        keep_checkpoints=1,
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=max(1, steps // 20)),
    )
