"""Writes tensors as a Hugging Face folder: shards of bounded size and an index, all or nothing.

One tensor is in memory at a time, and the bytes are those that the reference library writes:
wider dtypes first, then by name, header padded to eight bytes.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint.reader import Shape, quoted
from common.checkpoint.safetensors import DTYPES, LENGTH_BYTES
from common.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
_TAGS = {dtype: (rank, tag) for rank, (tag, dtype) in enumerate(DTYPES.items())}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known and whose values are computed when called."""

    shape: Shape
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    def __call__(self) -> np.ndarray:
        return self.values()


def write_safetensors(
    folder: str | Path,
    tensors: Mapping[str, Any],
    max_shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
    write: bool = True,
) -> list[Path]:
    """Writes `tensors` to `folder` as `model.safetensors`, or as shards with their index.

    Args:
      folder: made when missing; must not hold weights already.
      tensors: arrays, `LazyTensor`s, or zero-argument callables that return arrays (a bare
        callable is called twice: once for its shape, once for its values).
      max_shard_bytes: no shard is larger, unless it holds a single tensor.
      metadata: header strings; Hugging Face's own `{"format": "pt"}` by default.
      write: False only computes the tensors, which processes that take part in gathering
        sharded ones do while one process writes.

    Returns:
      The files written, index last.

    Raises:
      UserError: the folder already holds weights, or a tensor has a dtype the format lacks.
    """
    folder = Path(folder)
    lazy = {name: _lazy(name, value) for name, value in tensors.items()}
    shards = _shards(lazy, max_shard_bytes)
    if not write:
        for tensor in lazy.values():
            tensor()
        return []
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted([*folder.glob("*.safetensors"), *folder.glob(INDEX_NAME)])
    if present:
        raise UserError(f"{folder} already holds {present[0].name}: choose another folder")
    names = _file_names(len(shards))
    files = {
        name: _file_parts(shard, metadata or {"format": "pt"}) for name, shard in zip(names, shards)
    }
    if len(shards) > 1:
        files[INDEX_NAME] = iter([_index(names, shards)])
    return _write_all(folder, files)


def _write_all(folder: Path, files: Mapping[str, Iterator[Any]]) -> list[Path]:
    """Writes every file under a temporary name, then renames them all; leaves nothing on error."""
    temporary = {name: folder / f".{name}.partial" for name in files}
    try:
        for name, parts in files.items():
            with temporary[name].open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    return [path.rename(folder / name) for name, path in temporary.items()]


def _lazy(name: str, value: Any) -> LazyTensor:
    """Returns `value` with its shape and dtype at hand."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        array = np.asarray(value() if callable(value) else value)
        shape, dtype = array.shape, array.dtype
    else:
        shape, dtype = tuple(value.shape), np.dtype(value.dtype)
    dtype = dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype
    if dtype not in _TAGS:
        raise UserError(f"tensor {quoted(name)} is {dtype}, which safetensors cannot hold")
    return LazyTensor(shape, dtype, value if callable(value) else lambda: np.asarray(value))


def _shards(tensors: Mapping[str, LazyTensor], limit: float) -> list[dict[str, LazyTensor]]:
    """Fills shards in the order given; each but one of a single tensor stays within `limit`."""
    shards: list[dict[str, LazyTensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if shards[-1] and _bytes(tensor) > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= _bytes(tensor)
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _file_parts(shard: dict[str, LazyTensor], metadata: Mapping[str, str]) -> Iterator[Any]:
    """Yields the bytes of one file: length, header, tensors."""
    ordered = sorted(shard.items(), key=lambda item: (-_TAGS[item[1].dtype][0], item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + _bytes(tensor)
        header[name] = {
            "dtype": _TAGS[tensor.dtype][1],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % LENGTH_BYTES)
    yield len(text).to_bytes(LENGTH_BYTES, "little")
    yield text
    for name, tensor in ordered:
        array = np.asarray(tensor())
        if array.shape != tensor.shape:
            raise ValueError(f"tensor {name!r} came out as {array.shape}, not {tensor.shape}")
        yield np.ascontiguousarray(array, tensor.dtype).reshape(-1).view(np.uint8).data


def _index(names: list[str], shards: list[dict[str, LazyTensor]]) -> bytes:
    """Returns the index file that says which shard holds each tensor."""
    index = {
        "metadata": {"total_size": sum(_bytes(t) for shard in shards for t in shard.values())},
        "weight_map": {key: name for name, shard in zip(names, shards) for key in shard},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _bytes(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
