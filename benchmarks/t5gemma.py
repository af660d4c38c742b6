"""T5Gemma's encoding, generation and training against the transformers library.

    python -m benchmarks.t5gemma [--size 10m] [--contexts 128,512] [--batches 1,8]

Needs torch and transformers in this environment. Both run the same weights, take turns, and must
agree on the logits. Results go to `benchmarks/results/`.

"encode" gives the encoder's states of a prompt. "first token", "generate" and "beam search" call
`generate` on prompts of the context, for one token and for `--new-tokens`; "decode" is the loop
behind the first token alone. "train" reads half of the context and writes the other half.
"""

import argparse
import dataclasses
import importlib.util
import sys
import tempfile
from pathlib import Path

from flax import nnx

import t5gemma
from benchmarks import harness, side_by_side
from benchmarks.peers.contender import Contender
from benchmarks.peers.t5gemma_tenfold import Tenfold
from benchmarks.side_by_side import OURS
from common.errors import UserError
from t5gemma import presets
from t5gemma.config import T5GemmaConfig, gemma_stack, smoke_model

TRANSFORMERS = "transformers"
GOALS = {
    "encode": 1.0,
    "first token": 2.0,
    "generate": 2.0,
    "decode": 2.0,
    "beam search": 2.0,
    "train": 1.0,
}
BENCHMARK = side_by_side.Benchmark(
    "t5gemma",
    "T5Gemma: encoding, generation, training",
    writes=("generate", "decode", "beam search"),
    goals={TRANSFORMERS: GOALS},
)
_SMALL = dataclasses.replace(gemma_stack("s"), vocab_size=8192, dtype="float32", remat="none")
SIZES = {
    "tiny": smoke_model(),
    "10m": presets.cpu().model,
    # The public S-S with a smaller vocabulary.
    "s-s": T5GemmaConfig(_SMALL, _SMALL),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = side_by_side.parser(
        __doc__.splitlines()[0],
        sizes=SIZES,
        size="10m",
        tasks=",".join(GOALS),
        contexts="128,512",
        name=BENCHMARK.name,
    )
    parser.add_argument("--beams", type=int, default=4, help="hypotheses of beam search")
    flags = parser.parse_args(arguments)
    harness.run_as_launchers_do()
    return side_by_side.report_errors(BENCHMARK, lambda: _run(flags))


def _run(flags: argparse.Namespace) -> Path:
    # As the library reads the window, so that all see the same keys.
    config = dataclasses.replace(SIZES[flags.size], encoder_window="transformers")
    encoder, decoder = config.encoder, config.decoder
    with tempfile.TemporaryDirectory() as folder:
        return side_by_side.measure(
            BENCHMARK,
            flags,
            _contenders(config, Path(folder), flags.beams),
            agree_on=min(128, encoder.max_length or 128),
            model=f"{config.num_parameters():,} parameters, {encoder.num_layers} blocks of width "
            f"{encoder.width} in the encoder, {decoder.num_layers} of {decoder.width} in the "
            f"decoder, window {encoder.window}, vocabulary {decoder.vocab_size}",
            notes=[
                f"texts are {flags.new_tokens} tokens a row, beam search has {flags.beams} beams",
                "training reads half of a row's tokens and writes the other half",
            ],
        )


def _contenders(config: T5GemmaConfig, folder: Path, beams: int) -> dict[str, Contender]:
    """Gives both the same weights, each in its own format."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("the benchmark needs torch and transformers: run it by `make bench`")
    # Loads torch, so it waits until here.
    from benchmarks.peers.t5gemma_transformers import Transformers

    model = t5gemma.T5Gemma(config, rngs=nnx.Rngs(0))
    t5gemma.save(model, folder / "huggingface", format="huggingface")
    return {
        OURS: Tenfold(config, nnx.to_pure_dict(nnx.state(model)), beams=beams),
        TRANSFORMERS: Transformers(folder / "huggingface", beams=beams),
    }


if __name__ == "__main__":
    sys.exit(main())
