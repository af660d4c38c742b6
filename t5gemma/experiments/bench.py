"""A donor and a text, and every model that is made of them, each trained once."""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx

from common.data.assets import asset
from common.data.packing import PackedRows
from common.data.pipeline import batches, evaluation_batches
from common.data.text import tokenize_corpus, tokenizer_for
from common.data.token_store import TokenStore
from common.data.tokenizers import Tokenizer
from common.data.unigram import count_targets, unigram_cross_entropy
from common.launch.experiments import load_trained, measured, trained
from common.models import Decoder, load_decoder
from common.models.loading import attach_tokenizer
from common.train import TrainConfig, read_metrics
from common.train.language import NextToken
from common.train.task import PureDict
from t5gemma.adaptation import adapt, in_cross_attention
from t5gemma.config import T5GemmaConfig
from t5gemma.data import TOKENIZER_FILE, ObjectiveConfig, TrainingData, prepare_data
from t5gemma.experiments.config import BenchConfig, DonorConfig
from t5gemma.experiments.scoring import Continuations
from t5gemma.model import T5Gemma
from t5gemma.objective import Distillation, TargetTokens
from t5gemma.train import parameters_of
from t5gemma.ul2 import UL2Tokens


@dataclasses.dataclass(frozen=True)
class Arm:
    """One encoder-decoder of a comparison.

    Attributes:
      name: of its folder and its measurements.
      start: makes the model that training starts from.
      objective: what it learns: "prefix_lm", "distillation" (the bench's donor teaches) or "ul2".
      warmup: updates in which cross attention alone trains.
      fresh: parameters are drawn anew; of `start` the shape alone is taken.
      learning_rate: peak rate; None: the bench's.
      curve: score held-out rows during the training too.
    """

    name: str
    start: Callable[[], T5Gemma]
    objective: str = "prefix_lm"
    warmup: int = 0
    fresh: bool = False
    learning_rate: float | None = None
    curve: bool = False


