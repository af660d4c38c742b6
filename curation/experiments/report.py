"""Tables and figures of `curation.reproduce`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.launch import Figure, Line, Results, Table, write_report
from curation.experiments import concepts, documents, features, pictures, plane
from curation.plots import draw_map

Measured = Mapping[str, Any]
PUBLISHED = {
    plane.DATA: 0.942,
    "one level": 0.340,
    "two levels": 0.132,
    "three levels": 0.081,
    plane.RESAMPLED: 0.0418,
    plane.UNIFORM: 0.0401,
}


def write(folder: Path, results: Results) -> Path:
    """Writes `report/`: the page, figures, maps and `results.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    points = results.measured["plane"]["points"]
    panels = [
        (name, np.array(points[name])) for name in (plane.DATA, *plane.LEVELS, plane.RESAMPLED)
    ]
    draw_map(folder / "plane.png", "The data, and the centroids of the top level", panels)
    return write_report(
        folder,
        "Automatic data curation: the claims, scaled down",
        text="![The simulated distribution and its centroids](plane.png)",
        tables=tables(results.measured),
        figures=figures(results.measured),
        results=results,
    )


def tables(m: Measured) -> list[Table]:
    """A table for each experiment."""
    found, seconds = m["plane"]["divergence"], m["plane"]["seconds"]
    density = m["density"]
    learned = [_features(m["features"])] if "features" in m else []
    return [
        Table(
            "Divergence from uniform in the plane",
            ("centroids of", "published (nats)", "here (nats)", "seconds"),
            [(name, PUBLISHED[name], found[name], _cell(seconds.get(name))) for name in PUBLISHED],
            f"All settings together took {sum(seconds.values()):.1f} s a seed, compilation "
            "included.",
        ),
        Table(
            "Centroids in the dense box to those in the other",
            ("dimension", "first level", "theory", "second level", "theory ", "random seeds"),
            list(zip(density["dimensions"], *(density[name] for name in _RATIOS))),
            f"The boxes' points are as {density['contrast']:.0f} to 1.",
        ),
        Table(
            "Samples of long-tailed concepts",
            ("sample", "divergence from equal shares (nats)", "largest share"),
            [
                (name, m["concepts"]["divergence"][name], m["concepts"]["largest_share"][name])
                for name in concepts.NAMES
            ],
        ),
        Table(
            "Samples of long-tailed images",
            ("sample", "divergence (nats)", "accuracy", "its standard deviation"),
            [(name, *(m["pictures"][key][name] for key in _PICTURES)) for name in pictures.NAMES],
        ),
        *learned,
        Table(
            "Samples of documents",
            ("sample", "divergence (nats)", "largest share"),
            [
                (name, m["documents"]["divergence"][name], m["documents"]["largest_share"][name])
                for name in documents.NAMES
            ],
        ),
    ]


def _features(found: Measured) -> Table:
    rows = []
    for name in features.NAMES:
        each = [found["each"][task][name] for task in features.TASKS]
        spread = [" / ".join(f"{score:.3f}" for score in scores) for scores in each]
        means = [found["accuracy"][task][name] for task in features.TASKS]
        rows.append((name, found["divergence"][name], means[0], spread[0], means[1], spread[1]))
    return Table(
        "Features of a small DINO trained on samples of images",
        ("sample", "divergence (nats)", "k-NN", "each", "logistic", "each "),
        rows,
    )


_RATIOS = ("first", "theory", "second", "second_theory", "random")
_PICTURES = ("divergence", "accuracy", "accuracy_deviation")


def figures(m: Measured) -> list[Figure]:
    """The exponent by dimension, and the shares of concepts, before and after."""
    density = m["density"]
    d = density["dimensions"]
    return [
        Figure(
            "exponent",
            "Density of centroids by that of the data",
            "dimension d",
            "exponent",
            [
                Line("measured", d, density["exponent"]),
                Line("d / (d + 2)", d, [n / (n + 2) for n in d], dashed=True),
            ],
            log_x=True,
        ),
        _shares("concepts", "concepts", m["concepts"]["counts"], concepts.NAMES),
        _shares("pictures", "classes of images", m["pictures"]["counts"], pictures.NAMES),
        _shares("documents", "packages", m["documents"]["counts"], documents.NAMES),
    ]


def _shares(
    name: str, what: str, counts: Mapping[str, Sequence[int]], names: Sequence[str]
) -> Figure:
    """The share of each group in every sample, from the largest group on (last seed)."""
    lines = []
    for label in names:
        shares = np.sort(np.array(counts[label]) / sum(counts[label]))[::-1]
        lines.append(Line(label, list(range(1, len(shares) + 1)), shares.tolist()))
    even = 1 / len(counts[names[0]])
    lines.append(Line("equal shares", [1, len(counts[names[0]])], [even, even], dashed=True))
    return Figure(name, f"Shares of {what} in samples", "rank", "share", lines)


def _cell(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"
