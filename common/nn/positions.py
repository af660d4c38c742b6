"""Learned positions of an image's patches, resized to grids of other sizes.

A table of M × M vectors is resized by two small matrices, one for each direction, which are
computed on the host: exact, and differentiable in the table. Each manner is what a published
implementation does (specification of DINOv2, 2.6); between them features differ by a percent.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Interpolation = Literal["offset", "size", "antialias"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("offset", "size", "antialias")
_OFFSET = 0.1
_SHARP, _SMOOTH = -0.75, -0.5  # parameter of Keys's kernel, without and with antialiasing


def resized_positions(
    table: jax.Array, grid: tuple[int, int], interpolation: Interpolation
) -> jax.Array:
    """`table [M, M, D]` (rows, columns) -> `[h, w, D]` fp32 for `grid = (h, w)`.

    Args:
      table: of a square grid.
      grid: its new size; the table's own leaves it as it is.
      interpolation: bicubic all three. "offset": the scale is (h + 0.1) / M, as DINOv2 without
        registers was trained; "size": h / M, as transformers resizes these models; "antialias":
        h / M with a kernel that widens when the grid shrinks, as DINOv2 with registers was trained.
    """
    table = table.astype(jnp.float32)
    size = table.shape[0]
    if grid == (size, size):
        return table
    rows, columns = (resize_matrix(size, n, interpolation) for n in grid)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("hy,wx,yxd->hwd", rows, columns, table, precision=highest)


@functools.lru_cache(maxsize=256)
def resize_matrix(source: int, target: int, interpolation: Interpolation) -> np.ndarray:
    """`[target, source]` fp32: how to resize `source` points to `target`."""
    matrix = np.zeros((target, source))
    if interpolation == "antialias":
        scale = source / target
        for i in range(target):
            points, weights = _widened(source, scale, i)
            matrix[i, points] = weights
        return matrix.astype(np.float32)
    offset = _OFFSET if interpolation == "offset" else 0.0
    # Coordinates in fp32, as the weights met them in training.
    scale = np.float32(source / (target + offset))
    for i in range(target):
        at = scale * np.float32(i + 0.5) - np.float32(0.5)
        first = np.floor(at)
        taps = int(first) + np.arange(-1, 3)
        weights = _keys_kernel(np.float64(at - first) - np.arange(-1, 3), _SHARP)
        np.add.at(matrix[i], np.clip(taps, 0, source - 1), weights)
    return matrix.astype(np.float32)


def _widened(source: int, scale: float, i: int) -> tuple[slice, np.ndarray]:
    """Which points make up point i, and with which weights; cut at the border and normalised."""
    widening = max(scale, 1.0)
    centre, reach = scale * (i + 0.5), 2.0 * widening
    begin = max(int(centre - reach + 0.5), 0)
    end = min(int(centre + reach + 0.5), source)
    weights = _keys_kernel((np.arange(begin, end) - centre + 0.5) / widening, _SMOOTH)
    return slice(begin, end), weights / weights.sum()


def _keys_kernel(x: np.ndarray, a: float) -> np.ndarray:
    """Keys's cubic convolution kernel of parameter `a`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
