"""Reads one .gguf file (llama.cpp's format, versions 2 and 3, little endian) without trusting it.

The file is a header with counts, metadata as keys and typed values, the tensors' names, shapes,
types and offsets, and the tensors' data. All but the data is read and checked when the file is
opened: every count and length against the bytes that are left, before anything of that size is
made. Tensors stay in the mapped file, in blocks of a few bits a weight, until slices are read.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from common.checkpoint.gguf_types import GGUFType, gguf_type
from common.checkpoint.reader import Index, Shape, map_file, no_tensor, quoted
from common.errors import UserError, nearest

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Far above what exists; they keep a hostile file's cost at a few times its own size.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_NAME_BYTES = 1 << 16
MAX_STRING_BYTES = 1 << 26
MAX_ARRAY = 1 << 24
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
# How many weights are expanded at a time: the intermediate arrays stay in the processor's cache.
CHUNK = 1 << 17

_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
_SCALARS: Mapping[int, np.dtype] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    _FLOAT32: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),  # Bytes other than 0 and 1 would be undefined behaviour in a boolean.
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: its shape in numpy's order, type, and first byte in the file."""

    shape: Shape
    type: GGUFType
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.num_bytes


class GGUFTensors:
    """Metadata and tensors of an open .gguf file; a `TensorReader`.

    Shapes are in numpy's order, `[out, in]` for a matrix. Block types read as float32, plain
    numbers as what they are.

    Attributes:
      path: the file.
      metadata: key -> int, float, bool, str, list of str, or numpy array.
    """

    def __init__(
        self,
        path: Path,
        buffer: mmap.mmap,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, _Tensor],
    ) -> None:
        self.path = path
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata))
        self._buffer = buffer
        self._tensors = dict(tensors)

    def keys(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> Shape:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensor(name).type.dtype

    def type_name(self, name: str) -> str:
        """Returns how tensor `name` is stored: "F32", "Q4_K", …"""
        return self._tensor(name).type.name

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        tensor = self._tensor(name)
        if not tensor.type.is_quantised:
            array = np.ndarray(tensor.shape, tensor.type.dtype, self._buffer, tensor.offset)
            return array if index is None else array[index]
        *rows, width = tensor.shape
        blocks = np.ndarray(
            (*rows, width // tensor.type.block), tensor.type.layout, self._buffer, tensor.offset
        )
        if index is None:
            return _expand(tensor.type, blocks)
        start, stop, step = index[-1].indices(width)
        # Whole blocks that cover the slice of the last dim, then the slice itself.
        first, last = start // tensor.type.block, -(-max(stop, start) // tensor.type.block)
        values = _expand(tensor.type, blocks[(*index[:-1], slice(first, last))])
        before = first * tensor.type.block
        return values[..., start - before : max(stop, start) - before : step]

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise no_tensor(self.path, name, self._tensors)
        return self._tensors[name]

    # Metadata with its kind checked; `default` stands for an absent key, without one it is needed.

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns the non-negative integer `key`."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, "a count")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns the finite number `key`."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, "a number")
        if not math.isfinite(value):
            raise self._wrong(key, "a finite number")
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """Returns the truth value `key`."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """Returns the text `key`."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def strings(self, key: str, default: Sequence[str] | None = None) -> Sequence[str]:
        """Returns the list of texts `key`."""
        value = self._value(key, default)
        if not isinstance(value, list | tuple):
            raise self._wrong(key, "a list of texts")
        return value

    def numbers(self, key: str, default: Sequence[float] | None = None) -> np.ndarray:
        """Returns the array of numbers `key`."""
        value = self._value(key, default)
        if not isinstance(value, np.ndarray | list | tuple) or _has_text(value):
            raise self._wrong(key, "an array of numbers")
        return np.asarray(value)

    def _value(self, key: str, default: Any) -> Any:
        if key in self.metadata:
            return self.metadata[key]
        if default is None:
            raise UserError(f"{self.path} lacks the metadata {key}{nearest(key, self.metadata)}")
        return default

    def _wrong(self, key: str, wanted: str) -> UserError:
        value = self.metadata.get(key)
        return UserError(f"{self.path}: metadata {key} is {quoted(value)}, not {wanted}")


def _has_text(value: Any) -> bool:
    return not isinstance(value, np.ndarray) and any(isinstance(v, str) for v in value)


def is_gguf_file(path: str | Path) -> bool:
    """Says whether the file at `path` begins as a .gguf file does."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf_file(path: str | Path) -> GGUFTensors:
    """Opens one .gguf file.

    Raises:
      UserError: it cannot be read, is truncated, contradicts itself, or has tensors of a type
        that is not read here.
    """
    path = Path(path)
    buffer = map_file(path)
    cursor = _Cursor(path, buffer)
    tensors, keys = _header(cursor)
    metadata = _metadata(cursor, keys)
    infos = _infos(cursor, tensors)
    alignment = _alignment(path, metadata)
    start = -(-cursor.position // alignment) * alignment
    return GGUFTensors(path, buffer, metadata, _place(path, infos, start, alignment, len(buffer)))


class _Cursor:
    """A position in the file; every step is checked against the file's end."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.position = 0
        self._buffer = buffer

    @property
    def left(self) -> int:
        return len(self._buffer) - self.position

    def take(self, size: int, what: str) -> bytes:
        """Returns the next `size` bytes."""
        self.need(size, what)
        self.position += size
        return self._buffer[self.position - size : self.position]

    def need(self, size: int, what: str) -> None:
        """Raises unless `size` bytes are left."""
        if size > self.left:
            raise UserError(
                f"{self.path} ends within {what}: it wants {size} bytes at byte {self.position} "
                f"of {len(self._buffer)}; the file is truncated or not a GGUF file"
            )

    def natural(self, size: int, what: str) -> int:
        """Returns the next unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def text(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        """Returns the next string, which has its length in front."""
        length = self.natural(8, what)
        if length > limit:
            raise UserError(f"{self.path}: {what} claims {length} bytes of text; at most {limit}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: {what} is not UTF-8") from error


def _header(cursor: _Cursor) -> tuple[int, int]:
    """Returns the numbers of tensors and of metadata keys."""
    path = cursor.path
    if cursor.left < 24:
        raise UserError(f"{path} has {cursor.left} bytes, too few for a GGUF file")
    magic = cursor.take(4, "the header")
    if magic != MAGIC:
        raise UserError(f"{path} begins with {magic!r}, not {MAGIC!r}: it is not a GGUF file")
    version = cursor.natural(4, "the header")
    if version not in VERSIONS:
        big = version and version & 0xFFFF == 0
        reason = "is big endian" if big else f"has version {version}"
        raise UserError(f"{path} {reason}; little-endian GGUF of version 2 or 3 is read here")
    tensors, keys = cursor.natural(8, "the header"), cursor.natural(8, "the header")
    # The least that each takes: a name's length and one type, or three of them.
    limits = ((tensors, 24, MAX_TENSORS, "tensors"), (keys, 13, MAX_KEYS, "metadata keys"))
    for count, least, limit, what in limits:
        if count > min(limit, cursor.left // least):
            raise UserError(
                f"{path} claims {count} {what} in {cursor.left} bytes; it is truncated or damaged"
            )
    return tensors, keys


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for number in range(count):
        key = cursor.text(f"the name of metadata key {number}", MAX_NAME_BYTES)
        what = f"metadata {quoted(key)}"
        if key in metadata:
            raise UserError(f"{cursor.path} lists {what} twice")
        kind = cursor.natural(4, what)
        metadata[key] = _array(cursor, what) if kind == _ARRAY else _scalar(cursor, kind, what)
    return metadata


def _scalar(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == _STRING:
        return cursor.text(what)
    if kind not in _SCALARS:
        raise UserError(f"{cursor.path}: {what} has the unknown type {kind}")
    dtype = _SCALARS[kind]
    value = np.frombuffer(cursor.take(dtype.itemsize, what), dtype)[0]
    if kind == _FLOAT32:  # As it was written before it was rounded: 1e-5, not 9.99999974e-06.
        return float(str(value))
    return bool(value) if kind == _BOOL else value.item()


def _array(cursor: _Cursor, what: str) -> Any:
    kind, count = cursor.natural(4, what), cursor.natural(8, what)
    if kind == _ARRAY:
        raise UserError(f"{cursor.path}: {what} is an array of arrays, which no model needs")
    if kind != _STRING and kind not in _SCALARS:
        raise UserError(f"{cursor.path}: {what} is an array of the unknown type {kind}")
    if count > MAX_ARRAY:
        raise UserError(f"{cursor.path}: {what} claims {count} elements; at most {MAX_ARRAY}")
    least = 8 if kind == _STRING else _SCALARS[kind].itemsize
    cursor.need(count * least, what)
    if kind == _STRING:
        return [cursor.text(what) for _ in range(count)]
    values = np.frombuffer(cursor.take(count * least, what), _SCALARS[kind])
    return values != 0 if kind == _BOOL else values


def _infos(cursor: _Cursor, count: int) -> dict[str, _Tensor]:
    """Returns the tensors, their offsets still counted from the start of the data."""
    infos: dict[str, _Tensor] = {}
    for number in range(count):
        name = cursor.text(f"the name of tensor {number}", MAX_NAME_BYTES)
        where = f"tensor {quoted(name)}"
        if name in infos:
            raise UserError(f"{cursor.path} lists {where} twice")
        rank = cursor.natural(4, where)
        if rank > MAX_DIMS:
            raise UserError(f"{cursor.path}: {where} has {rank} dims; at most {MAX_DIMS}")
        dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, where))
        kind, offset = cursor.natural(4, where), cursor.natural(8, where)
        try:
            stored = gguf_type(kind)
        except KeyError as error:
            raise UserError(f"{cursor.path}: {where} has {error.args[0]}") from error
        shape = tuple(reversed(dims))  # The first is the one that varies fastest.
        if 0 in shape or math.prod(shape) >= 2**60:
            raise UserError(f"{cursor.path}: {where} has an impossible shape {list(shape)}")
        if (shape[-1] if shape else 1) % stored.block:
            raise UserError(
                f"{cursor.path}: {where} has shape {list(shape)}, but {stored.name} comes in "
                f"blocks of {stored.block}"
            )
        infos[name] = _Tensor(shape, stored, offset)
    return infos


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    fine = isinstance(value, int) and 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0
    if not fine or isinstance(value, bool):
        raise UserError(f"{path}: general.alignment is {quoted(value)}, not a power of two")
    return value


def _place(
    path: Path, infos: Mapping[str, _Tensor], start: int, alignment: int, size: int
) -> dict[str, _Tensor]:
    """Returns the tensors with offsets in the file, within it and apart from each other."""
    placed: dict[str, _Tensor] = {}
    expected, before = 0, ""
    for name, tensor in sorted(infos.items(), key=lambda item: item[1].offset):
        where, end = f"tensor {quoted(name)}", tensor.offset + tensor.num_bytes
        if tensor.offset % alignment:
            raise UserError(
                f"{path}: {where} starts at byte {tensor.offset} of the data, which is not a "
                f"multiple of the alignment {alignment}"
            )
        if start + end > size:
            raise UserError(
                f"{path}: {where} ends at byte {start + end} of a file of {size}; the file is "
                "truncated or its header wrong"
            )
        if tensor.offset < expected:
            raise UserError(f"{path}: {where} overlaps tensor {quoted(before)}")
        expected, before = end, name
        placed[name] = dataclasses.replace(tensor, offset=start + tensor.offset)
    return {name: placed[name] for name in infos}


def _expand(stored: GGUFType, blocks: np.ndarray) -> np.ndarray:
    """Returns the weights of `blocks [..., n]`, float32 `[..., n * block]`."""
    result = np.empty((*blocks.shape[:-1], blocks.shape[-1] * stored.block), stored.dtype)
    flat, weights = blocks.reshape(-1), result.reshape(-1, stored.block)
    step = CHUNK // stored.block
    for start in range(0, len(flat), step):
        weights[start : start + step] = stored.dequantise(flat[start : start + step])
    return result
