"""Block sizes per device and shape: small JSON tables beside the kernels, filled on real devices.

A table `<kernel>/tuning.json` is a list of entries

    {"device": "h200", "kernel": "forward", "dtype": "bfloat16", "shape": {"D": 2560, "L": 8192},
     "blocks": {"channels": 128, "chunk": 64}, "microseconds": 71.0}

The entry of the same device, kernel and dtype whose shape is nearest (in ratio) is taken. Without
one, a kernel takes its own default. `python -m benchmarks.tune` measures and writes them.
"""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

# A shape further away than this ratio, in all its dimensions together, says nothing.
_FARTHEST = math.log(16.0)


def blocks(
    folder: Path, kernel: str, dtype: Any, shape: Mapping[str, int], default: Mapping[str, int]
) -> dict[str, int]:
    """Returns block sizes for a kernel.

    Args:
      folder: where `tuning.json` lies.
      kernel: name within the table ("forward").
      dtype: of the main operand.
      shape: the dimensions that matter, by name.
      default: what to take where the table is silent; its keys are the block names.
    """
    device = _device()
    best, distance = {}, _FARTHEST
    for entry in table(folder):
        if (entry["device"], entry["kernel"], entry["dtype"]) != (device, kernel, _name(dtype)):
            continue
        if entry["shape"].keys() != shape.keys():
            continue
        far = sum(abs(math.log(entry["shape"][n] / size)) for n, size in shape.items())
        if far <= distance:
            best, distance = entry["blocks"], far
    return {name: int(best.get(name, value)) for name, value in default.items()}


@functools.cache
def table(folder: Path) -> tuple[dict[str, Any], ...]:
    """Returns the entries of a folder's table; none if there is no table."""
    path = folder / "tuning.json"
    return tuple(json.loads(path.read_text())) if path.exists() else ()


def device_name(device: jax.Device) -> str:
    """Returns the name under which a device's measurements are kept: "h200", "tpu v5 lite"."""
    kind = device.device_kind.lower()
    for name in ("h200", "h100", "a100", "b200"):
        if name in kind:
            return name
    return kind


def _device() -> str:
    return device_name(jax.devices()[0])


def _name(dtype: Any) -> str:
    return jax.numpy.dtype(dtype).name
