"""Reports: tables and plots as a Markdown page, and a claim checked against measurements."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.launch.plots import Figure, draw
from common.launch.workdir import write_atomically


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
      title: its heading.
      columns: headings, with units.
      rows: as many cells each as there are columns; numbers are shown with four digits.
      note: a sentence under the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table '{self.title}': {row} has not {len(self.columns)} cells")


@dataclass(frozen=True)
class Expectation:
    """An outcome that a paper's claim predicts.

    Attributes:
      name: a short key.
      statement: what is expected, in a sentence.
      holds: decides from the measurements whether it came out.
    """

    name: str
    statement: str
    holds: Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Results:
    """A claim, the setting it was tried in, what was expected of it and what was measured.

    Attributes:
      claim: the paper's, in a sentence.
      setting: what was run, and what is smaller than in the paper.
      expectations: decided from `measured`, never stated.
      measured: name to number, list or nested mapping of such; arrays are taken too.
    """

    claim: str
    setting: str
    expectations: Sequence[Expectation]
    measured: Mapping[str, Any]

    @property
    def holds(self) -> dict[str, bool]:
        """Whether each expectation came out."""
        return {e.name: bool(e.holds(self.measured)) for e in self.expectations}

    def to_dict(self) -> dict[str, Any]:
        """Returns what `results.json` holds."""
        return {
            "claim": self.claim,
            "setting": self.setting,
            "expected": [f"{e.name}: {e.statement}" for e in self.expectations],
            "measured": _plain(self.measured),
            "holds": self.holds,
        }

    def summary(self) -> str:
        """Returns a line for each expectation that says whether it came out."""
        holds = self.holds
        return "\n".join(
            f"{'holds' if holds[e.name] else 'FAILS'}  {e.name}: {e.statement}"
            for e in self.expectations
        )


def write_report(
    folder: str | Path,
    title: str,
    *,
    text: str = "",
    tables: Sequence[Table] = (),
    figures: Sequence[Figure] = (),
    results: Results | None = None,
) -> Path:
    """Writes `README.md`, a PNG for each figure and, if given, `results.json` to `folder`.

    Returns:
      The path of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}"]
    if text:
        parts.append(text.strip())
    if results is not None:
        document = json.dumps(results.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / "results.json", document + "\n")
        parts += _results_parts(results)
    for table in tables:
        parts += [f"## {table.title}", markdown_table(table.columns, table.rows)]
        parts += [table.note] if table.note else []
    for figure in figures:
        draw(figure, folder / f"{figure.name}.png")
        parts += [f"## {figure.title}", f"![{figure.title}]({figure.name}.png)"]
        parts += [figure.caption] if figure.caption else []
    page = folder / "README.md"
    write_atomically(page, "\n\n".join(parts) + "\n")
    return page


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table, columns padded so that it reads well as plain text too."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        for i in range(len(columns))
    ]
    grid = [[_cell(name) for name in columns], *cells]
    widths = [max(3, *(len(line[i]) for line in grid)) for i in range(len(columns))]

    def row_text(line: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, numeric)]
    return "\n".join([row_text(grid[0]), f"| {' | '.join(rule)} |", *map(row_text, grid[1:])])


def _results_parts(results: Results) -> list[str]:
    holds = results.holds
    rows = [
        (e.name, e.statement, "yes" if holds[e.name] else "**no**") for e in results.expectations
    ]
    return [
        f"**Claim.** {results.claim}",
        f"**Setting.** {results.setting}",
        "## Expected and found",
        markdown_table(("outcome", "expected", "holds"), rows),
    ]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> Any:
    """Turns measurements into JSON data; a number that is not finite becomes null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
