"""The report that a training run ends with: loss curves, a table of results, the headline."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from common.launch.plots import Figure, line_from_metrics
from common.launch.report import Table, write_report
from common.launch.workdir import RunFolder, write_atomically
from common.train import TrainResult, read_metrics


def report_language_training(
    folder: RunFolder,
    result: TrainResult,
    *,
    title: str,
    text: str,
    unit: str,
    unigram: float,
    rows: Sequence[tuple[str, Any]],
) -> None:
    """Writes `report/` of a run that predicts tokens, and prints its headline.

    Args:
      folder: of the run.
      result: of the Trainer; its metrics have the held-out loss.
      title, text: heading and first words of the page.
      unit: what a loss is of: "token", "target".
      unigram: held-out loss of token frequencies alone, in nats.
      rows: of the table of results, before those of the losses.
    """
    metrics = read_metrics(folder.path)
    heldout = result.metrics["eval/heldout/loss"]
    training = line_from_metrics(metrics, "loss", "training")
    curves = Figure(
        "loss",
        "Loss",
        "step",
        f"nats per {unit}",
        [
            training,
            line_from_metrics(metrics, "eval/heldout/loss", "held-out"),
            dataclasses.replace(
                training, label="unigram, held-out", y=[unigram] * len(training.x), dashed=True
            ),
        ],
        caption="The dashed line is the held-out loss of token frequencies alone.",
    )
    losses = [
        (f"held-out loss, nats per {unit}", f"{heldout:.4f}"),
        ("held-out perplexity", f"{math.exp(min(heldout, 50.0)):.2f}"),
        (f"unigram loss, nats per {unit}", f"{unigram:.4f}"),
    ]
    table = Table("Result", ("measure", "value"), [*rows, *losses])
    write_report(folder.report, title, text=text, tables=[table], figures=[curves])
    results = {"step": result.step, "heldout_loss": heldout, "unigram_loss": unigram}
    write_atomically(folder.report / "summary.json", json.dumps(results, indent=2) + "\n")
    print(f"report: {folder.report / 'README.md'}")
    print(
        f"held-out loss {heldout:.4f} nats per {unit} after {result.step:,} steps; "
        f"token frequencies alone {unigram:.4f}"
    )
