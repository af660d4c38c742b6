"""RecurrentGemma's prefill, decoding and training against transformers and the public JAX package.

    python -m benchmarks.recurrentgemma [--peer-python PATH] [--size 10m] [--contexts 512,2048]

Needs torch and transformers in this environment. `--peer-python`, or `TENFOLD_PEER_PYTHON`, names
the interpreter of an environment that holds the public `recurrentgemma` package. All run the same
weights, take turns, and must agree on the logits. Results go to `benchmarks/results/`.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import recurrentgemma
from benchmarks import harness
from benchmarks.peers.contender import Contender, Setting
from benchmarks.peers.recurrentgemma_process import PublicPackage
from benchmarks.peers.recurrentgemma_tenfold import Tenfold
from common.checkpoint import export_tensors
from common.errors import UserError
from recurrentgemma import config as presets
from recurrentgemma import convert

OURS, TRANSFORMERS, PUBLIC = "Tenfold", "transformers", "public JAX package"
GOALS = {TRANSFORMERS: 3.0, PUBLIC: 1.5}
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


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the report.

    Attributes:
        setting: What was measured.
        tokens: Tokens that one repeat reads or writes.
        measurements: By contender; ratios are to ours.
    """

    setting: Setting
    tokens: int
    measurements: dict[str, harness.Measurement]


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="10m", choices=sorted(SIZES))
    parser.add_argument("--tasks", default="prefill,decode,train")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--contexts", default="512,2048", help="tokens of a row")
    parser.add_argument("--batches", default="1,8", help="rows")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoding steps of a repeat")
    parser.add_argument("--most-tokens", type=int, default=4096, help="skip larger batch × context")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-python", default=os.environ.get("TENFOLD_PEER_PYTHON"))
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--name", default="recurrentgemma", help="stem of the result files")
    flags = parser.parse_args(arguments)
    try:
        path = _run(flags)
    except UserError as error:
        print(f"benchmarks.recurrentgemma: {error}", file=sys.stderr)
        return 2
    print(path.read_text())
    print(f"written to {path}")
    return 0


def _run(flags: argparse.Namespace) -> Path:
    settings = [
        Setting(task, dtype, int(batch), int(context), flags.new_tokens)
        for dtype, task, context, batch in itertools.product(
            *(x.split(",") for x in (flags.dtypes, flags.tasks, flags.contexts, flags.batches))
        )
        if int(batch) * int(context) <= flags.most_tokens
    ]
    config = SIZES[flags.size]
    with tempfile.TemporaryDirectory() as folder:
        contenders = _contenders(config, Path(folder), flags.peer_python)
        try:
            worst = _check_agreement(config, contenders)
            results = [_measure(setting, contenders, flags.repeats) for setting in settings]
            compiled = {name: contender.compile_seconds for name, contender in contenders.items()}
        finally:
            for contender in contenders.values():
                contender.close()
    notes = [
        f"model: {config.num_parameters():,} parameters, width {config.width}, "
        f"{config.num_layers} blocks, window {config.attention_window}, vocabulary "
        f"{config.vocab_size}; the same weights everywhere, logits within {worst:.0e} of ours",
        *(f"{name}: {contenders[name].describe()}" for name in contenders),
        "times are medians of interleaved repeats; a ratio is the median of the ratios of "
        "neighbouring repeats, above 1 where ours is faster",
        f"a decoding repeat is {flags.new_tokens} tokens a row behind a prompt of the context",
        *(f"{n}: {s:.0f} s compiling in all, not counted" for n, s in compiled.items() if s),
    ]
    return _write(flags, results, notes)


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


def _check_agreement(
    config: recurrentgemma.GriffinConfig, contenders: dict[str, Contender]
) -> float:
    """Returns the largest difference of fp32 logits from ours, on a row within the window."""
    length = min(64, config.attention_window)
    tokens = _tokens(Setting("prefill", "float32", 2, length, 1), config.vocab_size)
    ours = contenders[OURS].last_logits(tokens)
    worst = 0.0
    for name, contender in contenders.items():
        error = float(np.abs(contender.last_logits(tokens) - ours).max())
        if not error < 1e-3:
            raise UserError(f"{name} computes something else: logits differ by {error:.2g}")
        worst = max(worst, error)
    return worst


def _measure(setting: Setting, contenders: dict[str, Contender], repeats: int) -> Result:
    vocab = contenders[OURS].vocab_size
    tokens = _tokens(setting, vocab)
    runs = {name: c.prepare(setting, tokens) for name, c in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            elapsed = run()
            if turn:  # the first turn warms up
                seconds[name].append(elapsed)
    measurements = harness.summarise(seconds, OURS)
    done = setting.batch * (setting.new_tokens if setting.task == "decode" else setting.context)
    result = Result(setting, done, measurements)
    print(" ".join(_row(result)), file=sys.stderr, flush=True)
    return result


def _tokens(setting: Setting, vocab: int) -> np.ndarray:
    shape = (setting.batch, setting.context + 1)
    return np.random.default_rng(0).integers(2, vocab, shape).astype(np.int32)


def _row(result: Result) -> list[str]:
    setting, ours = result.setting, result.measurements[OURS]
    cells = [setting.task, setting.dtype, f"[{setting.batch}, {setting.context}]"]
    cells += [f"{1e3 * ours.median:.1f}", f"{result.tokens / ours.median:,.0f}"]
    for name, goal in GOALS.items():
        peer = result.measurements.get(name)
        if peer is None:
            cells += ["–", "–"]
            continue
        mark = "" if peer.ratio >= goal else " ✗"
        cells += [f"{result.tokens / peer.median:,.0f}", f"{peer.ratio:.2f}{mark}"]
    return cells


def _write(flags: argparse.Namespace, results: list[Result], notes: list[str]) -> Path:
    flags.output.mkdir(parents=True, exist_ok=True)
    machine = harness.describe_machine()
    path = flags.output / f"{flags.name}.md"
    lines = ["# RecurrentGemma: prefill, decoding, training", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    lines += [f"- {note}" for note in notes]
    goals = " and ".join(f"{goal} × {name}" for name, goal in GOALS.items())
    lines += [f"- goals: {goals}; ✗ marks a ratio below", ""]
    heads = ["task", "compute", "[rows, tokens]", "ours ms", "ours tokens/s"]
    for name in GOALS:
        heads += [f"{name} tokens/s", f"ours × {name}"]
    lines += [f"| {' | '.join(heads)} |", "|---|---|---|" + "---:|" * (len(heads) - 3)]
    lines += [f"| {' | '.join(_row(result))} |" for result in results]
    reading = flags.output / f"{flags.name}.reading.md"
    if reading.is_file():
        lines += ["", reading.read_text().rstrip()]
    path.write_text("\n".join(lines) + "\n")
    record = {
        "machine": machine,
        "backend": jax.default_backend(),
        "notes": notes,
        "results": [dataclasses.asdict(result) for result in results],
    }
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
