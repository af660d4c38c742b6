"""`kmeans`: seeds, Lloyd's iterations, restarts; rows on one device, a mesh, or in a file."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from common.errors import UserError
from common.sharding import make_mesh
from curation import seeding
from curation.assignment import Precision
from curation.checkpointing import Checkpoints
from curation.device_rows import DeviceRows
from curation.embeddings import Centred, Embeddings, open_embeddings, scan
from curation.lloyd import Empty, LloydConfig, lloyd
from curation.scalable_seeding import scalable_seeds
from curation.seeding import Init

# Of narrower rows a product is no larger a part of the search than what surrounds it.
_BFLOAT16_FROM = 32
Report = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class KMeans:
    """What k-means found.

    Attributes:
      centroids: float32 `[K, D]`.
      labels: the nearest centroid of each row, int32 `[N]`; the lower one of equally near ones.
      inertia: the sum of `distances`.
      distances: squared Euclidean distance of each row to its centroid, float32 `[N]`.
      iterations: of the run that was kept.
      converged: whether it ended before its iterations were used up.
    """

    centroids: np.ndarray
    labels: np.ndarray
    inertia: float
    distances: np.ndarray
    iterations: int
    converged: bool


@dataclasses.dataclass(frozen=True)
class KMeansConfig:
    """How to find K clusters.

    Attributes:
      init: "k-means++" (greedy, over a sample where there are very many rows), "k-means||" (the
        same over candidates drawn from all rows in a few passes), "random" rows, or "auto":
        k-means++ up to 2048 clusters, for more k-means|| over that sample.
      iterations: of Lloyd's algorithm, at the most.
      tolerance: stop when centroids move less; as a part of the mean variance of a dimension, as
        scikit-learn has it. 0 stops only when no row changes its cluster.
      restarts: how many times to start, from other seeds; the least inertia is kept.
      empty: "repair" moves centroids without rows to the rows farthest from theirs, "keep" leaves
        them where they are.
      precision: of the first search: "bfloat16", "float32", or "auto", bfloat16 for rows of 32
        dimensions and more. Winners and distances are float32's in any case.
    """

    init: Init = "auto"
    iterations: int = 50
    tolerance: float = 1e-4
    restarts: int = 1
    empty: Empty = "repair"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("init", ("auto", "k-means++", "k-means||", "random")),
            ("empty", ("repair", "keep")),
            ("precision", ("auto", "bfloat16", "float32")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is one of {', '.join(choices)}, not {getattr(self, name)}")
        if self.iterations < 0 or self.restarts < 1 or not self.tolerance >= 0:
            raise UserError(
                "k-means needs iterations of 0 or more, restarts of 1 or more and a tolerance of 0 "
                f"or more, not {self.iterations}, {self.restarts} and {self.tolerance}"
            )


def kmeans(
    x: Any,
    k: int,
    seed: int = 0,
    *,
    init: Init | np.ndarray = "auto",
    iterations: int = 50,
    tolerance: float = 1e-4,
    restarts: int = 1,
    empty: Empty = "repair",
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
    normalize: bool = False,
    mesh: Mesh | None = None,
    memory: int | None = None,
    checkpoints: str | Path | None = None,
    report: Report | None = None,
) -> KMeans:
    """Finds K centroids so that the squared distances of all rows to the nearest are small.

    The result follows from the rows, the arguments and the seed alone: not from the mesh, from
    `memory`, or from interruptions.

    Args:
      x: embeddings `[N, D]`: an array, a memory map, or the path of a `.npy` file, which need not
        fit into memory.
      k: how many clusters, at most N.
      seed: of the seeding.
      init: see `KMeansConfig`; or centroids to start from `[K, D]`.
      iterations, tolerance, restarts, empty, precision: see `KMeansConfig`.
      normalize: scale rows to unit length first.
      mesh: whose devices divide the rows, on all its axes; None for all devices.
      memory: bytes of rows that a device may hold, a gigabyte by default; larger data is read anew
        in every iteration.
      checkpoints: a folder. Interrupted and called again with the same arguments, the clustering
        goes on from there.
      report: called with what is being done, how much of it is done, and how much there is.

    Raises:
      UserError: rows that cannot be clustered, or arguments that make no sense.
    """
    start = None if isinstance(init, str) else np.asarray(init)
    config = KMeansConfig(
        "random" if start is not None else init, iterations, tolerance, restarts, empty, precision
    )
    if start is not None and restarts > 1:
        raise UserError("restarts from given centroids would all be the same: leave restarts at 1")
    embeddings = open_embeddings(x, normalize=normalize)
    check_clusters(k, embeddings, seed)
    if start is not None and start.shape != (k, embeddings.width):
        raise UserError(
            f"init must be [{k}, {embeddings.width}] like the centroids, not {list(start.shape)}"
        )
    data = scan(embeddings)
    kept = None
    if checkpoints is not None:
        settings = {"data": data.settings, "k": k, "seed": seed} | dataclasses.asdict(config)
        if start is not None:
            settings["init"] = zlib.crc32(np.ascontiguousarray(start).tobytes())
        kept = Checkpoints(Path(checkpoints), settings)
    return cluster_rows(
        DeviceRows(data, mesh or make_mesh(), memory=memory),
        k,
        (seed,),
        config,
        start=start,
        checkpoints=kept,
        report=report,
    )


def cluster_rows(
    rows: DeviceRows,
    k: int,
    seed: Sequence[int],
    config: KMeansConfig,
    *,
    start: np.ndarray | None = None,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
) -> KMeans:
    """As `kmeans`, of rows that have been looked through and laid out."""
    data = rows.data
    precision = resolve_precision(config.precision, data)
    tolerance = config.tolerance * data.variance
    iterate = LloydConfig(config.iterations, tolerance, config.empty, precision)
    best: KMeans | None = None
    for number in range(config.restarts):
        states = checkpoints
        if checkpoints is not None and config.restarts > 1:
            states = checkpoints.below(f"restart{number}", {"restart": number})
        if start is not None:
            centroids = np.asarray(start - data.centre, np.float32)
        else:
            centroids = _seeds(rows, k, (*seed, number), config.init, precision, states, report)
        found = lloyd(rows, centroids, iterate, checkpoints=states, report=report)
        if best is None or found.assignment.inertia < best.inertia:
            best = KMeans(
                found.centroids + data.centre,
                found.assignment.labels,
                found.assignment.inertia,
                found.assignment.distances,
                found.iterations,
                found.converged,
            )
    assert best is not None
    return best


def check_clusters(k: Any, embeddings: Embeddings, seed: Any) -> None:
    """Raises UserError unless rows can be divided into K clusters."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise UserError(f"the number of clusters must be a whole number from 1, not {k}")
    if k > embeddings.rows:
        raise UserError(
            f"{k} clusters need at least as many rows, but {embeddings.name} has {embeddings.rows}"
        )
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UserError(f"seed must be a whole number from 0, not {seed}")


