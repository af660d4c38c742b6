"""Next-token prediction: the Task of every causal language model."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.language_model import LanguageModel
from common.train.task import Batch, Loss, Task


class NextToken(Task):
    """Cross-entropy of the next token over packed documents.

    Batches hold `tokens`, `targets`, `positions`, `segment_ids` (int32) and `weights` (float32),
    each `[B, L]`.

    Args:
      build: makes the model from its random streams.
      loss_chunk: positions of a row whose logits exist at a time; None for all.
      forward_flops: FLOPs of the forward pass over `[B, L]` tokens, as a function of B and L.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], LanguageModel],
        *,
        loss_chunk: int | None = None,
        forward_flops: Callable[[int, int], float] | None = None,
    ):
        self._build = build
        self._loss_chunk = loss_chunk
        self._forward_flops = forward_flops

    def build(self, rngs: nnx.Rngs) -> LanguageModel:
        return self._build(rngs)

    def loss(self, model: LanguageModel, batch: Batch, key: jax.Array) -> Loss:
        """Sum of the weighted negative log-likelihoods, in nats."""
        hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        nll = model.nll(hidden, batch["targets"], self._loss_chunk)
        weights = batch["weights"].astype(jnp.float32)
        return Loss(total=jnp.sum(nll * weights), weight=jnp.sum(weights))

    def flops_per_step(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> float | None:
        """Three times the forward pass: the backward does each product twice."""
        if self._forward_flops is None:
            return None
        return 3.0 * self._forward_flops(*batch["tokens"].shape)
