"""A model's benchmark: contenders with the same weights take turns at every task.

What the contenders are, and what each task means, is the benchmark's own; here are the flags that
all of them have, the turns, and the table in `results/`.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks import harness
from benchmarks.peers.contender import Contender, Setting
from common.errors import UserError

OURS = "Tenfold"
# What a difference of fp32 logits may be.
_AGREEMENT = 1e-3


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


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What tells one model's benchmark from another's.

    Attributes:
        name: Of the module, and the default stem of the result files.
        title: Of the table.
        writes: Tasks whose tokens are those written; of others they are those read.
        goals: By contender and task, the ratio that is wanted.
    """

    name: str
    title: str
    writes: Collection[str]
    goals: Mapping[str, Mapping[str, float]]


def parser(
    description: str, *, sizes: Collection[str], size: str, tasks: str, contexts: str, name: str
) -> argparse.ArgumentParser:
    """Returns the flags of every such benchmark; the arguments are their defaults."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--size", default=size, choices=sorted(sizes))
    flags.add_argument("--tasks", default=tasks)
    flags.add_argument("--dtypes", default="float32,bfloat16")
    flags.add_argument("--contexts", default=contexts, help="tokens of a row")
    flags.add_argument("--batches", default="1,8", help="rows")
    flags.add_argument("--new-tokens", type=int, default=32, help="tokens that a repeat writes")
    flags.add_argument("--most-tokens", type=int, default=4096, help="skip larger batch × context")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--output", type=Path, default=harness.RESULTS)
    flags.add_argument("--name", default=name, help="stem of the result files")
    return flags


def report_errors(benchmark: Benchmark, run: Callable[[], Path]) -> int:
    """Runs a benchmark, prints its table, and returns the exit code."""
    try:
        path = run()
    except UserError as error:
        print(f"benchmarks.{benchmark.name}: {error}", file=sys.stderr)
        return 2
    print(path.read_text())
    print(f"written to {path}")
    return 0


def measure(
    benchmark: Benchmark,
    flags: argparse.Namespace,
    contenders: Mapping[str, Contender],
    *,
    agree_on: int,
    model: str,
    notes: Sequence[str],
) -> Path:
    """Measures all settings that the flags ask for, writes the table, returns its path.

    Args:
        benchmark: Which one.
        flags: As `parser` parses them.
        contenders: By name; `OURS` is one of them. They are closed at the end.
        agree_on: Tokens of the rows on which all must give the same logits.
        model: The model in words.
        notes: What else a reader of the table should know.

    Raises:
        UserError: A contender computes something else.
    """
    settings = _settings(flags)
    try:
        worst = _check_agreement(contenders, agree_on)
        results = [_measure(benchmark, s, contenders, flags.repeats) for s in settings]
        compiled = {name: contender.compile_seconds for name, contender in contenders.items()}
        described = {name: contender.describe() for name, contender in contenders.items()}
    finally:
        for contender in contenders.values():
            contender.close()
    lines = [
        f"model: {model}; the same weights everywhere, logits within {worst:.0e} of ours",
        *(f"{name}: {text}" for name, text in described.items()),
        "times are medians of interleaved repeats; a ratio is the median of the ratios of "
        "neighbouring repeats, above 1 where ours is faster",
        *notes,
        *(f"{n}: {s:.0f} s compiling in all, not counted" for n, s in compiled.items() if s),
    ]
    return _write(benchmark, flags, results, lines)


def _settings(flags: argparse.Namespace) -> list[Setting]:
    names = (flags.dtypes, flags.tasks, flags.contexts, flags.batches)
    return [
        Setting(task, dtype, int(batch), int(context), flags.new_tokens)
        for dtype, task, context, batch in itertools.product(*(x.split(",") for x in names))
        if int(batch) * int(context) <= flags.most_tokens
    ]


def _check_agreement(contenders: Mapping[str, Contender], length: int) -> float:
    """Returns the largest difference of fp32 logits from ours."""
    ours = contenders[OURS]
    tokens = _tokens(Setting("logits", "float32", 2, length, 1), ours.vocab_size)
    expected = ours.last_logits(tokens)
    worst = 0.0
    for name, contender in contenders.items():
        error = float(np.abs(contender.last_logits(tokens) - expected).max())
        if not error < _AGREEMENT:
            raise UserError(f"{name} computes something else: logits differ by {error:.2g}")
        worst = max(worst, error)
    return worst


def _measure(
    benchmark: Benchmark, setting: Setting, contenders: Mapping[str, Contender], repeats: int
) -> Result:
    tokens = _tokens(setting, contenders[OURS].vocab_size)
    runs = {name: c.prepare(setting, tokens) for name, c in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            elapsed = run()
            if turn:  # The first turn warms up.
                seconds[name].append(elapsed)
    each = setting.new_tokens if setting.task in benchmark.writes else setting.context
    result = Result(setting, setting.batch * each, harness.summarise(seconds, OURS))
    print(" ".join(_row(benchmark, result)), file=sys.stderr, flush=True)
    return result


def _tokens(setting: Setting, vocab: int) -> np.ndarray:
    shape = (setting.batch, setting.context + 1)
    return np.random.default_rng(0).integers(3, vocab, shape).astype(np.int32)


def _row(benchmark: Benchmark, result: Result) -> list[str]:
    setting, ours = result.setting, result.measurements[OURS]
    cells = [setting.task, setting.dtype, f"[{setting.batch}, {setting.context}]"]
    cells += [f"{1e3 * ours.median:.1f}", f"{result.tokens / ours.median:,.0f}"]
    for name, goals in benchmark.goals.items():
        peer = result.measurements.get(name)
        if peer is None:
            cells += ["–", "–"]
            continue
        mark = "" if peer.ratio >= goals.get(setting.task, 0.0) else " ✗"
        cells += [f"{result.tokens / peer.median:,.0f}", f"{peer.ratio:.2f}{mark}"]
    return cells


def _goals(benchmark: Benchmark) -> str:
    """The goals in words: those of a contender's tasks that are the same together."""
    parts = []
    for name, goals in benchmark.goals.items():
        for goal in sorted(set(goals.values()), reverse=True):
            tasks = [task for task, wanted in goals.items() if wanted == goal]
            every = len(tasks) == len(goals)
            parts.append(f"{goal} × {name}" + ("" if every else f" for {', '.join(tasks)}"))
    return "; ".join(parts)


def _write(
    benchmark: Benchmark, flags: argparse.Namespace, results: list[Result], notes: list[str]
) -> Path:
    heads = ["task", "compute", "[rows, tokens]", "ours ms", "ours tokens/s"]
    for name in benchmark.goals:
        heads += [f"{name} tokens/s", f"ours × {name}"]
    return harness.write_page(
        flags.output,
        flags.name,
        benchmark.title,
        [*notes, f"goals: {_goals(benchmark)}; ✗ marks a ratio below"],
        [
            "",
            f"| {' | '.join(heads)} |",
            "|---|---|---|" + "---:|" * (len(heads) - 3),
            *(f"| {' | '.join(_row(benchmark, result))} |" for result in results),
        ],
        {
            "backend": jax.default_backend(),
            "results": [dataclasses.asdict(result) for result in results],
        },
    )
