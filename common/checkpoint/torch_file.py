"""Reads torch checkpoints (.pth, .pt, .bin) without torch and without running what is in them.

torch.save writes a zip archive: a pickle `<root>/data.pkl` of the Python objects, whose tensors
refer to raw records `<root>/data/<key>`. The pickle is read by an unpickler that knows only the
handful of names a state dict needs and refuses every other one; records are mapped, not read.
"""

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from common.checkpoint.reader import Entry, MappedTensors, Shape, map_file, quoted
from common.checkpoint.safetensors import fits_memory
from common.errors import UserError

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"
TAR_MAGIC_AT, TAR_MAGIC = 257, b"ustar"
LOCAL_HEADER_BYTES = 30
MAX_DEPTH, MAX_LEAVES = 32, 1_000_000

STORAGES: Mapping[str, np.dtype] = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "ShortStorage": np.dtype("<i2"),
    "UntypedStorage": np.dtype(np.uint8),
}
INTEGER_NAMES = ("bool", "int", "int16", "int32", "int64", "int8", "long", "short", "uint8")
FLOAT_NAMES = ("bfloat16", "double", "float", "float16", "float32", "float64", "half")
COMPLEX_NAMES = ("complex128", "complex64")
DTYPE_NAMES = frozenset((*INTEGER_NAMES, *FLOAT_NAMES, *COMPLEX_NAMES))


def is_torch_file(path: Path) -> bool:
    """Says whether `path` starts as torch files of any age do."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY_MAGIC))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return start.startswith(ZIP_MAGIC) or start == LEGACY_MAGIC


def open_torch_file(path: str | Path) -> MappedTensors:
    """Opens the tensors of a torch checkpoint under dotted names ("model.blocks.0.weight").

    Nested dicts, lists and tuples are flattened; what is neither is left out (`subtree` unwraps
    the "model." or "state_dict." of training checkpoints).

    Raises:
      UserError: the file is no torch zip archive or damaged, or its pickle asks for anything but
        tensors in plain containers (the message names what was refused).
    """
    path = Path(path)
    buffer = map_file(path)
    _check_magic(path, buffer)
    records = _records(path, buffer)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{path} is a zip archive without a torch data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in records:
        start, end = records[f"{root}byteorder"]
        if buffer[start:end].strip() != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")
    start, end = records[pickles[0]]
    tree = _unpickle(path, buffer[start:end])
    entries: dict[str, Entry] = {}
    for name, tensor in _leaves(path, tree):
        if name in entries:
            raise UserError(f"{path} holds two tensors named {quoted(name)}")
        entries[name] = _entry(path, name, tensor, records, f"{root}data/")
    return MappedTensors(path, buffer, entries)


class _Storage(NamedTuple):
    """A record of raw elements."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A strided view of a storage, in elements, as the pickle claims it: not yet checked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _Known:
    """Stands for a torch name in the pickle; has no attribute that a pickle could set."""

    __slots__ = ("_build", "value")
    value: Any
    _build: Callable[..., Any] | None

    def __init__(self, value: Any, build: Callable[..., Any] | None = None) -> None:
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "_build", build)

    def __call__(self, *arguments: Any) -> Any:
        if self._build is None:
            raise pickle.UnpicklingError("a torch constant is called")
        return self._build(*arguments)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError("a torch name is changed")

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a torch name is changed")


class _Dict(dict):
    """Stands for OrderedDict; drops the attributes that torch hangs on state dicts."""

    def __setstate__(self, state: Any) -> None:
        del state


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


