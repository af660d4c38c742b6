"""`python -m curation.retrieve`: what in a pool resembles a small data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from common.errors import UserError
from common.launch import Run, launch
from curation.hierarchy_files import load
from curation.inputs import open_rows
from curation.outputs import output_folder, write_outputs
from curation.progress import progress_bar
from curation.retrieval import retrieve_clusters
from curation.similarity import nearest_neighbours

EXAMPLES = [
    "python -m curation.retrieve --queries=flowers.npy --embeddings=pool.npy --k=4 "
    "--output=runs/flowers",
    "python -m curation.retrieve --queries=flowers.npy --embeddings=pool.npy "
    "--clusters=runs/clusters --output=runs/flowers",
    "python -m curation.retrieve --queries=flowers.npy --embeddings=pool.npy "
    "--clusters=runs/clusters --level=2 --per_cluster=1000 --more_than=0 --output=runs/flowers",
]
RETRIEVED, NEIGHBOURS, SIMILARITIES = "retrieved.npy", "neighbours.npy", "similarities.npy"
SETTINGS = "retrieval.json"
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
QUERIES = flags.DEFINE_string(
    "queries", None, "embeddings of the small data set: .npy, Parquet, or a folder by `embed`",
    required=True, **_own,
)  # fmt: skip
EMBEDDINGS = flags.DEFINE_string(
    "embeddings", None, "those of the pool, by the same model", required=True, **_own
)
OUTPUT = flags.DEFINE_string("output", None, "the folder to write", required=True, **_own)
K = flags.DEFINE_integer("k", 4, "neighbours of each query", **_own)
CLUSTERS = flags.DEFINE_string(
    "clusters", None, "the pool's clusters: retrieve by cluster instead of by neighbours", **_own
)
LEVEL = flags.DEFINE_integer("level", 1, "which level of --clusters, from 1", **_own)
PER_CLUSTER = flags.DEFINE_integer("per_cluster", 10_000, "most points of a cluster", **_own)
MORE_THAN = flags.DEFINE_integer("more_than", 3, "queries that a cluster must exceed", **_own)
AT_MOST = flags.DEFINE_integer("at_most", 1_000_000, "most points of all clusters", **_own)
SEED = flags.DEFINE_integer("seed", 0, "of the random choice in clusters", **_own)
COLUMN = flags.DEFINE_string("column", "embedding", "of Parquet files", **_own)


def _main(run: Run) -> None:
    with output_folder(OUTPUT.value, RETRIEVED, NEIGHBOURS, SIMILARITIES) as folder:
        _retrieve(folder)


def _retrieve(folder: Path) -> None:
    queries = open_rows(QUERIES.value, folder, COLUMN.value)
    pool = open_rows(EMBEDDINGS.value, folder, COLUMN.value)
    settings: dict[str, Any] = {"queries": len(queries), "pool": len(pool)}
    if CLUSTERS.value is None:
        with progress_bar("neighbours") as progress:
            found = nearest_neighbours(queries, pool, K.value, progress=progress)
        arrays = {
            NEIGHBOURS: found.indices,
            SIMILARITIES: found.similarities,
            RETRIEVED: np.unique(found.indices),
        }
        settings |= {"k": K.value}
    else:
        hierarchy = load(Path(CLUSTERS.value).expanduser())
        if hierarchy.num_points != len(pool):
            raise UserError(
                f"--clusters are of {hierarchy.num_points} points, but the pool has {len(pool)}"
            )
        options = {
            "level": LEVEL.value,
            "per_cluster": PER_CLUSTER.value,
            "more_than": MORE_THAN.value,
            "at_most": AT_MOST.value,
            "seed": SEED.value,
        }
        arrays = {RETRIEVED: retrieve_clusters(queries, hierarchy, **options)}
        settings |= {"clusters": CLUSTERS.value, **options}
    retrieved = arrays[RETRIEVED]
    write_outputs(folder, arrays, SETTINGS, {**settings, "retrieved": len(retrieved)})
    print(
        f"written to {folder / RETRIEVED}\n"
        f"{len(retrieved):,} of {len(pool):,} rows resemble the {len(queries):,} queries"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="curation",
        verb="retrieve",
        description="Rows of a pool that resemble a small data set.",
        examples=EXAMPLES,
        flags=OPTIONS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
