"""Pictures of clusterings: sizes of clusters, concepts before and after, maps of two dimensions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.launch import Figure, Line
from common.launch.plots import COLOURS
from curation.balance import Balance
from curation.clusters import Hierarchy

_POINTS = 20_000  # most dots of a map
_STEPS = 400  # most dots of a line


def sizes_figure(hierarchy: Hierarchy) -> Figure:
    """Points in the clusters of each level, from the largest cluster on."""
    lines = [
        _ranked(f"level {number}: {level.num_clusters:,} clusters", counts)
        for number, (level, counts) in enumerate(zip(hierarchy.levels, hierarchy.point_counts()), 1)
    ]
    return Figure(
        "sizes",
        "Sizes of clusters",
        "rank of the cluster",
        "points in it",
        lines,
        log_x=True,
        log_y=True,
        caption="Empty clusters are left out.",
    )


def balance_figure(name: str, what: str, balance: Balance) -> Figure:
    """Shares of groups before and after a selection, each from the largest group on."""
    lines = [
        _ranked(f"{when}: {counts.sum():,} points", counts, share=True)
        for when, counts in (("before", balance.before), ("after", balance.after))
    ]
    even = 1 / len(balance.before)
    lines.append(Line("equal shares", [1, len(balance.before)], [even, even], dashed=True))
    return Figure(
        name,
        f"Shares of {what}, before and after",
        f"rank of the {what.rstrip('s')}",
        "share of the points",
        lines,
        log_x=True,
        log_y=True,
        caption="Those without a point are left out.",
    )


def draw_map(
    path: Path,
    title: str,
    panels: Sequence[tuple[str, np.ndarray]],
    centroids: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> None:
    """Draws sets of points [N, D] beside each other, on the first two axes of the first set.

    Points of two dimensions are shown as they are, others by principal components. Of a large set
    a random part is drawn.

    Args:
      path: of the PNG.
      title: above all.
      panels: name and points of each set.
      centroids: [K, D], drawn into every panel.
      seed: of the random part.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    rng = np.random.default_rng(seed)
    parts = [(name, _some(points, rng)) for name, points in panels]
    origin, axes = _first_axes(parts[0][1])
    canvas = Canvas(figsize=(4.5 * len(parts), 4.6), dpi=140, layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(1, len(parts), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (name, points) in zip(grid, parts):
        x, y = ((points - origin) @ axes).T
        panel.scatter(x, y, s=min(9.0, 12_000 / len(x)), c=COLOURS[0], alpha=0.5, linewidths=0)
        if centroids is not None:
            x, y = ((_some(np.asarray(centroids), rng) - origin) @ axes).T
            panel.scatter(x, y, s=10, c=COLOURS[1], marker="x", linewidths=0.8)
        panel.set_title(name, loc="left", fontsize=10)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_aspect("equal")
    canvas.suptitle(title, fontweight="bold")
    canvas.savefig(path)


def _ranked(label: str, counts: np.ndarray, share: bool = False) -> Line:
    ordered = np.sort(counts[counts > 0])[::-1]
    ranks = np.unique(np.geomspace(1, max(len(ordered), 1), _STEPS).astype(int))[: len(ordered)]
    values = ordered[ranks - 1] / (ordered.sum() if share else 1)
    return Line(label, ranks.tolist(), values.tolist())


def _some(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if len(points) > _POINTS:
        points = points[np.sort(rng.choice(len(points), _POINTS, replace=False))]
    return np.asarray(points, np.float64)


def _first_axes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where to look from, [D], and the two directions in which most is to be seen, [D, 2]."""
    width = points.shape[1]
    if width == 2 or not len(points):
        return np.zeros(width), np.eye(width, 2)
    origin = points.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(points - origin, rowvar=False).reshape(width, width))
    axes = vectors[:, ::-1][:, :2]
    return origin, np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))
