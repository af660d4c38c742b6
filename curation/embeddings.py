"""Embeddings `[N, D]` as clustering reads them: checked, centred, a part at a time.

The rows stay where they are, in memory or in a mapped `.npy` file. `open_embeddings` checks what
the header says; `scan` reads all rows once, finds those that cannot be clustered, and measures what
the arithmetic needs: a centre near their mean and how far from it they reach.
"""

import concurrent.futures
import dataclasses
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.errors import UserError
from curation.exact_sums import span_of
from curation.npy_files import map_npy

_CENTRE_ROWS = 4096
_MOST = np.finfo(np.float32).max / 4  # Numbers' differences stay within half of float32's range.
_SCAN_BYTES, _READ_BYTES = 1 << 25, 1 << 20  # looked through, and moved, at a time by a thread
_THREADS = min(8, os.cpu_count() or 1)
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class Embeddings:
    """Rows of floating-point numbers, read as float32.

    Attributes:
      rows, width: N and D.
      name: Of the array, for messages.
      dtype: As it is stored.
    """

    def __init__(
        self,
        array: np.ndarray,
        *,
        name: str = "the embeddings",
        normalize: bool = False,
        subset: np.ndarray | None = None,
    ):
        """Checks shape and dtype.

        Args:
          array: `[N, D]`, possibly a memory map.
          name: For messages.
          normalize: Whether rows are scaled to unit length.
          subset: Row numbers `[M]`: the embeddings are these rows.

        Raises:
          UserError: it is no matrix of floating-point numbers, or has no rows or columns.
        """
        if array.ndim != 2 or array.dtype.name not in _FLOATS:
            raise UserError(
                f"{name} must be a matrix [N, D] of {', '.join(_FLOATS)}, not "
                f"{array.dtype} {list(array.shape)}"
            )
        if 0 in array.shape:
            raise UserError(f"{name} has shape {list(array.shape)}: there is nothing to cluster")
        self._array = array
        self._subset = None if subset is None else _checked_subset(subset, len(array), name)
        self._normalize = normalize
        self.name = name
        self.rows = len(array) if self._subset is None else len(self._subset)
        self.width = array.shape[1]
        self.dtype = array.dtype

    @property
    def settings(self) -> dict[str, Any]:
        """What tells these embeddings from others of the same numbers: JSON-able."""
        return {"rows": self.rows, "width": self.width, "normalize": self._normalize}

    def subset(self, indices: np.ndarray) -> "Embeddings":
        """Returns the rows of these numbers, as embeddings of their own."""
        if self._subset is not None:
            indices = self._subset[indices]
        return Embeddings(self._array, name=self.name, normalize=self._normalize, subset=indices)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns rows start:stop in float32, or float64 where they are stored so."""
        if self._subset is not None:
            return self.take(np.arange(start, min(stop, self.rows)))
        return self._converted(self._array[start:stop])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Returns rows by number, as `read` does."""
        if self._subset is not None:
            indices = self._subset[indices]
        return self._converted(self._array[indices])

    def is_zero(self, index: int) -> bool:
        """Whether a row is stored as zeros."""
        row = index if self._subset is None else self._subset[index]
        return not np.any(self._array[row])

    def _converted(self, part: np.ndarray) -> np.ndarray:
        wide = np.float64 if part.dtype == np.float64 else np.float32
        part = np.asarray(part, wide)
        if not self._normalize:
            return part
        with np.errstate(invalid="ignore", divide="ignore"):
            return part / np.linalg.norm(part, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Centred:
    """Embeddings whose rows have been looked through, with what makes them good to compute with.

    Distances do not change when all rows move, and rounding is least near the origin.

    Attributes:
      embeddings: the rows as they are.
      centre: `[D]` float32, near the mean of all rows.
      span: a power of two above every number of `row - centre`.
      variance: of a dimension, the mean over all of them, as evenly spaced rows have it.
    """

    embeddings: Embeddings
    centre: np.ndarray
    span: float
    variance: float

    @property
    def rows(self) -> int:
        return self.embeddings.rows

    @property
    def width(self) -> int:
        return self.embeddings.width

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able; other for other data."""
        check = zlib.crc32(self.centre.tobytes())
        return {**self.embeddings.settings, "span": self.span, "check": check}

    def subset(self, indices: np.ndarray) -> "Centred":
        """Returns the rows of these numbers, centred as all of them are."""
        return dataclasses.replace(self, embeddings=self.embeddings.subset(indices))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns rows start:stop minus the centre, float32."""
        return (self.embeddings.read(start, stop) - self.centre).astype(np.float32, copy=False)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Puts what `read` returns into `out`, by several threads."""

        def part(first: int) -> None:
            last = min(first + step, stop)
            rows = self.embeddings.read(first, last)
            out[first - start : last - start] = np.subtract(rows, self.centre, dtype=rows.dtype)

        step = max(1, _READ_BYTES // (4 * self.width))
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(part, range(start, stop, step)))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Returns rows by number minus the centre, float32."""
        return (self.embeddings.take(indices) - self.centre).astype(np.float32, copy=False)


def open_embeddings(
    source: Any, *, normalize: bool = False, subset: np.ndarray | None = None
) -> Embeddings:
    """Opens embeddings.

    Args:
      source: an array `[N, D]` (NumPy's, a memory map, a JAX array), the path of a `.npy` file,
        which is mapped into memory, or `Embeddings`, which are handed through.
      normalize: scale rows to unit length.
      subset: row numbers: the embeddings are these rows.

    Raises:
      UserError: the file cannot be read, or is no matrix of floating-point numbers.
    """
    if isinstance(source, Embeddings):
        return source
    if isinstance(source, (str, os.PathLike)):
        array, name = map_npy(Path(source).expanduser()), str(source)
    else:
        array, name = np.asanyarray(source), "the embeddings"
    return Embeddings(array, name=name, normalize=normalize, subset=subset)


def scan(embeddings: Embeddings) -> Centred:
    """Reads all rows once; of several processes each reads its share.

    Raises:
      UserError: a row has a NaN or an infinity, or is zero and is to be scaled to unit length.
    """
    centre, variance = _moments(embeddings)
    share = -(-embeddings.rows // jax.process_count())
    first = jax.process_index() * share
    last = min(first + share, embeddings.rows)
    step = max(1, _SCAN_BYTES // (4 * embeddings.width))

    def look(start: int) -> tuple[float, int, int]:
        part = embeddings.read(start, min(start + step, last))
        with np.errstate(over="ignore", invalid="ignore"):
            most = max(np.max(part.max(axis=0) - centre), np.max(centre - part.min(axis=0)))
            if most < _MOST:  # Not so if it is NaN.
                return float(most), 0, embeddings.rows
            reach = np.max(np.abs(part - centre), axis=1)
        wrong = ~(reach < _MOST)
        first = start + int(np.argmax(wrong)) if wrong.any() else embeddings.rows
        return float(np.max(reach, where=~wrong, initial=0.0)), int(wrong.sum()), first

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        seen = list(pool.map(look, range(first, last, step)))
    largest = max((most for most, _, _ in seen), default=0.0)
    bad = sum(count for _, count, _ in seen)
    first_bad = min((row for _, _, row in seen), default=embeddings.rows)
    largest = _over_processes(largest, max)
    bad, first_bad = int(_over_processes(bad, sum)), int(_over_processes(first_bad, min))
    if bad:
        raise UserError(_told(embeddings, bad, first_bad))
    return Centred(embeddings, centre, span_of(largest), variance)


def _moments(embeddings: Embeddings) -> tuple[np.ndarray, float]:
    """Returns the mean `[D]` of evenly spaced rows and their variance; without NaN or infinity."""
    count = min(embeddings.rows, _CENTRE_ROWS)
    rows = embeddings.take(np.arange(count) * embeddings.rows // count)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if not len(rows):
        return np.zeros(embeddings.width, np.float32), 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        centre = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        variance = float(rows.var(axis=0, dtype=np.float64).mean())
    return np.where(np.isfinite(centre), centre, 0).astype(np.float32), variance


def _told(embeddings: Embeddings, bad: int, first: int) -> str:
    what = "holds a NaN, an infinity or a number too large for float32"
    if embeddings.is_zero(first):
        what = "is zero and has no direction"
    others = f", and {bad - 1} others cannot be clustered either" if bad > 1 else ""
    return f"row {first} of {embeddings.name} {what}{others}: leave such rows out"


def _over_processes(value: float, combine: Callable[[Any], Any]) -> float:
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    # As two words: without 64-bit types JAX would round it.
    words = np.asarray([value], np.float64).view(np.uint32)
    everyone = np.ascontiguousarray(multihost_utils.process_allgather(words))
    return float(combine(everyone.view(np.float64)[:, 0].tolist()))


def _checked_subset(subset: np.ndarray, rows: int, name: str) -> np.ndarray:
    subset = np.asarray(subset)
    if subset.ndim != 1 or not np.issubdtype(subset.dtype, np.integer) or not len(subset):
        raise UserError(
            f"a subset of rows must be integers [M], not {subset.dtype} {list(subset.shape)}"
        )
    if subset.min() < 0 or subset.max() >= rows:
        raise UserError(f"a subset names row {subset.max()}, but {name} has {rows}")
    return subset
