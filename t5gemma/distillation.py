"""A decoder-only teacher's distributions at an encoder-decoder's targets (section 3.2)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from common.nn.table import Head, through_head
from common.train import Batch


@dataclasses.dataclass(frozen=True)
class TeacherLayout:
    """A packed batch as a causal model reads it: each prefix with its target behind it.

    Attributes:
      tokens: `[B, S + T]` int32.
      segments: `[B, S + T]` int32, of the examples; padding, 0, stands at the end.
      predictors: `[B, T]` int32: at which of the places target t is predicted.
    """

    tokens: jax.Array
    segments: jax.Array
    predictors: jax.Array


def teacher_layout(batch: Batch) -> TeacherLayout:
    """Arranges the rows of `packing.PackedExamples` for the teacher.

    Prefixes must begin with the token that the teacher's documents begin with.
    """
    tokens = jnp.concatenate([batch["encoder_tokens"], batch["targets"]], axis=1)
    segments = jnp.concatenate([batch["encoder_segments"], batch["decoder_segments"]], axis=1)
    last = jnp.iinfo(jnp.int32).max
    # Stable, so that in each segment the encoder's tokens stay before the decoder's.
    order = jnp.argsort(jnp.where(segments == 0, last, segments), axis=1, stable=True)
    places = jnp.argsort(order, axis=1)[:, batch["encoder_tokens"].shape[1] :]
    return TeacherLayout(
        tokens=jnp.take_along_axis(tokens, order, axis=1),
        segments=jnp.take_along_axis(segments, order, axis=1),
        # What stands before the first target is the last token of the prefix.
        predictors=jnp.maximum(places - 1, 0),
    )


def distilled_nll(
    student: Head,
    teacher: Head,
    hidden: jax.Array,
    teacher_hidden: jax.Array,
    targets: jax.Array,
    *,
    chunk: int | None = None,
    top_k: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the student under the teacher's distribution, and of the true tokens.

    With `chunk` the logits of so many positions of each row exist at a time, of either model; the
    backward pass makes them again. With `top_k` it makes the student's alone.

    Args:
      student: its gradient is the only one.
      teacher: may know fewer tokens than the student: the first ones.
      hidden: `[B, T, D]` of the student.
      teacher_hidden: `[B, T, D']` of the teacher.
      targets: `[B, T]` int32.
      chunk: see `through_head`.
      top_k: how many of the teacher's likeliest tokens count; None for all.

    Returns:
      Both `[B, T]` fp32 nats.
    """
    teacher, teacher_hidden = jax.lax.stop_gradient((teacher, teacher_hidden))
    if top_k is None:
        rows = (targets, teacher_hidden)
        return through_head(_of_all, hidden, student, rows, (teacher,), chunk=chunk)
    likeliest = functools.partial(_likeliest, top_k)
    probabilities, tokens = through_head(likeliest, teacher_hidden, teacher, chunk=chunk)
    rows = (targets, probabilities, tokens)
    return through_head(_of_likeliest, hidden, student, rows, chunk=chunk)


Pair = tuple[jax.Array, jax.Array]


def _of_all(logits: jax.Array, heads: Any, targets: jax.Array, teacher_hidden: jax.Array) -> Pair:
    """Both losses, `[B, C]` each, from the student's logits and the teacher's features."""
    (teacher,) = heads
    probabilities = jax.nn.softmax(jax.lax.stop_gradient(teacher(teacher_hidden)))
    known = logits[..., : probabilities.shape[-1]]
    return _losses(logits, jnp.sum(probabilities * known, axis=-1), targets)


def _of_likeliest(
    logits: jax.Array, heads: Any, targets: jax.Array, probabilities: jax.Array, tokens: jax.Array
) -> Pair:
    """Both losses from the student's logits and the teacher's likeliest tokens."""
    known = jnp.take_along_axis(logits, tokens, axis=-1)
    return _losses(logits, jnp.sum(probabilities * known, axis=-1), targets)


def _losses(logits: jax.Array, expected: jax.Array, targets: jax.Array) -> Pair:
    total = jax.nn.logsumexp(logits, axis=-1)
    # A sum over all tokens: the gradient of picking one would be scattered into zeros.
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    return total - expected, total - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def _likeliest(top_k: int, logits: jax.Array, heads: Any) -> Pair:
    """Probabilities, renormalised, and ids of the likeliest tokens, `[B, C, k]` each."""
    values, tokens = jax.lax.top_k(logits, top_k)
    return jax.nn.softmax(values), tokens
