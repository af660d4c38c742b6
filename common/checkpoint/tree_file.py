"""Reads parameter trees of JAX releases: Orbax PyTree folders and Flax msgpack files.

Names are the tree's keys joined by "/" ("params/blocks.0/mlp_block/ffw_up/w": a key may contain
dots). No abstract tree is needed: an Orbax folder lists its own leaves, and TensorStore, by which
Orbax stores arrays, reads slices of them.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint.reader import ArrayTensors, Index, Shape, no_tensor, quoted
from common.checkpoint.safetensors import parse_json_object
from common.errors import UserError

METADATA, LEGACY_TREE, DATABASE = "_METADATA", "checkpoint", "manifest.ocdbt"
PLACEHOLDER = "PLACEHOLDER://"
# Where Orbax puts the tree itself inside the folder of a step.
ITEM_FOLDERS = ("", "default", "params", "state")
# Leaves that Orbax lists beside arrays: nothing, empty containers and text.
NO_ARRAY = ("None", "Dict", "List", "Tuple", "NamedTuple", "string")
MAX_DEPTH = 64


class TreeTensors:
    """The arrays of an Orbax folder, each an open TensorStore."""

    def __init__(self, path: Path, stores: Mapping[str, Any]) -> None:
        self.path = path
        self._stores = dict(stores)

    def keys(self) -> Collection[str]:
        return self._stores.keys()

    def shape(self, name: str) -> Shape:
        return tuple(self._store(name).shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._store(name).dtype.numpy_dtype)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        store = self._store(name)
        try:
            return np.asarray((store if index is None else store[index]).read().result())
        except ValueError as error:  # How TensorStore reports missing or damaged chunks.
            raise _damaged(self.path, name, error) from error

    def _store(self, name: str) -> Any:
        if name not in self._stores:
            raise no_tensor(self.path, name, self._stores)
        return self._stores[name]


def is_tree_folder(path: Path) -> bool:
    """Says whether `path` looks like a folder in which Orbax saved a tree."""
    return _item_folder(path) is not None


def open_tree_folder(path: str | Path) -> TreeTensors:
    """Opens the tree that Orbax (PyTree or Standard handler, any version) saved in a folder.

    Raises:
      UserError: it is not such a folder, or a leaf is missing or damaged.
    """
    path = Path(path)
    folder = _item_folder(path)
    if folder is None:
        raise UserError(f"{path} is not an Orbax checkpoint: it has no {METADATA} file")
    names, options = _listed(folder)
    if not names:
        raise UserError(f"{folder} lists no arrays")
    return TreeTensors(path, _open_stores(folder, names, options))


def open_msgpack_file(path: str | Path) -> ArrayTensors:
    """Opens a Flax msgpack file (`flax.serialization.to_bytes`); all of it is read at once."""
    from flax import serialization

    path = Path(path)
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # Damaged bytes surface as whatever the decoder trips over.
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a Flax msgpack file ({reason})") from error
    arrays = {name: leaf for name, leaf in _flatten(path, tree) if isinstance(leaf, np.ndarray)}
    if not arrays:
        raise UserError(f"{path} holds no arrays")
    return ArrayTensors(path, arrays)


def _item_folder(path: Path) -> Path | None:
    for item in ITEM_FOLDERS:
        if (path / item / METADATA).is_file():
            return path / item
    # Before _METADATA was written, the tree's structure lay in a msgpack file.
    return path if (path / LEGACY_TREE).is_file() else None


def _listed(folder: Path) -> tuple[dict[str, str], Mapping[str, Any]]:
    """Returns leaf name -> stored name, and the folder's storage options."""
    try:
        if not (folder / METADATA).is_file():
            return _listed_by_structure(folder / LEGACY_TREE), {}
        data = (folder / METADATA).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error
    metadata = parse_json_object(folder / METADATA, data, "tree metadata")
    names: dict[str, str] = {}
    try:
        for leaf in metadata["tree_metadata"].values():
            keys = [str(part["key"]) for part in leaf["key_metadata"]]
            if leaf["value_metadata"].get("value_type") not in NO_ARRAY:
                names["/".join(keys)] = ".".join(keys)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / METADATA} does not describe a tree") from error
    return names, metadata


def _listed_by_structure(path: Path) -> dict[str, str]:
    """Returns leaf name -> stored name from the msgpack structure file of old Orbax versions."""
    from flax import serialization

    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"{path} is not the structure of an Orbax tree") from error
    return {
        name: leaf.removeprefix(PLACEHOLDER)
        for name, leaf in _flatten(path, tree)
        if isinstance(leaf, str) and leaf.startswith(PLACEHOLDER)
    }


def _open_stores(
    folder: Path, names: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Opens every leaf's TensorStore, all at once since each waits for the disk."""
    import tensorstore

    base = folder.resolve()
    files = {"driver": "file", "path": f"{base}/"}
    database = (folder / DATABASE).is_file()
    context = tensorstore.Context()
    futures = {}
    for name, stored in names.items():
        if not database and (stored.startswith("/") or ".." in stored.split("/")):
            raise UserError(f"{folder}: {quoted(name)} points outside the checkpoint")
        spec: dict[str, Any] = {
            "driver": "zarr3" if options.get("use_zarr3") else "zarr",
            "kvstore": {"driver": "ocdbt", "base": files, "path": f"{stored}/"}
            if database
            else {"driver": "file", "path": f"{base}/{stored}/"},
        }
        if options.get("store_array_data_equal_to_fill_value"):
            spec["fill_missing_data_reads"] = False  # A lost chunk must not read as zeros.
        futures[name] = tensorstore.open(spec, open=True, read=True, context=context)
    stores = {}
    for name, future in futures.items():
        try:
            stores[name] = future.result()
        except ValueError as error:
            raise _damaged(folder, name, error) from error
    return stores


def _flatten(path: Path, tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields (keys joined by "/", leaf) of nested dicts and lists."""
    if len(keys) > MAX_DEPTH:
        raise UserError(f"{path} is nested deeper than a parameter tree")
    if not isinstance(tree, dict | list | tuple):
        yield "/".join(keys), tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _flatten(path, value, (*keys, str(key)))


def _damaged(path: Path, name: str, error: Exception) -> UserError:
    reason = json.dumps(" ".join(str(error).split())[:160])
    return UserError(f"{path}: parameter {quoted(name)} is missing or damaged ({reason})")
