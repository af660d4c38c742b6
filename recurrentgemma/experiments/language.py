"""Held-out loss after equal training, at the training length and beyond it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.data.pipeline import batches
from common.data.token_store import TokenStore
from common.errors import UserError
from common.launch.experiments import load_trained, measured, trained
from common.models import LanguageModel
from common.nn.losses import chunked_nll
from recurrentgemma.data import prepare_data
from recurrentgemma.experiments.config import LanguageConfig
from recurrentgemma.experiments.contenders import ContenderTask, contenders

PLACES = 32  # Points of the curve of loss by position.


def measure_language(
    config: LanguageConfig, seed: int, workdir: Path, resume_command: str | None = None
) -> dict[str, Any]:
    """Trains every contender on the same batches and scores the same held-out text.

    Returns:
      `lengths` and, for each model, `loss` at each of them (nats per token); `positions` and
      `loss_by_position` in rows of the longest length; `parameters`, `train_length`,
      `train_tokens` and `unigram_loss`.
    """
    folder = workdir / "language"
    folder.mkdir(parents=True, exist_ok=True)
    data = prepare_data(config.data, config.model.vocab_size, folder, print)
    table = long_rows(data.heldout.store, config.lengths[-1], config.rows)
    settings = config.train
    models = contenders(config.model)
    scores = {}
    for contender in models:
        task = ContenderTask(contender, loss_chunk=config.loss_chunk)
        rows = batches(data.train, global_batch=settings.batch_size, seed=seed)
        run = folder / contender.name
        trained(task, settings, run, rows, seed=seed, resume_command=resume_command)
        scores[contender.name] = measured(
            workdir,
            f"language-{contender.name}",
            lambda task=task, run=run: _score(load_trained(task, run, seed), table, config.lengths),
        )
    places = np.linspace(0, config.lengths[-1], _places(config.lengths[-1]) + 1)[1:]
    return {
        "parameters": {contender.name: contender.num_parameters() for contender in models},
        "train_length": config.data.sequence_length,
        "train_tokens": settings.steps * settings.batch_size * config.data.sequence_length,
        "heldout_tokens": int(table.shape[0] * config.lengths[-1]),
        "unigram_loss": data.unigram_loss(),
        "lengths": config.lengths,
        "loss": {name: score["loss"] for name, score in scores.items()},
        "positions": [int(place) for place in places],
        "loss_by_position": {name: score["by_position"] for name, score in scores.items()},
    }


def long_rows(store: TokenStore, length: int, rows: int) -> np.ndarray:
    """Stretches of `length + 1` tokens, each out of one document: `[rows or fewer, length + 1]`.

    Stretches of a document follow one another with a token in common, so that every token but the
    first is scored once. They are taken in turns from the documents that are long enough.

    Raises:
      UserError: no document is.
    """
    starts = [
        (number, int(first) + number * length)
        for first, size in zip(store.offsets[:-1], np.diff(store.offsets))
        for number in range((int(size) - 1) // length)
    ]
    if not starts:
        raise UserError(
            f"no held-out document has the {length + 1} tokens of the longest length: lower "
            "language.data.sequence_length or language.multiples, or take more documents"
        )
    chosen = [start for _, start in sorted(starts)[:rows]]
    return np.stack([store.tokens[s : s + length + 1] for s in chosen]).astype(np.int32)


def _score(model: LanguageModel, table: np.ndarray, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Mean loss of the same targets at each length, and by position at the longest."""
    nll = {length: row_losses(model, table, length) for length in lengths}
    longest = nll[lengths[-1]]
    by_position = longest.mean(axis=0).reshape(_places(lengths[-1]), -1).mean(axis=1)
    return {
        "loss": [float(nll[length].mean()) for length in lengths],
        "by_position": by_position.tolist(),
    }


def row_losses(model: LanguageModel, table: np.ndarray, length: int) -> np.ndarray:
    """Loss of every target of `table [R, S + 1]`, read in rows of `length`, `[rows, length]`.

    Each row is one context that starts empty; `length` divides S.
    """
    rows, longest = table.shape[0], table.shape[1] - 1
    tokens = table[:, :-1].reshape(-1, length)
    targets = table[:, 1:].reshape(-1, length)
    batch = max(1, longest // length) * max(1, min(rows, 8192 // longest))
    graphdef, state = nnx.split(model)

    @jax.jit
    def losses(state: nnx.State, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return chunked_nll(model.logits, model.hidden(tokens), targets, chunk=min(length, 256))

    parts = []
    for start in range(0, len(tokens), batch):
        part = [jnp.asarray(x[start : start + batch]) for x in (tokens, targets)]
        missing = batch - len(part[0])
        part = [jnp.pad(x, ((0, missing), (0, 0))) for x in part]
        parts.append(np.asarray(losses(state, *part), np.float64)[: batch - missing])
    return np.concatenate(parts)


def _places(length: int) -> int:
    """How many equal parts a row is divided into for the curve by position."""
    return next(n for n in range(min(PLACES, length), 0, -1) if length % n == 0)
