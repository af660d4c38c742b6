"""Embeddings in a column of Parquet files, written once as an array that maps into memory."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.data.file_sources import find_files
from common.errors import UserError, nearest

_ROWS = 1 << 14  # read at a time


def is_parquet(path: str) -> bool:
    """Whether a path names Parquet files: one, a pattern, or a folder that has some."""
    return path.endswith(".parquet") or (
        os.path.isdir(path) and any(name.endswith(".parquet") for name in os.listdir(path))
    )


def parquet_to_npy(path: str, folder: Path, column: str = "embedding") -> Path:
    """Writes a column of lists as `[N, D]` to a `.npy` file; one that is there already is taken.

    Args:
      path: a file, a folder or a pattern; files come in the order of their names.
      folder: where the array is kept.
      column: of lists of equally many floating-point numbers.

    Returns:
      The array's file, named after what the Parquet files are.

    Raises:
      UserError: no such files or column, a row without numbers or with another count of them.
    """
    readers = [_open(file.path, column) for file in find_files(path, "*.parquet")]
    digest = hashlib.sha256(column.encode())
    for name, _ in readers:
        status = os.stat(name)
        digest.update(f"{os.path.abspath(name)}:{status.st_size}:{status.st_mtime_ns};".encode())
    target = folder / f"embeddings-{digest.hexdigest()[:12]}.npy"
    if target.exists():
        return target
    rows = sum(reader.metadata.num_rows for _, reader in readers)
    unfinished = folder / f".{target.name}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(unfinished, rows, readers, column)
        os.replace(unfinished, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _write(path: Path, rows: int, readers: list[tuple[str, Any]], column: str) -> None:
    """Writes ordinarily, not through a map: a full disk is then an error and not the end."""
    shape: tuple[int, int] | None = None
    with open(path, "wb") as stream:
        for name, reader in readers:
            for part in _matrices(name, reader, column):
                if shape is None:
                    shape, dtype = (rows, part.shape[1]), part.dtype
                    descr = np.lib.format.dtype_to_descr(dtype)
                    header = {"descr": descr, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                if part.shape[1] != shape[1]:
                    raise UserError(f"{name}: rows of {part.shape[1]} numbers, others {shape[1]}")
                stream.write(np.ascontiguousarray(part, dtype).data)
        if shape is None:
            raise UserError(f"there are no rows in column '{column}'")
        stream.flush()
        os.fsync(stream.fileno())


def _matrices(name: str, reader: Any, column: str) -> Iterator[np.ndarray]:
    try:
        for batch in reader.iter_batches(_ROWS, columns=[column]):
            yield _matrix(batch.column(0), f"{name}, column '{column}'")
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these.
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is not a whole Parquet file: {reason}") from error


def _matrix(column: Any, name: str) -> np.ndarray:
    """Lists of a batch as [rows, D]."""
    import pyarrow as pa

    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(kind(column.type) for kind in kinds):
        raise UserError(f"{name} holds {column.type}: a column of lists of numbers is needed")
    if column.null_count:
        raise UserError(f"{name}: {column.null_count} rows are empty (null): leave them out")
    values = column.flatten()
    if not pa.types.is_floating(values.type) or values.null_count:
        raise UserError(f"{name} holds lists of {values.type}: floating-point numbers are needed")
    width = len(values) // max(len(column), 1)
    if not pa.types.is_fixed_size_list(column.type):
        lengths = np.diff(np.asarray(column.offsets))
        if np.any(lengths != width):
            raise UserError(f"{name}: rows hold {lengths.min()} to {lengths.max()} numbers")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), width)


def _open(path: str, column: str) -> tuple[str, Any]:
    import pyarrow.parquet

    try:
        reader = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a whole Parquet file: {reason}") from error
    names = reader.schema_arrow.names
    if column not in names:
        hint = nearest(column, names) or f"; it has {', '.join(names)}"
        raise UserError(f"{path} has no column '{column}'{hint}")
    return path, reader
