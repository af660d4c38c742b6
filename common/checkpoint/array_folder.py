"""One folder of named arrays, written by Orbax, with a record that proves it whole.

The only file that imports Orbax for the workspace's own checkpoints. Arrays are named by their
path in the tree (`params/blocks/up`), so a renamed class or another container type on the way does
not break a file.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from common.checkpoint.fingerprint import fingerprints
from common.errors import UserError
from common.sharding import everywhere

log = logging.getLogger(__name__)

RECORD = "checkpoint.json"
_Read = TypeVar("_Read")
_CHECKSUM_BELOW = 1 << 20  # bytes; larger files hold array chunks, which carry their own checksum.


class DamagedError(Exception):
    """A folder that is not what was written."""


def start_writing(path: Path, tree: Any, information: dict[str, Any]) -> Callable[[], None]:
    """Starts writing a tree of arrays into a new folder.

    Returns when the arrays have been copied; the function it returns blocks until all is on disk.

    Args:
      path: the folder; must not exist.
      tree: pytree of arrays (PRNG keys too), to be read back by `read`.
      information: JSON-able, kept in the record.

    Raises:
      TypeError: `information` is not JSON-able.
    """
    from orbax.checkpoint import v1 as ocp

    information = json.loads(_dump(information))  # A copy, and refused now rather than later.
    leaves = _named_leaves(tree, _plain)
    record = {
        **information,
        "arrays": {
            name: {
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "sum": None,
            }
            for name, leaf in leaves.items()
        },
    }
    for name, value in fingerprints(leaves).items():
        record["arrays"][name]["sum"] = value
    # Orbax takes no empty arrays; their shape in the record says all.
    groups = _groups({name: leaf for name, leaf in leaves.items() if leaf.size})
    response = ocp.save_checkpointables_async(path, groups)

    def finish() -> None:
        response.result()
        if jax.process_index() == 0:
            _write_record(path, record)

    return finish


def read(
    path: Path, abstract: Any, cast: bool = False, branch: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reads a tree of arrays and the record beside it.

    Args:
      path: a folder by `start_writing`.
      abstract: pytree of `jax.ShapeDtypeStruct`, or a part of the tree with the same names.
      cast: convert arrays whose dtype is another here; otherwise that is an error.
      branch: name of the branch that `abstract` lies in; what the folder has beside it is left
        unread. None: everything under the same top-level names.

    Raises:
      DamagedError: a file or an array is not what was written.
      UserError: intact, but its arrays are others than `abstract`.
    """
    record = _agreed(lambda: read_record(path))
    wanted = _named_leaves(abstract, _plain_abstract)
    _check_same_arrays(path, record["arrays"], wanted, cast, branch)
    on_disk = {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.dtype(record["arrays"][name]["dtype"]),
            sharding=leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),
        )
        for name, leaf in wanted.items()
    }
    loaded = _load(path, {name: leaf for name, leaf in on_disk.items() if leaf.size})
    for name, leaf in on_disk.items():
        if not leaf.size:
            loaded[name] = jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    for name, value in fingerprints(loaded).items():
        if value != record["arrays"][name]["sum"]:
            raise DamagedError(f"array '{name}' has another checksum than when it was saved")
    leaves = [
        loaded[name] if loaded[name].dtype == leaf.dtype else loaded[name].astype(leaf.dtype)
        for name, leaf in wanted.items()
    ]
    return _rebuild(abstract, leaves), record


def read_record(path: Path) -> dict[str, Any]:
    """Returns the record of a folder whose files are all there and as long as they were.

    Raises:
      DamagedError: they are not.
    """
    try:
        text = (path / RECORD).read_text(encoding="utf-8")
        record = json.loads(text)
        files = record["files"]
        body = {key: value for key, value in record.items() if key != "check"}
        if record["check"] != _crc(_dump(body)):
            raise DamagedError(f"{RECORD} has been altered")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{RECORD} is missing or unreadable") from error
    for name, (size, check) in files.items():
        file = path / name
        try:
            intact = file.stat().st_size == size and check in (None, _file_check(file))
        except OSError as error:
            raise DamagedError(f"{name} is missing") from error
        if not intact:
            raise DamagedError(f"{name} has been altered")
    return record


def is_array_folder(path: Path) -> bool:
    """Returns whether `path` looks like what `start_writing` makes, damaged or not."""
    return (path / RECORD).exists() or (path / "_CHECKPOINT_METADATA").exists()


