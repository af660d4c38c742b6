"""Reads one .safetensors file without trusting it.

The format is an 8-byte little-endian header length, a JSON header that gives each tensor's dtype,
shape and byte range, and one buffer that the ranges tile without overlaps or holes. All of it is
checked when the file is opened; the data stays in the mapped file until it is read.
"""

import collections
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from common.checkpoint.reader import Entry, MappedTensors, Shape, map_file, quoted
from common.errors import UserError

MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
# In the order by which the reference library lays tensors out (later first).
DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}


def open_safetensors_file(path: str | Path) -> MappedTensors:
    """Opens one .safetensors file.

    Raises:
      UserError: it cannot be read, is truncated, or its header contradicts itself or the file.
    """
    path = Path(path)
    buffer = map_file(path)
    header, start = _header(path, buffer)
    size = len(buffer) - start
    ranges: list[tuple[int, int, str]] = []
    entries: dict[str, Entry] = {}
    for name, field in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _tensor(path, name, field)
        if end > size:
            raise UserError(
                f"{path}: tensor {quoted(name)} ends at byte {end} of a buffer of {size} bytes; "
                "the file is truncated or its header wrong"
            )
        ranges.append((begin, end, name))
        entries[name] = Entry(shape, dtype, start + begin)
    _check_tiling(path, ranges, size)
    return MappedTensors(path, buffer, entries)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the free-form metadata of a .safetensors file (often `{"format": "pt"}`)."""
    path = Path(path)
    header, _ = _header(path, map_file(path))
    return header.get("__metadata__", {})


def parse_json_object(path: Path, data: bytes, what: str) -> dict:
    """Parses `data` as one JSON object without duplicate keys; `what` names it in errors."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) != len(pairs):
            name, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
            raise UserError(f"{path}: {what} lists {quoted(name)} twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: {what} is not valid JSON ({reason})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} is not a JSON object")
    return value


def _header(path: Path, buffer: mmap.mmap) -> tuple[dict, int]:
    """Returns the parsed header and the file offset of the tensor buffer."""
    if len(buffer) < LENGTH_BYTES:
        raise UserError(f"{path} has {len(buffer)} bytes, too few for a safetensors file")
    length = int.from_bytes(buffer[:LENGTH_BYTES], "little")
    if length > min(MAX_HEADER_BYTES, len(buffer) - LENGTH_BYTES):
        raise UserError(
            f"{path} claims a header of {length} bytes in a file of {len(buffer)} bytes; "
            "it is truncated or not a safetensors file"
        )
    start = LENGTH_BYTES + length
    header = parse_json_object(path, buffer[LENGTH_BYTES:start], "safetensors header")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: safetensors __metadata__ does not map strings to strings")
    return header, start


def _tensor(path: Path, name: str, field: object) -> tuple[np.dtype, Shape, int, int]:
    """Checks one header field by itself; returns dtype, shape, first byte and end."""
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} needs exactly the fields dtype, shape and data_offsets")
    tag, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(tag, str) or tag not in DTYPES:
        raise UserError(f"{where} has dtype {quoted(tag)}, which is not one of {', '.join(DTYPES)}")
    dtype = DTYPES[tag]
    if not _naturals(shape) or not fits_memory(shape, dtype):
        raise UserError(f"{where} has an impossible shape {quoted(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where} has an impossible byte range {quoted(offsets)}")
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise UserError(
            f"{where} has {offsets[1] - offsets[0]} bytes, but {tag} {quoted(shape)} takes {needed}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def fits_memory(shape: list[int] | Shape, dtype: np.dtype) -> bool:
    """Says whether numpy can describe an array of this shape (zeros count as ones there)."""
    return len(shape) <= 32 and math.prod(max(d, 1) for d in shape) * dtype.itemsize < 2**63


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_tiling(path: Path, ranges: list[tuple[int, int, str]], size: int) -> None:
    """Checks that the byte ranges cover the buffer exactly once."""
    expected, before = 0, ""
    for begin, end, name in sorted(ranges):
        if begin < expected:
            raise UserError(
                f"{path}: tensor {quoted(name)} overlaps tensor {quoted(before)} in the buffer"
            )
        if begin > expected:
            raise UserError(
                f"{path}: {begin - expected} unclaimed bytes before tensor {quoted(name)}"
            )
        expected, before = end, name
    if expected != size:
        raise UserError(f"{path}: {size - expected} unclaimed bytes after the last tensor")
