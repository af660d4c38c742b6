"""An encoder-decoder of a few lines with T5Gemma's interface."""

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.embed import Embedding
from common.nn.param import fan_in_normal, param
from common.nn.table import tied_nll


class StandIn(nnx.Module):
    """One attention layer on each side, both causal or not as T5Gemma's are."""

    def __init__(self, vocab_size: int, width: int = 8, *, rngs: nnx.Rngs):
        self.vocab_size = vocab_size
        self.tables = nnx.List([Embedding(vocab_size, width, rngs=rngs) for _ in range(2)])
        self.mixers = nnx.List(
            [param(rngs, fan_in_normal(), (width, width), ("embed", "mlp")) for _ in range(3)]
        )

    def hidden(
        self,
        encoder_tokens,
        decoder_tokens,
        *,
        encoder_positions=None,
        encoder_segments=None,
        decoder_positions=None,
        decoder_segments=None,
        encoder_valid=None,
        decoder_valid=None,
    ):
        def same(queries, keys, valid):
            return (queries[:, :, None] == keys[:, None, :]) & valid[:, None, :]

        encoded = self.tables[0].encode(encoder_tokens)
        mask = same(encoder_segments, encoder_segments, encoder_valid)
        encoded = self._mix(0, encoded, encoded, mask)
        x = self.tables[1].encode(decoder_tokens)
        x = x * (1 + jnp.sin(decoder_positions)[..., None])
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        x = self._mix(1, x, x, same(decoder_segments, decoder_segments, decoder_valid) & causal)
        return self._mix(2, x, encoded, same(decoder_segments, encoder_segments, encoder_valid))

    def logits(self, hidden):
        return jnp.tanh(self.tables[1].decode(hidden))

    def nll(self, hidden, targets, chunk=None):
        table = self.tables[1].table[...]
        return tied_nll(hidden, table, targets, cap=jnp.tanh, dtype=jnp.float32, chunk=chunk)

    def _mix(self, number, x, keys, mask):
        scores = jnp.einsum("bqd,de,bke->bqk", x, self.mixers[number][...], keys)
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1) * mask
        return x + jnp.einsum("bqk,bkd->bqd", weights, keys)
