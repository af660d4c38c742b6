"""Line plots for reports, drawn without a display."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which people of all colour vision tell apart; yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARKED = 24  # A solid line of at most so many points shows each of them.


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
      label: its name in the legend.
      x, y: as many numbers each.
      dashed: for a baseline or a bound.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"'{self.label}' has {len(self.x)} x but {len(self.y)} y")


@dataclass(frozen=True)
class Figure:
    """A plot of lines on one pair of axes.

    Attributes:
      name: the file's stem.
      title, x_label, y_label: with units where there are any.
      lines: drawn in this order.
      log_x, log_y: logarithmic axes.
      caption: a sentence under the plot in the report.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    caption: str = ""


def line_from_metrics(
    rows: Iterable[Mapping[str, Any]], key: str, label: str | None = None
) -> Line:
    """Takes the curve of `key` over `step` from the rows of a `metrics.jsonl`.

    A resumed run writes some steps again: the last value of a step counts.
    """
    values = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    steps = sorted(values)
    return Line(label or key, steps, [values[step] for step in steps])


def draw(figure: Figure, path: Path) -> None:
    """Draws a figure as a PNG file of 1280 × 800 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 5), dpi=160, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    for index, line in enumerate(figure.lines):
        axes.plot(
            line.x,
            line.y,
            label=line.label,
            color=COLOURS[index % len(COLOURS)],
            linestyle="--" if line.dashed else "-",
            linewidth=1.8,
            marker=None if line.dashed or len(line.x) > MARKED else MARKERS[index % len(MARKERS)],
            markersize=5,
        )
    if figure.log_x:
        axes.set_xscale("log", base=2 if _all_powers_of_two(figure) else 10)
    if figure.log_y:
        axes.set_yscale("log")
    axes.set_title(figure.title, loc="left", fontweight="bold")
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)
    axes.grid(True, which="major", color="#d9d9d9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(figure.lines) > 1:
        axes.legend(frameon=False)
    canvas.savefig(path)


def _all_powers_of_two(figure: Figure) -> bool:
    """Tells whether the x axis reads better in powers of two, as context lengths do."""
    points = [x for line in figure.lines for x in line.x]
    return all(x >= 1 and float(x).is_integer() and int(x).bit_count() == 1 for x in points)
