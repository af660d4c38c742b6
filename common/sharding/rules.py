"""Logical axis names to mesh axes: for parameters by metadata, for activations by `shard`.

A parameter is `nnx.Param(value, axes=("embed", "mlp"))`; a table of `Rules` says on which mesh
axes each name lies. Two things are decided here once for the whole workspace: a mesh axis is used
at most once in a spec (the later dimension gives way), and a dimension that an axis does not
divide stays whole.
"""

import contextlib
import contextvars
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from common.errors import nearest

MeshAxes = str | tuple[str, ...] | None
LogicalAxes = Sequence[str | None]

log = logging.getLogger(__name__)


class Rules(Mapping[str, MeshAxes]):
    """A frozen table from logical axis name to mesh axis, several mesh axes, or None."""

    def __init__(self, table: Mapping[str, MeshAxes]):
        self._table = dict(table)
        self._hash = hash(tuple(sorted(self._table.items(), key=lambda item: item[0])))

    def __getitem__(self, name: str) -> MeshAxes:
        if name not in self._table:
            raise KeyError(f"no sharding rule for axis '{name}'{nearest(name, self._table)}")
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self._table == other._table

    def __repr__(self) -> str:
        return f"Rules({self._table})"

    def replace(self, **changes: MeshAxes) -> "Rules":
        """Returns these rules with some names mapped otherwise, or new names added."""
        return Rules({**self._table, **changes})


DEFAULT_RULES = Rules(
    {
        "batch": ("data", "fsdp"),
        "seq": "context",
        "embed": "fsdp",
        "mlp": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "head_dim": None,
        "vocab": "tensor",
        "lru": "tensor",
        "layers": None,
    }
)

_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=DEFAULT_RULES)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Makes `shard` constrain activations on `mesh` by `rules` in what is traced inside."""
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _rules.reset(token)


def current_rules() -> Rules:
    """Returns the rules in force."""
    return _rules.get()


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to lie as its logical axes say; without a mesh, returns it as is.

    Args:
      x: any array, inside `jit`.
      axes: one logical name or None per dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.axis_sizes) == 1:
        return x
    if len(axes) != x.ndim:
        raise ValueError(f"shard got {len(axes)} axis names for an array of shape {x.shape}")
    spec = partition_spec(axes, x.shape, mesh, _rules.get())
    return jax.lax.with_sharding_constraint(x, spec)


def variable_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """Returns one logical name or None per dimension of a variable.

    A stacked variable has more dimensions than names: the first extra one is `layers`.
    """
    names = variable.get_metadata().get("axes")
    ndim = len(variable.shape)
    if names is None:
        return (None,) * ndim
    extra = ndim - len(names)
    if extra < 0:
        raise ValueError(f"axes {names} are more than the dimensions of shape {variable.shape}")
    leading = ("layers", *(None,) * (extra - 1)) if extra else ()
    return (*leading, *names)


def partition_spec(
    axes: LogicalAxes, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules
) -> PartitionSpec:
    """Returns where each dimension of an array of `shape` lies on `mesh`.

    Args:
      axes: a logical name or None per dimension.
      shape: the array's shape; a dimension that its mesh axes do not divide stays whole.
      mesh: the mesh; axes that a `shard_map` around has made manual are left out.
      rules: logical name to mesh axes.
    """
    return _partition_spec(tuple(axes), tuple(shape), free_axes(mesh), rules)


def state_shardings(abstract_state: nnx.State, mesh: Mesh, rules: Rules) -> dict[Any, Any]:
    """Returns a pure dict of `NamedSharding`, shaped like `nnx.to_pure_dict(abstract_state)`."""
    shardings: dict[Any, Any] = {}
    for path, variable in nnx.to_flat_state(abstract_state):
        spec = partition_spec(variable_axes(variable), variable.shape, mesh, rules)
        inner = shardings
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = NamedSharding(mesh, spec)
    return shardings


def free_axes(mesh: Mesh | AbstractMesh) -> tuple[tuple[str, int], ...]:
    """Returns name and size of the mesh axes that no `shard_map` around has made manual."""
    types = mesh.axis_types
    sizes = mesh.shape.items()
    return tuple((n, s) for (n, s), kind in zip(sizes, types) if kind != AxisType.Manual)


@functools.lru_cache(maxsize=4096)  # Also what makes the line about a dropped axis appear once.
def _partition_spec(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh_axes: tuple[tuple[str, int], ...],
    rules: Rules,
) -> PartitionSpec:
    sizes = dict(mesh_axes)
    used: set[str] = set()
    spec: list[MeshAxes] = []
    for name, size in zip(axes, shape, strict=True):
        wanted = rules[name] if name is not None else None
        wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
        free = [axis for axis in wanted if sizes.get(axis, 1) > 1 and axis not in used]
        while free and size % math.prod(sizes[axis] for axis in free):
            dropped = free.pop()
            log.info("dimension '%s' of %s is not split over '%s': %d does not divide by %d",
                     name, shape, dropped, size, sizes[dropped])  # fmt: skip
        used.update(free)
        spec.append(tuple(free) if len(free) > 1 else free[0] if free else None)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)
