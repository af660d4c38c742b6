"""Training RecurrentGemma on meshes, and through kills."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import recurrentgemma
from common.sharding import (
    DEFAULT_RULES,
    MeshConfig,
    batch_sharding,
    make_mesh,
    state_shardings,
    use_mesh,
)
from recurrentgemma.config import smoke
from recurrentgemma.model import Griffin, GriffinConfig
from recurrentgemma.objective import GriffinTask, forward_flops

CONFIG = GriffinConfig(
    vocab_size=64,
    width=32,
    mlp_width=64,
    num_heads=4,
    lru_width=32,
    num_layers=4,
    attention_window=8,
)


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (8, 25))
    segments = np.repeat([[1, 2, 3]], [9, 7, 8], axis=1).repeat(8, 0)
    positions = np.concatenate([np.arange(9), np.arange(7), np.arange(8)])[None].repeat(8, 0)
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "positions": positions.astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "weights": (rng.random((8, 24)) > 0.2).astype(np.float32),
    }


def loss_and_gradients(sizes: MeshConfig, devices: int, dtype: str = "float32", loss_chunk=8):
    """Loss and gradients of one model and batch, computed on a mesh."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    task = GriffinTask(config, loss_chunk=loss_chunk)
    graphdef, state = nnx.split(Griffin(config, rngs=nnx.Rngs(0)))
    mesh = make_mesh(sizes, jax.devices()[:devices])
    params = jax.device_put(nnx.to_pure_dict(state), state_shardings(state, mesh, DEFAULT_RULES))

    def loss(params, batch):
        nnx.replace_by_pure_dict(state, params)
        return task.loss(nnx.merge(graphdef, state), batch, jax.random.key(0)).total

    with use_mesh(mesh), jax.default_matmul_precision("highest"):
        placed = jax.device_put(batch(), batch_sharding(mesh))
        value, grads = jax.jit(jax.value_and_grad(loss))(params, placed)
    if devices > 1:
        kernel = params["units"]["blocks"][0]["mixer"]["linear_x"]["kernel"]
        shards = {shard.data.shape for shard in kernel.addressable_shards}
        assert shards == {(1, 32 // mesh.shape["fsdp"], 32 // mesh.shape["tensor"])}
    return jax.device_get((value, grads))


def test_eight_devices_equal_one():
    value, grads = loss_and_gradients(MeshConfig(), 1)
    sharded_value, sharded_grads = loss_and_gradients(MeshConfig(data=2, fsdp=2, tensor=2), 8)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)

    def same(a, b):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())

    jax.tree.map(same, grads, sharded_grads)


@pytest.mark.parametrize("loss_chunk", [None, 8])
def test_bf16_gradients_stay_near_fp32(loss_chunk):
    """Every product's gradient runs in the compute dtype, on this backend too."""
    value, grads = loss_and_gradients(MeshConfig(), 1)
    half_value, half_grads = loss_and_gradients(MeshConfig(), 1, "bfloat16", loss_chunk)
    np.testing.assert_allclose(half_value, value, rtol=5e-3)
    flat, half = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (grads, half_grads)
    )
    assert np.linalg.norm(half - flat) < 0.05 * np.linalg.norm(flat)


def test_what_decays():
    """Only the matrices of linear layers: no gate, no convolution, no embedding, no bias."""
    task = GriffinTask(CONFIG)
    state = nnx.state(nnx.eval_shape(lambda: Griffin(CONFIG, rngs=nnx.Rngs(0))))
    decays = {p[-2:] for p, v in nnx.to_flat_state(state) if task.decays(p, v)}
    names = ("linear_x", "linear_y", "linear_out", "q", "k", "v", "o", "down")
    assert decays == {(name, "kernel") for name in names} | {("mlp", "up")}


def test_flops_match_the_compiler():
    """Counted by hand against XLA's count of the forward pass of one unrolled unit."""
    config = GriffinConfig(
        vocab_size=512,
        width=128,
        mlp_width=384,
        num_heads=4,
        lru_width=128,
        num_layers=2,
        pattern=("recurrent", "recurrent", "attention"),
    )
    model = Griffin(config, rngs=nnx.Rngs(0))
    tokens = jnp.zeros((2, 64), jnp.int32)
    compiled = jax.jit(lambda m, t: m(t)).lower(model, tokens).compile()
    counted = forward_flops(config, 2, 64)
    assert counted == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


ARGUMENTS = [
    "--config=smoke",
    "--set=model.width=16",
    "--set=model.mlp_width=32",
    "--set=model.lru_width=16",
    "--set=model.vocab_size=400",
    "--set=model.num_layers=3",
    "--set=data.corpus.max_documents=30",
    "--set=data.sequence_length=32",
    "--set=train.steps=400",
    "--set=train.checkpoint_every=7",
    "--set=train.eval_every=0",
    "--set=train.eval_batches=2",
]


def start(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "recurrentgemma.train", f"--workdir={folder}", *ARGUMENTS]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def steps_written(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_kills_leave_no_trace(tmp_path, kills):
    """SIGKILL at random steps, then SIGTERM once: the trace is that of an undisturbed run."""
    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=300) == 0, whole.stdout.read()
    moments = sorted(random.Random(0).sample(range(20, 360), kills + 1))
    folder = tmp_path / "killed"
    for number, moment in enumerate(moments):
        process = start(folder)
        while steps_written(folder) < moment:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.002)
        last = number == len(moments) - 1
        process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
        code = process.wait(timeout=120)
        if last:
            said = process.stdout.read()
            assert code == 0, said
            assert "--workdir=" in said.split("resume by:")[1]
            saved = max(int(p.name.split("_")[1]) for p in (folder / "checkpoints").glob("step_*"))
            assert saved == steps_written(folder)
        else:
            assert code == -signal.SIGKILL
    final = start(folder)
    assert final.wait(timeout=300) == 0, final.stdout.read()
    assert losses(folder) == losses(tmp_path / "whole")
    tokens = np.arange(10)[None]
    one, other = (recurrentgemma.load(tmp_path / name) for name in ("whole", "killed"))
    np.testing.assert_array_equal(one(tokens), other(tokens))


def test_smoke_is_small():
    assert smoke().model.num_parameters() < 100_000
