"""Finds the kernels' block sizes on this device and writes them beside the kernels.

    python -m benchmarks.tune [--kernels linear_scan,attention] [--minutes 20]

Needs a GPU or a TPU. Whatever block sizes a kernel asks `common.kernels.tuning` for are halved and
doubled one at a time, from those in use, for as long as that makes the workload faster. Results are
compared with the oracle's before they are timed. Each improvement is written at once, so that a
run can be stopped at any time.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks import harness, workloads
from common.errors import UserError
from common.kernels import tuning

Blocks = dict[str, int]
# Runs a program on operands and returns the seconds of one call.
Clock = Callable[[Callable[..., Any], Any], float]

# Less is the noise of the clock.
_FASTER = 0.98
# Numbers that count steps of a pipeline, or that name a way; not elements of an array.
_COUNTED_SINGLY = {"stages", "route"}
_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


def main(arguments: list[str] | None = None) -> int:
    """Tunes and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default=",".join(workloads.KERNELS))
    parser.add_argument("--minutes", type=float, default=20.0, help="for all kernels together")
    flags = parser.parse_args(arguments)
    try:
        _run(flags)
    except UserError as error:
        print(f"benchmarks.tune: {error}", file=sys.stderr)
        return 2
    return 0


def _run(flags: argparse.Namespace) -> None:
    names = flags.kernels.split(",")
    unknown = [name for name in names if name not in workloads.KERNELS]
    if unknown:
        raise UserError(f"no kernel '{unknown[0]}'; there are {', '.join(workloads.KERNELS)}")
    if jax.default_backend() == "cpu":
        raise UserError("block sizes are found on a GPU or a TPU; this machine has only a CPU")
    chosen = [workload for name in names for workload in workloads.of(name)]
    end = time.monotonic() + 60 * flags.minutes
    for i, workload in enumerate(chosen):
        now = time.monotonic()
        share = (end - now) / (len(chosen) - i)
        print(workload.name, flush=True)
        try:
            tune(workload, jax.default_backend(), _clock, deadline=now + share)
        except Exception as error:  # one kernel's defect is no reason to leave the others
            print(f"  skipped: {_line(error)}", flush=True)


def tune(workload: workloads.Workload, form: str, clock: Clock, *, deadline: float) -> None:
    """Finds the block sizes of one workload and writes them to the kernels' tables.

    Args:
        workload: What to run.
        form: The implementation whose blocks are tried, "gpu" or "tpu".
        clock: Times a program.
        deadline: In `time.monotonic()`, after which nothing more is tried.
    """
    program, operands = workload.prepare(workload.ours(form))
    want = _oracle(workload)

    def attempt(answers: dict[tuning.Question, Blocks]) -> tuple[float, dict]:
        with tuning.trial(answers) as trial:
            error = workloads.error(jax.jit(program)(*operands), want)
            if not error < _tolerance(operands):
                raise UserError(f"differs from the oracle by {error:.1e}")
            return clock(program, operands), dict(trial.asked)

    seconds, best = attempt({})
    print(f"  {1e6 * seconds:.0f} µs with {_shown(best)}", flush=True)
    _write(best, seconds)
    tried = {_key(best)}
    while time.monotonic() < deadline:
        candidate = next((c for c in _neighbours(best) if _key(c) not in tried), None)
        if candidate is None:
            break
        tried.add(_key(candidate))
        try:
            found, _ = attempt(candidate)
        except Exception as error:  # blocks that do not fit fail in many ways
            print(f"  – {_shown(candidate)}: {_line(error)}", flush=True)
            continue
        if found < _FASTER * seconds:
            seconds, best = found, candidate
            print(f"  {1e6 * seconds:.0f} µs with {_shown(best)}", flush=True)
            _write(best, seconds)


def _oracle(workload: workloads.Workload) -> Any:
    """Returns what the workload should give."""
    try:
        program, operands = workload.prepare(workload.ours("reference"))
        return jax.block_until_ready(jax.jit(program)(*operands))
    except Exception as error:
        print(f"  compared with plain XLA, since the oracle failed: {_line(error)}", flush=True)
        program, operands = workload.prepare(workload.ours("xla"))
        return jax.jit(program)(*operands)


def _tolerance(operands: Any) -> float:
    names = {x.dtype.name for x in jax.tree.leaves(operands)}
    return max(_TOLERANCE.get(name, 0.0) for name in names)


def _neighbours(blocks: dict[tuning.Question, Blocks]) -> Iterator[dict[tuning.Question, Blocks]]:
    """Yields `blocks` with one number changed."""
    for question, answer in blocks.items():
        for name, value in answer.items():
            if name in _COUNTED_SINGLY:
                near = [value + 1, value - 1]
            else:
                near = [2 * value, value // 2]
            for other in near:
                if other >= 1:
                    yield {**blocks, question: {**answer, name: other}}


def _key(blocks: dict[tuning.Question, Blocks]) -> tuple:
    return tuple((question, tuple(answer.items())) for question, answer in blocks.items())


def _shown(blocks: dict[tuning.Question, Blocks]) -> str:
    return ", ".join(f"{q.kernel} {json.dumps(answer)}" for q, answer in blocks.items())


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _write(blocks: dict[tuning.Question, Blocks], seconds: float) -> None:
    """Enters block sizes into the tables, in the place of the same device, dtype and shape."""
    device = tuning.device_name(jax.devices()[0])
    for question, answer in blocks.items():
        head = {
            "device": device,
            "kernel": question.kernel,
            "dtype": question.dtype,
            "shape": dict(question.shape),
        }
        others = [
            entry
            for entry in tuning.table(question.folder)
            if any(entry[name] != value for name, value in head.items())
        ]
        entry = {**head, "blocks": answer, "microseconds": round(1e6 * seconds, 1)}
        lines = ",\n".join(json.dumps(one) for one in [*others, entry])
        Path(question.folder, "tuning.json").write_text(f"[\n{lines}\n]\n")
    tuning.table.cache_clear()


def _clock(program: Callable[..., Any], operands: Any) -> float:
    """Times enough calls to fill some tens of milliseconds."""
    few, _ = harness.device_seconds(program, operands, calls=3, repeats=2)
    calls = max(3, min(300, round(0.03 / min(few))))
    many, _ = harness.device_seconds(program, operands, calls=calls, repeats=3)
    return min(many)


if __name__ == "__main__":
    sys.exit(main())
