"""Serves the public `recurrentgemma` package's model to the benchmark, from its own environment.

Run by `recurrentgemma_process.py` as `python -P recurrentgemma_model.py weights.npz SHAPE`; reads
one JSON command a line, answers with one; imports nothing of this repository.
"""

import json
import os
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recurrentgemma import jax as griffin

# The native scan is unrolled 128 times, which takes XLA's CPU compiler minutes and runs slower;
# Pallas needs a TPU. That leaves this one.
SCAN = griffin.ScanType.ASSOCIATIVE_NATIVE
BLOCKS = {
    "recurrent": griffin.TemporalBlockType.RECURRENT,
    "attention": griffin.TemporalBlockType.ATTENTION,
}
VOCABULARY = types.SimpleNamespace(pad_id=lambda: 0, eos_id=lambda: 1)


def main() -> None:
    # What the libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    weights, shape = sys.argv[1], json.loads(sys.argv[2])
    shape["block_types"] = tuple(BLOCKS[name] for name in shape["block_types"])
    config = griffin.GriffinConfig(**shape, scan_type=SCAN)
    with np.load(weights) as loaded:
        params = nest({name: jnp.asarray(loaded[name]) for name in loaded.files})
    run = None
    for line in sys.stdin:
        question = json.loads(line)
        command = question.pop("command")
        if command == "describe":
            text = f"1.0.1 with jax {jax.__version__}, {SCAN.name.lower()} scan, its Sampler's"
            answer = {"description": text + " prefill and loop, no rematerialisation"}
        elif command == "logits":
            np.save("logits.npy", last_logits(config, params, np.array(question["tokens"])))
            answer = {"path": os.path.abspath("logits.npy")}
        elif command == "prepare":
            start = time.perf_counter()
            tokens = np.load(question["path"])
            make = train if question["task"] == "train" else generate
            run = make(config, params, tokens, question)
            run()
            answer = {"seconds": time.perf_counter() - start}
        else:
            answer = {"seconds": run()}
        print(json.dumps(answer), file=answers, flush=True)


def nest(flat: dict[str, jax.Array]) -> dict:
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        inner = tree
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return tree


def last_logits(config, params, tokens: np.ndarray) -> np.ndarray:
    model = griffin.Griffin(config, gradient_checkpointing=False)
    rows = jnp.asarray(tokens[:, :-1], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    logits, _ = jax.jit(model.apply)({"params": params}, rows, positions)
    return np.asarray(logits[:, -1], np.float32)


def generate(config, params, tokens: np.ndarray, setting: dict):
    """The Sampler's two compiled functions; the second one alone is timed for decoding."""
    dtype = jnp.dtype(setting["dtype"])
    model = griffin.Griffin(config, gradient_checkpointing=False, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    sampler = griffin.Sampler(model, VOCABULARY, params)
    batch, length = tokens[:, :-1].shape
    decoding = setting["task"] == "decode"

    def run() -> float:
        # Both functions take their arguments over.
        rows = jnp.array(tokens[:, :-1], jnp.int32)
        lengths = jnp.full((batch,), length, jnp.int32)
        jax.block_until_ready((rows, lengths))
        start = time.perf_counter()
        state = sampler.prompt_processing_fn(
            params, rows, None, lengths, setting["new_tokens"], False, False
        )
        jax.block_until_ready(state)
        if decoding:
            start = time.perf_counter()
            jax.block_until_ready(sampler.sample_fn(params, state, False))
        return time.perf_counter() - start

    return run


def train(config, params, tokens: np.ndarray, setting: dict):
    dtype = jnp.dtype(setting["dtype"])
    model = griffin.Griffin(config, gradient_checkpointing=False, dtype=dtype)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.95, weight_decay=0.1)
    )
    rows, targets = (jnp.asarray(part, jnp.int32) for part in (tokens[:, :-1], tokens[:, 1:]))
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)

    def loss_of(params):
        logits, _ = model.apply({"params": params}, rows, positions, None, True, False)
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def start_state(params):
        return jax.tree.map(jnp.copy, params), optimizer.init(params)

    def update(state):
        params, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    step = jax.jit(update, donate_argnums=0)
    state = start_state(params)

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state))
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    main()
