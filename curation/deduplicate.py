"""`python -m curation.deduplicate`: near-duplicates, and what is near a benchmark, left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from common.errors import UserError
from common.launch import Figure, Line, Run, Table, launch, write_report
from curation.deduplication import decontaminate, duplicate_components
from curation.hierarchy_files import load
from curation.inputs import open_rows
from curation.outputs import output_folder, write_outputs
from curation.progress import progress_bar

EXAMPLES = [
    "python -m curation.deduplicate --embeddings=features.npy --threshold=0.6 --output=runs/unique",
    "python -m curation.deduplicate --embeddings=features.npy --threshold=0.6 "
    "--references=imagenet-val.npy --reference_threshold=0.45 --output=runs/unique",
    "python -m curation.deduplicate --embeddings=billion.npy --threshold=0.9 "
    "--clusters=runs/clusters --output=runs/unique",
]
KEPT, COMPONENTS, SETTINGS = "kept.npy", "components.npy", "deduplication.json"
OPTIONS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": OPTIONS}
EMBEDDINGS = flags.DEFINE_string(
    "embeddings", None, "a .npy file, Parquet files, or a folder by `embed`", required=True, **_own
)
OUTPUT = flags.DEFINE_string("output", None, "the folder to write", required=True, **_own)
THRESHOLD = flags.DEFINE_float(
    "threshold", 0.6, "cosine above which two rows are duplicates (0.6: DINOv2, copy-detection "
    "embeddings)", **_own,
)  # fmt: skip
REFERENCES = flags.DEFINE_multi_string(
    "references", None, "embeddings of a benchmark: what hangs together with them goes; repeatable",
    **_own,
)  # fmt: skip
REFERENCE_THRESHOLD = flags.DEFINE_float(
    "reference_threshold", 0.45, "cosine above which a row is near a benchmark's", **_own
)
CLUSTERS = flags.DEFINE_string(
    "clusters", None, "compare only rows of one cluster, for pools too large for all pairs", **_own
)
LEVEL = flags.DEFINE_integer("level", 1, "which level of --clusters, from 1", **_own)
COLUMN = flags.DEFINE_string("column", "embedding", "of Parquet files", **_own)


def _main(run: Run) -> None:
    with output_folder(OUTPUT.value, KEPT, COMPONENTS) as folder:
        _deduplicate(folder)


def _deduplicate(folder: Path) -> None:
    x = open_rows(EMBEDDINGS.value, folder, COLUMN.value)
    references = [open_rows(path, folder, COLUMN.value) for path in REFERENCES.value or ()]
    groups = None
    if CLUSTERS.value is not None:
        groups = load(Path(CLUSTERS.value).expanduser()).point_labels(LEVEL.value)
        if len(groups) != len(x):
            raise UserError(f"--clusters are of {len(groups)} points, but there are {len(x)} rows")
    with progress_bar("duplicates") as progress:
        components = duplicate_components(x, THRESHOLD.value, groups=groups, progress=progress)
    first = components == np.arange(len(components))
    clean = np.ones(len(x), bool)
    for path, reference in zip(REFERENCES.value or (), references):
        with progress_bar(Path(path).name) as progress:
            left = decontaminate(
                x, reference, REFERENCE_THRESHOLD.value, components=components, progress=progress
            )
        clean &= np.isin(np.arange(len(x)), left)
    kept = np.flatnonzero(first & clean)
    counts = {"rows": len(x), "components": int(first.sum()), "kept": len(kept)}
    settings = {
        **counts,
        "threshold": THRESHOLD.value,
        "references": list(REFERENCES.value or ()),
        "reference_threshold": REFERENCE_THRESHOLD.value,
        "clusters": CLUSTERS.value,
    }
    write_outputs(folder, {COMPONENTS: components, KEPT: kept}, SETTINGS, settings)
    page = _report(folder / "report", components, counts)
    print(
        f"{len(kept):,} of {len(x):,} rows: {folder / KEPT}\nreport: {page}\n"
        f"{len(x) - counts['components']:,} near-duplicates and "
        f"{counts['components'] - len(kept):,} more that are near a benchmark are left out"
    )


def _report(folder: Path, components: np.ndarray, counts: dict[str, int]) -> Path:
    sizes = np.bincount(np.unique(components, return_inverse=True)[1])
    of_size = np.bincount(sizes)
    present = np.flatnonzero(of_size)
    figure = Figure(
        "components",
        "Components of near-duplicates",
        "rows in a component",
        "components",
        [Line("components", present.tolist(), of_size[present].tolist())],
        log_x=True,
        log_y=True,
    )
    table = Table(
        "Counts",
        ("rows", "components", "kept", "largest component"),
        [(*counts.values(), int(sizes.max(initial=0)))],
    )
    return write_report(folder, "Near-duplicates", tables=[table], figures=[figure])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the launcher."""
    launch(
        _main,
        package="curation",
        verb="deduplicate",
        description="One row kept of each component of near-duplicates.",
        examples=EXAMPLES,
        flags=OPTIONS,
        argv=argv,
    )


if __name__ == "__main__":
    main()
