"""`python -m curation.cluster`: embeddings into clusters of clusters."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from common.errors import UserError
from common.launch import Run, Table, launch, write_report
from common.sharding import barrier
from curation.clusters import Hierarchy
from curation.embeddings import Embeddings
from curation.hierarchy import HierarchyConfig, cluster_levels
from curation.hierarchy_files import is_hierarchy, load, save
from curation.inputs import open_row_numbers, open_rows
from curation.kmeans import KMeansConfig
from curation.outputs import output_folder
from curation.plots import sizes_figure
from curation.reference_files import read_reference_config

EXAMPLES = [
    "python -m curation.cluster --embeddings=features.npy --clusters=1000,100,10 "
    "--output=runs/clusters",
    "python -m curation.cluster --embeddings=billion.npy --clusters=100000,10000,1000 "
    "--resampling_steps=0,9,9 --memory=0.5 --output=runs/clusters",
    "python -m curation.cluster --embeddings=features.npy "
    "--reference_config=configs/4levels.yaml --output=runs/clusters",
]
CHECKPOINTS = "checkpoints"
LINE_SECONDS = 10.0  # between lines where there is no terminal
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
EMBEDDINGS = flags.DEFINE_string(
    "embeddings", None, "a .npy file, Parquet files, or a folder by `embed`", required=True, **_own
)
OUTPUT = flags.DEFINE_string(
    "output", None, "the folder to write; interrupted, the same command goes on there",
    required=True, **_own,
)  # fmt: skip
CLUSTERS = flags.DEFINE_list("clusters", ["1000", "100", "10"], "of each level", **_own)
RESAMPLING_STEPS = flags.DEFINE_list(
    "resampling_steps", None, "clusterings of each level after its first, or one number for all; "
    "default 0 for the lowest and 9 above", **_own,
)  # fmt: skip
SAMPLE_SIZES = flags.DEFINE_list(
    "sample_sizes", None, "members of a cluster that these take; default half the mean size", **_own
)
STRATEGY: Any = flags.DEFINE_enum(
    "strategy", "c", ["c", "r"], "they take the members closest to the centroid, or random ones",
    **_own,
)  # fmt: skip
INIT: Any = flags.DEFINE_enum(
    "init", "auto", ["auto", "k-means++", "k-means||", "random"], "where k-means starts", **_own
)
ITERATIONS = flags.DEFINE_integer("iterations", 50, "of each k-means, at the most", **_own)
TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.0, "shift of the centroids at which it ends, in mean variances", **_own
)
RESTARTS = flags.DEFINE_integer("restarts", 1, "of each k-means; the best one is kept", **_own)
EMPTY: Any = flags.DEFINE_enum(
    "empty", "keep", ["keep", "repair"], "leave centroids without members, or move them to the "
    "rows farthest from theirs", **_own,
)  # fmt: skip
NORMALIZE = flags.DEFINE_bool("normalize", False, "scale rows to unit length", **_own)
SUBSET = flags.DEFINE_string("subset", None, "a .npy file of row numbers: only these", **_own)
PRECISION: Any = flags.DEFINE_enum(
    "precision", "auto", ["auto", "bfloat16", "float32"], "of the first search for a row's "
    "centroid; winners are float32's in any case", **_own,
)  # fmt: skip
MEMORY = flags.DEFINE_float(
    "memory", 1.0, "GB of rows that a device may hold; more are read anew in each iteration", **_own
)
REFERENCE_CONFIG = flags.DEFINE_string(
    "reference_config", None, "a config.yaml of ssl-data-curation, instead of the flags for levels",
    **_own,
)  # fmt: skip
CHECKPOINT_SECONDS = flags.DEFINE_float(
    "checkpoint_seconds", 60.0, "between two states of a clustering on disk", **_own
)
SEED = flags.DEFINE_integer("seed", 0, "of all random choices", **_own)
COLUMN = flags.DEFINE_string("column", "embedding", "of Parquet files", **_own)


def _main(run: Run) -> None:
    config, subset_file = _config()
    with output_folder(OUTPUT.value) as folder:
        _cluster(folder, config, subset_file)


def _cluster(folder: Path, config: HierarchyConfig, subset_file: str | None) -> None:
    if is_hierarchy(folder):
        raise UserError(f"--output: {folder} holds clusters already; nothing is written over")
    rows = open_rows(EMBEDDINGS.value, folder, COLUMN.value)
    subset = None if subset_file is None else open_row_numbers(subset_file, len(rows))
    embeddings = Embeddings(
        rows, name=EMBEDDINGS.value, normalize=bool(NORMALIZE.value), subset=subset
    )
    if not MEMORY.value > 0:
        raise UserError(f"--memory must be positive, not {MEMORY.value}")
    started = time.perf_counter()
    with _Reporter(jax.process_index() == 0) as report:
        found = cluster_levels(
            embeddings,
            config,
            SEED.value,
            memory=int(MEMORY.value * 1e9),
            checkpoints=folder / CHECKPOINTS,
            checkpoint_seconds=CHECKPOINT_SECONDS.value,
            report=report,
        )
    if jax.process_index() == 0:
        settings = {**found.settings, "embeddings": EMBEDDINGS.value, "subset": subset_file}
        save(dataclasses.replace(found, settings=settings), folder)
        _write_report(folder, load(folder, check=False), time.perf_counter() - started)
        _remove(folder / CHECKPOINTS)
        print(f"clusters of {found.num_points} rows in {folder}")
    barrier("clusters are written")


def _config() -> tuple[HierarchyConfig, str | None]:
    """Returns what the flags or the reference's configuration say, and the file of row numbers."""
    kmeans = KMeansConfig(
        INIT.value,
        ITERATIONS.value,
        TOLERANCE.value,
        RESTARTS.value,
        EMPTY.value,
        PRECISION.value,
    )
    if REFERENCE_CONFIG.value is None:
        config = HierarchyConfig(
            tuple(_numbers("clusters", CLUSTERS.value)),
            _one_or_each("resampling_steps", RESAMPLING_STEPS.value),
            _one_or_each("sample_sizes", SAMPLE_SIZES.value),
            STRATEGY.value,
            kmeans,
        )
        return config, SUBSET.value
    read = read_reference_config(REFERENCE_CONFIG.value)
    config = HierarchyConfig(
        read.clusters,
        # There the first clustering counts as a step.
        tuple(max(0, steps - 1) for steps in read.resampling_steps),
        read.sample_sizes,
        "r" if read.strategy == "r" else "c",
        dataclasses.replace(kmeans, iterations=read.iterations),
        splits=read.splits,
    )
    return config, SUBSET.value or read.subset


