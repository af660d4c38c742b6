"""Opens checkpoints by what they look like: Hugging Face folders, single files, parameter trees.

A folder's index file is data from outside too: it may only name files beside itself, and what it
says must be exactly what the shards hold.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from common.checkpoint.gguf import is_gguf_file, open_gguf_file
from common.checkpoint.reader import Index, Shape, TensorReader, no_tensor, quoted
from common.checkpoint.safetensors import open_safetensors_file, parse_json_object
from common.checkpoint.torch_file import is_torch_file, open_torch_file
from common.checkpoint.tree_file import is_tree_folder, open_msgpack_file, open_tree_folder
from common.errors import UserError

MAX_INDEX_BYTES = 100_000_000
SINGLE_FILES: Mapping[str, Callable[[Path], TensorReader]] = {
    "model.safetensors": open_safetensors_file,
    "pytorch_model.bin": open_torch_file,
}


class ShardedTensors:
    """Tensors spread over the shards of a folder."""

    def __init__(self, path: Path, shards: Mapping[str, TensorReader]) -> None:
        """`shards` maps each tensor name to the reader that holds it."""
        self.path = path
        self._shards = dict(shards)

    def keys(self) -> Collection[str]:
        return self._shards.keys()

    def shape(self, name: str) -> Shape:
        return self._shard(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._shard(name).dtype(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self._shard(name).read(name, index)

    def _shard(self, name: str) -> TensorReader:
        if name not in self._shards:
            raise no_tensor(self.path, name, self._shards)
        return self._shards[name]


def open_checkpoint(path: str | Path) -> TensorReader:
    """Opens the tensors at `path`, whichever of the known foreign formats it has.

    That is a Hugging Face folder, a `.safetensors`, `.gguf` or torch `.pth`/`.pt`/`.bin` file, the
    folder of an Orbax parameter tree, or a Flax `.msgpack` file.

    Raises:
      UserError: nothing is there, it has another format, or it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: check the path")
    if path.is_dir():
        return open_tree_folder(path) if is_tree_folder(path) else open_huggingface(path)
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    if path.suffix == ".gguf" or is_gguf_file(path):
        return open_gguf_file(path)
    if path.suffix == ".msgpack":
        return open_msgpack_file(path)
    if path.suffix in (".pth", ".pt", ".bin") or is_torch_file(path):
        return open_torch_file(path)
    return open_safetensors_file(path)


def open_huggingface(folder: str | Path) -> TensorReader:
    """Opens the weights of a Hugging Face folder, in one file or sharded.

    Prefers safetensors to torch files, and a single file to an index, as transformers does.
    """
    folder = Path(folder)
    for name, open_file in SINGLE_FILES.items():
        if (folder / name).exists():
            return open_file(folder / name)
        if (folder / f"{name}.index.json").exists():
            return _open_sharded(folder / f"{name}.index.json")
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(files) == 1:
        return open_safetensors_file(files[0])
    raise UserError(
        f"{folder} has no model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )


def _open_sharded(index_path: Path) -> ShardedTensors:
    """Opens the shards that a Hugging Face index file names."""
    open_file = open_torch_file if ".bin." in index_path.name else open_safetensors_file
    files = _weight_map(index_path)
    shards: dict[str, TensorReader] = {}
    held: dict[str, Collection[str]] = {}
    for file in sorted(set(files.values())):
        if not (index_path.parent / file).is_file():
            raise UserError(f"{index_path} names the shard {file}, which is not beside it")
        shards[file] = open_file(index_path.parent / file)
        held[file] = shards[file].keys()
    for name, file in files.items():
        if name not in held[file]:
            raise UserError(f"{index_path} places tensor {quoted(name)} in {file}, which lacks it")
    for file, names in held.items():
        for name in names:
            if files.get(name) != file:
                raise UserError(f"{index_path} omits tensor {quoted(name)}, which {file} holds")
    return ShardedTensors(index_path.parent, {name: shards[f] for name, f in files.items()})


def _weight_map(index_path: Path) -> dict[str, str]:
    """Returns tensor name -> file name, every file name being a plain one."""
    try:
        size = index_path.stat().st_size
        data = index_path.read_bytes() if size <= MAX_INDEX_BYTES else b""
    except OSError as error:
        raise UserError(f"cannot read {index_path}: {error.strerror}") from error
    if size > MAX_INDEX_BYTES:
        raise UserError(f"{index_path} has {size} bytes, too many for an index")
    files = parse_json_object(index_path, data, "index").get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{index_path} has no weight_map from tensor names to files")
    for name, file in files.items():
        plain = isinstance(file, str) and file.isprintable() and file not in ("", ".", "..")
        if not plain or "/" in file or "\\" in file:
            raise UserError(
                f"{index_path} places tensor {quoted(name)} in {quoted(file)}, "
                "which is not the name of a file beside it"
            )
    return files
