"""k-means beside faiss, scikit-learn and the algorithm of the paper's own code.

    python -m benchmarks.curation [--shape 65536,1024,256] [--iterations 10]

"the same start" gives all of them the same rows to start from and the same number of Lloyd's
iterations: what they compute is the same, and checked to be. "from nothing" lets each one seed as
it does by default; scikit-learn's mini-batches are in this table, and the inertia says at what
price. "to equal quality" gives faiss its default number of iterations and ours as few as end no
higher. faiss and torch take part if they are installed. Results go to `benchmarks/results/`.

On a machine with other work `--clock processor` counts one thread's processor time instead of the
wall clock: what each of them has to compute, however well it spreads that over cores.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

import curation
from benchmarks import harness
from common.errors import UserError

OURS = "curation.kmeans (ours)"
GOALS = "goals: ours at least as fast as faiss (twice with bf16 matrix units), 3 × the others"
# Inertia of the same iterations from the same start may differ by rounding, and what follows it.
_AGREEMENT = 1e-3
Contenders = dict[str, Callable[[], float]]


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="65536,1024,256", help="rows, clusters, dimensions")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--same-start-only", action="store_true", help="leave seeding out")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--name", default="curation", help="stem of the result files")
    flags = parser.parse_args(arguments)
    try:
        with _one_thread() if flags.clock == "processor" else contextlib.nullcontext():
            path = _run(flags)
    except UserError as error:
        print(f"benchmarks.curation: {error}", file=sys.stderr)
        return 2
    print(path.read_text())
    print(f"written to {path}")
    return 0


def _run(flags: argparse.Namespace) -> Path:
    try:
        rows, clusters, width = (int(size) for size in flags.shape.split(","))
    except ValueError:
        rows = clusters = width = 0
    if min(rows, clusters, width) < 1 or clusters > rows:
        raise UserError(
            f"--shape needs rows,clusters,dimensions, such as 65536,1024,256; got {flags.shape}"
        )
    x = draw(rows, 2 * clusters, width)
    start = x[np.random.default_rng(1).choice(rows, clusters, replace=False)]
    same = _same_start(x, start, flags.iterations)
    inertia = {name: run() for name, run in same.items()}
    worst = max(abs(value / inertia[OURS] - 1) for value in inertia.values())
    if not worst < _AGREEMENT:
        raise UserError(f"the same start ends elsewhere: {inertia}")
    notes = [
        f"[N, K, D] = {[rows, clusters, width]}, {flags.iterations} iterations, float32",
        f"the same start: inertia agrees to {worst:.0e}",
        GOALS,
    ]
    if flags.clock == "processor":
        notes += ["seconds of one thread's processor time, on one core"]
    clock = time.process_time if flags.clock == "processor" else time.perf_counter
    measured = harness.measure(same, baseline=OURS, repeats=flags.repeats, warmup=0, clock=clock)
    sections = [harness.Section("the same start", OURS, measured)]
    if flags.same_start_only:
        return harness.write_report(
            flags.name, "k-means", sections, notes=notes, directory=flags.output
        )
    own = _from_nothing(x, clusters, flags.iterations)
    found = {name: run() for name, run in own.items()}
    notes += [f"from nothing: inertia of {_against(found)}"]
    measured = harness.measure(own, baseline=OURS, repeats=flags.repeats, warmup=0, clock=clock)
    sections.append(harness.Section("from nothing", OURS, measured))
    if (peers := _faiss_starts(x, clusters)) and (equal := _equal_quality(x, clusters, peers)):
        contenders, note = equal
        notes += [note]
        measured = harness.measure(
            contenders, baseline=OURS, repeats=flags.repeats, warmup=0, clock=clock
        )
        sections.append(harness.Section("to equal quality", OURS, measured))
    return harness.write_report(
        flags.name, "k-means", sections, notes=notes, directory=flags.output
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Confines this process to one core, and libraries to one thread on it, before JAX starts."""
    from threadpoolctl import threadpool_limits

    allowed = os.sched_getaffinity(0)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.sched_setaffinity(0, {max(allowed)})
    try:
        with threadpool_limits(1):
            if importlib.util.find_spec("torch") is not None:
                import torch

                torch.set_num_threads(1)
            yield
    finally:
        os.sched_setaffinity(0, allowed)


