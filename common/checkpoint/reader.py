"""What every checkpoint reader offers: names, shapes and lazily read slices of tensors.

A reader opens a file or folder once, checks everything that can be checked without touching the
data, and then reads slices on demand, so that a process loads only the part its devices hold.
"""

import dataclasses
import mmap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from common.errors import UserError, nearest

Shape = tuple[int, ...]
Index = tuple[slice, ...]


class TensorReader(Protocol):
    """Named tensors of one checkpoint; `path` is what error messages call it."""

    path: Path

    def keys(self) -> Collection[str]:
        """Returns the names of all tensors."""
        ...

    def shape(self, name: str) -> Shape:
        """Returns the shape of tensor `name`; UserError when there is none of that name."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Returns the stored dtype of tensor `name` (bfloat16 and float8 through ml_dtypes)."""
        ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns tensor `name`, or the part of it that `index` (one slice per dim) selects.

        The result may be a read-only view of the mapped file: copy what outlives the reader.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a mapped file: first byte, and bytes per step of each dim."""

    shape: Shape
    dtype: np.dtype
    offset: int
    strides: Shape | None = None


class MappedTensors:
    """Tensors that lie uncompressed in one memory-mapped file, at places already checked."""

    def __init__(self, path: Path, buffer: mmap.mmap, entries: Mapping[str, Entry]) -> None:
        self.path = path
        self._buffer = buffer
        self._entries = dict(entries)

    def keys(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> Shape:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._entry(name).dtype

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        entry = self._entry(name)
        # Bytes other than 0 and 1 would be undefined behaviour in a boolean array.
        boolean = entry.dtype == np.bool_
        dtype = np.dtype(np.uint8) if boolean else entry.dtype
        if 0 in entry.shape:  # An empty tensor may start past the last mapped byte.
            array = np.empty(entry.shape, dtype)
        else:
            array = np.ndarray(entry.shape, dtype, self._buffer, entry.offset, entry.strides)
        array = array if index is None else array[index]
        return array != 0 if boolean else array

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise no_tensor(self.path, name, self._entries)
        return self._entries[name]


class ArrayTensors:
    """Tensors that are already in memory."""

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        self.path = path
        self._arrays = dict(arrays)

    def keys(self) -> Collection[str]:
        return self._arrays.keys()

    def shape(self, name: str) -> Shape:
        return self._array(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._array(name).dtype

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        array = self._array(name)
        return array if index is None else array[index]

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            raise no_tensor(self.path, name, self._arrays)
        return self._arrays[name]


class RenamedTensors:
    """Another reader's tensors under other names."""

    def __init__(self, reader: TensorReader, names: Mapping[str, str]) -> None:
        """`names` maps each new name to the name that `reader` knows."""
        self.path = reader.path
        self._reader = reader
        self._names = dict(names)

    def keys(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, name: str) -> Shape:
        return self._reader.shape(self._name(name))

    def dtype(self, name: str) -> np.dtype:
        return self._reader.dtype(self._name(name))

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self._reader.read(self._name(name), index)

    def _name(self, name: str) -> str:
        if name not in self._names:
            raise no_tensor(self.path, name, self._names)
        return self._names[name]


def subtree(reader: TensorReader, *prefixes: str) -> TensorReader:
    """Returns the tensors under the first of `prefixes` that any name has, without the prefix.

    `subtree(open_torch_file(p), "model.", "state_dict.")` unwraps a training checkpoint and
    `subtree(open_tree_file(p), "params/")` a Flax one. A checkpoint in which no name has any of
    the prefixes is returned as it is.
    """
    names = reader.keys()
    for prefix in prefixes:
        under = {name[len(prefix) :]: name for name in names if name.startswith(prefix)}
        if under:
            return RenamedTensors(reader, under)
    return reader


def map_file(path: Path) -> mmap.mmap:
    """Maps `path` read-only; UserError when it cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # What mmap says of a file without a byte.
        raise UserError(f"{path} is empty: download or copy it again") from error


def quoted(name: object) -> str:
    """Returns `name` for an error message: quoted, on one line, of bounded length."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


def no_tensor(path: Path, name: str, names: Collection[str]) -> UserError:
    """Returns the error for a tensor that the checkpoint at `path` does not have."""
    return UserError(f"{path} has no tensor {quoted(name)}{nearest(name, names)}")
