"""Our side of the T5Gemma benchmark: what `generate` runs, and the trainer's step."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.peers.contender import Run, Setting
from benchmarks.peers.trainer_step import trainer_step
from common.generate import generate
from common.generate.decode import begin, decode, unroll
from common.generate.sampling import Sampling
from t5gemma.config import T5GemmaConfig
from t5gemma.model import T5Gemma
from t5gemma.objective import TargetTokens


class Tenfold:
    """See `Contender`.

    Args:
        config: Shape of the model.
        params: Its parameters.
        beams: Hypotheses of beam search.
    """

    def __init__(self, config: T5GemmaConfig, params: dict[str, Any], *, beams: int):
        self._config, self._params, self._beams = config, params, beams
        self.vocab_size = config.decoder.vocab_size
        self.compile_seconds = 0.0

    def describe(self) -> str:
        return f"jax {jax.__version__}; `generate`, its parts, and the trainer's step"

    def last_logits(self, tokens: np.ndarray) -> np.ndarray:
        model = self._model("float32")
        half = tokens.shape[1] // 2
        logits = jax.jit(lambda model, *sides: model(*sides))
        return np.asarray(logits(model, tokens[:, :half], tokens[:, half:-1])[:, -1])

    def prepare(self, setting: Setting, tokens: np.ndarray) -> Run:
        start = time.perf_counter()
        make = {
            "encode": self._encode,
            "first token": self._generate,
            "decode": self._decode,
            "generate": self._generate,
            "beam search": self._generate,
            "train": self._train,
        }[setting.task]
        run = make(setting, tokens)
        run()
        self.compile_seconds += time.perf_counter() - start
        return run

    def close(self) -> None:
        jax.clear_caches()

    def _model(self, dtype: str) -> T5Gemma:
        config = self._config.with_stacks(dtype=dtype)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: T5Gemma(config, rngs=nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, jax.tree.map(lambda x: x.astype(dtype), self._params))
        return nnx.merge(graphdef, state)

    def _encode(self, setting: Setting, tokens: np.ndarray) -> Run:
        graphdef, state = nnx.split(self._model(setting.dtype))
        encode = jax.jit(lambda state, tokens: nnx.merge(graphdef, state).encode(tokens))
        return _timed(lambda: encode(state, tokens[:, :-1]))

    def _decode(self, setting: Setting, tokens: np.ndarray) -> Run:
        model = self._model(setting.dtype)
        read = tokens[:, :-1]
        capacity = setting.new_tokens + 1
        begun = begin(*nnx.split(model), read, np.ones(read.shape, bool), capacity=capacity)
        graphdef, state = nnx.split(model.decoder)
        stop, key = jnp.array([-1]), jax.random.key(0)

        def run() -> float:
            # The loop takes logits and cache over.
            logits, cache = jax.tree.map(jnp.copy, begun)
            logits, cache = jax.block_until_ready((logits, unroll(cache)))
            loop = functools.partial(decode, sampling=Sampling(), max_new_tokens=setting.new_tokens)
            return _timed(lambda: loop(graphdef, state, logits, cache, key, stop))()

        return run

    def _generate(self, setting: Setting, tokens: np.ndarray) -> Run:
        model, prompts = self._model(setting.dtype), tokens[:, :-1].tolist()
        new = 1 if setting.task == "first token" else setting.new_tokens
        beams = self._beams if setting.task == "beam search" else 1
        return _timed(lambda: generate(model, prompts, new, stop=[], num_beams=beams))

    def _train(self, setting: Setting, tokens: np.ndarray) -> Run:
        config = self._config.with_stacks(dtype=setting.dtype)
        task = TargetTokens(lambda rngs: T5Gemma(config, rngs=rngs))
        half = tokens.shape[1] // 2
        read, written, targets = tokens[:, :half], tokens[:, half:-1], tokens[:, half + 1 :]
        batch = {"targets": targets, "weights": np.ones(targets.shape, np.float32)}
        for side, part in (("encoder", read), ("decoder", written)):
            counted = np.arange(part.shape[1], dtype=np.int32)
            batch[f"{side}_tokens"] = part
            batch[f"{side}_positions"] = np.broadcast_to(counted, part.shape)
            batch[f"{side}_segments"] = np.ones(part.shape, np.int32)
        return trainer_step(task, self._params, batch)


def _timed(run: Callable[[], Any]) -> Run:
    def timed() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    return timed