def draw(rows: int, modes: int, width: int) -> np.ndarray:
    """Returns float32 `[N, D]`: a mixture of Gaussians whose weights fall as those of concepts."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, modes + 1)
    which = rng.choice(modes, rows, p=weights / weights.sum())
    centres = rng.normal(size=(modes, width)).astype(np.float32)
    return centres[which] + rng.normal(size=(rows, width)).astype(np.float32)


def inertia_of(x: np.ndarray, centroids: np.ndarray) -> float:
    """Returns the sum of squared distances to the nearest centroid, by scikit-learn."""
    from sklearn.metrics import pairwise_distances_argmin_min

    _, distances = pairwise_distances_argmin_min(x, centroids)
    return float(np.square(distances, dtype=np.float64).sum())


def _against(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value / found[OURS]:.4f} × ours" for name, value in found.items())


def _same_start(x: np.ndarray, start: np.ndarray, iterations: int) -> Contenders:
    from sklearn.cluster import KMeans

    clusters = len(start)

    def ours() -> float:
        return curation.kmeans(
            x, clusters, init=start, iterations=iterations, tolerance=0, empty="keep"
        ).inertia

    def scikit_learn() -> float:
        model = KMeans(clusters, init=start, n_init=1, max_iter=iterations, tol=0)
        return float(model.fit(x).inertia_)

    return {OURS: ours, "scikit-learn KMeans": scikit_learn} | _optional(x, start, iterations)


def _optional(x: np.ndarray, start: np.ndarray, iterations: int) -> Contenders:
    contenders: Contenders = {}
    if importlib.util.find_spec("faiss") is not None:
        contenders["faiss Kmeans"] = lambda: _faiss(x, len(start), iterations, start)
    if importlib.util.find_spec("torch") is not None:
        from benchmarks.peers.kmeans_torch import lloyd

        contenders["the paper's algorithm in torch"] = lambda: lloyd(x, start, iterations)
    return contenders


def _faiss(
    x: np.ndarray, clusters: int, iterations: int, start: np.ndarray | None, **options: int
) -> float:
    import faiss

    model = faiss.Kmeans(
        x.shape[1],
        clusters,
        niter=iterations,
        max_points_per_centroid=len(x),  # By default it looks at 256 rows a cluster.
        min_points_per_centroid=1,
        **options,
    )
    model.train(x, init_centroids=start)
    distances, _ = model.index.search(x, 1)
    return float(distances.sum(dtype=np.float64))


def _from_nothing(x: np.ndarray, clusters: int, iterations: int) -> Contenders:
    from sklearn.cluster import KMeans, MiniBatchKMeans

    def scikit_learn() -> float:
        model = KMeans(clusters, n_init=1, max_iter=iterations, tol=0, random_state=0)
        return float(model.fit(x).inertia_)

    def mini_batches() -> float:
        model = MiniBatchKMeans(clusters, n_init=1, random_state=0, batch_size=4096)
        return float(model.fit(x).inertia_)

    contenders: Contenders = {
        OURS: lambda: curation.kmeans(x, clusters, iterations=iterations, tolerance=0).inertia,
        "scikit-learn KMeans": scikit_learn,
        "scikit-learn MiniBatchKMeans": mini_batches,
    }
    return contenders | _faiss_starts(x, clusters, iterations)


def _faiss_starts(x: np.ndarray, clusters: int, iterations: int = 25) -> Contenders:
    """faiss from each start that it has; 25 iterations are its default."""
    if importlib.util.find_spec("faiss") is None:
        return {}
    import faiss

    options = {"random rows": {}}
    if (init := getattr(faiss, "ClusteringInitMethod_KMEANS_PLUS_PLUS", None)) is not None:
        options["k-means++"] = {"init_method": init}
    return {
        f"faiss Kmeans ({name})": functools.partial(_faiss, x, clusters, iterations, None, **more)
        for name, more in options.items()
    }


def _equal_quality(
    x: np.ndarray, clusters: int, peers: Contenders
) -> tuple[Contenders, str] | None:
    """Ours with as few iterations as end no higher than the best of the peers, and the peers.

    None if no number of iterations up to theirs does.
    """
    found = {name: run() for name, run in peers.items()}
    best = min(found.values())
    for iterations in (1, 2, 3, 5, 10, 25):

        def ours(iterations: int = iterations) -> float:
            return curation.kmeans(x, clusters, iterations=iterations, tolerance=0).inertia

        if (inertia := ours()) <= best:
            note = (
                "to equal quality: faiss with its default of 25 iterations, ours with as few as "
                f"end no higher than the best of them: {iterations}; inertia of "
                f"{_against({OURS: inertia} | found)}"
            )
            return {OURS: ours} | peers, note
    return None


if __name__ == "__main__":
    sys.exit(main())
