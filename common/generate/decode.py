"""The compiled decode loop: prefill, then one `while_loop` until every row has stopped."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.generate.sampling import Sampling, sample

# Platforms whose compiler reads a layer's weights in place, out of the stack of all layers.
READ_IN_PLACE = ("tpu",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """What the loop carries.

    Attributes:
      step: [] int32 number of tokens emitted so far.
      logits: `[B, V]` fp32 for the next token.
      tokens: `[B, N]` int32 emitted tokens.
      logprobs: `[B, N]` fp32 of the emitted tokens.
      done: `[B]` bool, True from a row's stop token on.
      lengths: `[B]` int32 emitted tokens, the stop token counted.
      cache: the model's decode cache.
    """

    step: jax.Array
    logits: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    done: jax.Array
    lengths: jax.Array
    cache: Any


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def prefill(graphdef: nnx.GraphDef, state: Any, tokens, valid, *, capacity: int):
    """First chunk of the prompts `[B, T]`, right-padded: last logits `[B, V]` and a new cache."""
    model = nnx.merge(graphdef, state)
    return model.prefill(tokens, valid=valid, max_length=capacity, last_only=True)


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def begin(graphdef: nnx.GraphDef, state: Any, tokens, valid, *, capacity: int):
    """An encoder-decoder reads `[B, S]`: first logits `[B, V]` of its texts, and their cache."""
    model = nnx.merge(graphdef, state)
    return model.begin(tokens, valid, max_length=capacity)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache", "logits"))
def prefill_more(graphdef: nnx.GraphDef, state: Any, tokens, valid, cache, logits):
    """A further chunk; rows without tokens in it keep their cache and their last logits."""
    model = nnx.merge(graphdef, state)
    new_logits, cache = model.extend(tokens, cache, valid=valid, last_only=True)
    return jnp.where(valid.any(axis=1)[:, None], new_logits, logits), cache


@jax.jit
def unroll(cache: Any) -> Any:
    """A cache whose layers are arrays of their own, as `decode` wants it."""
    return cache.unrolled()


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "sampling", "max_new_tokens", "in_place"),
    donate_argnames=("cache", "logits"),
)
def decode(
    graphdef: nnx.GraphDef,
    state: Any,
    logits: jax.Array,
    cache: Any,
    key: jax.Array,
    stop: jax.Array,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    in_place: bool = False,
) -> LoopState:
    """Emits up to `max_new_tokens` tokens a row.

    Args:
      graphdef, state: the model, split.
      logits: `[B, V]` of each prompt's last token (donated).
      cache: the model's cache behind the prompts (donated). Best one that `unroll` has taken apart,
        which is written where it lies; stacked layers are taken apart and put together in here,
        which holds them three times.
      key: random key; row r draws token n with `fold_in(fold_in(key, r), n)`.
      stop: `[S]` int32 tokens that end a row (-1: none).
      sampling, max_new_tokens: static.
      in_place: static; cut the stack of all layers' weights at every token, inside the loop, where
        the compiler reads each layer out of it (`READ_IN_PLACE`). Other compilers would copy the
        layer first, every time: for them the stack is cut once, which holds its weights twice.

    Returns:
      The loop's last state. It holds the cache so that the donated buffers are written in place.
    """
    batch = logits.shape[0]
    if not in_place:
        graphdef, state = nnx.split(nnx.merge(graphdef, state).unrolled())
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def emit(loop: LoopState) -> tuple[jax.Array, LoopState]:
        keys = jax.vmap(lambda row: jax.random.fold_in(row, loop.step))(row_keys)
        token, logprob = sample(loop.logits, keys, sampling)
        token = jnp.where(loop.done, 0, token)
        lengths = loop.lengths + ~loop.done
        done = loop.done | (token[:, None] == stop[None]).any(axis=1)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=loop.step, axis=1)
        emitted = dataclasses.replace(
            loop,
            step=loop.step + 1,
            tokens=put(loop.tokens, token),
            logprobs=put(loop.logprobs, jnp.where(loop.done, 0.0, logprob)),
            done=done,
            lengths=lengths,
        )
        return token, emitted

    def body(loop: LoopState) -> LoopState:
        token, loop = emit(loop)
        # The model is made anew from its arrays inside the trace: nothing of it leaks out.
        if in_place:
            # Tied to the token, so that the compiler does not cut before the loop after all.
            weights, token = jax.lax.optimization_barrier((state, token))
            model = nnx.merge(graphdef, weights).unrolled()
        else:
            model = nnx.merge(graphdef, state)
        logits, cache = model.extend(token[:, None], loop.cache)
        return dataclasses.replace(loop, logits=logits[:, 0], cache=cache)

    def going(loop: LoopState) -> jax.Array:
        return (loop.step < max_new_tokens - 1) & ~loop.done.all()

    loop = LoopState(
        step=jnp.zeros((), jnp.int32),
        logits=logits,
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32),
        done=jnp.zeros((batch,), bool),
        lengths=jnp.zeros((batch,), jnp.int32),
        cache=cache.unrolled(),
    )
    if max_new_tokens > 1:  # Or else there is no need to take the stack of weights apart.
        loop = jax.lax.while_loop(going, body, loop)
    # The last token is drawn outside: nobody needs the logits behind it.
    _, loop = emit(loop)
    return dataclasses.replace(loop, cache=loop.cache.stacked_as(cache))
