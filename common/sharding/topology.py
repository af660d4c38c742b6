"""Accelerators that are not here: devices to compile for, and the compilation itself.

A topology is named `<kind>:<shape>`: `v5e:4x4`, `v5p:4x4x4`, `v6e:2x4` (a TPU slice, chips along
each dimension), `h100:8` (GPUs of one host, or `h100:2x8`: two hosts) or `cpu:8` (virtual devices
of this process). Its devices compile programs and report their memory; they run nothing.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from common.errors import UserError, nearest
from common.sharding.accelerators import Accelerator, accelerator

TPU_KINDS = ("v4", "v5e", "v5p", "v6e")
GPU_KINDS = ("h100",)

# What the compiler must know of a GPU (NVIDIA H100 SXM data sheet, CUDA compute capability 9.0).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as given.
      platform: "tpu", "cuda" or "cpu".
      accelerator: their capacities; None for CPUs.
      devices: one per chip (GPU, virtual CPU).
    """

    name: str
    platform: str
    accelerator: Accelerator | None
    devices: tuple[jax.Device, ...]


def topology(name: str) -> Topology:
    """Returns the devices of a topology's name.

    Raises:
      UserError: an unknown kind, a shape that does not exist, or a compiler that is not installed.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    kinds = (*TPU_KINDS, *GPU_KINDS, "cpu")
    if not match:
        raise UserError(f"a topology is <kind>:<shape>, as v5e:4x4, h100:8 or cpu:8; not '{name}'")
    kind, shape = match[1], tuple(int(size) for size in match[2].split("x"))
    if kind not in kinds:
        raise UserError(f"unknown accelerator '{kind}'{nearest(kind, kinds)}")
    if math.prod(shape) < 1:
        raise UserError(f"topology '{name}' has no device")
    if kind == "cpu":
        return Topology(name, "cpu", None, _cpus(math.prod(shape)))
    platform = "tpu" if kind in TPU_KINDS else "cuda"
    devices = _tpus(kind, shape) if platform == "tpu" else _gpus(shape)
    return Topology(name, platform, accelerator(kind), devices)


def compile_for(
    where: Topology,
    function: Any,
    *arguments: Any,
    donate_argnums: int | Sequence[int] = (),
    out_shardings: Any = None,
) -> jax.stages.Compiled:
    """Compiles `function` for a topology.

    Args:
      where: the topology.
      function: a callable, jitted or not.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings on the topology's devices.
      donate_argnums, out_shardings: for a function that is not jitted yet.
    """
    if not hasattr(function, "trace"):
        shardings = {} if out_shardings is None else {"out_shardings": out_shardings}
        function = jax.jit(function, donate_argnums=donate_argnums, **shardings)
    lowered = function.trace(*arguments).lower(lowering_platforms=(where.platform,))
    return compile_lowered(where, lowered)


def compile_lowered(
    where: Topology, lowered: jax.stages.Lowered, *, quick: bool = False
) -> jax.stages.Compiled:
    """Compiles what has been lowered for the platform of a topology.

    Args:
      where: the topology.
      lowered: the program.
      quick: spend a fifth of the time on a TPU's program: same shardings and memory within some
        percent, slower code.
    """
    # Without the device nothing can be timed, so nothing is tuned; and what the cache of compiled
    # programs would give back cannot be loaded.
    options = {"xla_gpu_autotune_level": 0} if where.platform == "cuda" else None
    settings: dict[str, Any] = {}
    if where.platform != "cpu":
        settings["jax_persistent_cache_min_compile_time_secs"] = math.inf
    if quick and hasattr(jax.config, "jax_exec_time_optimization_effort"):
        settings["jax_exec_time_optimization_effort"] = -1.0
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        return lowered.compile(compiler_options=options)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _cpus(count: int) -> tuple[jax.Device, ...]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"cpu:{count} needs {count} virtual devices, here are {len(devices)}: set "
            f"JAX_NUM_CPU_DEVICES={count}"
        )
    return tuple(devices[:count])


def _tpus(kind: str, shape: tuple[int, ...]) -> tuple[jax.Device, ...]:
    # Without these the compiler looks for the metadata server of a TPU host, for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # A compiler takes no chip for itself: several processes may hold one.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {}
    if kind in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # one device a chip, as its users know it
    hosts = {"v4": (2, 2, 1), "v5p": (2, 2, 1)}.get(kind, (2, 2))
    if len(shape) != len(hosts):
        raise UserError(f"a {kind} topology has {len(hosts)} dimensions, as {_example(kind)}")
    if math.prod(shape) < math.prod(hosts):
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    return _described("tpu", f"{kind}:{'x'.join(map(str, shape))}", kind, shape, options)


def _gpus(shape: tuple[int, ...]) -> tuple[jax.Device, ...]:
    hosts, count = (1, *shape) if len(shape) == 1 else shape
    options = {"topology": f"1x{hosts}x{count}", "target_config": _H100}
    return _described("cuda", "h100", "h100", shape, options)


def _described(
    platform: str, name: str, kind: str, shape: tuple[int, ...], options: dict[str, Any]
) -> tuple[jax.Device, ...]:
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(platform=platform, topology_name=name, **options)
    except Exception as error:  # of many kinds: the plugins raise their own
        text = " ".join(str(error).split())
        if "not found" in text.lower() or isinstance(error, (ImportError, KeyError)):
            extra = (
                "pip install 'jax[tpu]'"
                if platform == "tpu"
                else (
                    "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, of jax's own version"
                )
            )
            raise UserError(f"the compiler for {kind} is not installed: {extra}") from error
        size = "x".join(map(str, shape))
        raise UserError(
            f"no topology {kind}:{size}, as {_example(kind)} is one: {text[:200]}"
        ) from error
    return tuple(description.devices)


def _example(kind: str) -> str:
    return {"v4": "v4:4x4x4", "v5p": "v5p:4x4x4", "h100": "h100:8"}.get(kind, f"{kind}:4x4")
