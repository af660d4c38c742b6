"""Training objectives of T5Gemma: the targets' cross-entropy, and distillation from a decoder.

PrefixLM, UL2 and instruction tuning differ in their data alone; `TargetTokens` is the Task of all
three. `Distillation` is PrefixLM with the donor's distributions in place of the next tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.language_model import LanguageModel
from common.sharding import variable_axes
from common.train import Batch, Loss, Task
from common.train.frozen import Frozen
from common.train.task import Path, PureDict
from t5gemma.distillation import distilled_nll, teacher_layout

ForwardFlops = Callable[[int, int, int], float]


class TargetTokens(Task):
    """Cross-entropy of the targets, mean over those that are not padding (section 7.19).

    Batches are rows of `packing.PackedExamples`.

    Args:
      build: makes the encoder-decoder from its random streams.
      loss_chunk: positions of a row whose logits exist at a time; None for all.
      forward_flops: FLOPs of the forward pass as a function of B, S and T.
      trains: whether the parameter at a path trains; None trains all.
      trains_from: after how many updates the parameter at a path begins to change; None: at once.
    """

    unit = "targets"

    def __init__(
        self,
        build: Callable[[nnx.Rngs], nnx.Module],
        *,
        loss_chunk: int | None = None,
        forward_flops: ForwardFlops | None = None,
        trains: Callable[[Path], bool] | None = None,
        trains_from: Callable[[Path], int] | None = None,
    ):
        self._build = build
        self._trains = trains
        self._trains_from = trains_from
        self._loss_chunk = loss_chunk
        self._forward_flops = forward_flops

    def build(self, rngs: nnx.Rngs) -> Any:
        return self._build(rngs)

    def loss(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        """Sum of the weighted negative log-likelihoods, in nats."""
        nll = model.nll(decoder_hidden(model, batch), batch["targets"], self._loss_chunk)
        weights = batch["weights"].astype(jnp.float32)
        return Loss(total=jnp.sum(nll * weights), weight=jnp.sum(weights))

    def trainable(self, path: Path, variable: nnx.Variable) -> bool:
        chosen = self._trains is None or self._trains(path)
        return chosen and super().trainable(path, variable)

    def trains_from(self, path: Path, variable: nnx.Variable) -> int:
        return 0 if self._trains_from is None else self._trains_from(path)

    def decays(self, path: Path, variable: nnx.Variable) -> bool:
        """Matrices but for the embedding tables, most rows of which a batch does not touch."""
        return "vocab" not in variable_axes(variable) and super().decays(path, variable)

    def flops_per_step(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> float | None:
        """Three times the forward pass: the backward does each product twice."""
        if self._forward_flops is None:
            return None
        return 3.0 * self._forward_flops(*_sizes(batch))


class Distillation(TargetTokens):
    """Cross-entropy against a frozen decoder-only teacher, which reads prefix and target as one.

    The loss is `-sum_v P_teacher(v | prefix, target so far) log P_student(v | ...)` (section 3.2).
    Evaluation scores the true tokens, so that its loss compares with the other objectives'.

    The teacher's weights are state of the run beside the parameters (`common.train.frozen`).

    Args:
      build: makes the student.
      teacher: the trained decoder; for a program that only gets compiled it may be abstract.
      top_k: distil the teacher's k likeliest tokens, renormalised, which are found before the
        backward pass; None distils all of its distribution.
      ground_truth: share of the ordinary cross-entropy in the loss, from 0 to 1.
      loss_chunk, forward_flops, trains, trains_from: see `TargetTokens`.
      teacher_flops: FLOPs of the teacher's forward pass as a function of B and L.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], nnx.Module],
        teacher: LanguageModel,
        *,
        top_k: int | None = None,
        ground_truth: float = 0.0,
        loss_chunk: int | None = None,
        forward_flops: ForwardFlops | None = None,
        teacher_flops: Callable[[int, int], float] | None = None,
        trains: Callable[[Path], bool] | None = None,
        trains_from: Callable[[Path], int] | None = None,
    ):
        super().__init__(
            build,
            loss_chunk=loss_chunk,
            forward_flops=forward_flops,
            trains=trains,
            trains_from=trains_from,
        )
        if not 0.0 <= ground_truth <= 1.0:
            raise ValueError(f"ground_truth is a share from 0 to 1, not {ground_truth}")
        if top_k is not None and not 1 <= top_k <= teacher.vocab_size:
            raise ValueError(f"top_k is {top_k} of {teacher.vocab_size} tokens")
        self._top_k, self._ground_truth = top_k, ground_truth
        self._teacher_flops = teacher_flops
        self._frozen = Frozen(teacher)

    def build(self, rngs: nnx.Rngs) -> Any:
        model = self._build(rngs)
        model.teacher = self._frozen.room()
        return model

    def initial_rest(self, abstract: PureDict) -> PureDict:
        return {"teacher": self._frozen.weights(abstract["teacher"])}

    def loss(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        """Sum of the weighted cross-entropies; metrics `distillation` and `nll` are its parts."""
        layout = teacher_layout(batch)
        teacher: LanguageModel = self._frozen.model(model.teacher)
        read = teacher.hidden(layout.tokens, None, layout.segments)
        predicting = jnp.take_along_axis(read, layout.predictors[..., None], axis=1)
        distilled, nll = distilled_nll(
            model.decoder.output,
            teacher.output,
            decoder_hidden(model, batch),
            predicting,
            batch["targets"],
            chunk=self._loss_chunk,
            top_k=self._top_k,
        )
        weights = batch["weights"].astype(jnp.float32)
        distilled, nll = jnp.sum(distilled * weights), jnp.sum(nll * weights)
        share = self._ground_truth
        return Loss(
            total=(1 - share) * distilled + share * nll,
            weight=jnp.sum(weights),
            metrics={"distillation": distilled, "nll": nll},
        )

    def evaluate(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        return TargetTokens.loss(self, model, batch, key)

    def flops_per_step(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> float | None:
        """The student's step and the teacher's forward pass."""
        own = super().flops_per_step(batch)
        if own is None or self._teacher_flops is None:
            return None
        rows, encoder, decoder = _sizes(batch)
        return own + self._teacher_flops(rows, encoder + decoder)


def decoder_hidden(model: Any, batch: Batch) -> jax.Array:
    """`[B, T, D]` features of a packed batch, before the head."""
    encoder, decoder = batch["encoder_segments"], batch["decoder_segments"]
    return model.hidden(
        batch["encoder_tokens"],
        batch["decoder_tokens"],
        encoder_positions=batch["encoder_positions"],
        encoder_segments=encoder,
        decoder_positions=batch["decoder_positions"],
        decoder_segments=decoder,
        encoder_valid=encoder > 0,
        decoder_valid=decoder > 0,
    )


def _sizes(batch: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[int, int, int]:
    rows, encoder = batch["encoder_tokens"].shape
    return rows, encoder, batch["targets"].shape[1]
