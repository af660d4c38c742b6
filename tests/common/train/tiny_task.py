"""A task small enough for tests: an embedding and a scanned stack of MLPs that predict tokens.

Also a program: `python tiny_task.py WORKDIR` trains it slowly, for tests that kill the process.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.sharding import MeshConfig, shard
from common.train import Loss, OptimizerConfig, Task, TrainConfig, Trainer

VOCAB, WIDTH, DEPTH, LENGTH = 16, 8, 3, 6


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        # Compiling JAX's random numbers would take most of these tests' time.
        waves = jnp.sin(jnp.arange(2.0 * WIDTH * WIDTH) ** 2) / 2
        self.scale = nnx.Param(jnp.ones(WIDTH), axes=("embed",))
        self.up = nnx.Param(waves.reshape(WIDTH, -1), axes=("embed", "mlp"))
        self.down = nnx.Param(waves.reshape(-1, WIDTH), axes=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x * self.scale[...]
        y = shard(jax.nn.silu(y @ self.up[...]), "batch", "seq", "mlp")
        return shard(x + y @ self.down[...], "batch", "seq", "embed")


class Model(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        embed = jax.random.uniform(rngs.params(), (VOCAB, WIDTH), minval=-1, maxval=1)
        self.embed = nnx.Param(embed, axes=("vocab", "embed"))
        self.blocks = nnx.vmap(lambda r: Block(rngs=r))(rngs.split(DEPTH))
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        self.calls[...] += 1
        x = shard(self.embed[...][tokens], "batch", "seq", "embed")
        x = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)[0]
        return x @ self.embed[...].T


class TinyTask(Task):
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return Model(rngs=rngs)

    def loss(self, model: nnx.Module, batch: Any, key: jax.Array) -> Loss:
        logits = model(batch["tokens"])
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)
        weights = batch["weights"]
        right = (logits.argmax(-1) == batch["targets"]) * weights
        return Loss((nll[..., 0] * weights).sum(), weights.sum(), {"accuracy": right.sum()})


class NoisyTask(TinyTask):
    """Uses the step's random key, so that a resumed run must replay it."""

    def loss(self, model: nnx.Module, batch: Any, key: jax.Array) -> Loss:
        keep = jax.random.bernoulli(key, 0.8, batch["weights"].shape)
        return super().loss(model, {**batch, "weights": batch["weights"] * keep}, key)


def batch_at(index: int, rows: int = 8) -> dict[str, np.ndarray]:
    """A learnable sequence modulo the vocabulary, with a few positions of weight 0."""
    rng = np.random.default_rng(index)
    start = rng.integers(0, VOCAB, (rows, 1))
    tokens = (start + 3 * np.arange(LENGTH + 1)) % VOCAB
    weights = (rng.random((rows, LENGTH)) < 0.7).astype(np.float32)
    tokens = tokens.astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


class Batches:
    """Endless batches that remember their position; some may be poisoned."""

    def __init__(self, rows: int = 8, poison: tuple[int, ...] = ()):
        self.index = 0
        self.rows = rows
        self.poison = poison

    def __next__(self) -> dict[str, np.ndarray]:
        batch = batch_at(self.index, self.rows)
        if self.index in self.poison:
            batch["weights"][0] = np.nan
        self.index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"index": self.index}

    def set_state(self, state: dict[str, int]) -> None:
        self.index = state["index"]


def heldout() -> list[dict[str, np.ndarray]]:
    return [batch_at(1000), batch_at(1001)]


def tiny_config(**changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "steps": 12,
        "log_every": 1,
        "checkpoint_every": 3,
        "eval_every": 4,
        "optimizer": OptimizerConfig(learning_rate=0.02, warmup_steps=2),
        "mesh": MeshConfig(),
    }
    return TrainConfig(**{**fields, **changes})


def killed_config() -> TrainConfig:
    return tiny_config(steps=30, checkpoint_every=4, keep_checkpoints=2)


class SlowBatches(Batches):
    def __next__(self) -> dict[str, np.ndarray]:
        time.sleep(0.02)
        return super().__next__()


def main() -> None:
    sys.modules["tensorboardX"] = None  # It imports torch where that is installed: seconds.
    eval_sets = {"heldout": heldout}
    Trainer(NoisyTask(), killed_config(), Path(sys.argv[1]), SlowBatches(), eval_sets).run()


if __name__ == "__main__":
    main()
