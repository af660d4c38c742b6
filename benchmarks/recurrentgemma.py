"""RecurrentGemma's prefill, decoding and training against transformers and the public JAX package.

    python -m benchmarks.recurrentgemma [--peer-python PATH] [--size 10m] [--contexts 512,2048]

Needs torch and transformers in this environment. `--peer-python`, or `TENFOLD_PEER_PYTHON`, names
the interpreter of an environment that holds the public `recurrentgemma` package. All run the same
weights, take turns, and must agree on the logits. Results go to `benchmarks/results/`.

"prefill" reads the context into a cache, "decode" writes behind it, "train" makes one step.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

import recurrentgemma
from benchmarks import harness, side_by_side
from benchmarks.peers.contender import Contender
from benchmarks.peers.recurrentgemma_process import PublicPackage
from benchmarks.peers.recurrentgemma_tenfold import Tenfold
from benchmarks.side_by_side import OURS
from common.checkpoint import export_tensors
from common.errors import UserError
from recurrentgemma import config as presets
from recurrentgemma import convert

TRANSFORMERS, PUBLIC = "transformers", "public JAX package"
TASKS = ("prefill", "decode", "train")
BENCHMARK = side_by_side.Benchmark(
    "recurrentgemma",
    "RecurrentGemma: prefill, decoding, training",
    writes=("decode",),
    goals={TRANSFORMERS: dict.fromkeys(TASKS, 3.0), PUBLIC: dict.fromkeys(TASKS, 1.5)},
)
SIZES = {
    "tiny": presets.smoke().model,
    "10m": presets.cpu().model,
    "100m": dataclasses.replace(
        presets.cpu().model,
        vocab_size=8192,
        width=768,
        mlp_width=2304,
        lru_width=768,
        num_heads=6,
        num_layers=14,
        attention_window=1024,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = side_by_side.parser(
        __doc__.splitlines()[0],
        sizes=SIZES,
        size="10m",
        tasks=",".join(TASKS),
        contexts="512,2048",
        name=BENCHMARK.name,
    )
    parser.add_argument("--peer-python", default=os.environ.get("TENFOLD_PEER_PYTHON"))
    flags = parser.parse_args(arguments)
    harness.run_as_launchers_do()
    return side_by_side.report_errors(BENCHMARK, lambda: _run(flags))


def _run(flags: argparse.Namespace) -> Path:
    config = SIZES[flags.size]
    with tempfile.TemporaryDirectory() as folder:
        return side_by_side.measure(
            BENCHMARK,
            flags,
            _contenders(config, Path(folder), flags.peer_python),
            agree_on=min(64, config.attention_window),  # Its two readings agree within it.
            model=f"{config.num_parameters():,} parameters, width {config.width}, "
            f"{config.num_layers} blocks, window {config.attention_window}, vocabulary "
            f"{config.vocab_size}",
            notes=[
                f"a decoding repeat is {flags.new_tokens} tokens a row behind a prompt of the "
                "context"
            ],
        )


def _contenders(
    config: recurrentgemma.GriffinConfig, folder: Path, peer_python: str | None
) -> dict[str, Contender]:
    """Gives everyone the same weights, each in its own format."""
    model = recurrentgemma.Griffin(config, rngs=nnx.Rngs(0))
    contenders: dict[str, Contender] = {OURS: Tenfold(config, nnx.to_pure_dict(nnx.state(model)))}
    if importlib.util.find_spec("transformers") is None:
        raise UserError("the benchmark needs torch and transformers: run it by `make bench`")
    # Loads torch, so it waits until here.
    from benchmarks.peers.recurrentgemma_transformers import Transformers

    recurrentgemma.save(model, folder / "huggingface", format="huggingface")
    contenders[TRANSFORMERS] = Transformers(folder / "huggingface")
    if peer_python:
        tensors = export_tensors(nnx.to_pure_dict(nnx.state(model)), convert.release_rows(config))
        weights = folder / "release.npz"
        np.savez(weights, **{name: tensor() for name, tensor in tensors.items()})
        contenders[PUBLIC] = PublicPackage(peer_python, config, weights)
    return contenders


if __name__ == "__main__":
    sys.exit(main())
