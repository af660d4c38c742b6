"""Tables and figures of `t5gemma.reproduce`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.launch import Figure, Line, Results, Table, write_report
from t5gemma.experiments import equal_flops, from_scratch, objectives, unbalanced

Measured = Mapping[str, Any]


def write(folder: Path, results: Results) -> Path:
    """Writes `results.json`, figures, tables and the page; returns the page's path."""
    return write_report(
        folder,
        "Decoders adapted into encoder-decoders",
        tables=tables(results.measured),
        figures=figures(results.measured),
        results=results,
    )


def tables(measured: Measured) -> list[Table]:
    """A table for each experiment."""
    return [
        _from_scratch(measured["from_scratch"]),
        _objectives(measured["objectives"]),
        _equal_flops(measured["equal_flops"]),
        _unbalanced(measured["unbalanced"]),
        _warmups(measured["unbalanced"]),
    ]


def figures(measured: Measured) -> list[Figure]:
    """Loss while training; loss against the cost of an answer; loss by warm-up."""
    scratch, pairs = measured["from_scratch"], measured["unbalanced"]
    positions = scratch["positions"]
    return [
        Figure(
            "from_scratch",
            "Adapted and from scratch",
            "positions of both sides trained on",
            "held-out loss, nats per target",
            [
                *(
                    Line(label, positions, scratch["curve"][name])
                    for name, label in from_scratch.LABELS.items()
                ),
                Line(
                    "token frequencies alone",
                    [positions[0], positions[-1]],
                    [scratch["unigram_loss"]] * 2,
                    dashed=True,
                ),
            ],
        ),
        Figure(
            "cost_of_answers",
            "Loss against the cost of an answer",
            "FLOPs of an answer",
            "loss of continuations, nats per token",
            [
                *(
                    Line(name, [pairs["flops"][name]], [pairs["loss"][name]])
                    for name in unbalanced.PAIRS
                ),
                Line(
                    "small to large",
                    [pairs["flops"][name] for name in (unbalanced.SMALL, unbalanced.LARGE)],
                    [pairs["loss"][name] for name in (unbalanced.SMALL, unbalanced.LARGE)],
                    dashed=True,
                ),
            ],
            caption="A pair below the dashed line buys its quality more cheaply than a balanced "
            "pair of a size between the two would, were the line straight.",
        ),
        Figure(
            "warmup",
            "Cross attention alone, before all",
            "updates in which cross attention alone trains",
            "loss of continuations, nats per token",
            [Line(unbalanced.UNBALANCED, pairs["warmups"], pairs["loss_by_warmup"])],
            caption=f"Of {pairs['steps']} updates in all.",
        ),
    ]


def _from_scratch(part: Measured) -> Table:
    rows = [
        (
            label,
            part["curve"][name][-1],
            part["loss"][name],
            part["rougeL"][name],
            _needed(part, name),
        )
        for name, label in from_scratch.LABELS.items()
    ]
    return Table(
        "Adapted and from scratch, after equal tokens",
        ("pair", "held-out loss", "loss of continuations", "ROUGE-L", "positions to scratch's end"),
        rows,
        note=f"Nats per token. The donor itself continues the same pieces at "
        f"{part['donor_loss']:.3f}; token frequencies alone give {part['unigram_loss']:.3f}.",
    )


def _needed(part: Measured, name: str) -> str:
    if name == from_scratch.SCRATCH:
        return f"{part['positions'][-1]:,}"
    needed = part["needed"][name]
    return "never" if needed is None else f"at most {needed:,}"


def _objectives(part: Measured) -> Table:
    rows = [
        (
            label,
            part["loss"][name],
            part["rougeL"][name],
            part["bleu"][name],
            f"{part['accuracy'][name]:.1%}" if name in part["accuracy"] else "",
        )
        for name, label in objectives.LABELS.items()
        if name in part["loss"]
    ]
    return Table(
        "Objectives: writing and reading",
        ("objective", "loss of continuations", "ROUGE-L", "BLEU", "classification"),
        rows,
        note=f"Continuations of the same held-out pieces, {part['generated']} of them generated. "
        f"Classification: which package ({', '.join(part['labels'])}) a docstring is from, "
        f"{part['dev_texts']:,} texts after fine-tuning on {part['texts']:,}; one label for all is "
        f"right in {part['majority']:.1%}.",
    )


def _equal_flops(part: Measured) -> Table:
    rows = [
        (
            label,
            part["parameters"][name],
            part["loss"][name],
            part["rougeL"][name],
            part["flops"][name] / 1e9,
            1e3 * part["seconds"][name],
        )
        for name, label in equal_flops.LABELS.items()
    ]
    return Table(
        "Equal inference FLOPs",
        ("model", "parameters", "loss", "ROUGE-L", "GFLOPs an answer", "ms for a batch of answers"),
        rows,
        note=f"An answer of {part['continuation']} tokens to {part['prefix']}; {part['rows']} at a "
        "time, median of turns.",
    )


def _unbalanced(part: Measured) -> Table:
    rows = [
        (
            name,
            part["parameters"][name],
            part["loss"][name],
            part["rougeL"][name],
            part["flops"][name] / 1e9,
            1e3 * part["seconds"][name],
        )
        for name in unbalanced.PAIRS
    ]
    return Table(
        "Balanced and unbalanced pairs (encoder-decoder)",
        ("pair", "parameters", "loss", "ROUGE-L", "GFLOPs an answer", "ms for a batch of answers"),
        rows,
        note=f"An answer of {part['continuation']} tokens to {part['prefix']}; {part['rows']} at a "
        "time, median of turns.",
    )


def _warmups(part: Measured) -> Table:
    return Table(
        "Warm-up of the unbalanced pair",
        ("updates of cross attention alone", "loss of continuations"),
        list(zip(part["warmups"], part["loss_by_warmup"])),
        note=f"Of {part['steps']} updates in all.",
    )