def _numbers(flag: str, texts: Sequence[str]) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise UserError(
            f"--{flag} takes whole numbers, one for each level: 1000,100,10, not {','.join(texts)}"
        ) from error


def _one_or_each(flag: str, texts: Sequence[str] | None) -> int | tuple[int, ...] | None:
    if texts is None:
        return None
    numbers = _numbers(flag, texts)
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


class _Reporter:
    """Shows what goes on, how far it is, and how long it will take: a bar, or lines."""

    def __init__(self, active: bool):
        self._active = active
        self._what = ""
        self._bar: Any = None
        self._printed = self._began = 0.0
        self._first = 0

    def __enter__(self) -> "_Reporter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, what: str, done: int, whole: int) -> None:
        if not self._active:
            return
        if what != self._what:
            self._begin(what, done, whole)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        now = time.perf_counter()
        if now - self._printed < LINE_SECONDS:
            return
        self._printed = now
        left = ""
        if done > self._first:
            seconds = (now - self._began) / (done - self._first) * (whole - done)
            left = f"  at most {round(seconds)} s left"
        print(f"{what} {done}/{whole}{left}", flush=True)

    def _begin(self, what: str, done: int, whole: int) -> None:
        self._what, self._first, self._began = what, done, time.perf_counter()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=what, total=whole, initial=done, dynamic_ncols=True, leave=False)


def _write_report(folder: Path, found: Hierarchy, seconds: float) -> None:
    rows = []
    for number, level in enumerate(found.levels, 1):
        sizes = level.sizes
        rows.append(
            (
                number,
                level.num_members,
                level.num_clusters,
                int(np.sum(sizes == 0)),
                int(sizes.min()),
                float(np.median(sizes)),
                int(sizes.max()),
                float(np.sum(level.distances, dtype=np.float64)),
            )
        )
    columns = ("level", "members", "clusters", "empty", "smallest", "median", "largest", "inertia")
    write_report(
        folder / "report",
        "Clusters",
        text=f"{found.num_points} rows in {seconds:.0f} s",
        tables=[Table("Levels", columns, rows)],
        figures=[sizes_figure(found)],
    )


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    if folder.is_dir():
        folder.rmdir()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="curation",
        verb="cluster",
        description="Divides embeddings into clusters, these into clusters of clusters, and so on.",
        examples=EXAMPLES,
        flags=OPTIONS,
        several_processes=True,
        argv=argv,
    )


if __name__ == "__main__":
    main()