def _load(path: Path, abstract: dict[str, Any]) -> dict[str, jax.Array]:
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = True  # Which arrays are wanted has been checked.
    with context:
        trees = _agreed(lambda: ocp.load_checkpointables(path, _groups(abstract)))
    return {name: _at(trees, name) for name in abstract}


def _agreed(read: Callable[[], _Read]) -> _Read:
    """Reads in every process, and counts what one of them cannot read as damaged in all.

    They must turn to another checkpoint together, or they would wait for each other.
    """
    result, error = None, None
    try:
        result = read()
    except Exception as caught:  # Orbax tells damage by a dozen types, from three libraries.
        error = caught
    if not everywhere("readable", error is None):
        reason = (
            (str(error).splitlines() or [type(error).__name__])[0]
            if error
            else ("another process cannot read it")
        )
        raise DamagedError(reason[:200]) from error
    return cast(_Read, result)


def _check_same_arrays(
    path: Path,
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    cast: bool,
    branch: str | None,
) -> None:
    tops = tuple(
        {name.split("/")[0] + "/" for name in wanted} if branch is None else [branch + "/"]
    )
    problems = [f"'{n}' is not in it" for n in wanted if n not in stored]
    problems += [
        f"'{n}' is not in this model"
        for n in stored
        if n not in wanted and f"{n}/".startswith(tops)
    ]
    for name in wanted.keys() & stored.keys():
        there, here = tuple(stored[name]["shape"]), tuple(wanted[name].shape)
        if there != here:
            problems.append(f"'{name}' has shape {there} there and {here} here")
        elif not cast and stored[name]["dtype"] != str(wanted[name].dtype):
            problems.append(f"'{name}' is {stored[name]['dtype']} there, {wanted[name].dtype} here")
    if problems:
        more = f" and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise UserError(f"{path} was saved with another model or optimizer: {problems[0]}{more}")


def _write_record(path: Path, record: dict[str, Any]) -> None:
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            small = file.stat().st_size < _CHECKSUM_BELOW
            files[file.relative_to(path).as_posix()] = [
                file.stat().st_size,
                _file_check(file) if small else None,
            ]
    record = {**record, "files": files}
    record["check"] = _crc(_dump(record))
    with open(path / RECORD, "w", encoding="utf-8") as stream:
        stream.write(_dump(record))
        stream.flush()
        os.fsync(stream.fileno())


def _file_check(file: Path) -> int:
    return zlib.crc32(file.read_bytes())


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _named_leaves(tree: Any, convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns the leaves by name, `convert`ed, in the order of `jax.tree.leaves`."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {"/".join(_key(key) for key in path): convert(leaf) for path, leaf in pairs}
    if len(named) != len(pairs):
        raise ValueError("two arrays of the tree have the same name")
    return named


def _key(key: Any) -> str:
    match key:
        case jax.tree_util.DictKey(key=name) | jax.tree_util.FlattenedIndexKey(key=name):
            text = str(name)
        case jax.tree_util.GetAttrKey(name=name):
            text = name
        case jax.tree_util.SequenceKey(idx=index):
            text = str(index)
        case _:
            raise TypeError(f"cannot name an array under {key!r}")
    if "/" in text:
        raise ValueError(f"a name in the tree may not hold '/': {text!r}")
    return text


def _plain(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _plain_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    plain = leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        plain = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct | jax.Array) else None
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _rebuild(abstract: Any, leaves: list[jax.Array]) -> Any:
    structure = jax.tree.structure(abstract)
    restored = []
    for leaf, wanted in zip(leaves, jax.tree.leaves(abstract), strict=True):
        if jnp.issubdtype(wanted.dtype, jax.dtypes.prng_key):
            leaf = jax.random.wrap_key_data(leaf, impl=_key_impl(wanted))
        restored.append(leaf)
    return jax.tree.unflatten(structure, restored)


def _key_impl(key: Any) -> Any:
    found = []
    # `key_impl` takes arrays, of which a trace makes one from a shape.
    jax.eval_shape(
        lambda k: found.append(jax.random.key_impl(k)), jax.ShapeDtypeStruct(key.shape, key.dtype)
    )
    return found[0]


def _groups(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Splits named leaves into the Orbax items `params` and `state`, as nested dicts."""
    groups: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        group, *path = _location(name)
        inner = groups.setdefault(group, {})
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return groups


def _location(name: str) -> list[str]:
    path = name.split("/")
    return path if path[0] == "params" and len(path) > 1 else ["state", *path]


def _at(groups: Mapping[str, Any], name: str) -> jax.Array:
    node: Any = groups
    for key in _location(name):
        node = node[key]
    return node
