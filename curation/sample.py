"""`python -m curation.sample`: a balanced subset of clustered embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from common.errors import UserError
from common.launch import Run, Table, launch, write_report
from curation.balance import (
    Balance,
    balance_of_labels,
    balance_of_levels,
    divergence_from_uniform,
    largest_share,
)
from curation.clusters import Hierarchy
from curation.hierarchy_files import is_hierarchy, load
from curation.inputs import open_labels, open_row_numbers, open_rows, shown_rows
from curation.outputs import output_folder, write_outputs
from curation.page import sampled_groups, write_page
from curation.plots import balance_figure, draw_map, sizes_figure
from curation.sampling import balanced_sample, flat_sample

EXAMPLES = [
    "python -m curation.sample --clusters=runs/clusters --size=100000 --output=runs/sample",
    "python -m curation.sample --clusters=runs/clusters --size=100000 --strategy=c "
    "--embeddings=features.npy --images=photos --output=runs/sample",
    "python -m curation.sample --clusters=ssl-data-curation/exp --size=1000000 --seed=1 "
    "--subset=kept.npy --output=runs/sample",
]
SELECTED, SETTINGS = "selected.npy", "selection.json"
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
CLUSTERS = flags.DEFINE_string(
    "clusters",
    None,
    "a folder by `cluster`, or a result of ssl-data-curation; --output by default",
    **_own,
)
OUTPUT = flags.DEFINE_string("output", None, "the folder to write", required=True, **_own)
SIZE = flags.DEFINE_integer("size", None, "points to select", required=True, **_own)
STRATEGY: Any = flags.DEFINE_enum(
    "strategy", "r", ["r", "c"], "random points of a cluster, or those closest to its centroid",
    **_own,
)  # fmt: skip
SEED = flags.DEFINE_integer("seed", 0, "of the random choices", **_own)
MULTIPLIER = flags.DEFINE_integer("multiplier", 1, "how often a point may be selected", **_own)
FLAT_LEVEL = flags.DEFINE_integer(
    "flat_level",
    None,
    "select equally from the clusters of this level, blind to the others",
    **_own,
)
SUBSET = flags.DEFINE_string(
    "subset", None, "a .npy file: the row of the embeddings that each clustered point is", **_own
)
EMBEDDINGS = flags.DEFINE_string(
    "embeddings", None, "what was clustered, to draw maps of it: .npy, Parquet, or by `embed`",
    **_own,
)  # fmt: skip
COLUMN = flags.DEFINE_string("column", "embedding", "of Parquet files", **_own)
LABELS = flags.DEFINE_string(
    "labels", None, "a .npy file with a concept for each row, to show their balance", **_own
)
IMAGES = flags.DEFINE_string("images", None, "the images embedded, to show some", **_own)
TEXTS = flags.DEFINE_string("texts", None, "the texts embedded, to show some", **_own)


def _main(run: Run) -> None:
    with output_folder(OUTPUT.value, SELECTED) as folder:
        _sample(folder)


def _sample(folder: Path) -> None:
    hierarchy = load(Path(CLUSTERS.value or OUTPUT.value).expanduser())
    points = hierarchy.num_points
    subset = open_row_numbers(SUBSET.value) if SUBSET.value is not None else np.arange(points)
    if len(subset) != points:
        raise UserError(f"--subset: {len(subset)} rows, but {points} points were clustered")
    embeddings = _embeddings(folder, subset)
    rows = len(embeddings) if embeddings is not None else int(subset.max(initial=-1)) + 1
    show = shown_rows(rows, IMAGES.value, TEXTS.value, EMBEDDINGS.value)
    labels = None if LABELS.value is None else open_labels(LABELS.value, rows)[subset]

    options: dict[str, Any] = {"seed": SEED.value, "multiplier": MULTIPLIER.value}
    if FLAT_LEVEL.value is None:
        picked = balanced_sample(hierarchy, SIZE.value, STRATEGY.value, **options)
    else:
        picked = flat_sample(hierarchy, SIZE.value, FLAT_LEVEL.value, STRATEGY.value, **options)
    balances = balance_of_levels(hierarchy, picked)
    settings = {
        "size": SIZE.value,
        "selected": len(picked),
        "strategy": STRATEGY.value,
        "flat_level": FLAT_LEVEL.value,
        **options,
        "clusters": str(CLUSTERS.value or OUTPUT.value),
        "subset": SUBSET.value,
        "divergence_from_uniform": [divergence_from_uniform(b.after) for b in balances],
    }
    write_outputs(folder, {SELECTED: np.sort(subset[picked])}, SETTINGS, settings)
    # Beside the clusters there is their own report.
    report = folder / ("selection" if is_hierarchy(folder) else "report")
    page = _report(report, hierarchy, picked, balances, labels, embeddings, subset, show)
    if len(picked) < SIZE.value:
        print(f"all {len(picked):,} points there are (asked for {SIZE.value:,})")
    top = balances[-1]
    print(
        f"{len(picked):,} of {points:,} points: {folder / SELECTED}\nreport: {page}\n"
        f"largest cluster of the top level: {largest_share(top.before):.2%} of the points before, "
        f"{largest_share(top.after):.2%} after"
    )


def _embeddings(folder: Path, subset: np.ndarray) -> np.ndarray | None:
    if EMBEDDINGS.value is None:
        return None
    rows = open_rows(EMBEDDINGS.value, folder, COLUMN.value)
    if SUBSET.value is None and len(rows) != len(subset):
        raise UserError(
            f"{EMBEDDINGS.value} has {len(rows)} rows, but {len(subset)} points were clustered: "
            "name the rows that were with --subset"
        )
    if len(subset) and subset.max() >= len(rows):
        raise UserError(f"--subset names row {subset.max()} of {len(rows)} embeddings")
    return rows


def _report(
    folder: Path,
    hierarchy: Hierarchy,
    picked: np.ndarray,
    balances: Sequence[Balance],
    labels: np.ndarray | None,
    embeddings: np.ndarray | None,
    subset: np.ndarray,
    show: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    figures = [sizes_figure(hierarchy), balance_figure("clusters", "clusters", balances[-1])]
    named = [(f"clusters of level {n}", balance) for n, balance in enumerate(balances, 1)]
    if labels is not None:
        named.append(("concepts", balance_of_labels(labels, picked)))
        figures.append(balance_figure("concepts", "concepts", named[-1][1]))
    table = Table(
        "Balance",
        ("of", "groups", "largest before", "after", "divergence before (nats)", "after (nats)"),
        [
            (
                name,
                len(balance.before),
                f"{largest_share(balance.before):.2%}",
                f"{largest_share(balance.after):.2%}",
                divergence_from_uniform(balance.before),
                divergence_from_uniform(balance.after),
            )
            for name, balance in named
        ],
        "Largest: the share of the largest group. Divergence: from equal shares, 0 at best.",
    )
    text = ["[Clusters and some of what was selected of them](clusters.html)"]
    top = hierarchy.point_labels(len(hierarchy.levels))
    groups = sampled_groups(top, picked)
    write_page(folder / "clusters.html", "Clusters", groups, lambda row: show(int(subset[row])))
    if embeddings is not None and len(picked):
        centroids = hierarchy.levels[-1].centroids
        if centroids is not None and centroids.shape[1] != embeddings.shape[1]:
            centroids = None
        panels = [
            ("all points", embeddings[_some(subset)]),
            ("selected", embeddings[_some(subset[picked])]),
        ]
        draw_map(folder / "map.png", "Before and after", panels, centroids)
        text.append("![Points and top-level centroids, before and after](map.png)")
    return write_report(
        folder, "Balanced sample", text="\n\n".join(text), tables=[table], figures=figures
    )


def _some(rows: np.ndarray, most: int = 20_000) -> np.ndarray:
    """Evenly many of the rows, so that no more of a large map is read than is drawn."""
    return rows[:: -(-len(rows) // most)] if len(rows) > most else rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="curation",
        verb="sample",
        description="A balanced subset of clustered embeddings.",
        examples=EXAMPLES,
        flags=OPTIONS,
        accelerators=False,
        argv=argv,
    )


if __name__ == "__main__":
    main()
