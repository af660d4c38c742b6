"""Our side of the RecurrentGemma benchmark: the programs that generation and the trainer run."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.peers.contender import Run, Setting
from benchmarks.peers.trainer_step import trainer_step
from common.generate.decode import decode, prefill
from common.generate.sampling import Sampling
from common.train.language import NextToken
from recurrentgemma import Griffin, GriffinConfig


class Tenfold:
    """See `Contender`.

    Args:
        config: Shape of the model.
        params: Its parameters.
        loss_chunk: Positions of a row whose logits exist at a time in training; None for all.
    """

    def __init__(
        self, config: GriffinConfig, params: dict[str, Any], *, loss_chunk: int | None = None
    ):
        self._config, self._params, self._loss_chunk = config, params, loss_chunk
        self.vocab_size = config.vocab_size
        self.compile_seconds = 0.0

    def describe(self) -> str:
        return f"jax {jax.__version__}; generation's prefill and decode loop, the trainer's step"

    def last_logits(self, tokens: np.ndarray) -> np.ndarray:
        graphdef, state = self._model("float32")
        tokens = tokens[:, :-1]
        logits, _ = prefill(graphdef, state, tokens, np.ones(tokens.shape, bool), capacity=128)
        return np.asarray(logits)

    def prepare(self, setting: Setting, tokens: np.ndarray) -> Run:
        start = time.perf_counter()
        run = {"prefill": self._prefill, "decode": self._decode, "train": self._train}[setting.task]
        timed = run(setting, tokens)
        timed()
        self.compile_seconds += time.perf_counter() - start
        return timed

    def close(self) -> None:
        jax.clear_caches()

    def _model(self, dtype: str) -> tuple[nnx.GraphDef, Any]:
        config = dataclasses.replace(self._config, dtype=dtype)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Griffin(config, rngs=nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, jax.tree.map(lambda x: x.astype(dtype), self._params))
        return graphdef, state

    def _prefill(self, setting: Setting, tokens: np.ndarray) -> Run:
        graphdef, state = self._model(setting.dtype)
        tokens = tokens[:, :-1]
        capacity = setting.context + setting.new_tokens

        def run() -> float:
            start = time.perf_counter()
            valid = np.ones(tokens.shape, bool)
            jax.block_until_ready(prefill(graphdef, state, tokens, valid, capacity=capacity))
            return time.perf_counter() - start

        return run

    def _decode(self, setting: Setting, tokens: np.ndarray) -> Run:
        graphdef, state = self._model(setting.dtype)
        tokens = tokens[:, :-1]
        capacity = setting.context + setting.new_tokens
        valid = np.ones(tokens.shape, bool)
        filled = prefill(graphdef, state, tokens, valid, capacity=capacity)
        stop, key = jnp.array([-1]), jax.random.key(0)

        def run() -> float:
            # The loop takes logits and cache over.
            logits, cache = jax.block_until_ready(jax.tree.map(jnp.copy, filled))
            start = time.perf_counter()
            loop = decode(
                graphdef,
                state,
                logits,
                cache,
                key,
                stop,
                sampling=Sampling(),
                max_new_tokens=setting.new_tokens,
            )
            jax.block_until_ready(loop)
            return time.perf_counter() - start

        return run

    def _train(self, setting: Setting, tokens: np.ndarray) -> Run:
        config = dataclasses.replace(self._config, dtype=setting.dtype)
        task = NextToken(lambda rngs: Griffin(config, rngs=rngs), loss_chunk=self._loss_chunk)
        rows = tokens[:, :-1].shape
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.broadcast_to(np.arange(rows[1], dtype=np.int32), rows),
            "segment_ids": np.ones(rows, np.int32),
            "weights": np.ones(rows, np.float32),
        }
        return trainer_step(task, self._params, batch)
