"""A decoder-only teacher's distributions at an encoder-decoder's targets (section 3.2)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from common.train import Batch

Head = Callable[[jax.Array], jax.Array]


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
      student, teacher: heads, `[B, C, D]` to logits `[B, C, V]`; the teacher may know fewer tokens.
      hidden: `[B, T, D]` of the student.
      teacher_hidden: `[B, T, D']` of the teacher; gets no gradient.
      targets: `[B, T]` int32.
      chunk: C; None, or a C that does not divide T, computes all at once.
      top_k: how many of the teacher's likeliest tokens count; None for all.

    Returns:
      Both `[B, T]` fp32 nats.
    """
    teacher_hidden = jax.lax.stop_gradient(teacher_hidden)
    length = targets.shape[1]
    parts = 1 if chunk is None or length % chunk else max(1, length // chunk)

    def distribution(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Probabilities `[B, C, k]` and their tokens; all tokens in their order where None."""
        logits = jax.lax.stop_gradient(teacher(x).astype(jnp.float32))
        tokens = None
        if top_k is not None:
            logits, tokens = jax.lax.top_k(logits, top_k)
        return jax.nn.softmax(logits), tokens

    def losses(probabilities, tokens, x, y):
        logits = student(x).astype(jnp.float32)
        total = jax.nn.logsumexp(logits, axis=-1)
        if tokens is None:
            known = logits[..., : probabilities.shape[-1]]
        else:
            known = jnp.take_along_axis(logits, tokens, axis=-1)
        distilled = total - jnp.sum(probabilities * known, axis=-1)
        return distilled, total - jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]

    def whole(piece):
        x, teacher_x, y = piece
        return losses(*distribution(teacher_x), x, y)

    if parts == 1:
        return whole((hidden, teacher_hidden, targets))
    split = [_split(x, parts) for x in (hidden, teacher_hidden, targets)]
    if top_k is None:
        pair = jax.lax.map(jax.checkpoint(whole), tuple(split))
    else:
        found = jax.lax.map(distribution, split[1])
        pair = jax.lax.map(jax.checkpoint(lambda p: losses(*p)), (*found, split[0], split[2]))
    distilled, nll = (jnp.moveaxis(x, 0, 1).reshape(targets.shape) for x in pair)
    return distilled, nll


def _split(x: jax.Array, parts: int) -> jax.Array:
    """`[B, T, ...] -> [parts, B, T / parts, ...]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0)
