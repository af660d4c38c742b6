"""The same held-out text, continued by encoder-decoders and by decoders."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.data.token_store import TokenStore
from common.errors import UserError
from common.generate import generate
from common.models import Decoder
from t5gemma.evaluation import score_text
from t5gemma.metrics import generation_metrics
from t5gemma.model import T5Gemma
from t5gemma.ul2 import MODES, UL2Tokens

METRICS = ("rougeL", "bleu")


class Continuations:
    """Held-out pieces, each of `prefix` tokens to read and `continuation` tokens to come.

    Args:
      store: held-out documents.
      prefix, continuation: tokens of a piece.
      tokens: about how many continued tokens a score is of.
      generated: how many pieces are continued freely.
      batch: rows computed at a time.

    Attributes:
      table: `[R, prefix + continuation]` int32.
    """

    def __init__(
        self,
        store: TokenStore,
        prefix: int,
        continuation: int,
        *,
        tokens: int,
        generated: int,
        batch: int,
    ):
        self.prefix, self.continuation, self.batch = prefix, continuation, batch
        rows = -(-max(tokens // continuation, generated) // batch) * batch
        self.table = stretches(store, prefix + continuation, rows)
        self._generated = min(-(-generated // batch) * batch, len(self.table))

    def score(self, model: T5Gemma | Decoder, special: UL2Tokens | None = None) -> dict[str, Any]:
        """Loss of the true continuation, and how near the model's own comes to it.

        Args:
          model: with a tokenizer.
          special: UL2's ids, for a model trained by it.

        Returns:
          `loss`, nats per token; `rougeL` and `bleu` of greedy continuations, 0 to 100; `sample`,
          one of them.
        """
        texts = self.continued(model, special)
        decode = model.tokenizer.decode
        references = [decode(row[self.prefix :].tolist()) for row in self.table[: len(texts)]]
        metrics = generation_metrics(texts, references)
        sample = {
            "prefix": decode(self.table[0, : self.prefix].tolist()),
            "true": references[0],
            "written": texts[0],
        }
        scores = {name: metrics[name] for name in METRICS}
        return {"loss": self.loss(model, special), **scores, "sample": sample}

    def loss(self, model: T5Gemma | Decoder, special: UL2Tokens | None = None) -> float:
        """Mean loss of the true continuations, nats per token."""
        if isinstance(model, Decoder):
            return float(_decoder_losses(model, self.table, self.prefix, self.batch).mean())
        return score_text(
            model,
            list(self.table),
            prefix=self.prefix,
            continuation=self.continuation,
            tokens=len(self.table) * self.continuation,
            batch=self.batch,
            special=special,
        ).loss

    def continued(self, model: T5Gemma | Decoder, special: UL2Tokens | None = None) -> list[str]:
        """Greedy continuations of the first pieces."""
        texts = []
        for start in range(0, self._generated, self.batch):
            for found in self.answers(model, start, special)():
                tokens = found.tokens
                if special is not None and tokens[0] == special.first_sentinel:
                    tokens = tokens[1:]
                texts.append(model.tokenizer.decode(tokens[: self.continuation]))
        return texts

    def answers(
        self, model: T5Gemma | Decoder, start: int = 0, special: UL2Tokens | None = None
    ) -> Callable[[], Any]:
        """A function that continues a batch of pieces from `start` on, to be timed too."""
        bos = model.tokenizer.bos_id
        head, tail = [bos] if bos >= 0 else [], []
        if special is not None:
            head += [] if special.modes is None else [special.modes[MODES.index("S")]]
            tail = [special.first_sentinel]
        rows = self.table[start : start + self.batch, : self.prefix]
        prompts = [[*head, *row.tolist(), *tail] for row in rows]
        return functools.partial(
            generate, model, prompts, self.continuation + len(tail), stop=(), seed=0
        )


def stretches(store: TokenStore, length: int, rows: int) -> np.ndarray:
    """Pieces of `length` tokens, each out of one document: `[rows or fewer, length]` int32.

    They are taken in turns from the documents that are long enough, whose first and last token
    (bos and eos) are left out.

    Raises:
      UserError: no document is long enough.
    """
    starts = sorted(
        (number, int(first) + 1 + number * length)
        for first, size in zip(store.offsets[:-1], np.diff(store.offsets))
        for number in range((int(size) - 2) // length)
    )
    if not starts:
        raise UserError(
            f"no held-out document has {length} tokens: shorten both sides, or take more documents"
        )
    return np.stack([store.tokens[s : s + length] for _, s in starts[:rows]]).astype(np.int32)


def _decoder_losses(model: Decoder, table: np.ndarray, prefix: int, batch: int) -> np.ndarray:
    """`[R, P + C]` -> `[R, C]` nats: the last C tokens of each piece, given the first."""
    graphdef, state = nnx.split(model)
    bos = model.tokenizer.bos_id
    tokens = np.pad(table, ((0, 0), (int(bos >= 0), 0)), constant_values=max(bos, 0))
    continuation = table.shape[1] - prefix
    padded = np.pad(tokens, ((0, -len(tokens) % batch), (0, 0)), mode="edge")
    parts = [
        _nll(graphdef, state, jnp.asarray(padded[i : i + batch]), continuation)
        for i in range(0, len(padded), batch)
    ]
    return np.concatenate([np.asarray(part, np.float64) for part in parts])[: len(table)]


@functools.partial(jax.jit, static_argnames=("graphdef", "continuation"))
def _nll(
    graphdef: nnx.GraphDef[Decoder], state: nnx.State, tokens: jax.Array, continuation: int
) -> jax.Array:
    """`[B, L]` -> `[B, C]` nats."""
    model = nnx.merge(graphdef, state)
    hidden = model.hidden(tokens[:, :-1])[:, -continuation:]
    return model.nll(hidden, tokens[:, -continuation:])