def resolve_precision(precision: str, data: Centred) -> Precision:
    """Returns what "auto" means for such rows."""
    if precision == "auto":
        return "bfloat16" if data.width >= _BFLOAT16_FROM else "float32"
    return "float32" if precision == "float32" else "bfloat16"


def _seeds(
    rows: DeviceRows,
    k: int,
    seed: tuple[int, ...],
    init: Init,
    precision: Precision,
    checkpoints: Checkpoints | None,
    report: Report | None,
) -> np.ndarray:
    """Returns centroids to start from, `[K, D]`, the same in every process."""
    if checkpoints and (kept := checkpoints.load("seeds")) is not None:
        return kept["seeds"]
    if init == "auto" and k > seeding.MOST_STEPS:
        init = "k-means||"
        sample = seeding.sample_rows(rows.data.rows, k, seed)
        if len(sample) < rows.data.rows:
            rows = DeviceRows(rows.data.subset(sample), rows.mesh, memory=rows.memory)
    if init == "random":
        found = seeding.random_seeds(rows.data, k, seed)
    elif init == "k-means||":
        found = scalable_seeds(rows, k, seed, precision, report=report)
    else:
        found = seeding.plus_plus_seeds(rows.data, k, seed, checkpoints=checkpoints, report=report)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        found = np.asarray(multihost_utils.broadcast_one_to_all(found))
    if checkpoints:
        checkpoints.save("seeds", seeds=found)
        checkpoints.remove("seeding")
    return found