class _Unpickler(pickle.Unpickler):
    """Knows what state dicts are made of and refuses every other name."""

    def __init__(self, path: Path, data: bytes) -> None:
        # Strings written by Python 2 stay decodable whatever they hold.
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self._path = path

    def find_class(self, module: str, name: str) -> _Known:
        match module, name:
            case "collections", "OrderedDict":
                return _Known(None, _Dict)
            case "torch._utils", "_rebuild_tensor_v2":
                return _Known(None, _rebuild_tensor)
            case "torch._utils", "_rebuild_parameter":
                return _Known(None, _rebuild_parameter)
            case "torch", "Size":
                return _Known(None, tuple)
            case "torch" | "torch.storage", _ if name in STORAGES:
                return _Known(STORAGES[name])
            case "torch", _ if name in DTYPE_NAMES:
                return _Known(name)
        raise UserError(
            f"{self._path} wants to run {quoted(f'{module}.{name}')}: refused; "
            "save the bare state dict with torch.save(model.state_dict(), path)"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, count = pid
        dtype = storage_type.value
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("a persistent id that is not a storage")
        return _Storage(key, dtype, count)


def _unpickle(path: Path, data: bytes) -> Any:
    try:
        return _Unpickler(path, data).load()
    except UserError:
        raise
    except Exception as error:  # A hostile pickle can make the unpickler raise nearly anything.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{path}: data.pkl is damaged ({reason})") from error


def _check_magic(path: Path, buffer: mmap.mmap) -> None:
    """Tells the formats of torch's past from files of other kinds."""
    tar = buffer[TAR_MAGIC_AT : TAR_MAGIC_AT + len(TAR_MAGIC)] == TAR_MAGIC
    if tar or buffer[: len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        raise UserError(
            f"{path} has the format of torch before 1.6: convert it with "
            "torch.save(torch.load(path, weights_only=True), new_path)"
        )
    if buffer[: len(ZIP_MAGIC)] != ZIP_MAGIC:
        raise UserError(f"{path} is not a torch checkpoint")


def _records(path: Path, buffer: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Returns where each record's bytes lie in the file, every one within it and uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile answers damaged archives with a dozen exception types.
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is a damaged or truncated zip archive ({reason})") from error
    records: dict[str, tuple[int, int]] = {}
    for member in members:
        name = member.filename
        where = f"{path}: record {quoted(name)}"
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise UserError(f"{where} points outside the archive")
        if name in records:
            raise UserError(f"{where} is there twice")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise UserError(f"{where} is compressed or encrypted, which torch never writes")
        local = buffer[member.header_offset : member.header_offset + LOCAL_HEADER_BYTES]
        if len(local) < LOCAL_HEADER_BYTES or not local.startswith(ZIP_MAGIC):
            raise UserError(f"{where} does not start where the archive says")
        start = member.header_offset + LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", local[26:30]))
        end = start + member.file_size
        if member.file_size != member.compress_size or end > len(buffer):
            raise UserError(f"{where} runs past the end of the file")
        records[name] = (start, end)
    return records


def _leaves(path: Path, tree: Any) -> Iterator[tuple[str, _Tensor]]:
    """Yields the tensors of nested containers under dotted names, in order."""
    visited = 0

    def walk(node: Any, names: tuple[str, ...]) -> Iterator[tuple[str, _Tensor]]:
        nonlocal visited
        visited += 1
        # A pickle can share or nest a container within itself, so that the tree never ends.
        if visited > MAX_LEAVES or len(names) > MAX_DEPTH:
            raise UserError(f"{path} nests more than a checkpoint does near {quoted(names[:3])}")
        if isinstance(node, _Tensor):
            yield ".".join(names), node
        elif isinstance(node, dict):
            for key, value in node.items():
                if isinstance(key, str | int):
                    yield from walk(value, (*names, str(key)))
        elif isinstance(node, list | tuple) and not isinstance(node, _Storage):
            for key, value in enumerate(node):
                yield from walk(value, (*names, str(key)))

    yield from walk(tree, ())


def _entry(
    path: Path, name: str, tensor: _Tensor, records: Mapping[str, tuple[int, int]], prefix: str
) -> Entry:
    """Checks that a tensor lies within its storage and returns its place in the file."""
    where = f"{path}: tensor {quoted(name)}"
    storage, offset, shape, strides = tensor
    if not isinstance(storage, _Storage):
        raise UserError(f"{where} has no storage")
    if not all(_naturals(v) for v in (shape, strides, (offset, storage.size))):
        raise UserError(f"{where} has a shape, stride or offset that is not a natural number")
    dtype = storage.dtype
    if len(shape) != len(strides) or not fits_memory(shape, dtype):
        raise UserError(f"{where} has an impossible shape {quoted(shape)}")
    if f"{prefix}{storage.key}" not in records:
        raise UserError(f"{where} refers to record {quoted(storage.key)}, which is missing")
    start, end = records[f"{prefix}{storage.key}"]
    if storage.size * dtype.itemsize > end - start:
        raise UserError(f"{where} claims {storage.size} elements, more than its record holds")
    last = offset + sum((d - 1) * s for d, s in zip(shape, strides))
    # More elements than the storage would be a broadcast that fills memory when it is read.
    if 0 not in shape and (last >= storage.size or math.prod(shape) > storage.size):
        raise UserError(f"{where} reaches past the end of its storage")
    if 0 in shape:
        return Entry(tuple(shape), dtype, start)
    steps: Shape = tuple(0 if d == 1 else s * dtype.itemsize for d, s in zip(shape, strides))
    return Entry(tuple(shape), dtype, start + offset * dtype.itemsize, steps)


def _naturals(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and v >= 0 for v in values)
