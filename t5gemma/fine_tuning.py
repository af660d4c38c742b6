"""Fine-tuning a classifier over a small grid of settings; the best on the dev set counts."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from common.data.pipeline import batches, evaluation_batches
from common.data.tokenizers import Tokenizer
from common.errors import UserError
from common.launch import RunFolder
from common.sharding import MeshConfig, local_rows, make_mesh
from common.train import OptimizerConfig, TrainConfig, Trainer, read_metrics
from common.train.task import PureDict
from t5gemma.classification import (
    Classification,
    LabelledRows,
    LabelledText,
    Pooling,
    read_labelled,
)


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """What to try. Every combination is trained; the paper searches over the same three.

    Attributes:
      learning_rates, batch_sizes, dropouts: the grid.
      epochs: passes over the training texts.
      evaluations: how often, evenly over a training, the dev set is scored; the best counts.
      pooling: see `Classifier`.
      max_length: tokens of a text.
      seed: of heads, dropout and order.
      mesh: how devices are divided.
    """

    learning_rates: tuple[float, ...] = (1e-4,)
    batch_sizes: tuple[int, ...] = (32,)
    dropouts: tuple[float, ...] = (0.1,)
    epochs: float = 3.0
    evaluations: int = 4
    pooling: Pooling = "last"
    max_length: int = 512
    seed: int = 0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if not (self.learning_rates and self.batch_sizes and self.dropouts):
            raise UserError(
                "fine-tuning needs a learning rate, a batch size and a dropout at least"
            )
        if self.epochs <= 0 or self.evaluations < 1 or self.max_length < 1:
            raise UserError("epochs, evaluations and max_length of fine-tuning must be positive")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One combination and how it did.

    Attributes:
      learning_rate, batch_size, dropout: of the grid.
      steps: that were trained.
      accuracy: best on the dev set, from 0 to 1.
      final_accuracy: after the last step.
    """

    learning_rate: float
    batch_size: int
    dropout: float
    steps: int
    accuracy: float
    final_accuracy: float


@dataclasses.dataclass(frozen=True)
class Scores:
    """Result of a task.

    Attributes:
      labels: the classes.
      train_texts, dev_texts: how many there are.
      majority: share of the dev texts that have the most frequent training label.
      trials: every combination, the best first.
      preempted: a signal stopped the search before its end.
    """

    labels: tuple[str, ...]
    train_texts: int
    dev_texts: int
    majority: float
    trials: tuple[Trial, ...]
    preempted: bool = False

    @property
    def accuracy(self) -> float:
        """Of the best trial."""
        return self.trials[0].accuracy


def fine_tune(
    model: Any,
    train: str | Path,
    dev: str | Path,
    settings: FineTuning,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    checkpoint: str = "",
    resume_command: str | None = None,
) -> Scores:
    """Trains a classifier on one JSONL file for each combination and scores it on another.

    Args:
      model: a T5Gemma or a decoder-only language model, with a `config` to build it from; it stays
        as it is.
      train, dev: see `read_labelled`.
      settings: what to try.
      folder: for the runs, one folder each; finished ones are not trained again.
      tokenizer: default the model's own.
      checkpoint: where the model is from; a folder of runs that began elsewhere is refused.
      resume_command: printed when a signal stops a run.

    Raises:
      UserError: a file is wrong, there are fewer than two labels, or there is no tokenizer.
    """
    tokenizer = tokenizer if tokenizer is not None else model.tokenizer
    if tokenizer is None:
        raise UserError("classification needs a tokenizer beside the model")
    texts = read_labelled(train)
    labels = tuple(sorted({text.label for text in texts}))
    if len(labels) < 2:
        raise UserError(
            f"{train} has one label alone, '{labels[0]}': there is nothing to tell apart"
        )
    dev_texts = read_labelled(dev, labels)
    rows = LabelledRows(texts, labels, tokenizer, settings.max_length)
    dev_rows = LabelledRows(dev_texts, labels, tokenizer, settings.max_length)
    trials, preempted = [], False
    grid = itertools.product(settings.learning_rates, settings.batch_sizes, settings.dropouts)
    for rate, size, dropout in grid:
        config = _TrialConfig(checkpoint, str(train), str(dev), rate, size, dropout, settings)
        place = Path(folder) / f"rate{rate:g}-batch{size}-dropout{dropout:g}"
        trial = _run_trial(model, (rows, dev_rows), config, place, len(labels), resume_command)
        if trial is None:
            preempted = True
            break
        trials.append(trial)
    return Scores(
        labels=labels,
        train_texts=len(texts),
        dev_texts=len(dev_texts),
        majority=_majority(texts, dev_texts),
        trials=tuple(sorted(trials, key=lambda trial: -trial.accuracy)),
        preempted=preempted,
    )


@dataclasses.dataclass(frozen=True)
class _TrialConfig:
    """What a folder's run is of, so that no other is taken for it."""

    checkpoint: str
    train: str
    dev: str
    learning_rate: float
    batch_size: int
    dropout: float
    settings: FineTuning


def _run_trial(
    model: Any,
    rows: tuple[LabelledRows, LabelledRows],
    trial: _TrialConfig,
    folder: Path,
    classes: int,
    resume_command: str | None,
) -> Trial | None:
    """One training; None if a signal stopped it."""
    (train, dev), settings = rows, trial.settings
    rate, size, dropout = trial.learning_rate, trial.batch_size, trial.dropout
    steps = max(1, math.ceil(settings.epochs * len(train) / size))
    config = TrainConfig(
        steps=steps,
        batch_size=size,
        log_every=max(1, steps // 50),
        eval_every=max(1, steps // settings.evaluations),
        checkpoint_every=steps,
        keep_checkpoints=1,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=steps // 10, weight_decay=0.01),
        mesh=settings.mesh,
    )
    task = Classification(_builder(model), classes, pooling=settings.pooling, dropout=dropout)
    mesh = make_mesh(config.mesh)
    part: Any = {"global_batch": size, "local_rows": local_rows(mesh, size)}

    def initial_params(abstract: PureDict) -> PureDict:
        """The model's own weights, and a fresh head."""
        whole = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        values = {
            "body": {name: whole[name] for name in abstract["body"]},
            "head": task.fresh_head(abstract["head"], jax.random.key(settings.seed)),
        }
        return jax.tree.map(
            lambda value, leaf: jax.device_put(value.astype(leaf.dtype), leaf.sharding),
            values,
            abstract,
        )

    run_folder = RunFolder(folder)
    run_folder.open(trial, may_change=("settings.mesh",))
    trainer = Trainer(
        task,
        config,
        folder,
        batches(train, seed=settings.seed, **part),
        {"dev": lambda: evaluation_batches(dev, **part)},
        seed=settings.seed,
        initial_params=initial_params,
        resume_command=resume_command,
    )
    try:
        result = trainer.run()
    finally:
        run_folder.close()
    if result.preempted:
        return None
    lines = [line for line in read_metrics(folder) if "eval/dev/accuracy" in line]
    accuracies = [line["eval/dev/accuracy"] for line in lines]
    return Trial(rate, size, dropout, steps, max(accuracies), accuracies[-1])


def _builder(model: Any) -> Any:
    """Makes another model of the same shape."""
    kind, config = type(model), model.config
    return lambda rngs: kind(config, rngs=rngs)


def _majority(train: Sequence[LabelledText], dev: Sequence[LabelledText]) -> float:
    counts: dict[str, int] = {}
    for text in train:
        counts[text.label] = counts.get(text.label, 0) + 1
    most = max(counts, key=lambda label: counts[label])
    return sum(text.label == most for text in dev) / len(dev)
