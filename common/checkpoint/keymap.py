"""Key maps: which tensors of a foreign checkpoint make up each parameter, read in both directions.

A map is a list of rows (sources, target, transform). Before any data is read the engine proves it
a bijection between the checkpoint and the model: every tensor used once, every parameter and every
layer of a stacked parameter filled once, every shape and dtype as expected. Loading then places
each parameter straight on its sharding; exporting runs the same rows backwards.
"""

import dataclasses
import fnmatch
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.checkpoint.reader import Index, Shape, TensorReader, quoted
from common.checkpoint.safetensors_writer import LazyTensor
from common.checkpoint.transforms import IDENTITY, Transform
from common.errors import UserError

Tree = dict[Any, Any]
SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part `start:stop` along `axis` (from the front) of a tensor; its pieces must tile it."""

    name: str
    axis: int
    start: int
    stop: int


Source = str | Piece


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a key map.

    Attributes:
      sources: tensor names of the checkpoint (or pieces of tensors), in the transform's order.
      target: the parameter, its keys in the pure dict joined by "." ("blocks.0.mlp.up.w").
      transform: makes the target from the sources.
      index: position on the target's leading layers dim; None fills the whole target.
    """

    sources: Source | tuple[Source, ...]
    target: str
    transform: Transform = IDENTITY
    index: int | None = None

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources, always as a tuple."""
        return self.sources if isinstance(self.sources, tuple) else (self.sources,)


def load_tensors(
    reader: TensorReader,
    rows: Sequence[Row],
    abstract: Tree,
    dtype: Any = None,
    ignore: Sequence[str] = (),
) -> Tree:
    """Loads a checkpoint into the parameters of a model.

    Args:
      reader: the checkpoint.
      rows: its key map.
      abstract: pure dict of the model's parameters, whose leaves have a shape and dtype and may
        have a sharding (`jax.ShapeDtypeStruct`); nothing is computed from their values.
      dtype: dtype of all floating parameters, in place of that of their abstract leaf.
      ignore: shell patterns of tensors that no row may need ("lm_head.weight", "*.inv_freq").

    Returns:
      A pure dict like `abstract` of arrays on their shardings. At most one parameter is on the
      host at a time, and of that only the slices that this process's devices hold.

    Raises:
      UserError: the checkpoint does not fit the model; names the first few tensors that are
        missing, unexpected or of another shape or dtype.
    """
    leaves = _flatten(abstract)
    problems = _map_problems(rows, leaves) + _source_problems(reader, rows, leaves, ignore)
    if problems:
        raise UserError(f"{reader.path} does not fit the model: {'; '.join(problems)}")
    filled = _by_target(rows)

    def place(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        wanted = np.dtype(leaf.dtype)
        if dtype is not None and jnp.issubdtype(wanted, jnp.floating):
            wanted = jnp.dtype(dtype)
        return _place(reader, filled[_name(path)], leaf, wanted)

    return _map_tree(place, abstract)


def export_tensors(params: Tree, rows: Sequence[Row], dtype: Any = None) -> dict[str, LazyTensor]:
    """Returns the checkpoint tensors of a model, each computed when it is called.

    Args:
      params: pure dict of the model's parameters.
      rows: the key map by which such a checkpoint loads.
      dtype: dtype of all floating tensors, in place of their parameter's.

    Returns:
      Tensor name -> `LazyTensor`, in the order of the rows, as `write_safetensors` takes them.
      Parameters spread over several processes are gathered, so all processes must call alike.

    Raises:
      UserError: the key map does not cover the parameters.
    """
    leaves = _flatten(params)
    problems = _map_problems(rows, leaves)
    if problems:
        raise UserError(f"the key map does not fit the model: {'; '.join(problems)}")
    users: dict[str, list[tuple[Row, int]]] = defaultdict(list)
    for row in rows:
        for i, source in enumerate(row.parts):
            users[_source_name(source)].append((row, i))
    return {name: _lazy(leaves, uses, dtype) for name, uses in users.items()}


# Checks, before any data is read.


def _map_problems(rows: Sequence[Row], leaves: Mapping[str, Any]) -> list[str]:
    """Checks that the rows fill every parameter, and every layer of a stacked one, once."""
    filled = _by_target(rows)
    wrong = []
    for name, leaf in leaves.items():
        indices = [row.index for row in filled.get(name, ())]
        stacked = leaf.shape[:1] == (len(indices),) and indices == list(range(len(indices)))
        if indices and indices != [None] and not stacked:
            wrong.append(name)
    return [
        *_listed("parameters the key map does not fill", [n for n in leaves if n not in filled]),
        *_listed("parameters only in the key map", [n for n in filled if n not in leaves]),
        *_listed("parameters filled in part or twice", wrong),
    ]


def _source_problems(
    reader: TensorReader, rows: Sequence[Row], leaves: Mapping[str, Any], ignore: Sequence[str]
) -> list[str]:
    """Checks that the rows use every tensor of the checkpoint once, with its shape and dtype."""
    present = set(reader.keys())
    uses: dict[str, list[tuple[Source, Shape]]] = defaultdict(list)
    mismatched: list[str] = []
    for row in rows:
        if row.target not in leaves:
            continue
        leaf = leaves[row.target]
        try:
            shapes = row.transform.source_shapes(_part_shape(row, leaf.shape), len(row.parts))
        except ValueError as error:
            mismatched.append(f"{quoted(row.target)}: {error}")
            continue
        for source, shape in zip(row.parts, shapes):
            name = _source_name(source)
            uses[name].append((source, shape))
            if name in present and _kind(reader.dtype(name)) != _kind(leaf.dtype):
                mismatched.append(f"{quoted(name)} is {reader.dtype(name)}, not {leaf.dtype}")
    twice = []
    for name, users in uses.items():
        expected = _whole_shape(users)
        if expected is None:
            twice.append(name)
        elif name in present and reader.shape(name) != expected:
            found = list(reader.shape(name))
            mismatched.append(f"{quoted(name)} is {found}, not {list(expected)}")
    unexpected = [
        name
        for name in sorted(present - set(uses))
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    ]
    return [
        *_listed("missing tensors", [n for n in uses if n not in present]),
        *_listed("unexpected tensors", unexpected),
        *_listed("tensors used in part or twice", twice),
        *_listed("tensors of another shape or dtype", mismatched, quote=False),
    ]


def _whole_shape(users: Sequence[tuple[Source, Shape]]) -> Shape | None:
    """Returns the shape of a tensor from its uses, or None when they overlap or leave gaps."""
    first, shape = users[0]
    if len(users) == 1 and isinstance(first, str):
        return shape
    pieces = sorted(((s.start, s.stop) for s, _ in users if isinstance(s, Piece)))
    axes = {s.axis for s, _ in users if isinstance(s, Piece)}
    tiled = [0, *(stop for _, stop in pieces)]
    if len(pieces) != len(users) or len(axes) != 1 or [b for b, _ in pieces] != tiled[:-1]:
        return None
    axis = axes.pop()
    for source, part in users:
        rest = (part[:axis], part[axis + 1 :])
        size = source.stop - source.start if isinstance(source, Piece) else -1
        if not 0 <= axis < len(part) or part[axis] != size:
            return None
        if rest != (shape[:axis], shape[axis + 1 :]):
            return None
    return (*shape[:axis], tiled[-1], *shape[axis + 1 :])


def _listed(what: str, names: Sequence[str], quote: bool = True) -> list[str]:
    """Returns no phrase for no names, else one with their number and the first few."""
    if not names:
        return []
    shown = ", ".join(quoted(name) if quote else name for name in names[:SHOWN])
    return [f"{len(names)} {what} ({shown}{', …' if len(names) > SHOWN else ''})"]


def _kind(dtype: Any) -> type:
    kinds = (jnp.floating, jnp.bool_, jnp.integer, jnp.complexfloating)
    return next(kind for kind in kinds if jnp.issubdtype(dtype, kind))


# Loading.


def _place(reader: TensorReader, rows: list[Row], leaf: Any, dtype: np.dtype) -> jax.Array:
    """Reads one parameter onto its devices, each slice once however many devices hold it."""
    shape = tuple(leaf.shape)

    @functools.cache
    def part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        return _read_leaf(reader, rows, tuple(slice(a, b, 1) for a, b in bounds), shape, dtype)

    def local(index: Index | None) -> np.ndarray:
        index = index if index is not None else tuple(slice(None) for _ in shape)
        return part(tuple(s.indices(d)[:2] for s, d in zip(index, shape)))

    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.block_until_ready(jax.device_put(local(None)))
    array = jax.make_array_from_callback(shape, sharding, local)
    return jax.block_until_ready(array)  # Else the next parameter's buffers pile up beside it.


def _read_leaf(
    reader: TensorReader, rows: list[Row], index: Index, shape: Shape, dtype: np.dtype
) -> np.ndarray:
    """Returns `parameter[index]` in memory of its own, never a view of the file."""
    result = np.empty([s.stop - s.start for s in index], dtype)
    if rows[0].index is None:
        result[...] = _read_row(reader, rows[0], index, shape)
        return result
    for i, row in enumerate(rows[index[0].start : index[0].stop]):
        result[i] = _read_row(reader, row, index[1:], shape[1:])
    return result


def _read_row(reader: TensorReader, row: Row, index: Index, shape: Shape) -> np.ndarray:
    """Returns `target[index]` of a row whose whole target has `shape`."""
    reads = row.transform.reads(index, shape, len(row.parts))
    if reads is None:
        wholes = row.transform.source_shapes(shape, len(row.parts))
        arrays = [
            _read_source(reader, source, tuple(slice(0, d, 1) for d in whole))
            for source, whole in zip(row.parts, wholes)
        ]
        return row.transform.forward(arrays, shape)[index]
    arrays = [_read_source(reader, row.parts[i], part) for i, part in reads]
    return row.transform.forward(arrays, tuple(s.stop - s.start for s in index))


def _read_source(reader: TensorReader, source: Source, index: Index) -> np.ndarray:
    if isinstance(source, str):
        return reader.read(source, index)
    along = index[source.axis]
    shifted = slice(along.start + source.start, along.stop + source.start, 1)
    return reader.read(source.name, (*index[: source.axis], shifted, *index[source.axis + 1 :]))


# Exporting.


def _lazy(leaves: Mapping[str, Any], uses: list[tuple[Row, int]], dtype: Any) -> LazyTensor:
    """Returns one tensor of the checkpoint from the rows that use it (several for pieces)."""
    shapes: list[tuple[Source, Shape]] = []
    for row, i in uses:
        part = _part_shape(row, leaves[row.target].shape)
        shapes.append((row.parts[i], row.transform.source_shapes(part, len(row.parts))[i]))
    shape = _whole_shape(shapes)
    if shape is None:
        name = quoted(_source_name(shapes[0][0]))
        raise UserError(f"the key map uses tensor {name} in part or twice")
    wanted = np.dtype(leaves[uses[0][0].target].dtype)
    if dtype is not None and jnp.issubdtype(wanted, jnp.floating):
        wanted = jnp.dtype(dtype)

    def values() -> np.ndarray:
        result = np.empty(shape, wanted)
        for row, i in uses:
            host = _on_host(leaves[row.target], row.index)
            source = row.parts[i]
            where: Any = ...
            if isinstance(source, Piece):
                where = (slice(None),) * source.axis + (slice(source.start, source.stop),)
            result[where] = row.transform.inverse(host, len(row.parts))[i]
        return result

    return LazyTensor(shape, wanted, values)


def _on_host(leaf: Any, index: int | None) -> np.ndarray:
    """Returns a parameter, or one layer of it, as one array on this host."""
    value = leaf if index is None else leaf[index]
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


# Pure dicts and rows.


def _flatten(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of a pure dict by their dotted names."""
    leaves: dict[str, Any] = {}

    def keep(path: tuple[Any, ...], leaf: Any) -> Any:
        leaves[_name(path)] = leaf

    _map_tree(keep, tree)
    return leaves


def _map_tree(function: Any, tree: Tree, path: tuple[Any, ...] = ()) -> Tree:
    """Returns the dict tree with `function(path, leaf)` in place of each leaf."""
    return {
        key: _map_tree(function, value, (*path, key))
        if isinstance(value, dict)
        else function((*path, key), value)
        for key, value in tree.items()
    }


def _name(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def _by_target(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns the rows of each target, in the order of their index."""
    result: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        result[row.target].append(row)
    for target in result.values():
        target.sort(key=lambda row: -1 if row.index is None else row.index)
    return dict(result)


def _part_shape(row: Row, shape: Shape) -> Shape:
    return tuple(shape) if row.index is None else tuple(shape[1:])


def _source_name(source: Source) -> str:
    return source if isinstance(source, str) else source.name
