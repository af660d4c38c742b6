"""Nearest centroid: ours against the full matrix of distances, in JAX and in torch.

    python -m benchmarks.nearest_centroid [--shape 16384,4096,256] [--dtypes float32,bfloat16]

The baseline is the product of all rows and centroids alone, which no exact search does without;
ours may be faster, for it need not store it. torch takes part if it is installed. Results go to
`benchmarks/results/`.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from common.errors import UserError
from common.kernels import nearest_centroid

_PRODUCT = "x @ c.T"


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="16384,4096,256", help="rows, centroids, dimensions")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--name", default="nearest_centroid", help="stem of the result files")
    flags = parser.parse_args(arguments)
    try:
        path = _run(flags)
    except UserError as error:
        print(f"benchmarks.nearest_centroid: {error}", file=sys.stderr)
        return 2
    print(path.read_text())
    print(f"written to {path}")
    return 0


def _run(flags: argparse.Namespace) -> Path:
    try:
        rows, centroids, width = (int(size) for size in flags.shape.split(","))
    except ValueError:
        rows = centroids = width = 0
    if min(rows, centroids, width) < 1:
        raise UserError(
            f"--shape needs rows,centroids,dimensions, such as 16384,4096,256; got {flags.shape}"
        )
    sections = []
    for dtype in flags.dtypes.split(","):
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtypes may hold float32 and bfloat16; got {dtype}")
        keys = jax.random.split(jax.random.key(0))
        x, c = (
            jax.random.normal(key, (size, width)).astype(dtype)
            for key, size in zip(keys, (rows, centroids))
        )
        contenders = _contenders(x, c) | _torch_contenders(x, c)
        _check(contenders)
        measured = harness.measure(contenders, baseline=_PRODUCT, repeats=flags.repeats)
        sections.append(harness.Section(dtype, _PRODUCT, measured))
    notes = [
        f"shape [N, K, D] = {[rows, centroids, width]}; index and squared distance of each row"
    ]
    return harness.write_report(
        flags.name, "Nearest centroid", sections, notes=notes, directory=flags.output
    )


def product(x: jax.Array, c: jax.Array) -> jax.Array:
    """Returns `x c^T` `[N, K]` in float32."""
    return jax.lax.dot_general(x, c, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def full_matrix(x: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the nearest centroids as one would write it first."""
    norms = (jnp.sum(jnp.square(array.astype(jnp.float32)), axis=1) for array in (x, c))
    rows, centroids = norms
    distances = rows[:, None] + centroids - 2 * product(x, c)
    return jnp.argmin(distances, axis=1), jnp.maximum(jnp.min(distances, axis=1), 0)


def _contenders(x: jax.Array, c: jax.Array) -> dict[str, Callable[[], object]]:
    programs = {
        _PRODUCT: product,
        "nearest_centroid (ours)": nearest_centroid,
        "JAX, full matrix": full_matrix,
    }
    return {name: _bound(jax.jit(program), x, c) for name, program in programs.items()}


def _torch_contenders(x: jax.Array, c: jax.Array) -> dict[str, Callable[[], object]]:
    if importlib.util.find_spec("torch") is None or jax.default_backend() != "cpu":
        return {}
    import torch

    dtype = getattr(torch, x.dtype.name)
    rows, centroids = (
        torch.from_numpy(np.array(array.astype(jnp.float32))).to(dtype) for array in (x, c)
    )

    @torch.no_grad()
    def cdist() -> tuple[object, object]:
        distance, index = torch.cdist(rows, centroids).min(dim=1)
        return index, distance.square()

    @torch.no_grad()
    def expanded() -> tuple[object, object]:
        norms = centroids.float().square().sum(dim=1)
        scores, index = torch.addmm(norms.to(dtype), rows, centroids.T, alpha=-2).min(dim=1)
        distance = scores.float() + rows.float().square().sum(dim=1)
        return index, distance.clamp(min=0)

    contenders = {"torch, addmm and min": expanded}
    if x.dtype == jnp.float32:  # it knows no bfloat16 on a CPU
        contenders["torch.cdist and min"] = cdist
    return contenders


def _check(contenders: dict[str, Callable[[], object]]) -> None:
    """Refuses to compare the times of programs that do not find the same."""
    _, ours = contenders["nearest_centroid (ours)"]()
    for name, run in contenders.items():
        if name == _PRODUCT:
            continue
        distances = np.asarray(run()[1], np.float64)
        error = np.max(np.abs(distances - np.asarray(ours)) / (1 + np.asarray(ours)))
        # torch rounds its products to bfloat16 before it compares them.
        if not error < 0.05:
            raise UserError(f"{name} finds something else: distances differ by {error:.2g}")


def _bound(program: Callable[..., object], *operands: object) -> Callable[[], object]:
    return lambda: program(*operands)


if __name__ == "__main__":
    sys.exit(main())