class Bench:
    """Where the models of some experiments are made, in `folder`.

    Args:
      config: donor, text and settings of trainings.
      folder: keeps data, trainings and, in its parent's `measurements`, scores.
      seed: of everything.
      resume_command: printed when a signal stops a training.
    """

    def __init__(
        self, config: BenchConfig, folder: Path, seed: int, resume_command: str | None = None
    ):
        self.config, self.folder, self.seed = config, folder, seed
        self.resume_command = resume_command
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def positions(self) -> int:
        """Positions of both sides that every training of an arm goes through."""
        data, train = self.config.data, self.config.train
        return train.steps * train.batch_size * (data.encoder_length + data.decoder_length)

    # Donors.

    @functools.cached_property
    def donor(self) -> Decoder:
        """The model that is adapted."""
        return self.made(self.config.donor, "donor")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The real donor's, or one trained on the text."""
        if self.config.donor.asset is not None:
            return self.donor.tokenizer
        data = self.config.data
        assert self.config.donor.model is not None
        pieces = self.config.donor.model.vocab_size - data.spare_tokens
        return tokenizer_for(
            dataclasses.replace(data.corpus, split="train"),
            pieces,
            self.folder / TOKENIZER_FILE,
            max_characters=data.tokenizer_characters,
        )

    def made(self, config: DonorConfig, name: str) -> Decoder:
        """A donor: read, or trained in the run (once)."""
        if config.asset is not None:
            path = asset(config.asset)
            return load_decoder(path, dtype=self.config.dtype, param_dtype="float32")  # type: ignore[arg-type]
        assert config.model is not None
        assert config.train is not None
        model = self._trained_decoder(name, config.train, config.model, None)
        attach_tokenizer(model, self.tokenizer)
        return model

    def _trained_decoder(self, name: str, train: TrainConfig, shape: Any, start: Any) -> Decoder:
        length = self.config.data.encoder_length + self.config.data.decoder_length
        task = NextToken(lambda rngs: Decoder(shape, rngs=rngs), loss_chunk=self.config.loss_chunk)
        rows = PackedRows(self.store("train"), length)
        trained(
            task,
            train,
            self.folder / name,
            batches(rows, global_batch=train.batch_size, seed=self.seed),
            seed=self.seed,
            initial_params=None if start is None else parameters_of(start),
            resume_command=self.resume_command,
        )
        return load_trained(task, self.folder / name, self.seed)

    # Text.

    def store(self, split: str) -> TokenStore:
        """The tokenised documents of "train" or "heldout"."""
        corpus = dataclasses.replace(self.config.data.corpus, split=split)
        return tokenize_corpus(corpus, self.tokenizer, self.folder / "data")

    def rows(self, objective: str, model: T5GemmaConfig) -> TrainingData:
        """Packed rows of an objective."""
        kind: Any = "ul2" if objective == "ul2" else "prefix_lm"
        return prepare_data(
            self.config.data,
            ObjectiveConfig(kind=kind),
            model,
            self.folder,
            seed=self.seed,
            say=print,
            tokenizer=self.tokenizer,
        )

    @functools.cached_property
    def pieces(self) -> Continuations:
        """What every model is scored on."""
        config = self.config
        prefix = config.data.encoder_length - 1  # Behind a bos.
        return Continuations(
            self.store("heldout"),
            prefix,
            min(prefix, config.data.decoder_length),
            tokens=config.scored_tokens,
            generated=config.generated,
            batch=config.batch,
        )

    # Encoder-decoders.

    def adapted(self, **options: Any) -> T5Gemma:
        """The donor adapted; see `t5gemma.adapt`."""
        return adapt(self.donor, seed=self.seed, **options)

    def scores(self, arm: Arm) -> dict[str, Any]:
        """Trains an arm and scores it on the held-out pieces, both once.

        Returns:
          What `Continuations.score` gives; `parameters`; `first`, the loss that was logged first;
          `positions` and `curve`, held-out loss while training, if it was asked for.
        """
        return measured(
            self.folder.parent, f"{self.folder.name}-{arm.name}", lambda: self._scores(arm)
        )

    def scores_of_continued(self) -> dict[str, Any]:
        """Scores of the donor, trained on as a decoder for as many positions as every arm."""

        def score() -> dict[str, Any]:
            train, donor = self.config.train, self.donor
            model = self._trained_decoder("continued", train, donor.config, donor)
            attach_tokenizer(model, self.tokenizer)
            return self.pieces.score(model)

        scores = measured(self.folder.parent, f"{self.folder.name}-continued", score)
        self.release("continued")
        return scores

    def model(self, arm: Arm) -> T5Gemma:
        """The trained model of an arm; one that was released is trained again."""
        self._train(arm)
        return self._load(arm)

    def release(self, arm_name: str) -> None:
        """Removes a training of a real donor once it is scored: each holds gigabytes."""
        if self.config.donor.asset is not None:
            shutil.rmtree(self.folder / arm_name / "checkpoints", ignore_errors=True)

    def _scores(self, arm: Arm) -> dict[str, Any]:
        special = self._train(arm)
        model = self._load(arm)
        metrics = read_metrics(self.folder / arm.name)
        lines = [line for line in metrics if "eval/heldout/loss" in line]
        per_step = self.positions // self.config.train.steps
        return {
            **self.pieces.score(model, special),
            "parameters": model.config.num_parameters(),
            "positions": [line["step"] * per_step for line in lines],
            "first": metrics[0]["loss"],
            "curve": [line["eval/heldout/loss"] for line in lines],
        }

    def _train(self, arm: Arm) -> UL2Tokens | None:
        """Trains an arm to its end; returns UL2's ids if it learns by that."""
        model = arm.start()
        shape, start = model.config, None if arm.fresh else _handed_over(model)
        del model
        data = self.rows(arm.objective, shape)
        train = self.config.train
        if arm.learning_rate is not None:
            optimizer = dataclasses.replace(train.optimizer, learning_rate=arm.learning_rate)
            train = dataclasses.replace(train, optimizer=optimizer)
        size = train.batch_size
        sets = {"heldout": lambda: evaluation_batches(data.heldout, global_batch=size)}
        trained(
            self._task(arm, shape),
            train,
            self.folder / arm.name,
            batches(data.train, global_batch=size, seed=self.seed),
            sets if arm.curve else None,
            seed=self.seed,
            initial_params=start,
            resume_command=self.resume_command,
        )
        return data.special

    def _load(self, arm: Arm) -> T5Gemma:
        shape = arm.start().config
        task = TargetTokens(lambda rngs: T5Gemma(shape, rngs=rngs))
        model = load_trained(task, self.folder / arm.name, self.seed)
        attach_tokenizer(model, self.tokenizer)
        return model

    def _task(self, arm: Arm, shape: T5GemmaConfig) -> TargetTokens:
        def build(rngs: nnx.Rngs) -> T5Gemma:
            return T5Gemma(shape, rngs=rngs)

        chunk = self.config.loss_chunk
        if arm.objective == "distillation":
            return Distillation(build, self.donor, loss_chunk=chunk)
        return TargetTokens(
            build,
            loss_chunk=chunk,
            trains_from=lambda path: 0 if in_cross_attention(path) else arm.warmup,
        )

    def unigram_loss(self) -> float:
        """Held-out loss of token frequencies alone, nats per token."""
        train = self.store("train")
        heldout = PackedRows(self.store("heldout"), self.config.data.decoder_length)
        counts = count_targets(heldout, train.vocab_size)
        return unigram_cross_entropy(train.target_counts(), counts)


def _handed_over(model: T5Gemma) -> Callable[[PureDict], PureDict]:
    """What gives the Trainer a model's parameters, once: they are not held beside its own."""
    parameters = [parameters_of(model)]
    return lambda abstract: parameters.pop()(abstract)
