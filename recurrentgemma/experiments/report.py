"""Tables and figures of `recurrentgemma.reproduce`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.launch import Figure, Line, Results, Table, write_report
from recurrentgemma.experiments.contenders import ATTENTION, LABELS
from recurrentgemma.experiments.memory import crossover

Measured = Mapping[str, Any]


def write(folder: Path, results: Results) -> Path:
    """Writes `results.json`, figures, tables and the page; returns the page's path."""
    measured = results.measured
    return write_report(
        folder,
        "Griffin, Hawk and full attention, side by side",
        tables=tables(measured),
        figures=figures(measured),
        results=results,
    )


def tables(measured: Measured) -> list[Table]:
    """A table for each experiment."""
    memory, speed, language, induction = (
        measured[name] for name in ("memory", "speed", "language", "induction")
    )
    rate = speed["batch_size"]
    return [
        _by_length(
            "Bytes kept while decoding a document",
            "context (tokens)",
            memory["contexts"],
            memory["bytes"],
            note=f"Full attention keeps more than Griffin from {crossover(memory):,.0f} tokens on. "
            "By the same formula RecurrentGemma-2B keeps "
            f"{memory['released_megabytes']['2b']:.2f} MB and 9B "
            f"{memory['released_megabytes']['9b']:.2f} MB in bfloat16 at any context.",
        ),
        _by_length(
            "Decoded tokens per second",
            "context (tokens)",
            speed["contexts"],
            {
                name: [rate / seconds for seconds in series]
                for name, series in speed["decode_seconds"].items()
            },
            note=f"{rate} row(s) at a time, median of turns, {speed['device']}. At the longest "
            f"context full attention reads its cache at {_cache_rate(measured):.2g} GB/s: as far "
            "as that is below the memory's rate, the baseline could be faster.",
        ),
        _by_length(
            "Seconds to read a prompt",
            "prompt (tokens)",
            speed["prompts"],
            speed["prefill_seconds"],
            note="One prompt at a time, median of turns.",
        ),
        _by_length(
            "Held-out loss",
            "row length (tokens)",
            language["lengths"],
            language["loss"],
            note=f"Nats per token; the same {language['heldout_tokens']:,} tokens at every length. "
            f"Trained at {language['train_length']}; token frequencies alone give "
            f"{language['unigram_loss']:.3f}.",
        ),
        _by_length(
            "Induction: accuracy",
            "row length (tokens)",
            induction["lengths"],
            induction["accuracy"],
            note=f"Trained at {induction['train_length']}; guessing gives "
            f"{induction['chance']:.3f}.",
        ),
        Table(
            "Parameters",
            ("experiment", *LABELS.values()),
            [
                (experiment, *(part["parameters"][name] for name in LABELS))
                for experiment, part in (
                    ("size and speed", memory),
                    ("text", language),
                    ("induction", induction),
                )
            ],
        ),
    ]


def figures(measured: Measured) -> list[Figure]:
    """A figure for each table but the last, and two curves behind them."""
    memory, speed, language, induction = (
        measured[name] for name in ("memory", "speed", "language", "induction")
    )
    trained, learned = language["train_length"], induction["train_length"]
    return [
        Figure(
            "state_bytes",
            "State kept while decoding",
            "context (tokens)",
            "bytes",
            _lines(memory["contexts"], memory["bytes"]),
            log_x=True,
            log_y=True,
        ),
        Figure(
            "decode_time",
            "Time of one decoded token",
            "context (tokens)",
            "milliseconds",
            _lines(speed["contexts"], speed["decode_seconds"], factor=1e3),
            log_x=True,
        ),
        Figure(
            "prefill_time",
            "Time to read a prompt, per token",
            "prompt (tokens)",
            "microseconds per token",
            [
                Line(LABELS[name], speed["prompts"], _per_token(series, speed["prompts"]))
                for name, series in speed["prefill_seconds"].items()
            ],
            log_x=True,
        ),
        Figure(
            "loss_by_length",
            "Held-out loss by row length",
            "row length (tokens)",
            "nats per token",
            [*_lines(language["lengths"], language["loss"]), _mark(trained, language["loss"])],
            log_x=True,
            caption="The same text at every length. Dashed: the training length.",
        ),
        Figure(
            "loss_by_position",
            "Held-out loss by position in the longest rows",
            "position (tokens)",
            "nats per token",
            [
                *_lines(language["positions"], language["loss_by_position"]),
                _mark(trained, language["loss_by_position"]),
            ],
            caption="Dashed: the training length.",
        ),
        Figure(
            "induction_by_length",
            "Induction: accuracy by row length",
            "row length (tokens)",
            "accuracy",
            [*_lines(induction["lengths"], induction["accuracy"]), _mark(learned, {"": [0, 1]})],
            log_x=True,
            caption="Dashed: the training length.",
        ),
        Figure(
            "induction_training",
            "Induction: accuracy while training",
            "step",
            "accuracy of a batch",
            _lines(induction["steps"], induction["train_accuracy"]),
        ),
    ]


def _cache_rate(measured: Measured) -> float:
    """Gigabytes of cache per second that full attention goes through at the longest context."""
    speed = measured["speed"]
    size = speed["batch_size"] * measured["memory"]["bytes"][ATTENTION][-1]
    return size / speed["decode_seconds"][ATTENTION][-1] / 1e9


def _by_length(
    title: str,
    column: str,
    lengths: Sequence[int],
    series: Mapping[str, Sequence[float]],
    note: str,
) -> Table:
    """A row for each length, a column for each model."""
    rows = [(length, *(series[name][i] for name in LABELS)) for i, length in enumerate(lengths)]
    return Table(title, (column, *LABELS.values()), rows, note)


def _lines(
    x: Sequence[float], series: Mapping[str, Sequence[float]], factor: float = 1.0
) -> list[Line]:
    return [Line(LABELS[name], x, [factor * y for y in series[name]]) for name in LABELS]


def _per_token(seconds: Sequence[float], lengths: Sequence[int]) -> list[float]:
    return [1e6 * s / length for s, length in zip(seconds, lengths)]


def _mark(length: int, series: Mapping[str, Sequence[float]]) -> Line:
    """A vertical line at the training length, as high as the curves."""
    values = [value for curve in series.values() for value in curve]
    return Line("training length", [length, length], [min(values), max(values)], dashed=True)
