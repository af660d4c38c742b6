"""Induction heads: what followed the mark before? At and beyond the training length."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from common.data.pipeline import batches, evaluation_batches
from common.data.synthetic import InductionHeads
from common.launch.experiments import trained
from common.models import LanguageModel
from common.nn.losses import token_nll
from common.train import Batch, Loss, read_metrics
from recurrentgemma.experiments.config import InductionConfig
from recurrentgemma.experiments.contenders import ContenderTask, contenders

_EVALUATION_SEED = 1_000_003  # Added to the run's, so that no row is both trained on and scored.


class RecallTask(ContenderTask):
    """Cross-entropy of the answers, with the share of them that is the likeliest token."""

    def loss(self, model: LanguageModel, batch: Batch, key: jax.Array) -> Loss:
        logits = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        weights, targets = batch["weights"], batch["targets"]
        right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        return Loss(
            total=jnp.sum(token_nll(logits, targets) * weights),
            weight=jnp.sum(weights),
            metrics={"accuracy": jnp.sum(right * weights)},
        )


def measure_induction(
    config: InductionConfig, seed: int, workdir: Path, resume_command: str | None = None
) -> dict[str, Any]:
    """Trains every contender on the same rows; accuracy comes from the last evaluation.

    Returns:
      `lengths` and, for each model, `accuracy` at each of them; `train_length`, `chance`,
      `parameters`; `steps` and `train_accuracy`, a curve for each model.
    """
    settings = config.train
    train_rows = InductionHeads(config.train_length, config.vocabulary, seed=seed)
    shape = dataclasses.replace(config.model, vocab_size=train_rows.vocab_size)
    models = contenders(shape)
    accuracy, curves, steps = {}, {}, []
    for contender in models:
        folder = workdir / "induction" / contender.name
        result = trained(
            RecallTask(contender),
            settings,
            folder,
            batches(train_rows, global_batch=settings.batch_size, seed=seed),
            _evaluation_sets(config, seed),
            seed=seed,
            resume_command=resume_command,
        )
        accuracy[contender.name] = [
            result.metrics[f"eval/length_{length}/accuracy"] for length in config.lengths
        ]
        lines = {line["step"]: line["accuracy"] for line in read_metrics(folder)}
        steps = sorted(lines)
        curves[contender.name] = [lines[step] for step in steps]
    return {
        "parameters": {contender.name: contender.num_parameters() for contender in models},
        "chance": 1 / config.vocabulary,
        "train_length": config.train_length,
        "lengths": config.lengths,
        "accuracy": accuracy,
        "steps": steps,
        "train_accuracy": curves,
    }


def _evaluation_sets(config: InductionConfig, seed: int) -> dict[str, Any]:
    """Fresh rows of every length."""

    def rows_of(length: int) -> Any:
        rows = InductionHeads(length, config.vocabulary, config.rows, seed + _EVALUATION_SEED)
        return lambda: evaluation_batches(rows, global_batch=config.train.batch_size)

    return {f"length_{length}": rows_of(length) for length in config.lengths}
