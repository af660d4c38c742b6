"""How fast a language model reads and writes as the context grows, several models in turns."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from common.models import DecodeCache, LanguageModel

K = TypeVar("K", bound=Hashable)


def median_seconds(
    runs: Mapping[K, Callable[[], Any]], *, repeats: int = 5, warmup: int = 1
) -> dict[K, float]:
    """Times functions that return JAX arrays, in turns, so that a busy machine slows all alike.

    Every turn has an order of its own, so that none always runs on the caches its neighbour left.

    Args:
      runs: what to time, by name; the warm-up compiles what is not compiled yet.
      repeats: timed turns.
      warmup: turns before them that are not timed.

    Returns:
      The median over the repeats, in seconds.
    """
    seconds: dict[K, list[float]] = {name: [] for name in runs}
    order = list(runs.items())
    shuffle = random.Random(0).shuffle
    for turn in range(warmup + repeats):
        shuffle(order)
        for name, run in order:
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Reader:
    """Prefill of `[batch_size, length]` tokens into a cache made for them; compiled per length."""

    def __init__(self, model: LanguageModel, batch_size: int = 1):
        graphdef, self._state = nnx.split(model)
        self._vocab_size, self._batch_size = model.vocab_size, batch_size

        def prefill(state: nnx.State, tokens: jax.Array) -> tuple[jax.Array, DecodeCache]:
            model = nnx.merge(graphdef, state)
            return model.prefill(tokens, max_length=tokens.shape[1], last_only=True)

        self._prefill = jax.jit(prefill)

    def at(self, length: int) -> Callable[[], Any]:
        """Returns a function that reads one prompt of `length` tokens, for `median_seconds`."""
        row = jnp.arange(length, dtype=jnp.int32) % self._vocab_size
        tokens = jnp.broadcast_to(row, (self._batch_size, length))
        return lambda: self._prefill(self._state, tokens)


class Writer:
    """Greedy decoding of `steps` tokens in one compiled loop whose cache is donated."""

    def __init__(self, model: LanguageModel, batch_size: int = 1, steps: int = 16):
        graphdef, self._state = nnx.split(model)
        self._model, self._batch_size, self.steps = model, batch_size, steps

        def decode(
            state: nnx.State, tokens: jax.Array, cache: DecodeCache
        ) -> tuple[jax.Array, DecodeCache]:
            model = nnx.merge(graphdef, state)

            def step(_: jax.Array, carry: tuple[jax.Array, DecodeCache]) -> Any:
                logits, cache = model.extend(*carry)
                return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

            return jax.lax.fori_loop(0, steps, step, (tokens, cache))

        self._decode = jax.jit(decode, donate_argnums=(1, 2))

    def at(self, context: int) -> Callable[[], Any]:
        """Returns a function that writes the last tokens of a document of `context` tokens.

        The cache has room for `context` tokens, so a fixed-size state is compiled once. What it
        holds does not matter to the time: it starts empty and is marked as full.
        """
        if context < self.steps:
            raise ValueError(f"{self.steps} tokens do not fit a context of {context}")
        cache = self._model.init_cache(self._batch_size, context)

        def run() -> jax.Array:
            nonlocal cache
            count = jnp.full((self._batch_size,), context - self.steps, jnp.int32)
            cache = dataclasses.replace(cache, cached=count, first=jnp.zeros_like(count))
            first = jnp.zeros((self._batch_size, 1), jnp.int32)
            tokens, cache = self._decode(self._state, first, cache)
            return tokens

        return run


def cache_bytes(model: LanguageModel, context: int, batch_size: int = 1) -> int:
    """Bytes that decoding a document of `context` tokens keeps, its two counters left out.

    Nothing is allocated: an abstract model (`nnx.eval_shape`) will do.
    """
    cache = jax.eval_shape(lambda: model.init_cache(batch_size, context))
    leaves = jax.tree.leaves((cache.units, cache.rest))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
