"""Writes .gguf files for tests: the format once more, from its other end."""

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

STRING, ARRAY = 8, 9
VALUE_TYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7}
VALUE_TYPES |= {"u8": 10, "i8": 11, "f8": 12}
TENSOR_TYPES = {"f4": 0, "f2": 1, "i1": 24, "i2": 25, "i4": 26, "i8": 27, "f8": 28}
Q4_1, Q8_0, BF16 = 3, 8, 30


class Raw(NamedTuple):
    """A metadata value, or an element of the list of tensors, in bytes as they come."""

    type: int
    data: bytes
    shape: tuple[int, ...] = ()


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | Raw],
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A whole file; `metadata["general.alignment"]` is kept to, `counts` written as they are."""
    alignment = metadata.get("general.alignment", 32)
    alignment = alignment if isinstance(alignment, int) else 32
    stored = {name: _stored(value) for name, value in tensors.items()}
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(stored), len(metadata))))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    offset, data = 0, b""
    for name, (kind, payload, shape) in stored.items():
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind, offset)
        data += padded(payload, alignment)
        offset = len(data)
    return padded(head, alignment) + data


def padded(data: bytes, alignment: int = 32) -> bytes:
    return data + b"\0" * (-len(data) % alignment)


def q8_0(weights: np.ndarray) -> Raw:
    """`weights [..., D]` in blocks of 32 bytes and a scale."""
    blocks = weights.reshape(-1, 32).astype(np.float32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
    numbers = np.rint(blocks / np.maximum(scale.astype(np.float32), 1e-9)).astype(np.int8)
    data = np.concatenate([scale.view(np.uint8), numbers.view(np.uint8)], axis=1)
    return Raw(Q8_0, data.tobytes(), weights.shape)


def q4_1(weights: np.ndarray) -> Raw:
    """`weights [..., D]` in blocks of 32 half bytes, a scale and a minimum."""
    blocks = weights.reshape(-1, 32).astype(np.float32)
    least = blocks.min(axis=1, keepdims=True).astype("<f2")
    scale = ((blocks.max(axis=1, keepdims=True) - least) / 15).astype("<f2")
    numbers = (blocks - least) / np.maximum(scale.astype(np.float32), 1e-9)
    numbers = np.clip(np.rint(numbers), 0, 15).astype(np.uint8)
    packed = numbers[:, :16] | (numbers[:, 16:] << 4)
    data = np.concatenate([scale.view(np.uint8), least.view(np.uint8), packed], axis=1)
    return Raw(Q4_1, data.tobytes(), weights.shape)


def _stored(value: np.ndarray | Raw) -> tuple[int, bytes, tuple[int, ...]]:
    if isinstance(value, Raw):
        return value
    bfloat16 = value.dtype == np.dtype(ml_dtypes.bfloat16)
    kind = BF16 if bfloat16 else TENSOR_TYPES[value.dtype.str[1:]]
    return kind, value.tobytes(), value.shape


def _text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, Raw):
        return struct.pack("<I", value.type) + value.data
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        head = struct.pack("<IIQ", ARRAY, STRING, len(value))
        return head + b"".join(_text(text) for text in value)
    if not isinstance(value, np.ndarray):
        kinds = {bool: "?", int: "<u4" if value >= 0 else "<i4", float: "<f4"}
        number = np.array(value, getattr(value, "dtype", kinds.get(type(value))))
        return struct.pack("<I", VALUE_TYPES[number.dtype.str[1:]]) + number.tobytes()
    kind = VALUE_TYPES[value.dtype.str[1:]]
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + value.tobytes()
