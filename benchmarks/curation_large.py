"""A million embeddings clustered from disk in little memory; killed on the way, and taken up again.

    python -m benchmarks.curation_large [--shape 1000000,10000,256] [--iterations 4] [--folder DIR]

Writes float32 embeddings `[N, D]` to `DIR`, runs `python -m curation.cluster` on them, kills it
with SIGKILL once it has written a state between two iterations, runs the same command again to its
end, and holds some rows' centroids against a search through all of them in float64. The table in
`benchmarks/results/` has the seconds, the rate, and the most memory that either process held: with
mapped parts of files, and without. What was written to `DIR` is removed at the end.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import curation
from benchmarks import harness
from common.errors import UserError

_PART = 50_000  # rows drawn at a time
_CHECKED = 2_000  # rows held against a search through all centroids
_STATE = Path("checkpoints", "level1_step0", "lloyd.npz")
_PROGRESS = re.compile(r"rows of an iteration (\d+)/")


@dataclass(frozen=True)
class Ended:
    """What one run of the command took.

    Attributes:
        seconds: Wall clock.
        resident: The most memory resident at a time, bytes, with mapped files.
        own: Likewise without them.
        rates: Rows a second between two lines of progress inside one iteration.
        code: As the process ended.
    """

    seconds: float
    resident: int
    own: int
    rates: list[float]
    code: int


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1000000,10000,256", help="rows, clusters, dimensions")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--memory", type=float, default=0.5, help="GB of rows on the device")
    parser.add_argument("--folder", help="where the embeddings go; default a temporary one")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--name", default="curation_large", help="stem of the result files")
    flags = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
            path = _run(flags, Path(folder))
    except UserError as error:
        print(f"benchmarks.curation_large: {error}", file=sys.stderr)
        return 2
    print(path.read_text())
    print(f"written to {path}")
    return 0


def _run(flags: argparse.Namespace, folder: Path) -> Path:
    try:
        rows, clusters, width = (int(size) for size in flags.shape.split(","))
    except ValueError:
        rows = clusters = width = 0
    if min(rows, clusters, width) < 1 or clusters > rows or flags.iterations < 2:
        raise UserError(
            "--shape needs rows,clusters,dimensions, such as 1000000,10000,256, and --iterations "
            f"at least 2; got {flags.shape} and {flags.iterations}"
        )
    embeddings, output = folder / "embeddings.npy", folder / "clusters"
    write(embeddings, rows, clusters, width)
    command = [
        *(sys.executable, "-m", "curation.cluster"),
        f"--embeddings={embeddings}",
        f"--output={output}",
        f"--clusters={clusters}",
        f"--iterations={flags.iterations}",
        f"--memory={flags.memory}",
        "--checkpoint_seconds=0",
    ]
    killed = run(command, until=output / _STATE)
    if killed.code != -signal.SIGKILL or (output / "manifest.json").exists():
        raise UserError(f"the first run was to be killed on its way; it ended with {killed.code}")
    resumed = run(command)
    if resumed.code:
        raise UserError(f"taken up again, the command ended with {resumed.code}")
    differing = check(embeddings, output)
    rates = killed.rates + resumed.rates
    rate = float(np.median(rates)) if rates else float("nan")
    lines = [
        f"[N, K, D] = {[rows, clusters, width]}, float32: {4e-9 * rows * width:.2f} GB on disk; "
        f"{flags.iterations} iterations at the most, {flags.memory} GB of rows on the device",
        f"killed by SIGKILL once the first iteration was on disk, after {killed.seconds:.0f} s "
        f"(seeding included); most memory {_memory(killed)}",
        f"taken up again, it ended after {resumed.seconds:.0f} s; most memory {_memory(resumed)}",
        f"inside an iteration {rate:,.0f} rows/s, {2e-9 * rate * clusters * width:.0f} GFLOP/s "
        f"(median of {len(rates)} stretches of ten seconds)",
        f"of {min(_CHECKED, rows)} rows {differing} have another centroid than a search in float64",
    ]
    return harness.write_report(
        flags.name, "k-means streamed from disk", [], notes=lines, directory=flags.output
    )


def write(path: Path, rows: int, clusters: int, width: int) -> None:
    """Writes a mixture of Gaussians, half as many as clusters, a part at a time."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, clusters // 2), width)).astype(np.float32)
    array = np.lib.format.open_memmap(path, "w+", np.float32, (rows, width))
    for start in range(0, rows, _PART):
        part = rng.standard_normal((min(_PART, rows - start), width), np.float32)
        which = rng.integers(len(centres), size=len(part))
        array[start : start + len(part)] = part + centres[which]
    array.flush()


def run(command: list[str], until: Path | None = None) -> Ended:
    """Runs a command to its end, or kills it once a file is there; shows what it prints."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    rates: list[float] = []
    reader = threading.Thread(target=_read, args=(process, rates))
    reader.start()
    own = 0
    while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        own = max(own, _own_memory(process.pid))
        if until is not None and until.exists():
            process.send_signal(signal.SIGKILL)
            until = None
        time.sleep(0.1)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    seconds = time.perf_counter() - start
    return Ended(seconds, 1024 * usage.ru_maxrss, own, rates, process.returncode)


def check(embeddings: Path, output: Path) -> int:
    """Returns how many of some rows have another centroid than the nearest in float64.

    Raises:
        UserError: The result is not whole, or its centroids do not lie where they should.
    """
    level = curation.load(output).levels[0]
    x = np.load(embeddings, mmap_mode="r")
    if level.num_members != len(x) or int(level.sizes.sum()) != len(x):
        raise UserError(f"{level.num_members} of {len(x)} rows are in clusters")
    some = np.sort(np.random.default_rng(1).permutation(len(x))[:_CHECKED])
    labels = level.labels()[some]
    centroids = np.asarray(level.centroids, np.float64)
    half = 0.5 * np.square(centroids).sum(axis=1)
    nearest = np.argmin(half - x[some].astype(np.float64) @ centroids.T, axis=1)
    return int(np.sum(nearest != labels))


def _read(process: subprocess.Popen[str], rates: list[float]) -> None:
    before: tuple[int, float] | None = None
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        found = _PROGRESS.search(line)
        now = (int(found[1]), time.perf_counter()) if found else None
        if now and before and now[0] > before[0]:
            rates.append((now[0] - before[0]) / (now[1] - before[1]))
        before = now


def _own_memory(process: int) -> int:
    """Returns bytes of resident memory that are no file's, where Linux tells them."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


def _memory(ended: Ended) -> str:
    return f"{ended.resident / 1e9:.2f} GB resident, {ended.own / 1e9:.2f} GB without mapped files"


if __name__ == "__main__":
    sys.exit(main())
