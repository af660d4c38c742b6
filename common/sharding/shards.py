"""Functions of whole arrays, run on each device's shard: what the compiler cannot partition itself.

XLA partitions its own operations over a mesh, but not a kernel. `per_shard` wraps one in
`jax.shard_map`, with specs from the same logical names and rules as everything else.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from common.sharding.rules import LogicalAxes, Rules, current_rules, free_axes


def per_shard(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    in_axes: Sequence[LogicalAxes | None],
    out_axes: Any,
    *,
    sequence: str | None = None,
) -> Any:
    """Calls `function(*arguments)` on the shards that each device holds.

    Without a mesh, or on a mesh of one device, it is a plain call. A mesh axis that does not divide
    every dimension of a name is left out for all of them, so that a name means the same shards in
    every argument.

    Args:
      function: of arrays; called with shards. With `sequence`, it also takes `axis_name`: the mesh
        axis over which that dimension lies, or None where it is whole.
      arguments: arrays, or None.
      in_axes: for each argument one logical name or None per dimension; None for an argument that
        is None.
      out_axes: the same for the results: one tuple of names, or a tuple of them for several.
      sequence: the logical name of a dimension along which the function itself communicates; all
        other dimensions must be independent.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else dict(free_axes(mesh))
    given = [i for i, argument in enumerate(arguments) if argument is not None]
    named = _divisible(
        [(axes, arguments[i].shape) for i in given if (axes := in_axes[i]) is not None],
        sizes,
        current_rules(),
    )
    axis_name = named.get(sequence, ()) if sequence is not None else ()
    if len(axis_name) > 1:
        raise ValueError(f"'{sequence}' may lie on one mesh axis, not on {axis_name}")
    extra = {"axis_name": axis_name[0] if axis_name else None} if sequence is not None else {}

    def call(*present: Any) -> Any:
        all_arguments = [None] * len(arguments)
        for i, argument in zip(given, present):
            all_arguments[i] = argument
        return function(*all_arguments, **extra)

    present = [arguments[i] for i in given]
    if math.prod(sizes.values()) == 1:
        return call(*present)
    several = bool(out_axes) and isinstance(out_axes[0], (tuple, list))
    specs = [_spec(in_axes[i] or (), named) for i in given]
    out = tuple(_spec(axes, named) for axes in out_axes) if several else _spec(out_axes, named)
    # The kernels' own results carry no variance types.
    mapped = jax.shard_map(call, in_specs=tuple(specs), out_specs=out, check_vma=False)
    return mapped(*present)


def ways(name: str) -> int:
    """Returns into how many parts the mesh in force cuts a dimension of a name, if it divides."""
    mesh = jax.sharding.get_abstract_mesh()
    wanted = current_rules()[name]
    wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
    sizes = {} if mesh.empty else dict(free_axes(mesh))
    return math.prod(sizes.get(axis, 1) for axis in wanted)


def _divisible(
    named_shapes: Sequence[tuple[LogicalAxes, Sequence[int]]], sizes: dict[str, int], rules: Rules
) -> dict[str, tuple[str, ...]]:
    """Returns for each logical name the mesh axes that divide all its dimensions."""
    found: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for axes, shape in named_shapes:
        for name, size in zip(axes, shape, strict=True):
            if name is None:
                continue
            if name not in found:
                wanted = rules[name]
                wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
                found[name] = tuple(a for a in wanted if sizes.get(a, 1) > 1 and a not in used)
                used.update(found[name])
            while found[name] and size % math.prod(sizes[axis] for axis in found[name]):
                found[name] = found[name][:-1]
    return found


def _spec(axes: LogicalAxes, named: dict[str, tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(named.get(name) or None if name is not None else None for name in axes))
