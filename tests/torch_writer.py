"""Writes torch checkpoints without torch, honest ones and others."""

import collections
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Global:
    """Pickles as the name of something that need not exist here."""

    def __init__(self, name):
        self.name = name

    def __call__(self):
        raise AssertionError("only pickled")


class Call:
    """Pickles as a call of a global."""

    def __init__(self, name, *arguments, state=None):
        self.reduced = (Global(name), arguments, state)

    def __reduce__(self):
        return self.reduced


class Storage:
    def __init__(self, kind, key, count):
        self.pid = ("storage", Global(f"torch {kind}"), key, "cpu", count)


class Pickler(pickle._Pickler):
    """Writes `Global`s by name and `Storage`s as torch does."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_name(self, value):
        module, name = value.name.split(" ")
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    dispatch[Global] = save_name

    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None


def tensor(storage, offset, shape, strides):
    hooks = collections.OrderedDict()
    return Call("torch._utils _rebuild_tensor_v2", storage, offset, shape, strides, False, hooks)


def archive(path, tree, records=None, root="archive", extra=(), compression=zipfile.ZIP_STORED):
    """Writes what torch.save writes; `tree` may also be the bytes of a pickle."""
    stream = io.BytesIO()
    if not isinstance(tree, bytes):
        Pickler(stream, 2).dump(tree)
        tree = stream.getvalue()
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{root}/data.pkl", tree)
        file.writestr(f"{root}/byteorder", "little")
        for key, array in (records or {}).items():
            file.writestr(f"{root}/data/{key}", np.asarray(array).tobytes())
        file.writestr(f"{root}/version", "3\n")
        for name, content in extra:
            file.writestr(name, content)
    return path


def write_tensors(path: Path, tree: Any) -> Path:
    """Writes nested dicts of float32 arrays, and of whatever else pickles, as torch.save does."""
    records: dict[str, np.ndarray] = {}

    def told(node: Any) -> Any:
        if isinstance(node, Mapping):
            return collections.OrderedDict({key: told(value) for key, value in node.items()})
        if not isinstance(node, np.ndarray):
            return node
        key = str(len(records))
        records[key] = np.ascontiguousarray(node, np.float32)
        strides = tuple(step // 4 for step in records[key].strides)
        return tensor(Storage("FloatStorage", key, node.size), 0, node.shape, strides)

    return archive(path, told(tree), records)
