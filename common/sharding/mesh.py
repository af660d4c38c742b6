"""The device mesh: its four named axes and how their sizes come from a config.

`data` repeats the model and may cross slow links, `fsdp` shards parameters over the batch's
devices, `tensor` splits single matrices, `context` splits long sequences. An axis of size 1 costs
nothing, so every program carries all four.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, which takes the devices that are left.

    Attributes:
      data, fsdp, tensor, context: the sizes.
      most_fsdp: how many devices `fsdp=-1` takes at the most; `data` takes the rest. Parameters in
        very small parts are slow to gather: below a tile of memory, a TPU adds up zeros instead.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    most_fsdp: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return (self.data, self.fsdp, self.tensor, self.context)


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh of `config` over `devices` (all devices of all processes if None).

    Devices of several TPU slices are laid out so that only `data` crosses from slice to slice.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _resolve(config or MeshConfig(), len(devices))
    slices = len({_slice_index(d) for d in devices})
    types = (AxisType.Auto,) * len(MESH_AXES)
    # An axis may be a part of an axis of the torus where whole ones do not multiply to its size.
    split = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, **split)
        return Mesh(np.asarray(grid), MESH_AXES, axis_types=types)
    if shape[0] % slices:
        raise UserError(
            f"mesh axis data={shape[0]} must be a multiple of the {slices} slices: only data may "
            "cross from slice to slice"
        )
    within = (shape[0] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), **split)
    return Mesh(np.asarray(grid), MESH_AXES, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of input arrays [B, ...]: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Returns which of a batch's rows this process's devices hold, ascending, int64 [N].

    They need not lie together, nor be this process's alone: where `tensor` or `context` crosses
    processes, several of them hold the same rows.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    blocks = sorted({index[0].indices(rows) for index in indices})
    return np.concatenate([np.arange(*block) for block in blocks])


def place_rows(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a batch onto the mesh, its rows divided as `batch_sharding` says.

    Args:
      mesh: over the devices of all processes.
      batch: arrays `[N, ...]`, the rows that `local_rows` names.

    Returns:
      Arrays `[B, ...]`, B the rows of all processes.

    Raises:
      UserError: the rows do not divide among the devices.
    """
    sharding, shards = batch_sharding(mesh), batch_shards(mesh)
    held = local_rows(mesh, shards)  # Numbers of the shards, as if each were one row.
    block, rest = divmod(len(next(iter(batch.values()))), len(held))
    if rest:
        raise UserError(
            f"a batch of {block * len(held) + rest} rows does not divide among {len(held)} devices"
        )
    if sharding.is_fully_addressable:
        return jax.device_put(dict(batch), sharding)

    def place(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            first = np.searchsorted(held, (index[0].start or 0) // block) * block
            return array[first : first + block]

        shape = (block * shards, *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: place(np.asarray(array)) for name, array in batch.items()}


def _resolve(config: MeshConfig, count: int) -> tuple[int, ...]:
    sizes = _bounded(config, count).sizes
    given = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh sizes must be positive, at most one of them -1; got {given}")
    known = math.prod(size for size in sizes if size != -1)
    shape = tuple(count // known if size == -1 else size for size in sizes)
    if math.prod(shape) != count:
        raise UserError(
            f"mesh {given} does not fit {count} device(s): "
            + ("they do not divide evenly" if -1 in sizes else f"the sizes multiply to {known}")
        )
    return shape


def _bounded(config: MeshConfig, count: int) -> MeshConfig:
    """Returns the sizes with what `most_fsdp` keeps from `fsdp` given to `data`."""
    most = config.most_fsdp
    if most is None or config.fsdp != -1:
        return config
    if most < 1:
        raise UserError(f"mesh.most_fsdp must be positive, not {most}")
    if min(config.data, config.tensor, config.context) < 1:
        return config  # Told as it is.
    left, rest = divmod(count, config.data * config.tensor * config.context)
    if rest or not left:
        return config
    fsdp = max(n for n in range(1, min(most, left) + 1) if left % n == 0)
    return dataclasses.replace(config, data=config.data * (left // fsdp), fsdp=fsdp)


def _slice_index(device: jax.Device) -> int:
    # Only TPU devices that know of several slices carry the attribute.
    return getattr(device, "slice_index", 0) or 0
